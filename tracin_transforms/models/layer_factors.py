"""From what was noted of dense layers' calls to their gradient factors, within a compiled call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

from tracin_transforms.models.taps import Tap


@dataclass(frozen=True, eq=False)
class ChosenLayer:
    """A layer whose factors are taken.

    Attributes:
        layer: The layer.
        materialised: Whether its factors are the gradient itself, kernel and bias, as the
            activation of an error signal that is 1. That is smaller where positions are many.
    """

    layer: keras.layers.Dense
    materialised: bool

    @property
    def has_bias(self) -> bool:
        """Whether products of its factors have the bias still to be added."""
        return self.layer.use_bias and not self.materialised


def layer_factors(
    taps: Sequence[Tap], signals: Sequence[tf.Tensor | None]
) -> tuple[list[ChosenLayer], list[tf.Tensor]]:
    """Returns the layers that the loss depends on, and their factors.

    Args:
        taps: Calls of layers; those of one layer are positions of it.
        signals: The error signals of each call, or None.

    Returns:
        The layers in the order of their first calls; activations and error signals of each in
        turn, shape [n, width] or [n, positions, width], float32.
    """
    calls: dict[int, list[tuple[Tap, tf.Tensor]]] = {}
    for tap, signal in zip(taps, signals, strict=True):
        if signal is not None:
            calls.setdefault(id(tap.layer), []).append((tap, signal))
    chosen: list[ChosenLayer] = []
    factors: list[tf.Tensor] = []
    for found in calls.values():
        layer = found[0][0].layer
        e = _joined([signal for _, signal in found])
        h = _joined([tap.activations for tap, _ in found])
        chosen.append(ChosenLayer(layer, _is_smaller_materialised(layer, e, h)))
        factors += _materialise(layer, e, h) if chosen[-1].materialised else (h, e)
    return chosen, factors


def _joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns tensors [n, ..., width] as one: [n, width] or, at positions, [n, P, width]."""
    if len(tensors) == 1 and len(tensors[0].shape) == 2:
        return tf.cast(tensors[0], tf.float32)
    by_position = [
        tf.reshape(tf.cast(t, tf.float32), [-1, math.prod(t.shape[1:-1]), t.shape[-1]])
        for t in tensors
    ]
    return tf.concat(by_position, axis=1)


def _is_smaller_materialised(layer: keras.layers.Dense, e: tf.Tensor, h: tf.Tensor) -> bool:
    if len(e.shape) == 2:
        return False
    outputs, width = e.shape[-1], h.shape[-1]
    return bool(outputs * (width + layer.use_bias) <= e.shape[1] * (outputs + width))


def _materialise(layer: keras.layers.Dense, e: tf.Tensor, h: tf.Tensor) -> list[tf.Tensor]:
    size = e.shape[-1] * h.shape[-1]
    parts = [tf.reshape(tf.matmul(e, h, transpose_a=True), [-1, size])]
    if layer.use_bias:
        parts.append(tf.reduce_sum(e, axis=1))
    return [tf.concat(parts, axis=1), tf.ones_like(e[:, 0, :1])]
