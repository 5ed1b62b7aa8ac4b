"""Which layers of a loaded model compute in float64; weights stay as they were saved."""

import math
from typing import Any

import keras
import tensorflow as tf

from tracin_transforms.models.layers import all_layers, computes_in_float32
from tracin_transforms.models.model_ends import input_structure
from tracin_transforms.models.taps import replace_call

# Kernels of so many numbers and more are multiplied in float32, for the time it takes.
_LARGE_KERNEL = 2**14
# Products that are added up in float32; what they give is added up in float64.
_PRODUCTS_PER_SUM = 128


FLOAT64 = "float64"
PRECISIONS = (FLOAT64, "float32", "mixed_bfloat16", "mixed_float16")


def set_precision(model: keras.Model, precision: str) -> None:
    """Lets a model compute in another precision than it was saved with.

    Args:
        model: The model.
        precision: One of `PRECISIONS` but float64, which `widen` is for. The mixed ones leave the
            head in float32, as they are meant for the many products of a network's body.
    """
    for layer in all_layers(model):
        if precision == "float32" or not _is_head(layer):
            layer.dtype_policy = keras.DTypePolicy(precision)


def widen_head(model: keras.Model) -> None:
    """Lets the dense layers that are applied once per example add up in float64.

    These, behind the flattening or pooling of a network, add up the longest sums. An error signal
    is as exact, relatively, as the logits are absolutely: in float32 these layers alone would
    double its error. Large ones multiply in float32 nevertheless and add up some products at a
    time, which takes half of the error away at a tenth of the cost.

    Layers of another precision than float32 keep it: their rounding is part of the model. So do
    layers that a user's own code calls, or that other operations than layers follow: these may not
    expect another dtype than their own.
    """
    for layer in _graph_layers(model):
        if not _is_head(layer):
            continue
        if type(layer) is keras.layers.Dense and math.prod(layer.kernel.shape) >= _LARGE_KERNEL:
            replace_call(layer, _call_in_parts(layer))
        else:
            _widen([layer])


def widen(model: keras.Model) -> None:
    """Lets the whole model compute in float64; see `can_be_widened`."""
    layers = all_layers(model)
    _widen(layers)
    for layer in layers:
        if isinstance(layer, keras.layers.InputLayer) and layer not in model.layers:
            # A nested model casts its inputs to the dtype they were declared with; Keras has no
            # way to declare them anew.
            layer._dtype = layer.output._dtype = "float64"


def can_be_widened(model: keras.Model) -> bool:
    """Returns whether a model computes in float32 now and could in float64.

    It could not if float32 is written into a layer's code. The model is of no use afterwards.
    """
    inputs = _input_specs(model)
    if inputs is None or not computes_in_float32(model):
        return False
    widen(model)
    function = tf.function(lambda inputs: model(inputs, training=False), autograph=False)
    try:
        function.get_concrete_function(inputs)
    # Whatever a layer's code raises for a dtype that it does not expect.
    except Exception:
        return False
    return True


class _Float64Compute(keras.DTypePolicy):
    """Variables in float32, everything computed from them in float64."""

    def __init__(self) -> None:
        super().__init__("float32")

    @property
    def compute_dtype(self) -> str:
        """What inputs and variables are cast to."""
        return "float64"


def _widen(layers: list[keras.layers.Layer]) -> None:
    for layer in layers:
        layer.dtype_policy = _Float64Compute()


def _call_in_parts(layer: keras.layers.Dense) -> Any:
    def call(inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        kernel = tf.convert_to_tensor(layer.kernel)
        width = kernel.shape[0]
        sums = [
            tf.cast(tf.matmul(inputs[..., start:end], kernel[start:end]), tf.float64)
            for start, end in _parts(width)
        ]
        outputs = tf.add_n(sums)
        if layer.bias is not None:
            outputs += tf.cast(layer.bias, tf.float64)
        return outputs if layer.activation is None else layer.activation(outputs)

    return call


def _parts(width: int) -> list[tuple[int, int]]:
    number = -(-width // _PRODUCTS_PER_SUM)
    edges = [width * i // number for i in range(number + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _input_specs(model: keras.Model) -> Any:
    """Returns specs of what a model takes, where Keras knows it."""
    if getattr(model, "inputs", None):
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in model.inputs]
        return keras.tree.pack_sequence_as(input_structure(model), specs)
    built = (model.get_build_config() or {}).get("input_shape")
    return tf.TensorSpec((None, *built[1:]), "float32") if built else None


def _graph_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers that Keras itself calls, and whose outputs it gives to other layers."""
    if not getattr(model, "inputs", None):
        return []
    found = []
    for layer in model.layers:
        # Layers cast what they are given; other operations compute in its dtype.
        if all(isinstance(node.operation, keras.layers.Layer) for node in layer._outbound_nodes):
            found += _graph_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def _is_head(layer: keras.layers.Layer) -> bool:
    # Not what a user derived from them, whose code may do something else.
    kinds = (keras.layers.Dense, keras.layers.Activation, keras.layers.Softmax)
    if type(layer) not in kinds or layer.compute_dtype != "float32":
        return False
    activation = getattr(layer, "activation", None)
    is_own = getattr(activation, "__module__", "keras.").startswith("keras.")
    return is_own and _ranks(layer) == {2}


def _ranks(layer: keras.layers.Layer) -> set[int]:
    """Returns the numbers of axes of what the layer gives, in all places where Keras calls it."""
    return {len(node.outputs[0].shape) for node in layer._inbound_nodes}
