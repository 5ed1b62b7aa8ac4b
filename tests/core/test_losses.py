"""Formulas against hand-computed cases and finite differences; against Keras in tests/models."""

import numpy as np
import pytest

from tracin_transforms.core.losses import (
    LOSSES,
    QUERY_LOSSES,
    binary_crossentropy,
    margin,
    softmax_cross_entropy,
)
from tracin_transforms.core.targets import target_rows

ALL = sorted(LOSSES)


def random_case(name: str, n: int = 20, outputs: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the formula takes, and targets as the examples have them."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal((n, outputs)) * 3
    if name == "poisson":
        return np.exp(y / 3), rng.poisson(2.0, (n, outputs)).astype(float)
    if name == "kl_divergence":
        y = np.exp(y / 3) / np.exp(y / 3).sum(axis=1, keepdims=True)
    targets = {
        "index": lambda: rng.integers(0, outputs, n),
        "distribution": lambda: np.eye(outputs)[rng.integers(0, outputs, n)],
        "binary": lambda: rng.integers(0, 2, (n, outputs)).astype(float),
        "value": lambda: rng.standard_normal((n, outputs)),
    }
    return y, targets[LOSSES[name].targets]()


def _losses(name, y, targets, **options):
    formula = LOSSES[name]
    return formula.formula(np, y, target_rows(formula.targets, targets, y.shape), **options)


def test_hand_computed_case():
    loss, signals = _losses(
        "sparse_categorical_crossentropy", np.log([[1.0, 2.0, 5.0]]), np.array([1])
    )
    np.testing.assert_allclose(signals, [[0.125, -0.75, 0.625]], rtol=1e-14)
    np.testing.assert_allclose(loss, [np.log(4)], rtol=1e-14)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("name", ALL)
def test_error_signals_are_the_derivative_of_the_losses(name, options):
    y, targets = random_case(name)
    smooth = ["categorical_crossentropy", "binary_crossentropy"]
    smooth += ["categorical_focal_crossentropy", "binary_focal_crossentropy"]
    if options and name not in smooth:
        options = {"delta": 0.7} if name == "huber" else {}
    _, signals = _losses(name, y, targets, **options)
    step = 1e-6
    for c in range(y.shape[1]):
        shift = np.zeros(y.shape[1])
        shift[c] = step
        above, _ = _losses(name, y + shift, targets, **options)
        below, _ = _losses(name, y - shift, targets, **options)
        numeric = (above - below) / (2 * step)
        np.testing.assert_allclose(signals[:, c], numeric, rtol=1e-3, atol=1e-7)


def test_focal_losses_with_other_options():
    y, targets = random_case("binary_focal_crossentropy")
    options = {"apply_class_balancing": True, "alpha": 0.3, "gamma": 1.5}
    _, signals = _losses("binary_focal_crossentropy", y, targets, **options)
    shift = np.eye(5)[2] * 1e-6
    above, _ = _losses("binary_focal_crossentropy", y + shift, targets, **options)
    below, _ = _losses("binary_focal_crossentropy", y - shift, targets, **options)
    np.testing.assert_allclose(signals[:, 2], (above - below) / 2e-6, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_losses_of_perfect_fits_have_no_gradient(gamma):
    y, targets = np.array([[900.0, -900.0]]), np.array([[1.0, 0.0]])
    for name in ("categorical_focal_crossentropy", "binary_focal_crossentropy"):
        losses, signals = _losses(name, y, targets, gamma=gamma)
        assert losses.tolist() == [0.0]
        assert signals.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", ["categorical_focal_crossentropy", "binary_focal_crossentropy"])
def test_focal_losses_without_focus_are_cross_entropies(name):
    y, targets = random_case(name)
    options = {"gamma": 0.0} | ({"alpha": 1.0} if name.startswith("categorical") else {})
    for a, b in zip(
        _losses(name, y, targets, **options),
        _losses(name.replace("focal_", ""), y, targets),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_well_fitted_example_keeps_its_label_entry():
    gap = 60.0  # the label's probability is 1 in float64 too
    rows = np.array([[1.0, 0.0, 0.0]])
    loss, signals = softmax_cross_entropy(np, np.array([[gap, 0.0, 0.0]]), rows)
    np.testing.assert_allclose(signals[0], np.array([-2, 1, 1]) * np.exp(-gap), rtol=1e-12)
    np.testing.assert_allclose(loss, [2 * np.exp(-gap)], rtol=1e-12)

    loss, signals = binary_crossentropy(np, np.array([[gap]]), np.array([[1.0]]))
    np.testing.assert_allclose(signals, [[-np.exp(-gap)]], rtol=1e-12)
    np.testing.assert_allclose(loss, [np.exp(-gap)], rtol=1e-12)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_lose_the_loss(logit):
    y = np.array([[logit, 0.0]])
    for name, targets in [
        ("sparse_categorical_crossentropy", np.array([0])),
        ("categorical_focal_crossentropy", np.array([[1.0, 0.0]])),
        ("binary_crossentropy", np.array([[1.0, 0.0]])),
        ("binary_focal_crossentropy", np.array([[1.0, 0.0]])),
    ]:
        assert all(np.isfinite(part).all() for part in _losses(name, y, targets))
    loss, _ = _losses("sparse_categorical_crossentropy", y, np.array([0]))
    np.testing.assert_allclose(loss, [max(0.0, -logit)], rtol=1e-12)


def test_equal_logits():
    """Two classes that share the largest logit."""
    loss, signals = _losses(
        "sparse_categorical_crossentropy", np.array([[2.0, 2.0, 2.0]]), np.array([1])
    )
    np.testing.assert_allclose(signals, [[1 / 3, -2 / 3, 1 / 3]], rtol=1e-14)
    np.testing.assert_allclose(loss, [np.log(3)], rtol=1e-14)


@pytest.mark.parametrize("name", sorted(QUERY_LOSSES))
def test_losses_of_queries(name):
    formula = QUERY_LOSSES[name]
    rng = np.random.default_rng(1)
    y = rng.standard_normal((20, 5)) * 3
    t = np.eye(5)[rng.integers(0, 5, 20)]
    if name == "binary_margin":
        t = rng.integers(0, 2, (20, 5)).astype(float)
    losses, signals = formula.formula(np, y, t)
    p = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
    of_label = (p * t).sum(axis=1)
    sigmoid = 1 / (1 + np.exp(-y))
    expected = {
        "margin": lambda: -np.log(of_label / (1 - of_label)),
        "logit": lambda: -(y * t).sum(axis=1),
        "entropy": lambda: -(p * np.log(p)).sum(axis=1),
        "binary_margin": lambda: np.mean((1 - 2 * t) * np.log(sigmoid / (1 - sigmoid)), axis=1),
    }[name]()
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for c in range(5):
        step = np.eye(5)[c] * 1e-6
        above, below = formula.formula(np, y + step, t)[0], formula.formula(np, y - step, t)[0]
        np.testing.assert_allclose(signals[:, c], (above - below) / 2e-6, rtol=1e-4, atol=1e-8)


def test_the_margin_of_a_well_fitted_example_keeps_its_gradient():
    """That of the cross-entropy is gone: p is 1 in float64."""
    y, t = np.array([[60.0, 2.0, 1.0]]), np.array([[1.0, 0.0, 0.0]])
    loss, signals = margin(np, y, t)
    rivals = np.exp([2.0, 1.0])
    np.testing.assert_allclose(loss, [np.log(rivals.sum()) - 60], rtol=1e-14)
    np.testing.assert_allclose(signals, [[-1, *rivals / rivals.sum()]], rtol=1e-14)
