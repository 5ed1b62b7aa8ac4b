import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import WEIGHTS, random_block, split
from tracin_transforms.core.influence import pair_influence
from tracin_transforms.core.ranking import (
    InfluenceRows,
    TopInfluences,
    merge_block,
)

QUERY_IDS = np.array(["q0", "q1", "q2"])


def assert_same(a: TopInfluences, b: TopInfluences) -> None:
    assert a.k == b.k
    for end in ("proponents", "opponents"):
        x, y = getattr(a, end), getattr(b, end)
        np.testing.assert_array_equal(x.query_rows, y.query_rows)
        np.testing.assert_array_equal(x.example_ids, y.example_ids)
        np.testing.assert_array_equal(x.labels, y.labels)
        np.testing.assert_array_equal(x.parts, y.parts)


def _top(rows: list[tuple[int, int, int]], k: int) -> TopInfluences:
    """Ranks (query, example, score) triples, in one piece."""
    queries, examples, scores = (
        (np.array(c) for c in zip(*rows, strict=True)) if rows else ([],) * 3
    )
    pairs = InfluenceRows(
        query_rows=np.array(queries, dtype=np.int64),
        example_ids=np.array([f"z{e:03d}" for e in examples], dtype="U4"),
        labels=np.array(examples, dtype=np.int32),
        predictions=np.array(examples, dtype=np.int32),
        parts=np.array(scores, dtype=np.float64).reshape(-1, 1, 1),
    )
    everything = TopInfluences(QUERY_IDS, k, pairs, pairs)
    return everything.merge(_none(k))


def _none(k: int, query_ids: np.ndarray = QUERY_IDS) -> TopInfluences:
    none = InfluenceRows(
        query_rows=np.empty(0, dtype=np.int64),
        example_ids=np.empty(0, dtype="U1"),
        labels=np.empty(0, dtype=np.int32),
        predictions=np.empty(0, dtype=np.int32),
        parts=np.empty((0, 1, 1)),
    )
    return TopInfluences(query_ids, k, none, none)


# Few different scores, so that ties are common; each (query, example) at most once.
triples = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(-2, 2)),
    max_size=40,
    unique_by=lambda row: row[:2],
)


@given(triples, st.integers(1, 5), st.data())
@settings(deadline=None)
def test_merge_laws(rows, k, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), min_size=2, max_size=2)))
    a, b, c = (
        _top(part, k) for part in (rows[: cuts[0]], rows[cuts[0] : cuts[1]], rows[cuts[1] :])
    )
    whole = _top(rows, k)

    assert_same(a.merge(b).merge(c), whole)
    assert_same(a.merge(b.merge(c)), whole)
    assert_same(c.merge(a).merge(b), whole)
    assert_same(whole.merge(_none(k)), whole)


@given(triples, st.integers(1, 5))
@settings(deadline=None)
def test_order_is_by_score_and_then_by_id(rows, k):
    top = _top(rows, k)

    for query in range(3):
        own = [(score, f"z{e:03d}") for q, e, score in rows if q == query]
        proponents = sorted((-score, name) for score, name in own if score > 0)[:k]
        opponents = sorted((score, name) for score, name in own if score < 0)[:k]
        for end, expected in ((top.proponents, proponents), (top.opponents, opponents)):
            mine = end.query_rows == query
            assert end.example_ids[mine].tolist() == [name for _, name in expected]


def test_merging_other_queries_is_refused():
    top = _none(2)
    with pytest.raises(ValueError, match="same queries and the same k"):
        top.merge(_none(3))
    with pytest.raises(ValueError, match="same queries and the same k"):
        top.merge(_none(2, np.array(["q0", "q1", "other"])))


def _reference(block, queries, k):
    """All pairs in float64, sorted in full."""
    rows, columns = (i.ravel() for i in np.indices((len(block), len(queries))))
    scores = pair_influence(block, queries, WEIGHTS, rows, columns).sum(axis=1)
    scores = scores.reshape(len(block), len(queries))
    ends = {}
    for query, name in itertools.product(range(len(queries)), ("proponents", "opponents")):
        signed = scores[:, query] if name == "proponents" else -scores[:, query]
        order = [i for i in np.lexsort((block.example_ids, -signed)) if signed[i] > 0][:k]
        ends[query, name] = block.example_ids[order].tolist()
    return ends


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_blocks_merged_equal_the_full_sort(k, pieces):
    rng = np.random.default_rng(0)
    block, queries = random_block(rng, 700), random_block(rng, 5, "q")
    top = TopInfluences.empty(queries, k)
    for part in split(block, pieces):
        top = merge_block(top, part, queries, WEIGHTS)

    for (query, name), expected in _reference(block, queries, k).items():
        end = getattr(top, name)
        assert end.example_ids[end.query_rows == query].tolist() == expected


def test_scores_closer_than_float32_can_tell_are_ordered_exactly():
    """Ten rows whose scores differ by less than float32 rounding, in any block size."""
    rng = np.random.default_rng(1)
    block, queries = random_block(rng, 400), random_block(rng, 3, "q")
    for gradient in block.gradients:
        layer = gradient.layers[0]
        for row in range(1, 10):
            layer.activations[row] = layer.activations[0]
            layer.error_signals[row] = np.nextafter(
                layer.error_signals[row - 1], np.float32(np.inf)
            )
    expected = _reference(block, queries, 5)
    for pieces in (1, 13, 400):
        top = TopInfluences.empty(queries, 5)
        for part in split(block, pieces):
            top = merge_block(top, part, queries, WEIGHTS)
        for (query, name), ids in expected.items():
            end = getattr(top, name)
            assert end.example_ids[end.query_rows == query].tolist() == ids


def test_a_query_without_gradient_has_neither_proponents_nor_opponents():
    rng = np.random.default_rng(2)
    block, queries = random_block(rng, 50), random_block(rng, 2, "q")
    for gradient in queries.gradients:
        gradient.layers[0].error_signals[0] = 0
    top = merge_block(TopInfluences.empty(queries, 4), block, queries, WEIGHTS)

    assert top.proponents.query_rows.tolist() == [1] * 4
    assert top.opponents.query_rows.tolist() == [1] * 4


@pytest.mark.parametrize("exponent", [-10, -70, -90])
def test_influence_below_the_range_of_float32_is_ranked(exponent):
    """Of queries, and training examples, that are all but perfectly fitted."""
    rng = np.random.default_rng(3)
    block, queries = random_block(rng, 200), random_block(rng, 3, "q")
    expected = merge_block(TopInfluences.empty(queries, 5), block, queries, WEIGHTS)
    scales = [np.full(len(side), 2.0**exponent) for side in (block, queries)]
    block, queries = block.scaled(scales[0]), queries.scaled(scales[1])
    top = TopInfluences.empty(queries, 5)
    for rows in (slice(0, 80), slice(80, None)):
        top = merge_block(top, block.rows(rows), queries, WEIGHTS)
    for found, exact in (
        (top.proponents, expected.proponents),
        (top.opponents, expected.opponents),
    ):
        np.testing.assert_array_equal(found.example_ids, exact.example_ids)
        np.testing.assert_allclose(found.parts, exact.parts * 4.0**exponent, rtol=1e-5)
