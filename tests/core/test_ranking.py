import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracin_transforms.core.ranking import InfluenceRows, TopInfluences

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
    # What is in both counts once.
    assert_same(whole.merge(b), whole)
    assert_same(a.merge(b).merge(b.merge(c)), whole)


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
