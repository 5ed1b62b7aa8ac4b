"""The error signals of a layer: a loss's formula where it enters the model, and the way back."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.models.taps import Tap
from tracin_transforms.models.training_loss import TrainingLoss


def error_signals(
    loss: TrainingLoss,
    taps: Sequence[Tap],
    outputs: tf.Tensor,
    targets: tf.Tensor,
    tape: tf.GradientTape,
) -> tuple[tf.Tensor, list[tf.Tensor | None], tf.Tensor]:
    """Returns the losses of a batch and their derivatives by layers' pre-activations.

    A loss with a formula is computed in float64 from the logits, or from the outputs where it
    takes those; automatic differentiation leads from there to the layers. Another loss is
    differentiated as a whole.

    Args:
        loss: The training loss.
        taps: The layers' calls.
        outputs: What the model gave for the batch, shape [n, ..., C].
        targets: What `core.losses.target_rows` returned, or, for a loss without a formula, the
            targets as they are.
        tape: Has recorded the model's call.

    Returns:
        The losses, shape [n], float64; for each call its error signals ∂loss/∂(pre-activations),
        shape [n, ..., width], or None where the loss does not depend on it; and the logits or
        outputs, shape [n, ..., C], float64.

    Raises:
        InputError: The model's end does not fit the loss.
    """
    sources = [tap.pre_activations for tap in taps]
    taken = _taken_by_loss(loss, sources, outputs)
    formula = loss.formula
    if formula is None or taken is None:
        # On the tape again: the loss is no part of the model.
        with tape:
            losses = loss.keras_losses(targets, outputs)
        signals = tape.gradient(losses, sources)
        return tf.cast(losses, tf.float64), signals, tf.cast(outputs, tf.float64)
    by_position, signal = formula.formula(
        keras.ops, tf.cast(taken, tf.float64), targets, **loss.options
    )
    # Keras averages over positions, where an example has several.
    losses = tf.reduce_mean(by_position, axis=list(range(1, by_position.shape.rank)))
    signal = signal / math.prod(taken.shape[1:-1])
    signals = tape.gradient(taken, sources, output_gradients=tf.cast(signal, taken.dtype))
    # Where the loss takes the pre-activations themselves, without the rounding to their dtype.
    exact = [signal if taken is s else found for s, found in zip(sources, signals, strict=True)]
    return losses, exact, tf.cast(taken, tf.float64)


def _taken_by_loss(loss: TrainingLoss, sources: list[tf.Tensor], outputs: Any) -> tf.Tensor | None:
    """Returns the tensor that the formula takes; None if the model hides it."""
    formula = loss.formula
    if formula is None or formula.end is None:
        return outputs
    # Keras leaves the logits on what its softmax and sigmoid return; its losses look there too.
    logits = getattr(outputs, "_keras_logits", None)
    if loss.from_logits:
        if logits is not None:
            raise InputError(_misfit(loss, f"a {formula.end}", "logits"))
        return outputs
    if logits is None and any(outputs is source for source in sources):
        raise InputError(_misfit(loss, f"no {formula.end}", "probabilities"))
    return logits


def _misfit(loss: TrainingLoss, found: str, taken: str) -> str:
    return (
        f"there is {found} at its end, but the loss {loss.name!r} takes {taken} (from_logits "
        f"is {str(loss.from_logits).lower()}): correct from_logits, or the model's last activation"
    )
