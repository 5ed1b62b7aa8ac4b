"""Pairs of a shortlist, scored with stored factors: against all pairs, scored at once."""

from dataclasses import replace

import numpy as np
import pytest

from tests.core.test_ranking import assert_same
from tests.factories import WEIGHTS, random_block, ranked, split
from tests.storage.test_shard_scan import IDS, THREADS, stored
from tracin_transforms.core import top_scan
from tracin_transforms.core.influence import pair_influence
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences
from tracin_transforms.core.top_scan import TopScan
from tracin_transforms.storage.rescoring import Shortlist, rescore_shard
from tracin_transforms.storage.results import write_influence

K = 4


@pytest.fixture
def block():
    return random_block(np.random.default_rng(0), 300)


@pytest.fixture
def queries():
    # Ids that are not in the order of their rows.
    block = random_block(np.random.default_rng(1), 7, "q")
    return replace(block, example_ids=block.example_ids[np.array([3, 0, 6, 1, 5, 2, 4])])


def _write(directory, block, queries, pairs):
    """Writes chosen pairs as a first stage does, with influences that are far off."""
    rng = np.random.default_rng(2)
    rows, columns = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
    found = InfluenceRows(
        query_rows=columns,
        example_ids=block.example_ids[rows],
        labels=block.labels[rows],
        predictions=block.predictions[rows, -1],
        parts=rng.standard_normal((len(rows), 3, 1)),
    )
    top = TopInfluences.empty(queries, len(rows)).with_rows(found)
    write_influence(directory, top, queries)


def _rescored(directory, shards, queries):
    shortlist = Shortlist.read(directory, queries)
    prepared = Queries.prepare(queries, WEIGHTS)
    scan = TopScan(prepared, K, THREADS)
    for shard in shards:
        rescore_shard(shard, IDS, scan, shortlist)
    top = scan.top()
    assert top.pairs == len(shortlist)
    return top


@pytest.mark.parametrize("at_once", [2**16, 50])
def test_a_shortlist_of_all_pairs_gives_the_exact_ranking(
    tmp_path, block, queries, monkeypatch, at_once
):
    for limit in ("_PAIRS", "_NEW_PAIRS"):
        monkeypatch.setattr(top_scan, limit, at_once)
    shards = stored(tmp_path, split(block, 3), "float32")
    every = [(row, column) for row in range(len(block)) for column in range(len(queries))]
    _write(tmp_path, block, queries, every)
    assert_same(_rescored(tmp_path, shards, queries), ranked([block], queries, K))


def test_only_pairs_of_the_shortlist_are_ranked(tmp_path, block, queries):
    rng = np.random.default_rng(3)
    pairs = [(i, j) for i in range(300) for j in range(6) if rng.random() < 0.03]
    shards = stored(tmp_path, split(block, 3), "float32")
    _write(tmp_path, block, queries, pairs)
    found = _rescored(tmp_path, shards, queries)
    rows, columns = (np.array(side) for side in zip(*pairs, strict=True))
    exact = pair_influence(block, queries, WEIGHTS, rows, columns).sum(axis=(1, 2))
    for j in range(7):
        mine = [(exact[p], block.example_ids[i]) for p, (i, of) in enumerate(pairs) if of == j]
        for ends, sign in ((found.proponents, 1), (found.opponents, -1)):
            at = ends.query_rows == j
            expected = sorted((-sign * score, name) for score, name in mine if sign * score > 0)[:K]
            assert ends.example_ids[at].tolist() == [name for _, name in expected]
            np.testing.assert_array_equal(ends.influence[at], [-sign * s for s, _ in expected])


def test_record_batches_without_an_example_of_it_are_not_read(tmp_path, queries):
    block = random_block(np.random.default_rng(4), 5000)
    (shard,) = stored(tmp_path, [block])
    batches = shard.sidecar.file.batches
    assert len(batches) > 2
    names = shard.rows.example_ids[shard.sidecar.file.rows_of(1)][:2]
    pairs = [(int(name[1:]), column) for name in names for column in (0, 5)]
    _write(tmp_path, block, queries, pairs)
    expected = _rescored(tmp_path, [shard], queries)
    assert expected.pairs == 4
    for batch in (batches[0], *batches[2:]):
        with shard.paths.factors.open("r+b") as file:
            file.seek(batch.start + 64)
            file.write(b"\xff" * (batch.size - 128))
    assert_same(_rescored(tmp_path, [shard], queries), expected)


def test_an_empty_shortlist(tmp_path, block, queries):
    shards = stored(tmp_path, [block])
    write_influence(tmp_path, TopInfluences.empty(queries, K), queries)
    found = _rescored(tmp_path, shards, queries)
    assert len(found.proponents) == len(found.opponents) == 0
