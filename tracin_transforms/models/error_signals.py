"""The error signals of a layer: a loss's formula where it enters the model, and the way back."""

import math
from typing import Any

import keras
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.models.taps import Tap
from tracin_transforms.models.training_loss import TrainingLoss


def error_signals(
    loss: TrainingLoss, tap: Tap, outputs: tf.Tensor, targets: tf.Tensor, tape: tf.GradientTape
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the losses of a batch and their derivative by a layer's pre-activations.

    A loss with a formula is computed in float64 from the logits, or from the outputs where it
    takes those; automatic differentiation leads from there to the layer. Another loss is
    differentiated as a whole.

    Args:
        loss: The training loss.
        tap: The layer's call.
        outputs: What the model gave for the batch, shape [n, ..., C].
        targets: What `core.losses.target_rows` returned, or, for a loss without a formula, the
            targets as they are.
        tape: Has recorded the model's call.

    Returns:
        The losses, shape [n], float64; the error signals ∂loss/∂(pre-activations), shape
        [n, ..., width], float64; and the logits or outputs, shape [n, ..., C], float64.

    Raises:
        InputError: The model's end does not fit the loss, or the loss does not depend on the
            layer.
    """
    taken = _taken_by_loss(loss, tap, outputs)
    formula = loss.formula
    if formula is None or taken is None:
        # Outside: the tape would otherwise miss the loss, which is no part of the model.
        with tape:
            losses = loss.keras_losses(targets, outputs)
        signals = tape.gradient(losses, tap.pre_activations)
        taken = outputs
    else:
        y = tf.cast(taken, tf.float64)
        by_position, signal = formula.formula(keras.ops, y, targets, **loss.options)
        # Keras averages over positions, where an example has several.
        losses = tf.reduce_mean(by_position, axis=list(range(1, by_position.shape.rank)))
        signals = signal / math.prod(taken.shape[1:-1])
        if taken is not tap.pre_activations:
            signals = tape.gradient(
                taken, tap.pre_activations, output_gradients=tf.cast(signals, taken.dtype)
            )
    if signals is None:
        raise InputError(
            f"the output does not depend on the last Dense layer {tap.layer.name!r}: expected the "
            "layer that leads to it"
        )
    return tf.cast(losses, tf.float64), tf.cast(signals, tf.float64), tf.cast(taken, tf.float64)


def _taken_by_loss(loss: TrainingLoss, tap: Tap, outputs: Any) -> tf.Tensor | None:
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
    if logits is None and outputs is tap.pre_activations:
        raise InputError(_misfit(loss, f"no {formula.end}", "probabilities"))
    return logits


def _misfit(loss: TrainingLoss, found: str, taken: str) -> str:
    return (
        f"there is {found} at its end, but the loss {loss.name!r} takes {taken} (from_logits "
        f"is {str(loss.from_logits).lower()}): correct from_logits, or the model's last activation"
    )
