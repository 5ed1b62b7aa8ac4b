import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.factories import CHECKPOINTS, CLASSES, WEIGHTS, WIDTH, random_block
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import GradientFactors, LayerFactors
from tracin_transforms.core.influence import influence, pair_influence
from tracin_transforms.core.products import all_products
from tracin_transforms.core.sketching import Sketch

SEEDS = 4000
# One that leaves no side of the factories' layers whole, of either kind.
SKETCHES = [Sketch("activations", CLASSES + 3), Sketch("two-sided", 5)]


def _same_at_all_checkpoints(block):
    """The errors of neighbouring checkpoints are as alike as they can be."""
    layers = block.gradients[0].layers
    return replace(
        block, gradients=tuple(GradientFactors(f"epoch-{k}", layers) for k in range(CHECKPOINTS))
    )


def _block_of(*layers):
    block = random_block(np.random.default_rng(0), len(layers[0]))
    return replace(block, gradients=tuple(GradientFactors(c, layers) for c in block.checkpoint_ids))


def _layer(n, width, outputs, has_bias=True, name="dense", groups=1):
    rng = np.random.default_rng(0)
    h, e = (rng.standard_normal((n, m)).astype(np.float32) for m in (width, outputs))
    return LayerFactors(name, h, e, has_bias, groups)


def _projected(sketch, *layers):
    """The layers at the first checkpoint."""
    return sketch.project(_block_of(*layers)).gradients[0].layers


def _arrays(layers):
    return [array for layer in layers for array in (layer.error_signals, layer.activations)]


def _gradients(layer):
    """Σ_p e_p h_pᵀ of each example, [n, C, d], and Σ_p e_p, [n, C], 0 without a bias; float64."""
    n, positions = len(layer), layer.positions
    e, h = (
        array.astype(float).reshape(n, positions, -1)
        for array in (layer.error_signals, layer.activations)
    )
    return np.einsum("npc,npd->ncd", e, h), layer.has_bias * e.sum(axis=1)


def _covariance_of_forms(p, q):
    """Cov[bᵀPb, bᵀQb] for entries b = ±1: half the sum of (P + Pᵀ)∘(Q + Qᵀ) off the diagonal."""
    p, q = p + p.swapaxes(-1, -2), q + q.swapaxes(-1, -2)
    off = 1 - np.eye(p.shape[-1])
    return (p * q * off).sum(axis=(-1, -2)) / 2


def _variance(g, other, b, other_b, error_rows, activation_rows):
    """The variance of ⟨A G Bᵀ, A G' Bᵀ⟩ + ⟨A b, A b'⟩ = Σ_a aᵀ M a / r₁, M = G Bᵀ B G'ᵀ + b b'ᵀ.

    By the law of total variance, for gradients G and G' of any rank; None: no A.
    """
    forms = np.einsum("jc,kd->jkcd", g, other)  # M_jk − b_j b'_k is the form of these, over r₂.
    trace = np.einsum("jjcd->cd", forms)
    variance = _covariance_of_forms(trace, trace) / activation_rows
    if error_rows is None:
        return variance
    pairs = forms + forms.swapaxes(0, 1)
    of_bias = np.outer(b, other_b)
    squares = (np.einsum("jkcc->jk", pairs) + of_bias + of_bias.T) ** 2
    squares += _covariance_of_forms(pairs, pairs) / activation_rows
    return variance + (squares.sum() - np.trace(squares)) / (2 * error_rows)


def _variance_at_one_position(e, f, h, g, bias, error_rows, activation_rows):
    """The formulas of the module."""

    def of_side(x, y):
        return (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)

    s, t = e @ f, h @ g
    v = of_side(h, g) / activation_rows
    if error_rows is None:
        return s**2 * v
    u = of_side(e, f) / error_rows
    return u * v + s**2 * v + (t + bias) ** 2 * u


@pytest.mark.parametrize("bias", [0, 1])
@pytest.mark.parametrize("error_rows", [None, 3])
def test_the_variance_for_any_rank_is_that_of_the_module_at_one_position(error_rows, bias):
    rng = np.random.default_rng(0)
    e, f, h, g = (rng.standard_normal(m) for m in (4, 4, 7, 7))
    found = _variance(np.outer(e, h), np.outer(f, g), bias * e, bias * f, error_rows, 2)
    assert found == pytest.approx(_variance_at_one_position(e, f, h, g, bias, error_rows, 2))


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("positions", [1, 3])
def test_is_unbiased_with_the_variance_of_the_formula(sketch, has_bias, positions):
    rng = np.random.default_rng(0)
    shape = {"has_bias": has_bias, "positions": positions}
    block = _same_at_all_checkpoints(random_block(rng, 3, **shape))
    queries = _same_at_all_checkpoints(random_block(rng, 2, "q", **shape))
    rows, columns = (index.ravel() for index in np.indices((3, 2)))
    found = np.empty((SEEDS, 6, CHECKPOINTS))
    for seed in range(SEEDS):
        drawn = replace(sketch, seed=seed)
        blocks = drawn.project(block), drawn.project(queries)
        found[seed] = pair_influence(*blocks, np.ones(3), rows, columns)[:, :, 0]
    error_rows = 3 if sketch.kind == "two-sided" else None
    activation_rows = 2 if sketch.kind == "two-sided" else 3
    assert blocks[0].gradients[0].layers[0].error_signals.shape[-1] == (error_rows or CLASSES)
    assert blocks[0].gradients[0].layers[0].activations.shape[-1] == activation_rows

    (g, b), (f, c) = (_gradients(part.gradients[0].layers[0]) for part in (block, queries))
    pairs = list(zip(g[rows], f[columns], b[rows], c[columns], strict=True))
    expected = np.array([(g * f).sum() + b @ c for g, f, b, c in pairs])
    variances = np.array([_variance(*pair, error_rows, activation_rows) for pair in pairs])
    errors = (found - expected[:, None]) / np.sqrt(variances)[:, None]
    draws = SEEDS * CHECKPOINTS
    assert np.abs(errors.mean(axis=(0, 2))).max() < 4.5 / np.sqrt(draws)
    assert (errors**2).mean() == pytest.approx(1, abs=0.06)
    np.testing.assert_allclose((errors**2).mean(axis=(0, 2)), 1, atol=0.12)
    # Errors of different checkpoints are independent, so they average out.
    for k in range(CHECKPOINTS):
        correlations = (errors[:, :, k] * errors[:, :, k - 1]).mean(axis=0)
        assert np.abs(correlations).max() < 5 / np.sqrt(SEEDS)


def test_entries_are_signs_over_the_root_of_their_number():
    n = 300
    eye = LayerFactors("dense", np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32), False)
    (layer,) = _projected(Sketch("two-sided", 200), eye)
    a, b = layer.error_signals, layer.activations
    assert (a.shape, b.shape) == ((n, 150), (n, 50))
    for matrix in (a, b):
        assert matrix.dtype == np.float32
        rows = matrix.shape[1]
        np.testing.assert_allclose(np.abs(matrix), rows**-0.5, rtol=1e-6)
        assert abs(np.sign(matrix).mean()) < 4 / np.sqrt(n * rows)
    # The sides are independent of each other.
    assert abs((np.sign(a[:, :50]) * np.sign(b)).mean()) < 4 / np.sqrt(n * 50)


def test_the_signs_are_those_of_earlier_releases():
    eye = LayerFactors("dense", np.eye(16, dtype=np.float32), np.ones((16, 1), np.float32), False)
    (layer,) = _projected(Sketch("activations", 4, seed=7), eye)
    signs = "".join("-+"[int(value > 0)] for value in layer.activations.T.ravel())
    assert signs == "++-+---++--+--+---++-++----+--+++++-++-+--+-++-+"


def test_another_process_draws_the_same():
    code = (
        "import sys, tests.core.test_sketching as t; sys.stdout.buffer.write(t._everything_drawn())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert done.stdout == _everything_drawn()


def _everything_drawn():
    block = random_block(np.random.default_rng(3), 5, layers=2)
    projected = [replace(sketch, seed=5).project(block) for sketch in SKETCHES]
    layers = [layer for b in projected for gradient in b.gradients for layer in gradient.layers]
    return b"".join(array.tobytes() for array in _arrays(layers))


def test_checkpoint_place_and_seed_are_what_matrices_are_drawn_from():
    layer = _layer(5, 40, 30)
    sketch = Sketch("two-sided", 20)
    renamed = replace(layer, name="dense_1")
    first, second = _projected(sketch, layer, renamed)
    (other_name,) = _projected(sketch, renamed)
    (other_seed,) = _projected(replace(sketch, seed=1), layer)
    other_checkpoint = sketch.project(_block_of(layer)).gradients[1].layers[0]
    for mine, theirs in zip(_arrays([first]), _arrays([other_name]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for other in (second, other_seed, other_checkpoint):
        for mine, theirs in zip(_arrays([first]), _arrays([other]), strict=True):
            assert (mine != theirs).any(axis=1).all()


@pytest.mark.parametrize(
    ("text", "outputs", "width", "expected"),
    [
        ("10", 4, 20, (4, 6)),
        ("10", 4, 7, (4, 6)),
        ("10", 4, 6, (4, 6)),
        ("10", 4, 5, (4, 5)),
        ("10", 9, 20, (9, 1)),
        ("two-sided:20", 40, 40, (15, 5)),
        ("two-sided:20", 15, 40, (15, 5)),
        ("two-sided:20", 10, 40, (10, 10)),
        ("two-sided:20", 40, 5, (15, 5)),
        ("two-sided:20", 40, 4, (16, 4)),
        ("two-sided:20", 40, 3, (17, 3)),
        ("two-sided:20", 10, 10, (10, 10)),
        ("two-sided:20", 10, 11, (10, 10)),
        ("two-sided:20", 17, 3, (17, 3)),
        ("two-sided:2", 40, 40, (1, 1)),
        ("two-sided:3", 1, 40, (1, 2)),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_numbers_are_split_and_narrow_sides_are_whole(text, outputs, width, has_bias, expected):
    layer = _layer(6, width, outputs, has_bias)
    (found,) = _projected(Sketch.parse(text), layer)
    e, h = found.error_signals, found.activations
    assert (e.shape[-1], h.shape[-1]) == expected
    assert found.has_bias == has_bias
    assert e.dtype == h.dtype == np.float32
    assert (e is layer.error_signals) == (e.shape[-1] == outputs)
    assert (h is layer.activations) == (h.shape[-1] == width)
    whole = e is layer.error_signals and h is layer.activations
    assert np.array_equal(all_products(found, found), all_products(layer, layer)) == whole


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
def test_grouped_and_one_hot_layers_are_whole(sketch):
    grouped = _layer(4, 40, 30, groups=2)
    signals = _layer(4, 40, 30).error_signals
    one_hot = LayerFactors("embedding", np.arange(4, dtype=np.int32)[:, None], signals, False)
    dense = _layer(4, WIDTH, CLASSES)
    layers = _projected(sketch, grouped, one_hot, dense)
    assert layers[0] is grouped
    assert layers[1] is one_hot
    assert layers[2].activations.shape[-1] < WIDTH


@pytest.mark.parametrize("sketch", SKETCHES, ids=str)
@pytest.mark.parametrize("positions", [1, 3])
def test_each_row_is_projected_by_itself(sketch, positions):
    block = random_block(np.random.default_rng(0), 9, positions=positions, layers=2)
    rows = np.array([7, 2])
    for k in range(CHECKPOINTS):
        some, all_of_them = (
            b.gradients[k].layers
            for b in (sketch.project(block.rows(rows)), sketch.project(block).rows(rows))
        )
        for mine, theirs in zip(_arrays(some), _arrays(all_of_them), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    nothing = sketch.project(block.rows(slice(0)))
    assert len(nothing) == 0
    assert nothing.gradients[0].layers[0].activations.ndim == (2 if positions == 1 else 3)


def test_influence_takes_sketches_as_factors():
    rng = np.random.default_rng(0)
    block, queries = random_block(rng, 8, layers=2), random_block(rng, 3, "q", layers=2)
    exact = influence(block, queries, WEIGHTS)
    mean = np.zeros((8, 3))
    for seed in range(1000):
        sketch = Sketch("activations", CLASSES + 4, seed)
        mean += influence(sketch.project(block), sketch.project(queries), WEIGHTS) / 1000
    assert np.abs(mean - exact).max() < 0.1 * np.abs(exact).max()
    assert np.corrcoef(mean.ravel(), exact.ravel())[0, 1] > 0.995


def test_no_copy_of_a_block_is_made():
    block = _block_of(_layer(2000, 400, 400))
    sketch = Sketch("two-sided", 40)
    sketch.project(block)
    tracemalloc.start()
    try:
        sketch.project(block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    results = CHECKPOINTS * 4 * 2000 * 40
    assert peak < results + 2000 * 400


def test_too_many_outputs_to_keep_whole():
    message = r"layer 'logits' has 30 outputs.* 30 numbers.* more than 30.* two-sided:30"
    with pytest.raises(InputError, match=message):
        _projected(Sketch("activations", 30), _layer(5, 40, 30, name="logits"))
    _projected(Sketch("activations", 31), _layer(5, 40, 30))


@pytest.mark.parametrize("text", ["", "two-sided", "two-sided:", "-3", "1.5", "1e3", "١٢", "1_000"])
def test_text_that_names_no_sketch(text):
    with pytest.raises(InputError, match=r"sketch .*expected how many numbers.* two-sided:1472"):
        Sketch.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sketch("one-sided", 10), "'one-sided': expected 'activations' or 'two-sided'"),
        (lambda: Sketch.parse("0"), "sketch of 0 numbers: expected at least 1"),
        (lambda: Sketch.parse("two-sided:1"), "sketch of 1 numbers: expected at least 2"),
    ],
)
def test_sketches_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "sketch"),
    [("1472", Sketch("activations", 1472)), ("two-sided:1472", Sketch("two-sided", 1472))],
)
def test_text_and_json_come_back(text, sketch):
    assert Sketch.parse(text) == sketch
    assert str(sketch) == text
    seeded = replace(sketch, seed=3)
    assert Sketch.from_json(json.loads(json.dumps(seeded.to_json()))) == seeded
