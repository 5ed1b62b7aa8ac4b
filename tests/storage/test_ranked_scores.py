"""The merge of sorted files against one sort of all rows in Python."""

import contextlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bucket import emulated_bucket
from tracin_transforms.core.errors import InputError
from tracin_transforms.storage import ranked_scores, results
from tracin_transforms.storage.columns import as_column
from tracin_transforms.storage.files import any_path
from tracin_transforms.storage.ranked_scores import ranked, write_ranked
from tracin_transforms.storage.results import read_result, write_self_influence

# Bytes that hold but one row.
ONE_ROW = 1


@pytest.fixture
def sizes(monkeypatch):
    """Sets the bytes of a chunk and the number of files that are merged at once."""

    def set_sizes(chunk, fan_in):
        monkeypatch.setattr(ranked_scores, "_CHUNK", chunk)
        monkeypatch.setattr(ranked_scores, "_FAN_IN", fan_in)
        monkeypatch.setattr(ranked_scores, "_POOL", 2 * chunk * fan_in)

    return set_sizes


def _scores(n, kind="ties", seed=0):
    """Returns self-influences, shape [n]."""
    rng = np.random.default_rng(seed)
    return {
        "ties": rng.integers(0, 5, n) / 4,
        "equal": np.zeros(n),
        "random": rng.gamma(0.5, 1.0, n),
        "falling": np.arange(n, 0, -1.0),
        "rising": np.arange(n) / 1.0,
    }[kind]


def _table(scores, label_shape=(), layers=1, seed=1):
    """Returns rows as `write_scores` has them, with ids of one to four bytes a character."""
    rng = np.random.default_rng(seed)
    n = len(scores)
    ids = [f"{'aZé雪😀'[i % 5]}{i:06d}" for i in rng.permutation(n)]
    columns = {
        "example_id": pa.array(ids, pa.string()),
        "label": as_column(rng.integers(0, 9, (n, *label_shape))),
        "self_influence": pa.array(scores),
        "per_checkpoint": as_column(rng.random((n, 3))),
    }
    if layers > 1:
        parts = [as_column(rng.random((n, 3))) for _ in range(layers)]
        columns["per_layer"] = pa.StructArray.from_arrays(parts, [f"d{i}" for i in range(layers)])
    return pa.table(columns)


def _write(directory, table, files, seed=2):
    """Writes rows to files at random, which leaves some files without a row."""
    of_row = np.random.default_rng(seed).integers(0, max(1, files - 1), len(table))
    return _write_at(directory, table, of_row, files)


def _write_at(directory, table, of_row, files):
    paths = [directory / f"scores-{file:05d}.arrow" for file in range(files)]
    for file, path in enumerate(paths):
        write_ranked(path, table.take(pa.array(np.flatnonzero(of_row == file))))
    return paths


def _in_order(table):
    return sorted(table.to_pylist(), key=lambda row: (-row["self_influence"], row["example_id"]))


def _rows(pieces):
    return [row for piece in pieces for row in piece.to_pylist()]


@pytest.mark.parametrize("kind", ["ties", "equal", "random"])
@pytest.mark.parametrize("chunk", [ONE_ROW, 500, 2**15])
@pytest.mark.parametrize(("files", "fan_in"), [(1, 128), (2, 128), (7, 128), (7, 6), (7, 2)])
def test_a_merge_equals_one_sort(tmp_path, sizes, kind, chunk, files, fan_in):
    sizes(chunk, fan_in)
    table = _table(_scores(200, kind))
    paths = _write(tmp_path, table, files)
    assert _rows(ranked(paths, tmp_path)) == _in_order(table)


@pytest.mark.parametrize(("n", "fan_in"), [(3000, 128), (3000, 1000), (300, 10)])
def test_a_merge_of_a_thousand_files_equals_one_sort(tmp_path, sizes, n, fan_in):
    sizes(200, fan_in)
    table = _table(_scores(n))
    paths = _write(tmp_path, table, 1000)
    assert _rows(ranked(paths, tmp_path)) == _in_order(table)


@pytest.mark.parametrize(("label_shape", "layers"), [((2,), 1), ((), 3), ((2, 2), 2), ((0,), 1)])
@pytest.mark.parametrize("chunk", [ONE_ROW, 2**15])
def test_lists_and_structs_come_back_as_they_were(tmp_path, sizes, label_shape, layers, chunk):
    sizes(chunk, 3)
    table = _table(_scores(60), label_shape, layers)
    pieces = list(ranked(_write(tmp_path, table, 5), tmp_path))
    assert _rows(pieces) == _in_order(table)
    assert {piece.schema for piece in pieces} == {table.schema}


@pytest.mark.parametrize("files", [0, 1, 5])
def test_files_without_rows_give_none(tmp_path, sizes, files):
    sizes(ONE_ROW, 3)
    paths = [tmp_path / f"scores-{file}.arrow" for file in range(files)]
    for path in paths:
        write_ranked(path, _table(np.zeros(0)))
    assert _rows(ranked(paths, tmp_path)) == []


class _Counted:
    """Counts the rows that were read and did not leave their merge, and the files open."""

    def __init__(self, monkeypatch):
        self.held = self.most_held = self.open = self.most_open = self.largest_chunk = 0
        self._chunks, self._merge = ranked_scores._chunks, ranked_scores._merge
        monkeypatch.setattr(ranked_scores, "_chunks", self.chunks)
        monkeypatch.setattr(ranked_scores, "_merge", self.merge)

    def chunks(self, file):
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        with contextlib.closing(self._chunks(file)) as chunks:
            for chunk in chunks:
                self.held += len(chunk)
                self.most_held = max(self.most_held, self.held)
                self.largest_chunk = max(self.largest_chunk, len(chunk))
                yield chunk
        self.open -= 1

    def merge(self, files):
        for piece in self._merge(files):
            yield piece
            self.held -= len(piece)


@pytest.mark.parametrize("kind", ["ties", "equal", "random", "falling", "rising"])
@pytest.mark.parametrize("of_row", ["blocks", "in turn"])
@pytest.mark.parametrize("files", [10, 25])
def test_rows_held_at_once_do_not_grow_with_their_number(
    tmp_path, monkeypatch, sizes, kind, of_row, files
):
    n, rows_of_chunk, fan_in = 20_000, 20, 10
    table = _table(_scores(n, kind))
    sizes(table.nbytes * rows_of_chunk // n, fan_in)
    places = np.arange(n)
    paths = _write_at(
        tmp_path, table, places * files // n if of_row == "blocks" else places % files, files
    )
    counted = _Counted(monkeypatch)
    pieces = [len(piece) for piece in ranked(paths, tmp_path)]

    pool = 2 * fan_in * rows_of_chunk
    assert sum(pieces) == n
    assert counted.held == counted.open == 0
    assert counted.most_open <= fan_in
    assert counted.largest_chunk <= 1.1 * rows_of_chunk
    assert counted.most_held <= 1.1 * (pool + rows_of_chunk)
    # Pieces large enough that the number of times that something is sorted is small, too.
    assert min(pieces[:-1]) >= 0.9 * pool / 2


@pytest.mark.parametrize("rows_per_file", [1, 7, 50, 100])
def test_the_ranking_is_cut_into_files(tmp_path, monkeypatch, sizes, rows_per_file):
    sizes(300, 3)
    monkeypatch.setattr(results, "_ROWS_PER_FILE", rows_per_file)
    table = _table(_scores(100), label_shape=(2,))
    _write(tmp_path, table, 5)
    first = write_self_influence(tmp_path, tmp_path, 100, 60)

    expected = [{"rank": i + 1, **row} for i, row in enumerate(_in_order(table))]
    assert first == expected[:60]
    assert read_result(tmp_path, "self_influence").to_pylist() == expected
    files = sorted(tmp_path.glob("self_influence-*"))
    count = -(-100 // rows_per_file)
    assert [file.name for file in files] == [
        f"self_influence-{i:05d}-of-{count:05d}.parquet" for i in range(count)
    ]
    assert {pq.read_metadata(file).num_rows for file in files[:-1]} <= {rows_per_file}


def test_a_damaged_file_is_named(tmp_path):
    paths = _write(tmp_path, _table(_scores(50)), 2)
    paths[0].write_bytes(paths[0].read_bytes()[:1500])
    with pytest.raises(InputError, match="scores-00000.arrow' cannot be read"):
        write_self_influence(tmp_path, tmp_path, 50, 1)


def test_files_of_an_object_store_are_merged_there(tmp_path, monkeypatch, sizes):
    sizes(300, 2)
    table = _table(_scores(60))
    with emulated_bucket() as bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.address)
        work = any_path(f"{bucket.uri}/work")
        paths = _write(work, table, 4)
        assert _rows(ranked(paths, work)) == _in_order(table)
        assert (work / "merged-000000.arrow").is_file()
