"""Which layers of a loaded model compute in float64; weights stay as they were saved."""

import keras
import tensorflow as tf

from tracin_transforms.models.layers import all_layers, computes_in_float32, input_shape


def widen_head(model: keras.Model) -> None:
    """Lets the dense layers that are applied once per example compute in float64.

    These, behind the flattening or pooling of a network, add up the longest sums and are a small
    part of its work. An error signal is as exact, relatively, as the logits are absolutely: in
    float32 these layers alone would double its error. Layers of another precision than float32
    keep it: their rounding is part of the model. So do layers that a user's own code calls, which
    may not expect another dtype than its own.
    """
    _widen([layer for layer in _graph_layers(model) if _is_head(layer)])


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
    shape = input_shape(model)
    if shape is None or not computes_in_float32(model):
        return False
    dtype = model.inputs[0].dtype if getattr(model, "inputs", None) else "float32"
    widen(model)
    function = tf.function(lambda inputs: model(inputs, training=False), autograph=False)
    try:
        function.get_concrete_function(tf.TensorSpec(shape, dtype))
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


def _graph_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers that Keras itself calls, in nested models too."""
    if not getattr(model, "inputs", None):
        return []
    found = []
    for layer in model.layers:
        found += _graph_layers(layer) if isinstance(layer, keras.Model) else [layer]
    return found


def _is_head(layer: keras.layers.Layer) -> bool:
    kinds = keras.layers.Dense | keras.layers.Activation | keras.layers.Softmax
    if not isinstance(layer, kinds) or layer.compute_dtype != "float32":
        return False
    return _rank(layer) == 2


def _rank(layer: keras.layers.Layer) -> int | None:
    """Returns the number of axes of what the layer gives, or None where Keras does not say."""
    if config := layer.get_build_config():
        return len(config["input_shape"])
    try:
        # Layers without weights are not built; those of a functional model have one output.
        return len(layer.output.shape)
    except (AttributeError, ValueError):
        return None
