"""Stores of sketches: what is exact in them stays so, and pruning is by what is stored."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.core.test_ranking import assert_same as assert_same_top
from tests.factories import CLASSES, WEIGHTS, WIDTH, random_block, ranked, split
from tests.storage.test_factor_store import (
    FACTORS,
    IDS,
    assert_same,
    describe,
    of_checkpoints,
    read,
)
from tests.storage.test_shard_scan import brute, heavy_tailed, of_classes, pruned
from tracin_transforms.core import likely_pairs
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.influence import squared_gradient_norms
from tracin_transforms.core.peaks import COUNT
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.factor_shard import StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.shard_writer import ShardWriter
from tracin_transforms.storage.store_check import problems

SKETCHES = [Sketch("activations", 6), Sketch("two-sided", 4)]


def described(sketch, ids=IDS, shards=("a",)):
    more = {} if sketch is None else {"sketch": sketch.to_json()}
    return describe(ids, shards, {**FACTORS, **more})


def write(store, name, blocks, ids=None, dtype="float16"):
    """Writes the blocks as a shard, as a worker does."""
    shard = next(s for s in store.description.shards if s.name == name)
    known, weights = store.stored_shard(shard), store.description.sorting_weights
    new, sketch = tuple(ids or store.description.checkpoint_ids), store.description.sketch
    with ShardWriter(store.paths(name), shard, weights, dtype, known, new, sketch) as writer:
        for block in blocks:
            writer.add(of_checkpoints(block, new))
        return writer.finish([])


def _store(directory, sketch, blocks, dtype="float16"):
    names = tuple(f"s{i}" for i in range(len(blocks)))
    store = FactorStore.prepare(directory / "store", described(sketch, shards=names))
    for name, block in zip(names, blocks, strict=True):
        write(store, name, split(block, 3), dtype=dtype)
    return store


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_factors_are_projected_and_norms_are_not(tmp_path, sketch, layers):
    block = random_block(np.random.default_rng(0), 80, layers=layers)
    store = _store(tmp_path, sketch, [block], dtype="float32")
    assert FactorStore.open(tmp_path / "store").description.sketch == sketch
    projected = sketch.project(block)
    assert_same(read(store, "s0"), projected, rtol=2e-5)
    rows = store.shard("s0").rows
    by_index = np.argsort(rows.indices)
    exact, sketched = (np.sqrt(squared_gradient_norms(b)) for b in (block, projected))
    np.testing.assert_allclose(rows.gradient_norms[by_index], exact, rtol=1e-6)
    np.testing.assert_allclose(rows.stored_norms[by_index], sketched, rtol=2e-5)
    assert np.abs(sketched / exact - 1).max() > 0.1
    # What users read, and the order, are of the gradients.
    own = (exact**2).sum(axis=2) @ WEIGHTS
    table = pq.read_table(store.paths("s0").sidecar)
    np.testing.assert_allclose(table["self_influence"], np.sort(own)[::-1], rtol=1e-6)
    norms = np.array(table["gradient_norms"].to_pylist())[by_index]
    np.testing.assert_allclose(norms, np.sqrt((exact**2).sum(axis=2)), rtol=1e-6)
    store.finish()
    assert list(problems(store)) == []


def test_a_store_of_factors_has_no_norms_of_sketches(tmp_path):
    store = _store(tmp_path, None, [random_block(np.random.default_rng(0), 8)])
    assert "sketch" not in store.description.factors
    assert "sketch_norms" not in pq.read_schema(store.paths("s0").sidecar).names
    rows = store.shard("s0").rows
    assert rows.stored_norms is rows.gradient_norms


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
@pytest.mark.parametrize("options", [{}, {"layers": 2}, {"positions": 3}], ids=str)
def test_pruning_changes_nothing(tmp_path, sketch, options, dtype):
    rng = np.random.default_rng(0)
    blocks = [heavy_tailed(rng, n, prefix=f"z{n}-", **options) for n in (900, 500, 1)]
    share = _pruned_share(tmp_path, sketch, blocks, random_block(rng, 7, "q", **options), dtype)
    assert share < 0.7


@pytest.mark.parametrize("classes", [CLASSES, 300])
def test_rows_whose_sketches_are_longer_than_their_gradients_are_not_left_out(tmp_path, classes):
    """The last 100 rows are the strongest by the sketch, and the weakest by their gradients."""
    block = random_block(np.random.default_rng(0), 500, has_bias=False, classes=classes)
    # As many proponents as opponents.
    error_signals = np.ones((500, classes), np.float32)
    error_signals[::2] = -1
    unit = np.eye(WIDTH, dtype=np.float32)[np.arange(500) % WIDTH]
    sketch = Sketch("activations", classes + 1)
    signs = sketch.project(_with(block, [unit] * 3, error_signals))
    rows = [unit.copy() for _ in range(3)]
    for h, gradient in zip(rows, signs.gradients, strict=True):
        # In the one number of the sketch, all numbers of the last rows add up.
        h *= gradient.layers[0].activations
        h[200:] *= 0.7
        h[400:] = 0.6 * h[:WIDTH].sum(axis=0) / np.sqrt(WIDTH)
    block = _with(block, rows, error_signals)
    queries = block.rows(np.arange(3))
    strongest = ranked([sketch.project(block)], sketch.project(queries), 5).proponents
    assert (strongest.example_ids >= "z00400").all()
    _pruned_share(tmp_path, sketch, [block], queries)


def _with(block, activations, error_signals):
    gradients = []
    for gradient, h in zip(block.gradients, activations, strict=True):
        layer = replace(gradient.layers[0], activations=h, error_signals=error_signals)
        gradients.append(replace(gradient, layers=(layer,)))
    return replace(block, gradients=tuple(gradients))


def test_pruning_by_peaks_changes_nothing(tmp_path, monkeypatch):
    # However few rows there are.
    monkeypatch.setattr(likely_pairs, "_MOST_SHARE", np.inf)
    rng = np.random.default_rng(1)
    blocks = [of_classes(rng, n, prefix=f"z{n}-") for n in (3000, 2500)]
    queries = of_classes(rng, 20, prefix="q")
    # Several of each class, so that it takes much to be the strongest.
    assert _pruned_share(tmp_path, Sketch("activations", 305), blocks, queries, k=1) < 0.97


@pytest.mark.parametrize(
    ("sketch", "count"), [(Sketch("activations", 303), COUNT), (Sketch("two-sided", 350), 0)]
)
def test_peaks_are_of_whole_error_signals_alone(tmp_path, sketch, count):
    store = _store(tmp_path, sketch, [random_block(np.random.default_rng(0), 90, classes=300)])
    assert store.shard("s0", with_peaks=True).rows.peaks.count == count


def _pruned_share(directory, sketch, blocks, queries, dtype="float16", k=5):
    """Returns which share of the pairs pruning multiplies; its result is that of them all."""
    store = _store(directory, sketch, blocks, dtype)
    shards = [
        StoredShard.open(store.paths(shard.name), with_peaks=True)
        for shard in store.description.shards
    ]
    prepared = Queries.prepare(sketch.project(queries), WEIGHTS)
    expected, found = brute(shards, prepared, k), pruned(shards, prepared, k)
    assert_same_top(found, expected)
    return found.pairs / expected.pairs


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_a_checkpoint_is_added_to_what_is_there(tmp_path, sketch):
    block = random_block(np.random.default_rng(3), 40)
    whole = FactorStore.prepare(tmp_path / "whole", described(sketch))
    write(whole, "a", [block])
    store = FactorStore.prepare(tmp_path / "store", described(sketch, IDS[::2]))
    write(store, "a", [block])
    store = FactorStore.prepare(tmp_path / "store", described(sketch))
    write(store, "a", [block], ids=["epoch-1"])
    for part in ("factors", "sidecar"):
        both = [getattr(s.paths("a"), part).read_bytes() for s in (store, whole)]
        assert both[0] == both[1]
    some = store.shard("a").rows_of(IDS[1:])
    np.testing.assert_array_equal(some.stored_norms, store.shard("a").rows.stored_norms[:, 1:])


@pytest.mark.parametrize(
    ("known", "wanted", "message"),
    [
        (None, SKETCHES[0], r'sketch is null there and \{"kind": "activations", "numbers": 6'),
        (SKETCHES[0], None, r"sketch is \{.*\} there and null here"),
        (
            Sketch("activations", 6),
            Sketch("activations", 7),
            "sketch.numbers is 6 there and 7 here",
        ),
    ],
)
def test_another_sketch_is_refused(tmp_path, known, wanted, message):
    store = FactorStore.prepare(tmp_path / "store", described(known))
    write(store, "a", [random_block(np.random.default_rng(0), 3)])
    with pytest.raises(InputError, match=f"holds other gradient factors: {message}"):
        FactorStore.prepare(tmp_path / "store", described(wanted))
