"""TensorFlow's checkpoints, of Keras 3 and of Keras 2, and SavedModels, as weights of a model.

Keras 2 numbers the layers that have weights: ``layer_with_weights-3/kernel``. Keras 3 names
objects by their place in the model, and what `model.export` writes only numbers the variables.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError

_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_KERAS_2 = "layer_with_weights-"


def is_tf_checkpoint(path: str) -> bool:
    """Returns whether a path is that of a SavedModel, or the prefix of a checkpoint's files."""
    return Path(f"{_prefix(path)}.index").is_file()


def read_tf_checkpoint(model: keras.Model, path: str) -> None:
    """Sets the variables of a model to what a checkpoint or SavedModel holds.

    Raises:
        InputError: It does not have all of them, of the same shapes.
    """
    reader = tf.train.load_checkpoint(_prefix(path))
    keys = [key for key in reader.get_variable_to_shape_map() if key.endswith(_SUFFIX)]
    legacy = [key for key in keys if re.search(rf"(^|/){_KERAS_2}\d+/", key)]
    if legacy:
        root = min((key[: key.index(_KERAS_2)] for key in legacy), key=len)
        names = [(root + name, variable) for name, variable in _keras_2_names(model)]
    elif f"variables/0{_SUFFIX}" in keys:
        names = [(f"variables/{i}", variable) for i, variable in enumerate(model.variables)]
    else:
        _read_objects(model, _prefix(path), keys)
        return
    _assign(reader, names)


def _prefix(path: str) -> str:
    return str(Path(path) / "variables" / "variables") if Path(path).is_dir() else path


def _keras_2_names(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    weighted = (layer for layer in model.layers if layer.variables)
    for i, layer in enumerate(weighted):
        if isinstance(layer, keras.Model):
            inner: Any = _keras_2_names(layer)
        else:
            # Seeds are state of Keras 3 alone.
            inner = ((v.name, v) for v in layer.variables if not np.issubdtype(v.dtype, np.integer))
        for name, variable in inner:
            yield f"{_KERAS_2}{i}/{name}", variable


def _assign(reader: Any, names: list[tuple[str, keras.Variable]]) -> None:
    shapes = reader.get_variable_to_shape_map()
    for name, variable in names:
        found = shapes.get(name + _SUFFIX)
        if found is None or tuple(found) != tuple(variable.shape):
            there = "it has none" if found is None else f"it has {name!r} of shape {tuple(found)}"
            raise InputError(
                f"variable {variable.path!r} of the model has shape {tuple(variable.shape)}, but "
                f"{there}: expected the weights of this very network"
            )
    for name, variable in names:
        variable.assign(reader.get_tensor(name + _SUFFIX))


def _read_objects(model: keras.Model, prefix: str, keys: list[str]) -> None:
    """Reads a checkpoint of Keras 3, whatever name the model was given in it."""
    # Not what is a variable itself, such as the counter of saves.
    roots = sorted({key.split("/")[0] for key in keys if "/" in key.removesuffix(_SUFFIX)})
    problem = "it holds no variables"
    for arguments, names in [((model,), {}), *(((), {root: model}) for root in roots)]:
        try:
            objects = tf.train.Checkpoint(*arguments, **names)
            objects.read(prefix).assert_existing_objects_matched()
        except (AssertionError, ValueError) as error:
            problem = " ".join(str(error).split())
        else:
            return
    raise InputError(
        f"its weights cannot be loaded into model {model.name!r}: {problem:.200}; expected a "
        f"checkpoint of this very network (it has {', '.join(roots)[:100]})"
    )
