"""Notes what goes into dense layers, and what comes out of them before their activation."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf


@dataclass(frozen=True, eq=False)
class Tap:
    """One call of a layer.

    Attributes:
        layer: The layer.
        activations: Its input, shape [n, ..., d].
        pre_activations: W h + b, shape [n, ..., C], watched by the tape.
    """

    layer: keras.layers.Layer
    activations: tf.Tensor
    pre_activations: tf.Tensor


@contextlib.contextmanager
def tapped(layers: Sequence[keras.layers.Layer], tape: tf.GradientTape) -> Iterator[list[Tap]]:
    """Notes every call of the layers within the block, in order, wherever they are in a model.

    Args:
        layers: Dense layers.
        tape: Is made to watch the pre-activations.
    """
    taps: list[Tap] = []
    for layer in layers:
        # Past Keras's own __setattr__, which would take it for a part of the layer's state.
        object.__setattr__(layer, "call", _tapped_call(layer, tape, taps))
    try:
        yield taps
    finally:
        for layer in layers:
            object.__delattr__(layer, "call")


def _tapped_call(
    layer: keras.layers.Layer, tape: tf.GradientTape, taps: list[Tap]
) -> Callable[..., Any]:
    call = layer.call

    def tapped_call(inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        activation = layer.activation
        object.__setattr__(layer, "activation", None)
        try:
            pre_activations = call(inputs, *arguments, **keywords)
        finally:
            object.__setattr__(layer, "activation", activation)
        tape.watch(pre_activations)
        taps.append(Tap(layer, inputs, pre_activations))
        return pre_activations if activation is None else activation(pre_activations)

    return tapped_call
