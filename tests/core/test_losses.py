"""Formulas against hand-computed cases and finite differences; against Keras in tests/models."""

import numpy as np
import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import LOSSES, binary_crossentropy, softmax_cross_entropy
from tracin_transforms.core.targets import (
    RowError,
    readable_predictions,
    readable_targets,
    target_rows,
)

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


def test_targets_become_one_number_for_each_output():
    one_hot = np.eye(4)[[0, 3, 2]]
    for indices in (np.array([0, 3, 2]), np.array([[0], [3], [2]])):
        np.testing.assert_array_equal(target_rows("index", indices, (3, 4)), one_hot)
    np.testing.assert_array_equal(target_rows("distribution", one_hot, (3, 4)), one_hot)
    values = np.array([0.5, 1, 2])
    np.testing.assert_array_equal(target_rows("value", values, (3, 1)), values[:, None])


def test_labels_and_predictions_for_a_reader():
    rows = np.eye(4)[[0, 3]]
    assert readable_targets("index", rows).tolist() == [0, 3]
    assert readable_predictions("distribution", -rows).tolist() == [1, 0]
    binary = np.array([[1.0], [0.0]])
    assert readable_targets("binary", binary).dtype == np.int32
    assert readable_targets("binary", binary).tolist() == [1, 0]
    assert readable_targets("binary", np.array([[0.5], [1]])).dtype == np.float32
    assert readable_predictions("binary", np.array([[-1.0, 2.0]])).tolist() == [[0, 1]]
    assert readable_targets("value", np.array([[1.5], [2]])).tolist() == [1.5, 2]
    assert readable_predictions("value", np.array([[1.0, 2]])).dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("index", [0, 3, 4], r"row 2: label 4 is out of range.*expected 0 to 3"),
        ("index", [-1, 3, 0], "row 0: label -1"),
        ("distribution", [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]], "row 1: .* is not one-hot"),
        ("distribution", [[1, 0, 0, 0], [2, -1, 0, 0], [0, 0, 0, 1]], "row 1: .* is not one-hot"),
        ("binary", [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 3, 0]], "row 2: .* is not 0 or 1"),
        ("value", [[0, 0, 1, 0], [0, np.nan, 0, 0], [0, 0, 3, 0]], "row 1: .* is not finite"),
    ],
)
def test_bad_targets_are_named(kind, targets, message):
    with pytest.raises(RowError, match=message):
        target_rows(kind, np.array(targets), (3, 4))


def test_targets_of_another_kind_are_refused():
    with pytest.raises(InputError, match="one-hot labels need categorical_crossentropy"):
        target_rows("index", np.eye(4)[:3], (3, 4))
    with pytest.raises(InputError, match="integer labels need sparse_categorical_crossentropy"):
        target_rows("distribution", np.array([0, 1, 2]), (3, 4))
    with pytest.raises(InputError, match=r"shape \(3, 2\), expected \(3, 4\)"):
        target_rows("value", np.zeros((3, 2)), (3, 4))
