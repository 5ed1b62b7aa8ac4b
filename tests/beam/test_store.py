"""Pipelines that fill and read a store, with NumPy stand-ins for examples and models."""

import dataclasses
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pytest

from tests.factories import WEIGHTS, ArraySource, LinearExtractor
from tests.storage.test_factor_store import IDS, assert_same, describe, read
from tracin_transforms.beam.extract import ExtractFactors, Extraction, SharedExtractor
from tracin_transforms.beam.self_influence import ScoreSelfInfluence, ScoreStored
from tracin_transforms.beam.store import ReadFactors, WriteFactors
from tracin_transforms.core.errors import ExampleError, InputError
from tracin_transforms.core.factors import concatenate_blocks
from tracin_transforms.core.protocols import BadExample
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.results import read_result, write_self_influence

N = 60
EXTRACTOR = LinearExtractor()


@dataclass(frozen=True)
class FaultySource(ArraySource):
    """Every tenth example cannot be read."""

    def read(self, shard, batch_size):
        for batch in super().read(shard, batch_size):
            bad = (shard.start + batch.indices) % 10 == 9
            yield dataclasses.replace(
                batch.rows(~bad),
                bad=tuple(
                    BadExample(str(name), shard.name, int(index), "it is broken")
                    for name, index in zip(batch.example_ids[bad], batch.indices[bad], strict=True)
                ),
            )


@dataclass(frozen=True)
class FaultyExtractor(LinearExtractor):
    """Refuses every tenth example, the fifth first; runs out of memory at one, if told to."""

    exhausted: bool = False

    def extract(self, batch):
        if self.exhausted:
            raise MemoryError("not even one example at a time has room")
        for last in "5", "7":
            rows = [i for i, name in enumerate(batch.example_ids) if name.endswith(last)]
            if rows:
                raise ExampleError([(i, "it is odd") for i in rows])
        return super().extract(batch)


def _notes(tmp_path):
    notes = JobNotes(tmp_path / "notes")
    notes.create()
    return notes


def _store(tmp_path, source):
    shards = tuple(dataclasses.replace(s, size=10) for s in source.shards())
    wanted = dataclasses.replace(describe(), shards=shards)
    return FactorStore.prepare(tmp_path / "store", wanted)


def _fill(tmp_path, source, extractor=EXTRACTOR, **more):
    store = _store(tmp_path, source)
    extraction = Extraction(source, SharedExtractor(extractor), 7, _notes(tmp_path), **more)
    write = WriteFactors(extraction, IDS, store, "float32")
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        _ = pipeline | beam.Create(store.description.shards) | write
    return store


def _expected(source):
    return concatenate_blocks(
        [EXTRACTOR.extract(b) for shard in source.shards() for b in source.read(shard, 1000)]
    )


@pytest.mark.parametrize("shards", [1, 4])
def test_a_store_gives_the_blocks_that_were_computed(tmp_path, shards):
    source = ArraySource(N, shards)
    store = _fill(tmp_path, source)
    assert store.finish()["examples"] == N
    assert JobNotes(tmp_path / "notes").shards_stored() == shards
    expected = _expected(source)
    found = concatenate_blocks([read(store, shard.name) for shard in source.shards()])
    assert_same(found, expected, rtol=0)


@pytest.mark.parametrize("ids", [IDS, IDS[1:]])
def test_self_influence_from_a_store_is_that_from_examples(tmp_path, ids):
    source = ArraySource(N, 4)
    store = _fill(tmp_path, source)
    names = [shard.name for shard in source.shards()]
    weights = WEIGHTS[: len(ids)]
    rankings = []
    for directory, build in {
        "sidecars": lambda p, d: p | beam.Create(names) | ScoreStored(store, ids, weights, d),
        "factors": lambda p, d: (
            p | beam.Create(names) | ReadFactors(store, ids) | ScoreSelfInfluence(weights, d)
        ),
    }.items():
        (tmp_path / directory).mkdir()
        with beam.Pipeline(runner="FnApiRunner") as pipeline:
            build(pipeline, tmp_path / directory)
        write_self_influence(tmp_path / directory, tmp_path / directory, N, 0)
        rankings.append(read_result(tmp_path / directory, "self_influence"))
    for name in ("example_id", "label", "prediction", "loss"):
        assert rankings[0][name].to_pylist() == rankings[1][name].to_pylist()
    for name in ("self_influence", "per_checkpoint"):
        found, expected = (np.array(ranking[name].to_pylist()) for ranking in rankings)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_examples_that_cannot_be_used_are_left_out_and_named(tmp_path):
    source = FaultySource(N, 4)
    store = _fill(tmp_path, source, FaultyExtractor(), max_bad_examples=18)
    assert store.finish() | {"bytes": 0} == {"examples": 42, "skipped": 18, "bytes": 0}
    bad = [example for sidecar in store.stored().values() for example in sidecar.bad]
    assert {example.example_id for example in bad} == {
        f"z{i:05d}" for i in range(N) if i % 10 in (5, 7, 9)
    }
    places = {s.name: s.start for s in source.shards()}
    assert all(int(b.example_id[1:]) == places[b.shard] + b.index for b in bad)
    assert {b.error for b in bad} >= {"it is odd", "it is broken"}
    keep = np.array([i for i in range(N) if i % 10 not in (5, 7, 9)])
    found = concatenate_blocks([read(store, shard.name) for shard in source.shards()])
    np.testing.assert_array_equal(
        found.example_ids, np.array([f"z{i:05d}" for i in range(N)])[keep]
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {},
            "'z00005' of shard 'shard-0', index 5: it is odd; --max-bad-examples N leaves out",
        ),
        ({"max_bad_examples": 17}, "18 examples cannot be used, --max-bad-examples allows 17"),
        (
            {"max_bad_examples": 17, "bad_before": 10},
            "1[89] examples cannot be used, --max-bad-examples allows 17",
        ),
    ],
)
def test_too_many_of_them_end_the_job(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        _fill(tmp_path, FaultySource(N, 1), FaultyExtractor(), **more)


def test_memory_that_runs_out_names_the_shard(tmp_path):
    with pytest.raises(InputError, match="shard 'shard-0': out of memory .*smaller --batch-size"):
        _fill(tmp_path, ArraySource(N, 2), FaultyExtractor(exhausted=True))


@dataclass(frozen=True)
class ShortSource(ArraySource):
    """Gives fewer examples than it says."""

    def read(self, shard, batch_size):
        yield from list(super().read(shard, batch_size))[:-1]


def test_a_shard_that_lost_examples_is_noticed(tmp_path):
    with pytest.raises(InputError, match="shard 'shard-0' has 28 examples, expected 30"):
        _fill(tmp_path, ShortSource(N, 2))


@dataclass(frozen=True)
class FailingSource(ArraySource):
    """Fails in the second shard."""

    error: type[Exception] = ValueError

    def read(self, shard, batch_size):
        if shard.name == "shard-1":
            raise self.error("no luck")
        yield from super().read(shard, batch_size)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError, InputError, "shard 'shard-1' cannot be read: no luck"),
        (ValueError, RuntimeError, "shard 'shard-1' cannot be read: ValueError: no luck"),
        (InputError, InputError, "^no luck"),
    ],
)
def test_what_goes_wrong_in_reading_names_the_shard(tmp_path, error, raised, message):
    with pytest.raises(raised, match=message):
        _fill(tmp_path, FailingSource(N, 3, error=error))


def test_a_complete_shard_is_left_alone(tmp_path):
    """As when another run, or the same one a second time, comes to it."""
    source = ArraySource(N, 4)
    store = _fill(tmp_path, source)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store" / "factors").iterdir()}
    gone = store.paths("shard-2")
    gone.sidecar.unlink()
    _fill(tmp_path, source)
    changed = [p for p, then in before.items() if p.stat().st_mtime_ns != then]
    assert changed == [gone.factors]


def test_bad_examples_are_counted_only_with_notes():
    with pytest.raises(ValueError, match="max_bad_examples needs notes"):
        Extraction(ArraySource(1, 1), SharedExtractor(EXTRACTOR), 1, None, 5)


def test_what_processes_note(tmp_path):
    notes = _notes(tmp_path)
    first = [BadExample("x", "a", 3, "bad"), BadExample("y", "a", 5, "bad")]
    assert notes.bad(first) == 2
    # A shard that is begun again notes the same once more.
    assert notes.bad(first) == 2
    assert notes.bad([BadExample("z", "b", 1, "bad")]) == 3
    assert [example.example_id for example in notes.all_bad()] == ["x", "y", "z"]
    for shard in ("a", "b", "a"):
        with notes.running(shard):
            assert [running.shard for running in notes.all_running()] == [shard]
    assert notes.all_running() == []
    assert notes.repeated() == 1


def test_ids_that_occur_twice_are_noticed(tmp_path):
    notes = _notes(tmp_path)
    notes.finished("a", 0, 2, np.array(["x", "y"]))
    notes.finished("b-1", 7, 2, np.array(["z", "ä"]))
    # A block that is done again is the same block.
    notes.finished("a", 0, 2, np.array(["x", "y"]))
    notes.check_unique()
    assert notes.examples() == 4
    notes.finished("c", 5, 2, np.array(["new", "z"]))
    with pytest.raises(
        InputError,
        match="1 example ids occur more than once, first in shard 'b-1', in the block that begins "
        "at example 7, and in shard 'c', at 5",
    ):
        notes.check_unique()


def test_blocks_are_extracted_as_before(tmp_path):
    """A source with bad examples and room for them, in the pipeline without a store."""
    extraction = Extraction(
        FaultySource(N, 4), SharedExtractor(EXTRACTOR), 7, _notes(tmp_path), max_bad_examples=6
    )
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        blocks = pipeline | beam.Create(extraction.source.shards()) | ExtractFactors(extraction)
        _ = blocks | ScoreSelfInfluence(WEIGHTS, tmp_path)
    assert len(write_self_influence(tmp_path, tmp_path, 54, 54)) == 54
    assert extraction.notes.examples() == 54
