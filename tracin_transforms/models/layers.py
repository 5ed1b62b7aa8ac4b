"""The layers of a model, at any depth, and which of them a choice means."""

import keras

from tracin_transforms.core.errors import InputError
from tracin_transforms.models.linear_maps import DENSE_KINDS
from tracin_transforms.models.weight_matrices import is_supported

LAST, ALL_DENSE, ALL = "last", "all-dense", "all"


def all_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the model and all layers in it, at any depth (Keras has no public name for this)."""
    return list(model._flatten_layers())


def candidate_layers(model: keras.Model, layers: str) -> list[keras.layers.Layer]:
    """Returns the layers that a choice may mean, in no particular order.

    Args:
        model: The model.
        layers: ``last``: the dense one that is called last, so any; ``all-dense``: all Dense and
            EinsumDense layers; ``all``: convolutions and embeddings too. Frozen layers have no
            part in training and are left out. Or names of layers, or their paths, separated by
            commas, frozen or not.

    Raises:
        InputError: There is none, or a name stands for no layer with factors, or for several.
    """
    # A layer that is not built was never called.
    every = [layer for layer in all_layers(model) if layer.built and is_supported(layer)]
    if layers not in (LAST, ALL_DENSE, ALL):
        # Once each, also if named twice.
        names = [name.strip() for name in layers.split(",")]
        return list(dict.fromkeys(_by_name(model, every, name) for name in names))
    what = "Dense or EinsumDense" if layers != ALL else "Dense, convolutional or Embedding"
    found = every if layers == ALL else [x for x in every if isinstance(x, DENSE_KINDS)]
    if not found:
        others = ", ".join(layer.name for layer in every)
        hint = f", or one of its layers {others} with --layers" if others else ""
        raise InputError(f"the model has no {what} layer: expected at least one{hint}")
    trained = [layer for layer in found if layer.trainable]
    if not trained:
        raise InputError(f"all {what} layers are frozen: name those to take nevertheless")
    return trained


def check_not_quantised(model: keras.Model, what: str) -> None:
    """Raises InputError if any layer is quantised: its weights are not those that were trained.

    The message begins with `what`.
    """
    for layer in all_layers(model):
        if getattr(layer, "quantization_mode", None) is not None:
            raise InputError(
                f"{what}: layer {layer.name!r} is quantised to {layer.quantization_mode}: "
                "expected a model with weights as they were trained"
            )


def check_recordable(model: keras.Model, what: str) -> str:
    """Returns the first choice of layers, of ``last`` and ``all``, that a model has.

    Raises:
        InputError: It has no layer with factors, or one is quantised; the message begins with
            `what`.
    """
    check_not_quantised(model, what)
    try:
        candidate_layers(model, LAST)
    except InputError:
        try:
            candidate_layers(model, ALL)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        return ALL
    return LAST


def _by_name(model: keras.Model, every: list[keras.layers.Layer], name: str) -> keras.layers.Layer:
    found = [layer for layer in every if name in (layer.name, layer.path)]
    if len(found) == 1:
        return found[0]
    others = [layer for layer in all_layers(model)[1:] if name in (layer.name, layer.path)]
    if others and not found:
        raise InputError(
            f"layer {name!r} is a {type(others[0]).__name__}: expected a Dense, EinsumDense, "
            "Conv1D, Conv2D, DepthwiseConv1D, DepthwiseConv2D or Embedding layer"
        )
    known = ", ".join(sorted(layer.path for layer in every))
    raise InputError(
        f"{len(found)} layers are called {name!r}: expected one of {known}; or {LAST}, {ALL_DENSE} "
        f"or {ALL}"
    )


def computes_in_float32(model: keras.Model) -> bool:
    """Returns whether every layer computes in float32."""
    return {layer.compute_dtype for layer in all_layers(model)} == {"float32"}
