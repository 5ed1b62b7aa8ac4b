"""TensorFlow's checkpoints, of Keras 3 and of Keras 2, and SavedModels, as weights of a model.

Keras 2 numbers the layers that have weights: ``layer_with_weights-3/kernel``. Keras 3 names
objects by their place in the model, and what `model.export` writes only numbers the variables.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from tracin_transforms.core.errors import InputError

_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
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
    if not reader.has_tensor(_GRAPH):
        raise InputError("it is a checkpoint of TensorFlow 1: expected one of tf.train.Checkpoint")
    objects = _Objects(TrackableObjectGraph.FromString(reader.get_tensor(_GRAPH)))
    root = objects.nearest_with(f"{_KERAS_2}0")
    if root is not None:
        _assign(reader, _keras_2_keys(model, objects, root))
    elif objects.child(0, "_all_variables") is not None:
        variables = objects.child(0, "variables")
        _assign(
            reader,
            (
                (variable, objects.key(objects.child(variables, str(i))))
                for i, variable in enumerate(model.variables)
            ),
        )
    else:
        _read_objects(model, _prefix(path), objects.names(0))


def _prefix(path: str) -> str:
    return str(Path(path) / "variables" / "variables") if Path(path).is_dir() else path


class _Objects:
    """The objects of a checkpoint, by number, with the names of their children."""

    def __init__(self, graph: Any) -> None:
        self._nodes = graph.nodes
        self._children = [{c.local_name: c.node_id for c in node.children} for node in graph.nodes]

    def names(self, node: int) -> list[str]:
        """Returns the names of an object's children that have children of their own."""
        return [name for name, child in self._children[node].items() if self._children[child]]

    def child(self, node: int | None, name: str) -> int | None:
        """Returns a child, or None if there is none of that name."""
        return None if node is None else self._children[node].get(name)

    def key(self, node: int | None) -> str | None:
        """Returns the name under which a variable's value is stored, or None if it has none."""
        attributes = [] if node is None else self._nodes[node].attributes
        return attributes[0].checkpoint_key if attributes else None

    def nearest_with(self, name: str) -> int | None:
        """Returns the object nearest to the root that has a child of that name."""
        level, seen = [0], {0}
        while level:
            for node in level:
                if name in self._children[node]:
                    return node
            level = [c for node in level for c in self._children[node].values() if c not in seen]
            seen.update(level)
        return None


def _keras_2_keys(
    model: keras.Model, objects: _Objects, root: int | None
) -> list[tuple[keras.Variable, str | None]]:
    found: list[tuple[keras.Variable, str | None]] = []
    weighted = (layer for layer in model.layers if _weights(layer))
    for i, layer in enumerate(weighted):
        there = objects.child(root, f"{_KERAS_2}{i}")
        if isinstance(layer, keras.Model):
            found += _keras_2_keys(layer, objects, there)
        else:
            found += [(v, objects.key(objects.child(there, v.name))) for v in _weights(layer)]
    return found


def _weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns a layer's variables without seeds, which are state of Keras 3 alone."""
    return [v for v in layer.variables if not np.issubdtype(v.dtype, np.integer)]


def _assign(reader: Any, keys: Iterable[tuple[keras.Variable, str | None]]) -> None:
    shapes, pairs = reader.get_variable_to_shape_map(), list(keys)
    for variable, key in pairs:
        if key is None or tuple(shapes[key]) != tuple(variable.shape):
            there = "it has none" if key is None else f"it has one of shape {tuple(shapes[key])}"
            raise InputError(
                f"variable {variable.path!r} of the model has shape {tuple(variable.shape)}, but "
                f"{there}: expected the weights of this very network"
            )
    for variable, key in pairs:
        variable.assign(reader.get_tensor(key))


def _read_objects(model: keras.Model, prefix: str, roots: list[str]) -> None:
    """Reads a checkpoint of Keras 3, whatever name the model was given in it."""
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
