"""The layers of a model, at any depth."""

import keras

from tracin_transforms.core.errors import InputError

LAST, ALL_DENSE = "last", "all-dense"


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the model and all layers in it, at any depth (Keras has no public name for this)."""
    return list(model._flatten_layers())


def candidate_layers(model: keras.Model, layers: str) -> list[keras.layers.Dense]:
    """Returns the dense layers that a choice may mean, in no particular order.

    Args:
        model: The model.
        layers: ``last``: the one that is called last, so any; ``all-dense``: all that are trained,
            without frozen ones; or names of layers, or their paths, separated by commas.

    Raises:
        InputError: There is none, or a name stands for no dense layer or for several.
    """
    dense = [layer for layer in all_layers(model) if isinstance(layer, keras.layers.Dense)]
    if not dense:
        raise InputError("the model has no Dense layer: expected at least one")
    if layers == LAST:
        return dense
    if layers != ALL_DENSE:
        # Once each, also if named twice.
        return list(dict.fromkeys(_by_name(dense, name.strip()) for name in layers.split(",")))
    trained = [layer for layer in dense if layer.trainable]
    if not trained:
        raise InputError("all Dense layers are frozen: name those to take nevertheless")
    return trained


def _by_name(dense: list[keras.layers.Dense], name: str) -> keras.layers.Dense:
    found = [layer for layer in dense if name in (layer.name, layer.path)]
    if len(found) != 1:
        known = ", ".join(sorted(layer.path for layer in dense))
        raise InputError(f"{len(found)} Dense layers are called {name!r}: expected one of {known}")
    return found[0]


def computes_in_float32(model: keras.Model) -> bool:
    """Returns whether every layer computes in float32."""
    return {layer.compute_dtype for layer in all_layers(model)} == {"float32"}


def input_shape(model: keras.Model) -> tuple[int | None, ...] | None:
    """Returns the shape of what a model with one input takes, (None, ...), where Keras knows it."""
    if getattr(model, "inputs", None):
        return tuple(model.inputs[0].shape)
    built = (model.get_build_config() or {}).get("input_shape")
    return (None, *built[1:]) if built else None
