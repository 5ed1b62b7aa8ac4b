"""Exact pruning: whatever the rows are, the result is that of multiplying all pairs."""

import ctypes
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.test_ranking import assert_same
from tests.factories import random_block, split
from tracin_transforms.core import likely_pairs, pruning
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import pair_influence, squared_gradient_norms
from tracin_transforms.core.likely_pairs import LikelyPairs
from tracin_transforms.core.peaks import Peaks
from tracin_transforms.core.protocols import Shard
from tracin_transforms.core.pruning import Pruner, RowBounds
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import TopInfluences
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import TopScan
from tracin_transforms.storage.factor_shard import ShardPaths, StoredShard
from tracin_transforms.storage.shard_scan import scan_shard, scout_shard
from tracin_transforms.storage.shard_writer import ShardWriter

THREADS = Threads(2)
CHECKPOINTS = 3
IDS = tuple(f"epoch-{k}" for k in range(CHECKPOINTS))
WEIGHTS = np.array([0.5, 0.2, 0.1])


def stored(directory, blocks, dtype="float16"):
    """Writes each block as a shard of its own, and opens them."""
    found = []
    for i, block in enumerate(blocks):
        paths = ShardPaths(directory / f"{i}.arrow", directory / f"{i}.parquet")
        with ShardWriter(paths, Shard(f"s{i}"), dict.fromkeys(IDS, 1.0), dtype) as writer:
            for part in split(block, 3):
                writer.add(part)
            writer.finish([])
        found.append(StoredShard.open(paths, with_peaks=True))
    return found


def brute(shards, queries, k):
    scan = TopScan(queries, k, THREADS)
    for shard in shards:
        scan_shard(shard, IDS, scan)
    return scan.top()


def pruned(shards, queries, k):
    """Some pairs first, then what they leave open, as the pipeline does; a scan for each shard."""
    top = TopInfluences.empty(queries.block, k)
    likely = LikelyPairs(queries, k, len(shards), THREADS)
    for shard in shards:
        scan = TopScan(queries, k, THREADS)
        scout_shard(shard, IDS, scan, likely)
        top = top.merge(scan.top())
    thresholds = top.thresholds()
    for shard in shards:
        scan = TopScan(queries, k, THREADS, thresholds)
        pruner = Pruner(queries, scan.tile_rows, THREADS)
        scan_shard(shard, IDS, scan, pruner)
        top = top.merge(scan.top())
    return top


def assert_pruning_changes_nothing(directory, blocks, queries, k=5, weights=WEIGHTS, **options):
    shards = stored(directory, blocks, **options)
    queries = Queries.prepare(queries, weights)
    expected = brute(shards, queries, k)
    found = pruned(shards, queries, k)
    assert_same(found, expected)
    assert expected.pairs == sum(map(len, blocks)) * len(queries)
    # Likely pairs of rows with peaks are scored before the others, and with them.
    assert found.pairs <= 2 * expected.pairs
    return found.pairs / max(1, expected.pairs)


def scaled(block, factors):
    """Multiplies each row's gradients at all checkpoints."""
    return block.scaled(np.repeat(np.asarray(factors)[:, None], len(block.gradients), axis=1))


def changed(block, change):
    """Applies a change to the arrays of each layer: error signals and activations."""
    gradients = []
    for gradient in block.gradients:
        layers = []
        for layer in gradient.layers:
            e, h = change(layer.error_signals.copy(), layer.activations.copy())
            layers.append(replace(layer, error_signals=e, activations=h))
        gradients.append(replace(gradient, layers=tuple(layers)))
    return replace(block, gradients=tuple(gradients))


def heavy_tailed(rng, n, **options):
    return scaled(random_block(rng, n, **options), np.exp(2 * rng.standard_normal(n)))


def of_classes(rng, n, classes=300, prefix="z"):
    """Rows whose error is of three classes but for a little, as a trained network's is."""
    block = random_block(rng, n, prefix, classes=classes)
    right, mass = rng.integers(0, classes, n), rng.random(n)

    def change(e, h):
        e *= 0.002 * rng.random((n, 1))
        for near, share in ((0, -1), (1, 0.7), (2, 0.3)):
            e[np.arange(n), (right + near) % classes] = share * mass
        return e.astype(np.float32), np.abs(h)

    return changed(block, change)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, {"layers": 2}, {"positions": 3}, {"has_bias": False}], ids=str
)
def test_heavy_tails(tmp_path, options, dtype):
    rng = np.random.default_rng(0)
    blocks = [heavy_tailed(rng, n, prefix=f"z{n}-", **options) for n in (900, 500, 30, 1)]
    queries = random_block(rng, 7, "q", **options)
    share = assert_pruning_changes_nothing(tmp_path, blocks, queries, dtype=dtype)
    assert share < 0.5


@pytest.fixture(autouse=True)
def likely_pairs_of_few_rows(monkeypatch):
    monkeypatch.setattr(likely_pairs, "_MOST_SHARE", np.inf)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_many_classes(tmp_path, k, monkeypatch):
    """Norms alike: what is left out is left out by the largest error signals."""
    # So few numbers would rather be multiplied than told apart.
    monkeypatch.setattr(pruning, "_PIECE_COST", 0)
    rng = np.random.default_rng(1)
    blocks = [of_classes(rng, n, prefix=f"z{n}-") for n in (3000, 2500)]
    queries = of_classes(rng, 20, prefix="q")
    share = assert_pruning_changes_nothing(tmp_path, blocks, queries, k=k)
    if k == 1:
        assert share < 0.8


def test_norms_that_are_all_equal(tmp_path):
    rng = np.random.default_rng(2)

    def unit(e, h):
        return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32), np.sign(h)

    block = changed(random_block(rng, 800), unit)
    assert_pruning_changes_nothing(tmp_path, split(block, 2), random_block(rng, 5, "q"))


def test_scores_that_are_all_tied(tmp_path):
    """The order is that of the ids, wherever their rows lie."""
    rng = np.random.default_rng(3)
    block = random_block(rng, 700)
    same = changed(block, lambda e, h: (np.tile(e[:1], (700, 1)), np.tile(h[:1], (700, 1))))
    order = rng.permutation(700)
    assert_pruning_changes_nothing(tmp_path, split(same.rows(order), 3), random_block(rng, 5, "q"))


def test_rows_and_queries_without_gradient(tmp_path):
    rng = np.random.default_rng(4)
    block = scaled(heavy_tailed(rng, 600), rng.random(600) < 0.1)
    queries = scaled(random_block(rng, 6, "q"), [1, 0, 1, 0, 0, 1])
    assert_pruning_changes_nothing(tmp_path, split(block, 2), queries, k=50)
    nothing = scaled(block, np.zeros(600))
    assert_pruning_changes_nothing(tmp_path, [nothing], queries)


def test_one_giant_row(tmp_path):
    rng = np.random.default_rng(5)
    factors = np.ones(600)
    factors[123] = 1e12
    block = scaled(random_block(rng, 600), factors)
    assert_pruning_changes_nothing(tmp_path, split(block, 2), random_block(rng, 5, "q"))


def test_negative_and_zero_weights(tmp_path):
    rng = np.random.default_rng(6)
    blocks = split(heavy_tailed(rng, 900), 2)
    queries = random_block(rng, 5, "q")
    weights = np.array([1.0, -0.9, 0.0])
    assert assert_pruning_changes_nothing(tmp_path, blocks, queries, weights=weights) < 0.9


@pytest.mark.parametrize("exponent", [-70, -20, 40])
def test_gradients_near_the_ends_of_the_range(tmp_path, exponent):
    rng = np.random.default_rng(7)
    blocks = [scaled(of_classes(rng, 900), np.full(900, 2.0**exponent))]
    queries = scaled(of_classes(rng, 6, prefix="q"), np.full(6, 2.0 ** min(exponent, 0)))
    assert_pruning_changes_nothing(tmp_path, blocks, queries)


def test_rounding_to_float16_does_not_lift_a_row_above_its_bound(tmp_path):
    """All rows alike but for what float16 rounds, most of them upwards."""
    rng = np.random.default_rng(8)

    def change(e, h):
        e[:] = np.float32(1 + 2.0**-11 + 2.0**-20)
        h[:] = np.float32(1 + 2.0**-11 + 2.0**-20) * (1 + rng.integers(0, 2, (len(h), 1)) * 1e-3)
        return e, h.astype(np.float32)

    block = changed(random_block(rng, 900), change)
    queries = changed(random_block(rng, 3, "q"), lambda e, h: (np.abs(e), np.abs(h)))
    assert_pruning_changes_nothing(tmp_path, split(block, 3), queries, k=30)


@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "n": st.integers(1, 500),
            "shards": st.integers(1, 3),
            "classes": st.sampled_from([4, 300]),
            "tail": st.sampled_from([0.0, 0.5, 3.0]),
            "repeated": st.booleans(),
            "k": st.integers(1, 30),
            "weights": st.lists(st.floats(-2, 2), min_size=3, max_size=3),
            "queries": st.lists(st.sampled_from([0, 1e-20, 1, 50]), min_size=1, max_size=9),
            "dtype": st.sampled_from(["float16", "float32"]),
        }
    )
)
@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_whatever_is_drawn(tmp_path, case):
    rng, n, factors = np.random.default_rng(case["seed"]), case["n"], case["queries"]
    make = of_classes if case["classes"] == 300 else random_block
    block = scaled(make(rng, n, prefix="z"), np.exp(case["tail"] * rng.standard_normal(n)))
    if case["repeated"]:
        # Few different rows, so that ties are common.
        repeated = block.rows(rng.integers(0, n, n))
        block = replace(repeated, example_ids=block.example_ids, indices=block.indices)
    queries = scaled(make(rng, len(factors), prefix="q"), factors)
    weights = np.array(case["weights"])
    blocks = split(block, min(n, case["shards"]))
    assert_pruning_changes_nothing(
        tmp_path, blocks, queries, case["k"], weights, dtype=case["dtype"]
    )


def test_few_open_pairs_are_scored_one_by_one_and_their_rows_alone_are_looked_at(tmp_path):
    rng = np.random.default_rng(10)
    block = of_classes(rng, 4000, classes=1000)
    (shard,) = stored(tmp_path, [block])
    queries = Queries.prepare(of_classes(rng, 4, classes=1000, prefix="q"), WEIGHTS)
    expected = brute([shard], queries, 2)
    pruner = Pruner(queries, 64, THREADS)
    rows = shard.rows_of(IDS)
    bounds = RowBounds.of_stored(rows.stored_norms, rows.peaks, 2.0**-11)
    weakest = expected.thresholds()
    needed = np.minimum(weakest.proponents, weakest.opponents)
    open_rows, kinds = [], set()
    for number in range(len(shard.sidecar.file.batches)):
        at = shard.sidecar.file.rows_of(number)
        pieces = pruner.pieces(bounds.rows(at), needed)
        open_rows += [piece.places + at.start for piece in pieces]
        kinds |= {piece.is_paired for piece in pieces}
    assert True in kinds
    assert len(np.unique(np.concatenate(open_rows))) < 0.2 * 4000
    # Whatever the other rows hold, where only few of a batch are wanted.
    _spoil(shard, np.setdiff1d(np.arange(4000), np.concatenate(open_rows)))
    scan = TopScan(queries, 2, THREADS, weakest)
    scan_shard(shard, IDS, scan, pruner)
    assert_same(scan.top(), expected)
    with pytest.raises(AssertionError):
        assert_same(brute([shard], queries, 2), expected)


def _spoil(shard, rows):
    """Overwrites the numbers of some rows."""
    with pa.memory_map(str(shard.paths.factors), "r+") as mapped:
        file = pa.ipc.open_file(mapped)
        for number in range(file.num_record_batches):
            batch, at = file.get_batch(number), shard.sidecar.file.rows_of(number)
            mine = rows[(rows >= at.start) & (rows < at.stop)] - at.start
            for column in batch.columns:
                if pa.types.is_fixed_size_list(column.type):
                    address = column.values.buffers()[1].address
                    width = column.type.list_size
                    kind = ctypes.c_uint16 * (width * len(batch))
                    numbers = np.frombuffer(kind.from_address(address), np.uint16)
                    numbers.reshape(-1, width)[mine] = 0xFFFF


def test_blocks_without_a_survivor_are_not_read(tmp_path):
    rng = np.random.default_rng(9)
    factors = np.where(np.arange(5000) < 300, 1.0, 1e-6)
    (shard,) = stored(tmp_path, [scaled(random_block(rng, 5000), factors)])
    queries = Queries.prepare(random_block(rng, 3, "q"), WEIGHTS)
    expected = brute([shard], queries, 5)
    batches = shard.sidecar.file.batches
    assert len(batches) > 2
    last = batches[-1]
    with shard.paths.factors.open("r+b") as file:
        file.seek(last.start + 64)
        file.write(b"\xff" * (last.size - 128))
    assert_same(pruned([shard], queries, 5), expected)


@pytest.mark.parametrize("rounding", [0.0, 2.0**-11])
def test_bounds_hold_where_the_largest_entries_cancel(rounding):
    """Sums in float32 of what cancels in float64 all but for the last digits."""
    rng = np.random.default_rng(12)

    def signals(e, h):
        e[:] = 0
        values = rng.standard_normal((len(e), 8)).astype(np.float32)
        e[:, :8], e[:, 8:16] = values, values[:, ::-1] * np.float32(1 + 2.0**-22)
        return e, h

    def opposite(e, h):
        e[:] = 0
        values = rng.standard_normal((len(e), 8)).astype(np.float32)
        e[:, :8], e[:, 8:16] = values, -values[:, ::-1] * np.float32(1 + 2.0**-23)
        return e, h

    block = changed(random_block(rng, 300, classes=256), signals)
    queries = Queries.prepare(
        changed(random_block(rng, 20, "q", classes=256), opposite), np.array([1.0, 0, 0])
    )
    norms = np.sqrt(squared_gradient_norms(block)).astype(np.float32)
    bounds = RowBounds.of_stored(norms, Peaks.of_block(block), rounding)
    found = Pruner(queries, 64, THREADS)._bounds_by_peaks(bounds)
    rows, columns = (index.ravel() for index in np.indices(found.shape))
    exact = pair_influence(block, queries.block, queries.weights, rows, columns).sum(axis=(1, 2))
    assert (np.abs(exact) > 0).mean() > 0.5
    assert (found.ravel() >= np.abs(exact)).all()


def test_peaks_bound_what_they_stand_for():
    rng = np.random.default_rng(10)
    block = of_classes(rng, 200)
    peaks = Peaks.of_block(block)
    assert peaks.count == 16
    for k, gradient in enumerate(block.gradients):
        layer = gradient.layers[0]
        norms = np.sqrt((layer.activations.astype(np.float64) ** 2).sum(axis=1) + 1)
        kept = np.zeros_like(layer.error_signals, dtype=np.float64)
        np.put_along_axis(kept, peaks.classes[:, k], peaks.values[:, k] / norms[:, None], axis=1)
        rest = np.where(kept == 0, layer.error_signals, 0)
        np.testing.assert_allclose(kept[kept != 0], layer.error_signals[kept != 0], rtol=1e-5)
        np.testing.assert_allclose(
            peaks.rests[:, k], np.linalg.norm(rest, axis=1) * norms, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            peaks.next[:, k], np.abs(rest).max(axis=1) * norms, rtol=1e-4, atol=1e-6
        )
        smallest = np.where(kept != 0, np.abs(kept), np.inf).min(axis=1) * (1 + 1e-6)
        assert (np.abs(rest).max(axis=1) <= smallest).all()


def test_no_peaks_but_of_one_wide_layer():
    rng = np.random.default_rng(11)
    wide = random_block(rng, 5, classes=256)
    assert Peaks.of_block(wide).count == 16
    for other in (
        random_block(rng, 5, classes=255),
        random_block(rng, 5, classes=256, layers=2),
        random_block(rng, 5, classes=256, positions=2),
    ):
        assert isinstance(other, FactorBlock)
        assert Peaks.of_block(other).count == 0
