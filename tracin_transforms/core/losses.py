"""Losses of single examples, and their error signals: the derivative by what the loss takes.

Each formula is written once, for any namespace with NumPy's names: NumPy itself, or ``keras.ops``
inside a compiled call. ``y`` is what the loss takes, logits or outputs, shape [..., C]; ``t`` the
targets. The sources are Keras's definitions of its losses; Pruthi et al. (2020), section 4.1, use
the first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# What Keras adds to, or clips, probabilities with.
_EPSILON = 1e-7

Arrays = tuple[Any, Any]


@dataclass(frozen=True)
class LossFormula:
    """A loss, as a function of one example's logits or outputs and its targets.

    Attributes:
        formula: Called as ``formula(xp, y, t, **options)`` with the namespace xp, y of shape
            [..., C] and t of the same shape, both floating; returns the losses, shape [...], and
            the error signals ∂loss/∂y, shape [..., C].
        targets: What the targets are: ``index`` (a class index), ``distribution`` (a row over
            the classes, such as a one-hot row), ``class`` (either of both), ``binary`` (0 or 1 for
            each output) or ``value``; ``indices`` where the formula does not take them.
        end: Activation at the end of a model that gives the loss probabilities, ``softmax`` or
            ``sigmoid``; the formula takes its input, the logits. None: it takes the outputs.
    """

    formula: Callable[..., Arrays]
    targets: str
    end: str | None = None


def softmax_cross_entropy(xp: Any, y: Any, t: Any, label_smoothing: float = 0.0) -> Arrays:
    """``loss = -Σ_c t_c log p_c`` with p = softmax(y); ``∂loss/∂y = p Σt − t``.

    For a one-hot row the label's entry, p − 1, is taken as −Σ of the other p, because for a well
    fitted example p rounds to 1 long before the sum of the others rounds to 0.
    """
    t = _smoothed(t, label_smoothing, 1 / y.shape[-1])
    p, rest, log_p = _softmax(xp, y)
    whole = xp.sum(t, axis=-1, keepdims=True)
    is_label = xp.logical_and(xp.equal(t, 1.0), xp.equal(whole, 1.0))
    return -xp.sum(t * log_p, axis=-1), xp.where(is_label, -rest, whole * p - t)


def categorical_focal_crossentropy(
    xp: Any, y: Any, t: Any, alpha: float = 0.25, gamma: float = 2.0, label_smoothing: float = 0.0
) -> Arrays:
    """``loss = -α Σ_c t_c (1 − p_c)^γ log p_c`` with p = softmax(y)."""
    t = _smoothed(t, label_smoothing, 1 / y.shape[-1])
    p, rest, log_p = _softmax(xp, y)
    focus = rest**gamma
    # u_c = p_c ∂loss/∂p_c, and ∂p_c/∂y_j = p_c (δ_cj − p_j)
    u = -alpha * t * (focus - gamma * p * _power(xp, rest, gamma - 1) * log_p)
    others = xp.sum(u, axis=-1, keepdims=True) - u
    return -alpha * xp.sum(t * focus * log_p, axis=-1), u * rest - p * others


def binary_crossentropy(xp: Any, y: Any, t: Any, label_smoothing: float = 0.0) -> Arrays:
    """``loss = mean_c -(t log σ(y) + (1 − t) log σ(−y))``; ``∂loss/∂y = (σ(y) − t) / C``."""
    t = _smoothed(t, label_smoothing, 0.5)
    p, rest, cross_entropy = _sigmoid(xp, y, t)
    return xp.mean(cross_entropy, axis=-1), ((1 - t) * p - t * rest) / y.shape[-1]


def binary_focal_crossentropy(
    xp: Any,
    y: Any,
    t: Any,
    apply_class_balancing: bool = False,
    alpha: float = 0.25,
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
) -> Arrays:
    """``loss = mean_c w (1 − q)^γ · cross-entropy`` with q = t σ(y) + (1 − t) σ(−y)."""
    t = _smoothed(t, label_smoothing, 0.5)
    p, rest, cross_entropy = _sigmoid(xp, y, t)
    weight = (t * alpha + (1 - t) * (1 - alpha)) if apply_class_balancing else 1.0
    missing = t * rest + (1 - t) * p
    slope = -(2 * t - 1) * p * rest
    steep = gamma * _power(xp, missing, gamma - 1) * slope * cross_entropy
    signal = steep + missing**gamma * ((1 - t) * p - t * rest)
    loss = xp.mean(weight * missing**gamma * cross_entropy, axis=-1)
    return loss, weight * signal / y.shape[-1]


def kl_divergence(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = Σ_c t_c log(t_c / y_c)`` of probabilities clipped to [1e-7, 1]."""
    t, clipped = xp.clip(t, _EPSILON, 1.0), xp.clip(y, _EPSILON, 1.0)
    signal = xp.where(xp.equal(y, clipped), -t / clipped, xp.zeros_like(y))
    return xp.sum(t * xp.log(t / clipped), axis=-1), signal


def mean_squared_error(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c (y − t)²``; ``∂loss/∂y = 2 (y − t) / C``."""
    return xp.mean((y - t) ** 2, axis=-1), 2 * (y - t) / y.shape[-1]


def mean_absolute_error(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c |y − t|``; ``∂loss/∂y = sign(y − t) / C``."""
    return xp.mean(xp.abs(y - t), axis=-1), xp.sign(y - t) / y.shape[-1]


def huber(xp: Any, y: Any, t: Any, delta: float = 1.0) -> Arrays:
    """``½ (y − t)²`` up to |y − t| = δ, linear beyond; ``∂loss/∂y = clip(y − t, −δ, δ) / C``."""
    error = y - t
    inner = xp.clip(error, -delta, delta)
    return xp.mean(inner * (error - inner / 2), axis=-1), inner / y.shape[-1]


def log_cosh(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c log cosh(y − t)``; ``∂loss/∂y = tanh(y − t) / C``."""
    error = xp.abs(y - t)
    losses = error + xp.log1p(xp.exp(-2 * error)) - float(np.log(2))
    return xp.mean(losses, axis=-1), xp.tanh(y - t) / y.shape[-1]


def poisson(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c y − t log(y + 1e-7)``; ``∂loss/∂y = (1 − t / (y + 1e-7)) / C``."""
    return xp.mean(y - t * xp.log(y + _EPSILON), axis=-1), (1 - t / (y + _EPSILON)) / y.shape[-1]


def hinge(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c max(1 − t y, 0)`` with t = −1 or 1; 0 stands for −1."""
    t = xp.where(xp.equal(t, 0.0), -xp.ones_like(t), t)
    margin = 1 - t * y
    # At the kink itself Keras's derivative is that of the slope.
    signal = xp.where(xp.greater_equal(margin, 0.0), -t, xp.zeros_like(t)) / y.shape[-1]
    return xp.mean(xp.maximum(margin, 0.0), axis=-1), signal


def squared_hinge(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c max(1 − t y, 0)²`` with t = −1 or 1; 0 stands for −1."""
    t = xp.where(xp.equal(t, 0.0), -xp.ones_like(t), t)
    margin = xp.maximum(1 - t * y, 0.0)
    return xp.mean(margin**2, axis=-1), -2 * t * margin / y.shape[-1]


def categorical_hinge(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = max(max_c (1 − t_c) y_c − Σ_c t_c y_c + 1, 0)``."""
    wrong = (1 - t) * y
    highest = xp.max(wrong, axis=-1, keepdims=True)
    margin = highest - xp.sum(t * y, axis=-1, keepdims=True) + 1
    slope = xp.where(xp.equal(wrong, highest), 1 - t, xp.zeros_like(t)) - t
    signal = xp.where(xp.greater_equal(margin, 0.0), slope, xp.zeros_like(t))
    return xp.maximum(margin, 0.0)[..., 0], signal


def margin(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = -log(p_t / (1 − p_t))`` with p = softmax(y): the margin of the label, negated.

    For a query whose loss is long flat: ``∂loss/∂y_j = p_j / (1 − p_t)``, −1 for the label.
    """
    rivals = xp.where(xp.equal(t, 1.0), xp.full_like(y, -np.inf), y)
    highest = xp.max(rivals, axis=-1, keepdims=True)
    exponentials = xp.exp(rivals - highest)
    total = xp.sum(exponentials, axis=-1, keepdims=True)
    losses = (highest + xp.log(total))[..., 0] - xp.sum(t * y, axis=-1)
    return losses, exponentials / total - t


def binary_margin(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = mean_c (1 − 2 t) y``, the margin log(p / (1 − p)) of the label, negated.

    As in hinge losses, a label of −1 means 0.
    """
    signs = 1 - 2 * xp.maximum(t, xp.zeros_like(t))
    return xp.mean(signs * y, axis=-1), signs / y.shape[-1]


def logit(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = -y_t``, the label's logit, negated."""
    return -xp.sum(t * y, axis=-1), -t


def entropy(xp: Any, y: Any, t: Any) -> Arrays:
    """``loss = H = -Σ_c p_c log p_c`` with p = softmax(y), for queries without a label.

    ``∂H/∂y = −p (log p + H)``.
    """
    p, _, log_p = _softmax(xp, y)
    found = -xp.sum(p * log_p, axis=-1, keepdims=True)
    return found[..., 0], -p * (log_p + found)


def _power(xp: Any, base: Any, exponent: float) -> Any:
    """Returns base ** exponent, 0 for a base of 0: what it multiplies goes to 0 faster."""
    is_zero = xp.equal(base, 0.0)
    power = xp.where(is_zero, xp.ones_like(base), base) ** exponent
    return xp.where(is_zero, xp.zeros_like(base), power)


def _smoothed(t: Any, label_smoothing: float, towards: float) -> Any:
    return t * (1 - label_smoothing) + label_smoothing * towards if label_smoothing else t


def _softmax(xp: Any, y: Any) -> tuple[Any, Any, Any]:
    """Returns p, 1 − p and log p, each without cancellation where p is near 1."""
    z = y - xp.max(y, axis=-1, keepdims=True)
    exponentials, zero = xp.exp(z), xp.zeros_like(z)
    is_largest = xp.equal(z, 0.0)
    smaller = xp.sum(xp.where(is_largest, zero, exponentials), axis=-1, keepdims=True)
    ties = xp.sum(xp.where(is_largest, exponentials, zero), axis=-1, keepdims=True) - 1
    others = smaller + ties
    total = 1 + others
    # `others` lacks one entry of the largest; where there are several, that is right for each.
    rest = xp.where(is_largest, others, total - exponentials) / total
    return exponentials / total, rest, z - xp.log1p(others)


def _sigmoid(xp: Any, y: Any, t: Any) -> tuple[Any, Any, Any]:
    """Returns σ(y), σ(−y) and the cross-entropy with t."""
    zero = xp.zeros_like(y)
    above, below = xp.logaddexp(zero, y), xp.logaddexp(zero, -y)
    return xp.exp(-below), xp.exp(-above), t * below + (1 - t) * above


LOSSES: dict[str, LossFormula] = {
    "sparse_categorical_crossentropy": LossFormula(softmax_cross_entropy, "index", "softmax"),
    "categorical_crossentropy": LossFormula(softmax_cross_entropy, "distribution", "softmax"),
    "categorical_focal_crossentropy": LossFormula(
        categorical_focal_crossentropy, "distribution", "softmax"
    ),
    "binary_crossentropy": LossFormula(binary_crossentropy, "binary", "sigmoid"),
    "binary_focal_crossentropy": LossFormula(binary_focal_crossentropy, "binary", "sigmoid"),
    "kl_divergence": LossFormula(kl_divergence, "distribution"),
    "mean_squared_error": LossFormula(mean_squared_error, "value"),
    "mean_absolute_error": LossFormula(mean_absolute_error, "value"),
    "huber": LossFormula(huber, "value"),
    "log_cosh": LossFormula(log_cosh, "value"),
    "poisson": LossFormula(poisson, "value"),
    "hinge": LossFormula(hinge, "binary"),
    "squared_hinge": LossFormula(squared_hinge, "binary"),
    "categorical_hinge": LossFormula(categorical_hinge, "distribution"),
}


# What a query may be asked about instead of its training loss; Keras has no such losses.
QUERY_LOSSES: dict[str, LossFormula] = {
    "margin": LossFormula(margin, "class", "softmax"),
    "binary_margin": LossFormula(binary_margin, "binary", "sigmoid"),
    "logit": LossFormula(logit, "class", "softmax"),
    "entropy": LossFormula(entropy, "indices", "softmax"),
}
