import itertools

import numpy as np
import pytest

from tests.core.test_ranking import assert_same
from tests.factories import WEIGHTS, random_block, ranked, split
from tracin_transforms.core import threads, top_scan
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.influence import pair_influence
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import Piece, TopScan


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
    top = ranked(split(block, pieces), queries, k)

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
        top = ranked(split(block, pieces), queries, 5)
        for (query, name), ids in expected.items():
            end = getattr(top, name)
            assert end.example_ids[end.query_rows == query].tolist() == ids


def test_a_query_without_gradient_has_neither_proponents_nor_opponents():
    rng = np.random.default_rng(2)
    block, queries = random_block(rng, 50), random_block(rng, 2, "q")
    for gradient in queries.gradients:
        gradient.layers[0].error_signals[0] = 0
    top = ranked([block], queries, 4)

    assert top.proponents.query_rows.tolist() == [1] * 4
    assert top.opponents.query_rows.tolist() == [1] * 4


@pytest.mark.parametrize("exponent", [-10, -70, -90])
def test_influence_below_the_range_of_float32_is_ranked(exponent):
    """Of queries, and training examples, that are all but perfectly fitted."""
    rng = np.random.default_rng(3)
    block, queries = random_block(rng, 200), random_block(rng, 3, "q")
    expected = ranked([block], queries, 5)
    scales = [np.full(side.losses.shape, 2.0**exponent) for side in (block, queries)]
    block, queries = block.scaled(scales[0]), queries.scaled(scales[1])
    top = ranked([block.rows(slice(0, 80)), block.rows(slice(80, None))], queries, 5)
    for found, exact in (
        (top.proponents, expected.proponents),
        (top.opponents, expected.opponents),
    ):
        np.testing.assert_array_equal(found.example_ids, exact.example_ids)
        np.testing.assert_allclose(found.parts, exact.parts * 4.0**exponent, rtol=1e-5)


@pytest.mark.parametrize("few", [0, 100], ids=["one by one", "one ahead"])
def test_threads_and_lag_change_nothing(few, monkeypatch):
    """Blocks are scored while those before are seen to, or not, and held for longer or not."""
    monkeypatch.setattr(top_scan, "_FEW_SHARE", few)
    monkeypatch.setattr(threads, "_FEWEST_OPERATIONS", 0)
    rng = np.random.default_rng(5)
    block, queries = random_block(rng, 900), random_block(rng, 6, "q")
    expected = ranked([block], queries, 7)
    for held in (0, 10**9):
        monkeypatch.setattr(top_scan, "_HELD_BYTES", held)
        scan = TopScan(Queries.prepare(queries, WEIGHTS), 7, Threads(2))
        for part in split(block, 60):
            scan.add(part)
        assert_same(scan.top(), expected)
        assert scan.top().pairs == 900 * 6


def test_only_the_pieces_asked_for_are_scored():
    rng = np.random.default_rng(6)
    block, queries = random_block(rng, 100), random_block(rng, 4, "q")
    scan = TopScan(Queries.prepare(queries, WEIGHTS), 5, Threads(1))
    rows, columns = np.array([3, 50, 7]), np.array([1, 3])
    scan.add(block, [Piece(slice(20, 60), columns), Piece(rows, np.array([0]))])
    top = scan.top()
    assert top.pairs == 40 * 2 + 3
    for query, some in ((0, rows), (1, np.arange(20, 60)), (3, np.arange(20, 60))):
        expected = _reference(block.rows(some), queries, 5)
        mine = top.proponents.query_rows == query
        assert top.proponents.example_ids[mine].tolist() == expected[query, "proponents"]
    assert 2 not in top.proponents.query_rows


@pytest.mark.parametrize("layers", [{}, {"layers": 2}, {"positions": 3}], ids=str)
def test_pairs_are_scored_one_by_one(layers):
    rng = np.random.default_rng(8)
    block, queries = random_block(rng, 100, **layers), random_block(rng, 4, "q", **layers)
    rows, columns = np.nonzero(rng.random((100, 4)) < 0.3)
    half = len(rows) // 2
    exact = pair_influence(block, queries, WEIGHTS, rows, columns).sum(axis=(1, 2))
    scans = [TopScan(Queries.prepare(queries, WEIGHTS), 5, Threads(2)) for _ in range(2)]
    scans[0].add(block, [Piece(rows[:half], columns[:half], is_paired=True)])
    scans[0].add(block, [Piece(rows[half:], columns[half:], is_paired=True)])
    scans[1].add_pairs(block, rows[:half], columns[:half])
    scans[1].add_pairs(block, rows[half:], columns[half:])
    for scan in scans:
        top = scan.top()
        assert top.pairs == len(rows)
        for query in range(4):
            mine = np.flatnonzero((columns == query) & (exact > 0))
            best = mine[np.argsort(-exact[mine])][:5]
            at = top.proponents.query_rows == query
            assert top.proponents.example_ids[at].tolist() == (
                block.example_ids[rows[best]].tolist()
            )
            np.testing.assert_array_equal(top.proponents.influence[at], exact[best])


def test_a_pair_beyond_float32_names_the_example():
    rng = np.random.default_rng(7)
    block, queries = random_block(rng, 50), random_block(rng, 3, "q")
    for gradient in block.gradients:
        gradient.layers[0].activations[17] = 1e30
        gradient.layers[0].error_signals[17] = 1e30
    scan = TopScan(Queries.prepare(queries, WEIGHTS), 5, Threads(1))
    some = Piece(np.array([3, 17, 17]), np.array([0, 0, 2]), is_paired=True)
    with pytest.raises(InputError, match="'z00017' has an influence beyond the range of float32"):
        scan.add(block, [some])


def test_an_influence_beyond_float32_names_the_example():
    rng = np.random.default_rng(7)
    block, queries = random_block(rng, 50), random_block(rng, 3, "q")
    for gradient in block.gradients:
        gradient.layers[0].activations[17] = 1e30
        gradient.layers[0].error_signals[17] = 1e30
    scan = TopScan(Queries.prepare(queries, WEIGHTS), 5, Threads(1))
    with pytest.raises(InputError, match="'z00017' has an influence beyond the range of float32"):
        scan.add(block)
