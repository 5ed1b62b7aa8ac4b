"""Notes what goes into layers, and what comes out of them before their activation."""

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
        inputs: What it was given, shape [n, ...].
        pre_activations: What it gave before its activation, shape [n, ...], watched by the tape.
    """

    layer: keras.layers.Layer
    inputs: tf.Tensor
    pre_activations: tf.Tensor


@contextlib.contextmanager
def tapped(layers: Sequence[keras.layers.Layer], tape: tf.GradientTape) -> Iterator[list[Tap]]:
    """Notes every call of the layers within the block, in order, wherever they are in a model.

    Args:
        layers: Layers whose call applies their attribute `activation`, if they have one, last.
        tape: Is made to watch the pre-activations.
    """
    taps: list[Tap] = []
    with contextlib.ExitStack() as replacements:
        for layer in layers:
            call = _tapped_call(layer, tape, taps)
            replacements.enter_context(_replaced(layer, "call", call))
        yield taps


def replace_call(layer: keras.layers.Layer, call: Callable[..., Any]) -> None:
    """Lets a layer compute something else from now on."""
    # Past Keras's own __setattr__, which would take it for a part of the layer's state.
    object.__setattr__(layer, "call", call)


@contextlib.contextmanager
def _replaced(layer: keras.layers.Layer, name: str, value: Any) -> Iterator[None]:
    own = vars(layer).get(name)
    object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        if own is None:
            object.__delattr__(layer, name)
        else:
            object.__setattr__(layer, name, own)


def _tapped_call(
    layer: keras.layers.Layer, tape: tf.GradientTape, taps: list[Tap]
) -> Callable[..., Any]:
    call, activation = layer.call, getattr(layer, "activation", None)

    def tapped_call(inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        with contextlib.ExitStack() as replacements:
            if activation is not None:
                linear = keras.activations.linear
                replacements.enter_context(_replaced(layer, "activation", linear))
            pre_activations = call(inputs, *arguments, **keywords)
        tape.watch(pre_activations)
        taps.append(Tap(layer, inputs, pre_activations))
        return pre_activations if activation is None else activation(pre_activations)

    return tapped_call
