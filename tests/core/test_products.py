import numpy as np
import pytest

from tracin_transforms.core import products
from tracin_transforms.core.factors import LayerFactors
from tracin_transforms.core.products import (
    absolute_norms,
    all_products,
    materialised,
    pair_products,
    squared_norms,
)


def _layer(rng, n, positions, width, outputs, has_bias):
    shape = (n,) if positions is None else (n, positions)
    return LayerFactors(
        "dense",
        rng.standard_normal((*shape, width)).astype(np.float32),
        rng.standard_normal((*shape, outputs)).astype(np.float32),
        has_bias,
    )


def _gradients(layer):
    """One loop for each sum of the definition, in float64."""
    gradients = []
    for h, e in zip(layer.activations, layer.error_signals, strict=True):
        h, e = (np.atleast_2d(part).astype(np.float64) for part in (h, e))
        kernel = sum(np.outer(b, a) for a, b in zip(h, e, strict=True))
        gradients.append(np.append(kernel, e.sum(axis=0) if layer.has_bias else []))
    return np.array(gradients)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("budget", [1, 10_000, 2**26])
@pytest.mark.parametrize(
    ("positions", "other_positions", "width", "outputs"),
    [
        (None, None, 7, 3),
        (1, None, 7, 3),
        # Few positions of a wide layer: pairs of positions are cheaper.
        (2, 3, 40, 30),
        # Many positions of a narrow one: materialised gradients are.
        (20, 30, 4, 3),
    ],
)
def test_equal_products_of_materialised_gradients(
    monkeypatch, positions, other_positions, width, outputs, budget, has_bias
):
    monkeypatch.setattr(products, "_BUDGET_BYTES", budget)
    rng = np.random.default_rng(0)
    layer = _layer(rng, 9, positions, width, outputs, has_bias)
    other = _layer(rng, 5, other_positions, width, outputs, has_bias)
    gradients, other_gradients = _gradients(layer), _gradients(other)
    expected = gradients @ other_gradients.T

    scale = np.abs(expected).max()
    assert np.abs(all_products(layer, other) - expected).max() < 1e-5 * scale
    assert all_products(layer, other).dtype == np.float32
    rows, other_rows = (index.ravel() for index in np.indices(expected.shape))
    pairs = pair_products(layer, other, rows, other_rows)
    np.testing.assert_allclose(pairs, expected.ravel(), atol=1e-12 * scale)
    np.testing.assert_allclose(squared_norms(layer), (gradients**2).sum(axis=1), rtol=1e-12)
    assert (absolute_norms(layer) >= np.sqrt(squared_norms(layer)) * (1 - 1e-12)).all()
    np.testing.assert_allclose(
        (materialised(layer) ** 2).sum(axis=1), (gradients**2).sum(axis=1), rtol=1e-5
    )


def test_the_cheaper_order_is_chosen():
    rng = np.random.default_rng(1)
    wide, narrow = _layer(rng, 9, 2, 40, 30, True), _layer(rng, 9, 20, 4, 3, True)
    assert products._gram_is_cheaper(wide, wide)
    assert not products._gram_is_cheaper(narrow, narrow)


def test_no_pairs_and_no_rows():
    rng = np.random.default_rng(2)
    layer, none = np.empty(0, int), _layer(rng, 0, 3, 4, 2, True)
    assert pair_products(none, none, layer, layer).shape == (0,)
    assert absolute_norms(none).shape == (0,)
