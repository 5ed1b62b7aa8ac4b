"""Which layers of a loaded model compute in float64; weights stay as they were saved."""

import keras

from tracin_transforms.models.layers import all_layers, computes_in_float32


def widen_head(model: keras.Model) -> None:
    """Lets the dense layers that are applied once per example compute in float64.

    These, behind the flattening or pooling of a network, add up the longest sums and are a small
    part of its work. An error signal is as exact, relatively, as the logits are absolutely: in
    float32 these layers alone would double its error. Layers of another precision than float32
    keep it: their rounding is part of the model.
    """
    _widen([layer for layer in all_layers(model) if _is_head(layer)])


def widen(model: keras.Model) -> None:
    """Lets the whole model compute in float64, if it computes in float32 now."""
    if not computes_in_float32(model):
        return
    layers = all_layers(model)
    _widen(layers)
    for layer in layers:
        if isinstance(layer, keras.layers.InputLayer) and layer not in model.layers:
            # A nested model casts its inputs to the dtype they were declared with; Keras has no
            # way to declare them anew.
            layer._dtype = layer.output._dtype = "float64"


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
