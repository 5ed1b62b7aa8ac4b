"""The layers of a model, at any depth."""

import keras


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the model and all layers in it, at any depth (Keras has no public name for this)."""
    return list(model._flatten_layers())


def dense_layers(model: keras.Model) -> list[keras.layers.Dense]:
    """Returns all dense layers of the model."""
    return [layer for layer in all_layers(model) if isinstance(layer, keras.layers.Dense)]


def computes_in_float32(model: keras.Model) -> bool:
    """Returns whether every layer computes in float32."""
    return {layer.compute_dtype for layer in all_layers(model)} == {"float32"}
