import numpy as np
import pytest

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.losses import (
    RowError,
    one_hot_cross_entropy,
    softmax_cross_entropy,
)


def test_hand_computed_case():
    values = softmax_cross_entropy(np.log([[1.0, 2.0, 5.0]]), np.array([1]))

    np.testing.assert_allclose(values.error_signals, [[0.125, -0.75, 0.625]], rtol=1e-14)
    np.testing.assert_allclose(values.losses, [np.log(4)], rtol=1e-14)
    assert values.predictions.tolist() == [2]
    assert values.labels.tolist() == [1]


def test_error_signals_are_the_derivative_of_the_losses():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, 7)) * 5
    targets = rng.integers(0, 7, 20)
    step = 1e-6

    for c in range(7):
        shift = np.zeros(7)
        shift[c] = step
        above = softmax_cross_entropy(logits + shift, targets).losses
        below = softmax_cross_entropy(logits - shift, targets).losses
        numeric = (above - below) / (2 * step)
        analytic = softmax_cross_entropy(logits, targets).error_signals[:, c]
        np.testing.assert_allclose(analytic, numeric, atol=1e-8)


def test_a_well_fitted_example_keeps_its_label_entry():
    gap = 60.0  # the label's probability is 1 in float64 too
    values = softmax_cross_entropy(np.array([[gap, 0.0, 0.0]]), np.array([0]))

    np.testing.assert_allclose(values.error_signals[0, 0], -2 * np.exp(-gap), rtol=1e-12)
    np.testing.assert_allclose(values.losses, [2 * np.exp(-gap)], rtol=1e-12)
    assert abs(values.error_signals.sum()) < 1e-30


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_lose_the_loss(logit):
    values = softmax_cross_entropy(np.array([[logit, 0.0]]), np.array([0]))

    assert np.isfinite(values.error_signals).all()
    np.testing.assert_allclose(values.losses, [max(0.0, -logit)], rtol=1e-12)


def test_one_hot_equals_indices():
    rng = np.random.default_rng(1)
    logits, targets = rng.standard_normal((9, 5)), rng.integers(0, 5, 9)

    for a, b in zip(
        one_hot_cross_entropy(logits, np.eye(5)[targets]),
        softmax_cross_entropy(logits, targets),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_bad_targets_are_named():
    logits = np.zeros((3, 4))
    with pytest.raises(RowError, match=r"row 2: label 4 is out of range.*expected 0 to 3"):
        softmax_cross_entropy(logits, np.array([0, 3, 4]))
    with pytest.raises(RowError, match="row 0: label -1"):
        softmax_cross_entropy(logits, np.array([-1, 3, 0]))
    with pytest.raises(InputError, match="one-hot labels need categorical_crossentropy"):
        softmax_cross_entropy(logits, np.eye(4)[:3])
    with pytest.raises(RowError, match=r"row 1: label .* is not one-hot"):
        one_hot_cross_entropy(logits, np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]))
    with pytest.raises(InputError, match="integer labels need sparse_categorical_crossentropy"):
        one_hot_cross_entropy(logits, np.array([0, 1, 2]))
