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


def find_last_dense(model: keras.Model, what: str) -> LastDense:
    """Returns the last dense layer of a functional or sequential model.

    Args:
        model: The model.
        what: What to call the model in messages.

    Raises:
        InputError: The model is of another kind, does not end in a dense layer with at most a
            softmax behind it, or does not compute in float32; the message says which.
    """
    # Only models that Keras knows the graph of have inputs; Keras has no public class for them.
    if not getattr(model, "inputs", None):
        raise InputError(
            f"{what} is a {type(model).__name__}: expected a functional or sequential model"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise InputError(
            f"{what} has {len(model.inputs)} inputs and {len(model.outputs)} outputs: "
            "expected one of each"
        )
    operation, kinds = _last_dense_and_activations(model)
    if not isinstance(operation, keras.layers.Dense):
        raise InputError(
            f"{what} ends in {type(operation).__name__} {operation.name!r}: expected a Dense "
            "layer, with at most a softmax behind it"
        )
    others = [kind for kind in kinds if kind not in ("linear", "softmax")]
    if others or kinds.count("softmax") > 1:
        raise InputError(
            f"{what} has the activations {kinds} from its last Dense layer on: expected "
            "at most one softmax"
        )
    source = operation.input
    if len(source.shape) != 2:
        raise InputError(
            f"{what}: Dense layer {operation.name!r} takes an input of shape "
            f"{tuple(source.shape)}: expected [examples, width]"
        )
    policies = {layer.compute_dtype for layer in all_layers(model)}
    if policies != {"float32"}:
        raise InputError(f"{what} computes in {sorted(policies)}: expected float32 only")
    return LastDense(
        layer=operation,
        until_input=keras.Model(model.inputs, source),
        softmax="softmax" in kinds,
    )


def check_end(dense: LastDense, loss: str, from_logits: bool, what: str) -> None:
    """Raises InputError if the model's end is not what its loss takes.

    Args:
        dense: The model's last dense layer.
        loss: Name of the loss.
        from_logits: Whether the loss takes logits.
        what: What to call the model in messages.
    """
    if dense.softmax == from_logits:
        found = "a softmax" if dense.softmax else "no softmax"
        wanted = "logits" if from_logits else "probabilities"
        raise InputError(
            f"{what} has {found} at its end, but the loss {loss!r} takes {wanted} (from_logits is "
            f"{str(from_logits).lower()}): correct from_logits, or the model's last activation"
        )


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the model and all layers in it, at any depth (Keras has no public name for this)."""
    return list(model._flatten_layers())


def _last_dense_and_activations(model: keras.Model) -> tuple[Any, list[str]]:
    """Returns the last layer that is not an activation, and the activations from it on."""
    kinds: list[str] = []
    operation = _operation(model.outputs[0])
    while isinstance(operation, keras.layers.Activation | keras.layers.Softmax):
        kinds.insert(0, _activation_name(operation))
        operation = _operation(operation.input)
    if isinstance(operation, keras.layers.Dense):
        kinds.insert(0, _activation_name(operation))
    return operation, kinds


def _operation(tensor: Any) -> Any:
    """Returns the layer that made a symbolic tensor (Keras has no public name for this)."""
    return tensor._keras_history.operation


def _activation_name(layer: Any) -> str:
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    # A layer may serve as an activation; it has no __name__.
    return str(getattr(layer.activation, "__name__", type(layer.activation).__name__))
