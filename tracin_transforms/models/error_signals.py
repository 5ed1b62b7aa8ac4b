"""The error signals of a layer: a loss's formula where it enters the model, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from keras import ops

from tracin_transforms.core.errors import InputError
from tracin_transforms.models.taps import Tap
from tracin_transforms.models.training_loss import TrainingLoss, log_odds


@dataclass(frozen=True, eq=False)
class LossEnd:
    """Where the loss meets the model, from which gradients go back to its layers.

    Attributes:
        losses: Loss of each example, with its weight, shape [n], float64.
        loss_inputs: The logits or outputs that the loss takes, shape [n, ..., C], float64. Of
            sigmoids whose logits are hidden: logits again, to tell predictions by their signs.
    """

    losses: tf.Tensor
    loss_inputs: tf.Tensor
    _tape: tf.GradientTape
    _target: tf.Tensor
    _signal: tf.Tensor | None

    def signals(self, taps: Sequence[Tap]) -> list[tf.Tensor | None]:
        """Returns for each call its error signals ∂loss/∂(pre-activations), of their shape.

        None stands for a call that the loss does not depend on.
        """
        sources = [tap.pre_activations for tap in taps]
        if self._signal is None:
            signals: list[tf.Tensor | None] = self._tape.gradient(self._target, sources)
            return signals
        output_gradients = tf.cast(self._signal, self._target.dtype)
        signals = self._tape.gradient(self._target, sources, output_gradients=output_gradients)
        # Where the loss takes the pre-activations themselves, without the rounding to their dtype.
        return [
            self._signal if self._target is source else found
            for source, found in zip(sources, signals, strict=True)
        ]


def loss_end(
    loss: TrainingLoss,
    taps: Sequence[Tap],
    outputs: tf.Tensor,
    targets: tf.Tensor,
    rows: tf.Tensor,
    weights: tf.Tensor,
    tape: tf.GradientTape,
) -> LossEnd:
    """Returns the losses of a batch, and where their gradients start.

    A loss with a formula is computed in float64 from the logits, or from the outputs where it
    takes those; automatic differentiation leads from there to the layers. Another loss is
    differentiated as a whole.

    Args:
        loss: The loss.
        taps: The layers' calls.
        outputs: What the model gave for the batch, shape [n, ..., C].
        targets: As the examples have them.
        rows: What `core.targets.target_rows` made of them, shape [n, ..., C], float64.
        weights: Weight of each example's loss, shape [n], float64.
        tape: Has recorded the model's call; persistent.

    Raises:
        InputError: The model's end does not fit the loss.
    """
    taken = _taken_by_loss(loss, [tap.pre_activations for tap in taps], outputs)
    formula = loss.formula
    if formula is None or taken is None:
        # On the tape again: the loss is no part of the model.
        with tape:
            losses = losses_of_examples(loss, outputs, targets, rows, weights)
        return LossEnd(tf.cast(losses, tf.float64), _like_logits(loss, outputs), tape, losses, None)
    by_position, signal = formula.formula(ops, tf.cast(taken, tf.float64), rows, **loss.options)
    shares = _shares(loss, by_position, outputs, weights)
    return LossEnd(
        _example_sums(by_position * shares),
        tf.cast(taken, tf.float64),
        tape,
        taken,
        signal * shares[..., None],
    )


def losses_of_examples(
    loss: TrainingLoss, outputs: tf.Tensor, targets: tf.Tensor, rows: tf.Tensor, weights: tf.Tensor
) -> tf.Tensor:
    """Returns the losses by Keras's own function, shape [n], to be differentiated as a whole.

    The arguments are those of `loss_end`.
    """
    by_position = loss.by_position(outputs, targets, rows)
    shares = _shares(loss, by_position, outputs, weights)
    return _example_sums(by_position * tf.cast(shares, by_position.dtype))


def _shares(
    loss: TrainingLoss, by_position: tf.Tensor, outputs: tf.Tensor, weights: tf.Tensor
) -> tf.Tensor:
    """Returns what each position counts for in the loss of its example, shape [n, ...], float64.

    That is its part in the loss that Keras computes for a batch of this example alone: positions
    are averaged, without those that a mask excludes.
    """
    shape = tf.shape(by_position)
    shares = tf.reshape(weights, tf.concat([shape[:1], tf.ones_like(shape[1:])], axis=0))
    if by_position.shape.rank == 1:
        return shares
    counted = tf.ones(shape, tf.float64)
    # Keras leaves masks on the model's outputs and on what a loss returns; its losses look there.
    for tensor in (outputs, by_position):
        mask = getattr(tensor, "_keras_mask", None)
        if mask is not None:
            counted *= tf.cast(tf.broadcast_to(mask, shape), tf.float64)
    if loss.sums_positions:
        return shares * counted
    axes = list(range(1, by_position.shape.rank))
    return shares * tf.math.divide_no_nan(counted, tf.reduce_sum(counted, axes, keepdims=True))


def _example_sums(by_position: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(by_position, axis=list(range(1, by_position.shape.rank)))


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


def _like_logits(loss: TrainingLoss, outputs: tf.Tensor) -> tf.Tensor:
    outputs = tf.cast(outputs, tf.float64)
    return log_odds(outputs) if loss.takes_sigmoid and not loss.from_logits else outputs


def _misfit(loss: TrainingLoss, found: str, taken: str) -> str:
    return (
        f"there is {found} at its end, but the loss {loss.name!r} takes {taken} (from_logits "
        f"is {str(loss.from_logits).lower()}): correct from_logits, or the model's last activation"
    )
