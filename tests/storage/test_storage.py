import contextlib
import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.factories import WEIGHTS, random_block, ranked, split
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.influence import self_influence
from tracin_transforms.storage.checkpoint_series import (
    read_checkpoint_series,
    write_checkpoint_series,
)
from tracin_transforms.storage.columns import as_strings
from tracin_transforms.storage.factor_file import read_factor_block, write_factor_block
from tracin_transforms.storage.files import (
    StagedDirectory,
    existing_file,
    local_path,
    mark,
    sha256,
    written_atomically,
)
from tracin_transforms.storage.manifest import is_finished, read_manifest, write_manifest
from tracin_transforms.storage.results import (
    read_result,
    write_influence,
    write_scores,
    write_self_influence,
)


def _fail_halfway(path):
    with written_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk full")


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk full"):
        _fail_halfway(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_published_directory_replaces_the_old_one(tmp_path):
    output = tmp_path / "out"
    previous = []
    for content in ("first", "second"):
        staged = StagedDirectory(output)
        (staged.create() / "file").write_text(content)
        previous.append(staged.publish("manifest.json"))
        staged.discard()
    assert (output / "file").read_text() == "second"
    assert previous[0] is None
    assert (previous[1] / "file").read_text() == "first"
    assert set(tmp_path.iterdir()) == {output, previous[1]}


def test_a_refused_write_is_an_error_for_the_user(tmp_path):
    for write in (lambda path: _write_text(path), mark):
        with pytest.raises(InputError, match="cannot be written: .*No such file"):
            write(tmp_path / "gone" / "file")


def _write_text(path):
    with written_atomically(path) as temporary:
        temporary.write_text("text")


def test_a_directory_that_cannot_be_moved_stays(tmp_path):
    """Renaming onto a file fails: what was staged and what was there are both kept."""
    staged = StagedDirectory(tmp_path / "out")
    (staged.create() / "file").write_text("new")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    staged.path.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        staged.publish("manifest.json")
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_discarding_wins_against_threads_that_still_write(tmp_path):
    """As those of an interrupted pipeline: whatever they do, nothing is left."""
    staged = StagedDirectory(tmp_path / "out")
    directory = staged.create()
    stop = threading.Event()

    def write():
        i = 0
        while not stop.is_set():
            i += 1
            with contextlib.suppress(InputError):
                mark(directory / str(i))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    staged.discard()
    stop.set()
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match=r"'gs://bucket/x': expected a local path"):
        local_path("gs://bucket/x")
    with pytest.raises(InputError, match=r"model '.*nothing' does not exist: expected a file"):
        existing_file(tmp_path / "nothing", "model")
    with pytest.raises(InputError, match="is a directory: expected a file"):
        existing_file(tmp_path, "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        StagedDirectory(tmp_path / "file" / "output").create()


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


RUN = {"command": "influence", "k": 20, "checkpoints": [{"id": "a", "weight": 0.1}, {"id": "b"}]}


def _finished(output, run=RUN):
    output.mkdir()
    (output / "influence-00000-of-00001.parquet").write_text("")
    write_manifest(output, run, {"examples": 3})


def test_manifest_says_whether_the_run_is_the_same(tmp_path):
    output = tmp_path / "out"
    assert not is_finished(output, RUN)
    output.mkdir()
    assert not is_finished(output, RUN)
    output.rmdir()
    _finished(output)

    assert is_finished(output, {**RUN, "checkpoints": tuple(RUN["checkpoints"])})
    assert read_manifest(output)["summary"] == {"examples": 3}
    assert read_manifest(output)["files"] == ["influence-00000-of-00001.parquet"]
    assert read_manifest(output)["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 10}, "another run: k is 20 there and 10 here.*--overwrite"),
        ({"x": 1}, "x is null there and 1 here"),
        (
            {"checkpoints": [{"id": "a", "weight": 0.2}, {"id": "c"}]},
            r"checkpoints\[0\].weight is 0.1 there and 0.2 here; checkpoints\[1\].id is \"b\"",
        ),
        ({"checkpoints": [{"id": "a"}]}, "checkpoints is .* there and .* here"),
    ],
)
def test_what_differs_is_said(tmp_path, change, message):
    _finished(tmp_path / "out")
    with pytest.raises(InputError, match=message):
        is_finished(tmp_path / "out", {**RUN, **change})
    assert not is_finished(tmp_path / "out", {**RUN, **change}, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_outputs_that_are_not_ours_are_refused(tmp_path, overwrite):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no result"):
        is_finished(tmp_path, RUN, overwrite)
    with pytest.raises(InputError, match="is a file: expected a directory"):
        is_finished(tmp_path / "notes.txt", RUN, overwrite)
    with pytest.raises(InputError, match="'/' is a mount point"):
        is_finished(Path("/"), RUN, overwrite)
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        is_finished(tmp_path, RUN, overwrite)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="not a manifest of format 1"):
        is_finished(tmp_path, RUN, overwrite)


def test_only_a_result_of_the_same_command_is_overwritten(tmp_path):
    output = tmp_path / "out"
    _finished(output)
    assert not is_finished(output, RUN, overwrite=True)
    with pytest.raises(InputError, match="a result of 'influence', not of 'demo'"):
        is_finished(output, {**RUN, "command": "demo"}, overwrite=True)
    (output / "below").mkdir()
    (output / "below" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'below/notes\.txt', which is no part of the result"):
        is_finished(output, RUN, overwrite=True)


def test_a_result_that_lacks_a_file_is_not_finished(tmp_path):
    _finished(tmp_path / "out")
    (tmp_path / "out" / "influence-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"without its file 'influence-.*--overwrite"):
        is_finished(tmp_path / "out", RUN)
    assert not is_finished(tmp_path / "out", RUN, overwrite=True)


SERIES = CheckpointSeries(
    (Checkpoint("epoch-1", "one.keras", 0.1, 10, 1, 0.5),),
    "sparse_categorical_crossentropy",
    True,
    32,
    "sgd",
)


def test_checkpoint_series_round_trip(tmp_path):
    (tmp_path / "one.keras").write_text("model")
    write_checkpoint_series(tmp_path, SERIES)
    series = read_checkpoint_series(tmp_path)

    assert series.checkpoints[0].path == str(tmp_path / "one.keras")
    assert series.optimizer == "sgd"
    assert json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"][0]["path"] == (
        "one.keras"
    )


def test_runs_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoints\.json.*CheckpointRecorder"):
        read_checkpoint_series(tmp_path)
    write_checkpoint_series(tmp_path, SERIES)
    with pytest.raises(InputError, match="checkpoint 'epoch-1': file .*one.keras' does not exist"):
        read_checkpoint_series(tmp_path)
    (tmp_path / "checkpoints.json").write_text("{]")
    with pytest.raises(InputError, match=r"checkpoints\.json' is not JSON"):
        read_checkpoint_series(tmp_path)
    (tmp_path / "checkpoints.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match=r"checkpoints\.json': field 'loss' is missing"):
        read_checkpoint_series(tmp_path)


def test_factor_block_round_trip(tmp_path):
    block = random_block(np.random.default_rng(0), 5, layers=2)
    renamed = dataclasses.replace(block.gradients[1].layers[0], name="dense_7", groups=2)
    gradient = dataclasses.replace(
        block.gradients[1], layers=(renamed, block.gradients[1].layers[1])
    )
    block = dataclasses.replace(
        block,
        indices=block.indices + 7,
        gradients=(block.gradients[0], gradient, block.gradients[2]),
    )
    write_factor_block(tmp_path / "block.npz", block)
    read = read_factor_block(tmp_path / "block.npz")

    assert read.shard == block.shard
    np.testing.assert_array_equal(read.indices, block.indices)
    assert read.checkpoint_ids == block.checkpoint_ids
    np.testing.assert_array_equal(read.labels, block.labels)
    np.testing.assert_array_equal(read.predictions, block.predictions)
    np.testing.assert_array_equal(read.example_ids, block.example_ids)
    np.testing.assert_array_equal(read.losses, block.losses)
    for a, b in zip(read.gradients, block.gradients, strict=True):
        for x, y in zip(a.layers, b.layers, strict=True):
            assert (x.name, x.has_bias, x.groups) == (y.name, y.has_bias, y.groups)
            np.testing.assert_array_equal(x.activations, y.activations)
            np.testing.assert_array_equal(x.error_signals, y.error_signals)


def _write_all(directory, blocks, expected):
    for start, block in enumerate(blocks):
        block = dataclasses.replace(block, indices=block.indices + 1000 * start)
        parts = self_influence(block, WEIGHTS)
        write_scores(directory, str(start), block, parts, block.layer_names)
    return write_self_influence(directory, directory, expected, 3)


def test_self_influence_files(tmp_path):
    block = random_block(np.random.default_rng(1), 20)
    first = _write_all(tmp_path, split(block, 3), 20)
    own = self_influence(block, WEIGHTS)[..., 0]
    order = np.argsort(-own.sum(axis=1))

    table = pq.read_table(tmp_path / "self_influence-00000-of-00001.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "rank": "int64",
        "example_id": "string",
        "label": "int32",
        "prediction": "int32",
        "loss": "float",
        "self_influence": "double",
        "per_checkpoint": "list<element: double>",
    }
    assert first == table.slice(0, 3).to_pylist()
    assert table["rank"].to_pylist() == list(range(1, 21))
    assert table["example_id"].to_pylist() == block.example_ids[order].tolist()
    assert table["label"].to_pylist() == block.labels[order].tolist()
    assert table["loss"].to_pylist() == block.losses[order, -1].tolist()
    np.testing.assert_allclose(table["per_checkpoint"].to_pylist(), own[order], rtol=1e-15)
    np.testing.assert_allclose(table["self_influence"], own.sum(axis=1)[order], rtol=1e-15)


@pytest.mark.parametrize("expected", [3, 5])
def test_lost_examples_are_found_and_those_too_many(tmp_path, expected):
    block = random_block(np.random.default_rng(2), 4)
    with pytest.raises(RuntimeError, match=f"4 of {expected} examples were scored"):
        _write_all(tmp_path, split(block, 2), expected)


def test_equal_self_influence_is_ordered_by_id(tmp_path):
    block = random_block(np.random.default_rng(1), 6)
    ids = np.array(["b", "d", "a", "é", "c", "Z"])
    parts = np.reshape([1.0, 2.0, 1.0, 1.0, 2.0, 1.0], (6, 1, 1))
    renamed = dataclasses.replace(block, example_ids=ids)
    write_scores(tmp_path, "all", renamed, parts, block.layer_names)
    ranking = write_self_influence(tmp_path, tmp_path, 6, 6)
    assert [row["example_id"] for row in ranking] == ["c", "d", "Z", "a", "b", "é"]


def test_influence_files(tmp_path):
    rng = np.random.default_rng(3)
    block, queries = random_block(rng, 30), random_block(rng, 3, "q")
    top = ranked([block], queries, 4)
    write_influence(tmp_path, top, queries)

    table = read_result(tmp_path, "influence")
    assert {field.name: str(field.type) for field in table.schema} == {
        "query_id": "string",
        "query_label": "int32",
        "query_prediction": "int32",
        "direction": "string",
        "rank": "int32",
        "example_id": "string",
        "label": "int32",
        "prediction": "int32",
        "influence": "double",
        "per_checkpoint": "list<element: double>",
    }
    rows = table.to_pylist()
    assert [(r["query_id"], r["direction"], r["rank"]) for r in rows] == [
        (query, direction, rank)
        for query in queries.example_ids
        for direction in ("proponent", "opponent")
        for rank in (1, 2, 3, 4)
    ]
    assert [r["example_id"] for r in rows[:4]] == top.proponents.example_ids[:4].tolist()
    assert all(r["influence"] == pytest.approx(sum(r["per_checkpoint"])) for r in rows)
    assert all((r["influence"] > 0) == (r["direction"] == "proponent") for r in rows)
    assert rows[-1]["query_label"] == queries.labels[2]


def test_several_layers_have_their_parts_shown(tmp_path):
    rng = np.random.default_rng(4)
    block, queries = random_block(rng, 30, layers=2), random_block(rng, 3, "q", layers=2)
    top = ranked([block], queries, 4)
    write_influence(tmp_path, top, queries)
    for row in read_result(tmp_path, "influence").to_pylist():
        assert list(row["per_layer"]) == ["dense-0", "dense-1"]
        assert row["influence"] == pytest.approx(sum(row["per_layer"].values()))

    _write_all(tmp_path, split(block, 3), 30)
    own = dict(zip(block.example_ids, self_influence(block, WEIGHTS).sum(axis=1), strict=True))
    for row in read_result(tmp_path, "self_influence").to_pylist():
        np.testing.assert_allclose(list(row["per_layer"].values()), own[row["example_id"]])


def test_a_result_without_files_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no influence"):
        read_result(tmp_path, "influence")


@pytest.mark.parametrize(
    "ids",
    [["a1", "b2", "c3"], ["a", "bcd", ""], ["ä1", "b2"], ["a\0", "b2"], ["x"] * 3, []],
    ids=str,
)
def test_ids_come_back_whatever_their_length_and_letters(ids):
    column = pa.chunked_array([pa.array(ids, pa.string())])
    expected = np.array(ids, dtype=str)
    assert as_strings(column).tolist() == expected.tolist()
    sliced = pa.chunked_array([pa.array(["zz", *ids], pa.string())[1:]])
    assert as_strings(sliced).tolist() == expected.tolist()
    two = pa.chunked_array([pa.array(ids, pa.string())] * 2)
    assert as_strings(two).tolist() == [*expected.tolist()] * 2
