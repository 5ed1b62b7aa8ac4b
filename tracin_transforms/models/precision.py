"""Which layers of a loaded model compute in float64; weights stay as they were saved."""

import keras


def widen_head(model: keras.Model) -> None:
    """Lets the dense layers that are applied once per example compute in float64.

    These, behind the flattening or pooling of a network, add up the longest sums and are a small
    part of its work. An error signal is as exact, relatively, as the logits are absolutely: in
    float32 these layers alone would double its error.
    """
    _widen([layer for layer in _all_layers(model) if _is_head(layer)])


def widen(model: keras.Model) -> None:
    """Lets the whole model compute in float64."""
    _widen(_all_layers(model))


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


def _all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the model and all layers in it, at any depth (Keras has no public name for this)."""
    return list(model._flatten_layers())


def _is_head(layer: keras.layers.Layer) -> bool:
    return (
        isinstance(layer, keras.layers.Dense) and len(layer.get_build_config()["input_shape"]) == 2
    )
