"""From what was noted of layers' calls to their gradient factors, within a compiled call."""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.models.taps import Tap
from tracin_transforms.models.weight_matrices import WeightMatrix, weight_matrices


@dataclass(frozen=True, eq=False)
class ChosenMatrix:
    """A weight of a layer whose factors are taken.

    Attributes:
        layer: The layer.
        matrix: Which of its weights.
        materialised: Whether its factors are the gradient itself, kernel and bias, as the
            activation of an error signal that is 1. That is smaller where positions are many.
    """

    layer: keras.layers.Layer
    matrix: WeightMatrix
    materialised: bool

    @property
    def has_bias(self) -> bool:
        """Whether products of its factors have the bias still to be added."""
        return self.matrix.bias is not None and not self.materialised

    @property
    def groups(self) -> int:
        """Groups of the factors."""
        return 1 if self.materialised else self.matrix.groups


def layer_factors(
    taps: Sequence[Tap], signals: Sequence[tf.Tensor | None], any_length: bool
) -> tuple[list[ChosenMatrix], list[tf.Tensor]]:
    """Returns the weights that the loss depends on, and their factors.

    Args:
        taps: Calls of layers; those of one layer are positions of it.
        signals: The error signals of each call, or None.
        any_length: Whether other examples may have other numbers of positions. Then nothing is
            materialised: the form of the factors must not depend on that number.

    Returns:
        The weights in the order of their layers' first calls; activations and error signals of
        each in turn, shape [n, width] or [n, positions, width], as `LayerFactors` takes them.

    Raises:
        InputError: A layer is of a form that is not supported, or is called at an unknown number
            of positions.
    """
    calls: dict[int, list[tuple[Tap, tf.Tensor]]] = {}
    for tap, signal in zip(taps, signals, strict=True):
        if signal is not None:
            _check_positions(tap)
            calls.setdefault(id(tap.layer), []).append((tap, signal))
    chosen: list[ChosenMatrix] = []
    factors: list[tf.Tensor] = []
    for found in calls.values():
        layer = found[0][0].layer
        for matrix in weight_matrices(layer):
            h, e = _joined(matrix, found)
            materialised = not any_length and _is_smaller_materialised(matrix, h, e)
            chosen.append(ChosenMatrix(layer, matrix, materialised))
            factors += _materialise(matrix, h, e) if materialised else _one_position(h, e)
    return chosen, factors


def _check_positions(tap: Tap) -> None:
    if None in (*tap.inputs.shape[1:], *tap.pre_activations.shape[1:]):
        raise InputError(
            f"layer {tap.layer.name!r} is called at a number of positions that is not known "
            f"before (shape {tuple(tap.inputs.shape)}): expected inputs of a fixed shape"
        )


def _joined(
    matrix: WeightMatrix, calls: Sequence[tuple[Tap, tf.Tensor]]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the factors of all calls as positions of one, [n, P, width]."""
    dtype = tf.int32 if matrix.is_one_hot else tf.float32
    pairs = []
    for tap, signal in calls:
        x = tap.inputs if tap.inputs.dtype.is_integer else tf.cast(tap.inputs, tf.float32)
        h, e = matrix.factors(x, tf.cast(signal, tf.float32))
        pairs.append((tf.cast(h, dtype), e))
    activations, signals = zip(*pairs, strict=True)
    return tf.concat(activations, axis=1), tf.concat(signals, axis=1)


def _one_position(h: tf.Tensor, e: tf.Tensor) -> list[tf.Tensor]:
    """Returns factors of a single position as [n, width]."""
    return [h[:, 0], e[:, 0]] if e.shape[1] == 1 else [h, e]


def _is_smaller_materialised(matrix: WeightMatrix, h: tf.Tensor, e: tf.Tensor) -> bool:
    positions = e.shape[1]
    if positions == 1 and not matrix.is_one_hot:
        return False
    bias = e.shape[2] if matrix.bias is not None else 0
    gradient = matrix.variable.value.shape.num_elements() + bias
    return bool(gradient <= positions * (h.shape[2] + e.shape[2]))


def _materialise(matrix: WeightMatrix, h: tf.Tensor, e: tf.Tensor) -> list[tf.Tensor]:
    if matrix.is_one_hot:
        h = tf.one_hot(h[..., 0], matrix.variable.shape[0], dtype=tf.float32)
    n, positions = tf.shape(e)[0], e.shape[1]
    h, e_by_group = (
        tf.reshape(part, [n, positions, matrix.groups, part.shape[2] // matrix.groups])
        for part in (h, e)
    )
    size = matrix.groups * e_by_group.shape[3] * h.shape[3]
    parts = [tf.reshape(tf.einsum("npgc,npgd->ngcd", e_by_group, h), [n, size])]
    if matrix.bias is not None:
        parts.append(tf.reduce_sum(e, axis=1))
    return [tf.concat(parts, axis=1), tf.ones_like(e[:, 0, :1])]
