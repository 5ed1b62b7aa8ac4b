"""The last dense layer of a model: where it is, and a model that ends at its input."""

from dataclasses import dataclass
from typing import Any

import keras

from tracin_transforms.core.errors import InputError


@dataclass(frozen=True, eq=False)
class LastDense:
    """The dense layer whose pre-activations are the logits.

    Attributes:
        layer: The layer.
        until_input: Model from the whole model's input to the layer's activations [n, d].
        softmax: Whether a softmax follows, in the layer itself or behind it.
    """

    layer: keras.layers.Dense
    until_input: keras.Model
    softmax: bool


def find_last_dense(model: keras.Model, checkpoint_id: str) -> LastDense:
    """Returns the last dense layer of a functional or sequential model.

    Raises:
        InputError: The model is of another kind, does not end in a dense layer with at most a
            softmax behind it, or does not compute in float32; the message says which.
    """
    where = f"checkpoint {checkpoint_id!r}: model {model.name!r}"
    # Only models that Keras knows the graph of have inputs; Keras has no public class for them.
    if not getattr(model, "inputs", None):
        raise InputError(
            f"{where} is a {type(model).__name__}: expected a functional or sequential model"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise InputError(
            f"{where} has {len(model.inputs)} inputs and {len(model.outputs)} outputs: "
            "expected one of each"
        )
    activations: list[Any] = []
    tensor = model.outputs[0]
    operation = _operation(tensor)
    while isinstance(operation, keras.layers.Activation | keras.layers.Softmax):
        activations.append(operation)
        tensor = operation.input
        operation = _operation(tensor)
    if not isinstance(operation, keras.layers.Dense):
        raise InputError(
            f"{where} ends in {type(operation).__name__} {operation.name!r}: expected a Dense "
            "layer, with at most a softmax behind it"
        )
    activations.append(operation)
    kinds = [_activation_name(layer) for layer in activations]
    others = [kind for kind in kinds if kind not in ("linear", "softmax")]
    if others or kinds.count("softmax") > 1:
        raise InputError(
            f"{where} has the activations {kinds[::-1]} from its last Dense layer on: expected "
            "at most one softmax"
        )
    source = operation.input
    if len(source.shape) != 2:
        raise InputError(
            f"{where}: Dense layer {operation.name!r} takes an input of shape "
            f"{tuple(source.shape)}: expected [examples, width]"
        )
    policies = {layer.compute_dtype for layer in model.layers}
    if policies != {"float32"}:
        raise InputError(f"{where} computes in {sorted(policies)}: expected float32 only")
    return LastDense(
        layer=operation,
        until_input=keras.Model(model.inputs, source),
        softmax="softmax" in kinds,
    )


def _operation(tensor: Any) -> Any:
    """Returns the layer that made a symbolic tensor (Keras has no public name for this)."""
    return tensor._keras_history.operation


def _activation_name(layer: Any) -> str:
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    return str(layer.activation.__name__)
