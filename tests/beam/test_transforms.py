import pickle

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.util import assert_that

from tests.factories import WEIGHTS, ArraySource, LinearExtractor, ranked
from tracin_transforms.beam.extract import ExtractFactors, Extraction, SharedExtractor
from tracin_transforms.beam.influence import Question, ScoreInfluence, WriteInfluence, _MergeTop
from tracin_transforms.beam.self_influence import ScoreSelfInfluence
from tracin_transforms.core.factors import concatenate_blocks
from tracin_transforms.core.influence import self_influence
from tracin_transforms.storage.factor_file import write_factor_block
from tracin_transforms.storage.job_notes import JobNotes
from tracin_transforms.storage.results import read_result, write_self_influence

N, K = 150, 5
EXTRACTOR = LinearExtractor()
PROCESSES = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def _all_factors(source):
    return concatenate_blocks(
        [EXTRACTOR.extract(b) for shard in source.shards() for b in source.read(shard, 1000)]
    )


def _run(transform, source, block_rows, beam_args=()):
    options = PipelineOptions(["--runner=FnApiRunner", *beam_args])
    extract = ExtractFactors(Extraction(source, SharedExtractor(EXTRACTOR), block_rows))
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(source.shards()) | extract | transform


@pytest.fixture
def queries(tmp_path):
    block = _all_factors(ArraySource(6, 1, seed=9, prefix="q"))
    write_factor_block(tmp_path / "queries.npz", block)
    return block


CASES = [(1, 1000, ()), (2, 7, ()), (7, 32, ()), (150, 1, ()), (7, 32, PROCESSES)]


@pytest.mark.parametrize(("shards", "block_rows", "beam_args"), CASES)
def test_influence_equals_the_direct_computation(tmp_path, queries, shards, block_rows, beam_args):
    source = ArraySource(N, shards)
    expected = ranked([_all_factors(source)], queries, K)
    path = tmp_path / "queries.npz"
    (tmp_path / "out").mkdir()
    question = Question(path, WEIGHTS, K)
    steps = _Chain(ScoreInfluence(question), WriteInfluence(question, tmp_path / "out"))
    _run(steps, source, block_rows, beam_args)

    found = read_result(tmp_path / "out", "influence")
    for direction, rows in (("proponent", expected.proponents), ("opponent", expected.opponents)):
        mine = [row for row in found.to_pylist() if row["direction"] == direction]
        assert [row["example_id"] for row in mine] == rows.example_ids.tolist()
        assert [row["query_id"] for row in mine] == queries.example_ids[rows.query_rows].tolist()
        np.testing.assert_allclose([r["influence"] for r in mine], rows.influence, rtol=1e-12)
        np.testing.assert_allclose(
            [r["per_checkpoint"] for r in mine], rows.parts.sum(axis=2), rtol=1e-12
        )


@pytest.mark.parametrize(("shards", "block_rows", "beam_args"), CASES)
def test_self_influence_equals_the_direct_computation(tmp_path, shards, block_rows, beam_args):
    source = ArraySource(N, shards)
    block = _all_factors(source)
    expected = dict(
        zip(block.example_ids, self_influence(block, WEIGHTS).sum(axis=(1, 2)), strict=True)
    )
    _run(ScoreSelfInfluence(WEIGHTS, tmp_path), source, block_rows, beam_args)

    rows = write_self_influence(tmp_path, tmp_path, N, N)
    assert [row["example_id"] for row in rows] == sorted(expected, key=lambda i: -expected[i])
    np.testing.assert_allclose(
        [row["self_influence"] for row in rows],
        [expected[row["example_id"]] for row in rows],
        rtol=1e-12,
    )


def test_a_removed_shard_removes_its_examples_and_changes_nothing_else(tmp_path):
    source = ArraySource(N, 7)
    _run(ScoreSelfInfluence(WEIGHTS, tmp_path), source, 32)
    everything = write_self_influence(tmp_path, tmp_path, N, N)
    gone = source.shards()[3]
    for file in tmp_path.glob(f"scores-{gone.name}-*"):
        file.unlink()
    rest = write_self_influence(tmp_path, tmp_path, N - gone.count, N)

    removed = {f"z{i:05d}" for i in range(gone.start, gone.start + gone.count)}
    kept = [row for row in everything if row["example_id"] not in removed]
    assert [row["example_id"] for row in rest] == [row["example_id"] for row in kept]
    assert [row["self_influence"] for row in rest] == [row["self_influence"] for row in kept]


def test_blocks_are_no_larger_than_asked_for_and_noted(tmp_path):
    def check(blocks):
        assert sorted(len(block) for block in blocks) == [15, 15, 60, 60]

    notes = JobNotes(tmp_path)
    notes.create()
    source = ArraySource(N, 2)
    extract = ExtractFactors(Extraction(source, SharedExtractor(EXTRACTOR), 60, notes))
    with beam.Pipeline(runner="FnApiRunner") as pipeline:
        assert_that(pipeline | beam.Create(source.shards()) | extract, check)
    assert notes.examples() == N
    assert notes.all_running() == []
    assert sorted(file.name for file in (tmp_path / "blocks").iterdir()) == [
        "shard-0-000000000000-60",
        "shard-0-000000000060-15",
        "shard-1-000000000000-60",
        "shard-1-000000000060-15",
    ]


def test_transforms_are_small_when_pickled(tmp_path):
    for transform in (
        ExtractFactors(Extraction(ArraySource(10**6, 1000), SharedExtractor(EXTRACTOR), 2048)),
        ScoreSelfInfluence(WEIGHTS, tmp_path),
        ScoreInfluence(Question(tmp_path / "queries.npz", WEIGHTS, 20)),
    ):
        assert len(pickle.dumps(transform)) < 10_000


def test_merging_tops_without_a_pipeline(queries):
    combine = _MergeTop()
    block = _all_factors(ArraySource(N, 1))
    parts = [ranked([block.rows(rows)], queries, K) for rows in np.array_split(np.arange(N), 4)]
    empty = combine.create_accumulator()
    first = combine.add_input(combine.add_input(empty, parts[0]), parts[1])
    second = combine.add_input(combine.add_input(empty, parts[3]), parts[2])
    merged = combine.extract_output(combine.merge_accumulators([empty, second, empty, first]))
    whole = ranked([block], queries, K)

    assert merged.proponents.example_ids.tolist() == whole.proponents.example_ids.tolist()
    assert merged.opponents.example_ids.tolist() == whole.opponents.example_ids.tolist()
    assert combine.merge_accumulators([empty, empty]) is None


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"block_rows is {size}"):
        Extraction(ArraySource(1, 1), SharedExtractor(EXTRACTOR), size)
    with pytest.raises(ValueError, match=f"k is {size}"):
        Question(tmp_path, WEIGHTS, size)


class _Chain(beam.PTransform):
    def __init__(self, *steps):
        super().__init__()
        self._steps = steps

    def expand(self, collection):
        for step in self._steps:
            collection = collection | step
        return collection
