import numpy as np
import pytest

from tracin_transforms.core import products
from tracin_transforms.core.factors import LayerFactors
from tracin_transforms.core.products import (
    absolute_norms,
    all_products,
    gradient_sum,
    pair_products,
    squared_norms,
)


def _layer(rng, n, positions, width, outputs, has_bias=True, groups=1):
    shape = (n,) if positions is None else (n, positions)
    return LayerFactors(
        "dense",
        rng.standard_normal((*shape, width)).astype(np.float32),
        rng.standard_normal((*shape, outputs)).astype(np.float32),
        has_bias,
        groups,
    )


def _one_hot(rng, n, positions, width, outputs):
    shape = (n,) if positions is None else (n, positions)
    return LayerFactors(
        "embedding",
        rng.integers(0, width, (*shape, 1)).astype(np.int32),
        rng.standard_normal((*shape, outputs)).astype(np.float32),
        has_bias=False,
    )


def _gradients(layer, width):
    """One loop for each sum of the definition, in float64: matrices by group, then biases."""
    gradients = []
    for h, e in zip(layer.activations, layer.error_signals, strict=True):
        h, e = np.atleast_2d(h), np.atleast_2d(e).astype(np.float64)
        h = np.eye(width)[h[:, 0]] if layer.is_one_hot else h.astype(np.float64)
        parts = [
            sum(np.outer(b, a) for a, b in zip(x, y, strict=True))
            for x, y in zip(
                np.split(h, layer.groups, axis=1), np.split(e, layer.groups, axis=1), strict=True
            )
        ]
        parts.append(e.sum(axis=0) if layer.has_bias else np.empty(0))
        gradients.append(np.concatenate([part.ravel() for part in parts]))
    return np.array(gradients)


def _check(layer, other, width):
    gradients, other_gradients = _gradients(layer, width), _gradients(other, width)
    expected = gradients @ other_gradients.T
    scale = np.abs(expected).max()
    found = all_products(layer, other)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5 * scale
    rows, other_rows = (index.ravel() for index in np.indices(expected.shape))
    pairs = pair_products(layer, other, rows, other_rows)
    np.testing.assert_allclose(pairs, expected.ravel(), atol=1e-12 * scale)
    np.testing.assert_allclose(squared_norms(layer), (gradients**2).sum(axis=1), rtol=1e-12)
    assert (absolute_norms(layer) >= np.sqrt(squared_norms(layer)) * (1 - 1e-12)).all()
    factors = np.arange(len(layer)) - 2.5
    np.testing.assert_allclose(
        gradient_sum(layer, factors, width), factors @ gradients, atol=1e-12 * scale
    )


# Few positions of a wide layer: pairs of positions are cheaper. Many positions of a narrow one:
# the gradients themselves are.
SHAPES = [(None, None, 8, 4), (1, None, 8, 4), (2, 3, 40, 32), (20, 30, 4, 2)]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("budget", [1, 10_000, 2**26])
@pytest.mark.parametrize(("positions", "other_positions", "width", "outputs"), SHAPES)
def test_equal_products_of_materialised_gradients(
    monkeypatch, positions, other_positions, width, outputs, budget, groups, has_bias
):
    monkeypatch.setattr(products, "_BUDGET_BYTES", budget)
    rng = np.random.default_rng(0)
    layer = _layer(rng, 9, positions, width, outputs, has_bias, groups)
    other = _layer(rng, 5, other_positions, width, outputs, has_bias, groups)
    _check(layer, other, width // groups)


@pytest.mark.parametrize("budget", [1, 2**26])
@pytest.mark.parametrize(
    ("positions", "other_positions", "width"), [(None, None, 3), (7, 4, 5), (7, 4, 1000)]
)
def test_one_hot_activations(monkeypatch, positions, other_positions, width, budget):
    monkeypatch.setattr(products, "_BUDGET_BYTES", budget)
    rng = np.random.default_rng(1)
    layer = _one_hot(rng, 9, positions, width, 4)
    other = _one_hot(rng, 5, other_positions, width, 4)
    # So that some indices meet, however many there are.
    layer.activations[..., :2, 0] = 1
    other.activations[..., :1, 0] = 1
    _check(layer, other, width)


def test_the_cheaper_order_is_chosen():
    rng = np.random.default_rng(1)
    wide, narrow = _layer(rng, 9, 2, 40, 30), _layer(rng, 9, 20, 4, 3)
    assert products._position_pairs_are_cheaper(wide, wide)
    assert not products._position_pairs_are_cheaper(narrow, narrow)


def test_no_pairs_and_no_rows():
    rng = np.random.default_rng(2)
    nothing = np.empty(0, int)
    for none in (_layer(rng, 0, 3, 4, 2), _one_hot(rng, 0, 3, 4, 2)):
        assert pair_products(none, none, nothing, nothing).shape == (0,)
        assert absolute_norms(none).shape == (0,)
        assert all_products(none, none).shape == (0, 0)
