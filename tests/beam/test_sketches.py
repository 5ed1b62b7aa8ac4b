"""A store of sketches, filled, asked, and its shortlist scored again; with NumPy stand-ins."""

from dataclasses import replace

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from tests.factories import CLASSES, WEIGHTS, ArraySource, LinearExtractor, ranked
from tests.storage.test_factor_store import IDS, assert_same, read
from tests.storage.test_sketch_store import described
from tracin_transforms.beam.extract import Extraction, SharedExtractor
from tracin_transforms.beam.influence import (
    Question,
    RescoreShortlist,
    ScoreStoredInfluence,
    WriteInfluence,
    read_pairs,
)
from tracin_transforms.beam.self_influence import ScoreStored
from tracin_transforms.beam.store import WriteFactors
from tracin_transforms.core.factors import concatenate_blocks
from tracin_transforms.core.influence import self_influence
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.factor_file import write_factor_block
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.rescoring import lacking
from tracin_transforms.storage.results import read_result, write_self_influence

N, QUERIES, K = 150, 6, 5
SKETCH = Sketch("activations", CLASSES + 2)
EXTRACTOR = LinearExtractor()
PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def _run(build, beam_args=()):
    options = PipelineOptions(["--runner=FnApiRunner", *beam_args])
    with beam.Pipeline(options=options) as pipeline:
        build(pipeline)


def _filled(directory, sketch, shards, n=N):
    source = ArraySource(n, shards)
    of_source = tuple(replace(shard, size=10) for shard in source.shards())
    wanted = replace(described(sketch), shards=of_source)
    store = FactorStore.prepare(directory, wanted)
    extraction = Extraction(source, SharedExtractor(EXTRACTOR), 32)
    write = WriteFactors(extraction, IDS, store, "float32")
    _run(lambda pipeline: pipeline | beam.Create(of_source) | write)
    store.finish()
    return store


def _all_factors(source):
    return concatenate_blocks(
        [EXTRACTOR.extract(b) for shard in source.shards() for b in source.read(shard, 1000)]
    )


@pytest.fixture(scope="module")
def block():
    return _all_factors(ArraySource(N, 1))


@pytest.fixture(scope="module")
def queries():
    return _all_factors(ArraySource(QUERIES, 1, seed=9, prefix="q"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The sketches in other shards than the factors."""
    directory = tmp_path_factory.mktemp("stores")
    return _filled(directory / "sketches", SKETCH, 3), _filled(directory / "factors", None, 7)


def _names(store):
    return beam.Create([shard.name for shard in store.description.shards])


def _asked(directory, queries, k):
    directory.mkdir()
    write_factor_block(directory / "queries.npz", queries)
    return Question(directory / "queries.npz", WEIGHTS, k)


def _first(directory, store, queries, k, prune=True, beam_args=()):
    """Writes a result by sketches."""
    question = _asked(directory, SKETCH.project(queries), k)
    score = ScoreStoredInfluence(question, store, IDS, prune)
    write = WriteInfluence(question, directory)
    _run(lambda pipeline: pipeline | _names(store) | score | write, beam_args)


def _again(directory, store, queries, shortlist, beam_args=(), notes=None):
    question = _asked(directory, queries, K)
    score = RescoreShortlist(question, store, IDS, shortlist, notes)
    write = WriteInfluence(question, directory)
    _run(lambda pipeline: pipeline | _names(store) | score | write, beam_args)
    return read_result(directory, "influence").to_pylist()


def _assert_is(rows, top, queries):
    for direction, expected in (("proponent", top.proponents), ("opponent", top.opponents)):
        mine = [row for row in rows if row["direction"] == direction]
        assert [row["example_id"] for row in mine] == expected.example_ids.tolist()
        ids = queries.example_ids[expected.query_rows].tolist()
        assert [row["query_id"] for row in mine] == ids
        found = [row["influence"] for row in mine]
        np.testing.assert_allclose(found, expected.influence, rtol=1e-12)


def test_a_worker_projects_what_it_stores(stores):
    sketches, _ = stores
    found = concatenate_blocks([read(sketches, s.name) for s in sketches.description.shards])
    expected = SKETCH.project(_all_factors(ArraySource(N, 3)))
    assert_same(found, expected, rtol=1e-4)
    assert found.gradients[0].layers[0].activations.shape == (N, 2)


@pytest.mark.parametrize("prune", [True, False])
def test_influence_by_sketches_is_that_of_projected_blocks(tmp_path, stores, queries, prune):
    sketches, _ = stores
    _first(tmp_path / "first", sketches, queries, K, prune)
    blocks = [read(sketches, shard.name) for shard in sketches.description.shards]
    rows = read_result(tmp_path / "first", "influence").to_pylist()
    _assert_is(rows, ranked(blocks, SKETCH.project(queries), K), queries)


@pytest.mark.parametrize("beam_args", [(), PROCESSES], ids=["in process", "two processes"])
def test_a_shortlist_of_all_gives_exact_influence(tmp_path, stores, block, queries, beam_args):
    sketches, factors = stores
    notes = JobNotes(tmp_path / "notes")
    notes.create()
    _first(tmp_path / "first", sketches, queries, N, beam_args=beam_args)
    rows = _again(tmp_path / "again", factors, queries, tmp_path / "first", beam_args, notes)
    _assert_is(rows, ranked([block], queries, K), queries)
    assert read_pairs(tmp_path / "again") == N * QUERIES
    assert notes.examples() == N


def test_a_shortlist_of_some_gives_the_strongest_of_them(tmp_path, stores, block, queries):
    sketches, factors = stores
    _first(tmp_path / "first", sketches, queries, 12)
    rows = _again(tmp_path / "again", factors, queries, tmp_path / "first")
    listed = read_result(tmp_path / "first", "influence").to_pylist()
    assert read_pairs(tmp_path / "again") == len(listed) <= 2 * 12 * QUERIES
    for q in range(QUERIES):
        name = str(queries.example_ids[q])
        mine = {row["example_id"] for row in listed if row["query_id"] == name}
        some = block.rows(np.isin(block.example_ids, list(mine)))
        expected = ranked([some], queries.rows(np.array([q])), K)
        _assert_is([row for row in rows if row["query_id"] == name], expected, queries.rows([q]))


def test_self_influence_of_sketches_is_that_of_the_gradients(tmp_path, stores, block):
    sketches, _ = stores
    _run(lambda p: p | _names(sketches) | ScoreStored(sketches, IDS, WEIGHTS, tmp_path))
    rows = write_self_influence(tmp_path, tmp_path, N, N)
    own = self_influence(block, WEIGHTS).sum(axis=(1, 2))
    order = np.argsort(-own)
    assert [row["example_id"] for row in rows] == block.example_ids[order].tolist()
    np.testing.assert_allclose([row["self_influence"] for row in rows], own[order], rtol=1e-6)


def test_examples_that_a_store_lacks_are_found(tmp_path, stores, queries):
    sketches, _ = stores
    fewer = _filled(tmp_path / "fewer", None, 2, n=100)
    _first(tmp_path / "first", sketches, queries, N)
    _again(tmp_path / "again", fewer, queries, tmp_path / "first")
    assert read_pairs(tmp_path / "again") == 100 * QUERIES
    ids = np.array([f"z{i:05d}" for i in range(N)])
    assert lacking(fewer, ids).tolist() == ids[100:].tolist()
