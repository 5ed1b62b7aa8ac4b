"""Pairs that are likely to be strong, against estimates of all pairs."""

import numpy as np
import pytest

from tests.storage.test_shard_scan import THREADS, WEIGHTS, of_classes
from tracin_transforms.core import likely_pairs
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.likely_pairs import LikelyPairs
from tracin_transforms.core.peaks import Peaks
from tracin_transforms.core.queries import Queries


def _largest_four(layer):
    """Error signals times the norms of their gradients' other factor, all but four set to 0."""
    e = layer.error_signals.astype(np.float64)
    h = layer.activations.astype(np.float64)
    others = np.argsort(np.abs(e), axis=1)[:, :-4]
    np.put_along_axis(e, others, 0, axis=1)
    return e * np.sqrt((h**2).sum(axis=1, keepdims=True) + 1)


def _estimates(block: FactorBlock, queries: FactorBlock) -> np.ndarray:
    return sum(
        weight * _largest_four(one.layers[0]) @ _largest_four(other.layers[0]).T
        for weight, one, other in zip(WEIGHTS, block.gradients, queries.gradients, strict=True)
    )


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """However few rows there are."""
    monkeypatch.setattr(likely_pairs, "_MOST_SHARE", np.inf)


@pytest.fixture(scope="module")
def block():
    return of_classes(np.random.default_rng(0), 600)


@pytest.fixture(scope="module")
def queries():
    return of_classes(np.random.default_rng(1), 9, prefix="q")


def _likely(queries, k, shards):
    return LikelyPairs(Queries.prepare(queries, WEIGHTS), k, shards, THREADS)


@pytest.mark.parametrize("at_once", [2**20, 100])
@pytest.mark.parametrize(("k", "shards", "lots"), [(1, 2, 1), (5, 2, 5), (5, 100, 1), (7, 3, 5)])
def test_the_strongest_of_each_lot_by_estimates(
    block, queries, k, shards, lots, at_once, monkeypatch
):
    monkeypatch.setattr(likely_pairs, "_ESTIMATES", at_once)
    rows, columns = _likely(queries, k, shards).of(Peaks.of_block(block))
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert len(found) == len(rows)
    assert (np.diff(rows) >= 0).all()
    estimates = _estimates(block, queries)
    assert len(found) <= 2 * lots * len(queries)
    for first in range(lots):
        lot = np.arange(first, len(block), lots)
        for column in range(len(queries)):
            mine = [row for row, of in found if of == column and row % lots == first]
            for sign in (1, -1):
                best = (sign * estimates[lot, column]).max()
                assert (sign * estimates[mine, column]).max() == pytest.approx(best, rel=1e-4)


def test_more_than_there_are(block, queries):
    rows, columns = _likely(queries, 700, 1).of(Peaks.of_block(block))
    assert len(rows) == len(block) * len(queries)
    assert np.bincount(columns).tolist() == [len(block)] * len(queries)


def test_few_rows_have_none(block, queries, monkeypatch):
    monkeypatch.setattr(likely_pairs, "_MOST_SHARE", 0.05)
    likely, peaks = _likely(queries, 1, 2), Peaks.of_block(block)
    assert [len(side) for side in likely.of(peaks)] == [0, 0]
    many = peaks.take(np.arange(4000) % len(block))
    rows, _ = likely.of(many)
    assert 0 < len(rows) <= 2 * len(queries)


def test_a_shard_without_rows_and_queries_without_peaks(queries):
    likely = _likely(queries, 5, 1)
    assert likely.are_known
    assert [len(side) for side in likely.of(Peaks.none(0, 3))] == [0, 0]
    few = of_classes(np.random.default_rng(2), 4, classes=5)
    assert not _likely(few, 5, 1).are_known
