"""Loading checkpoints as Keras models, without running what an untrusted file may contain."""

from typing import Any

import keras

from tracin_transforms.core.checkpoints import Checkpoint
from tracin_transforms.core.errors import InputError

_FLOAT32 = {"name": "float32"}


def load_model(checkpoint: Checkpoint) -> keras.Model:
    """Returns the model of a ``.keras`` checkpoint, loaded in Keras's safe mode.

    Raises:
        InputError: Not a Keras model, or one that safe mode refuses (a Lambda layer); Keras runs
            on a backend other than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"Keras runs on the backend {keras.backend.backend()!r}, expected 'tensorflow': "
            "set KERAS_BACKEND=tensorflow"
        )
    try:
        model = keras.saving.load_model(checkpoint.path, compile=False, safe_mode=True)
    # Keras raises many kinds of exceptions for files that are not what it expects.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"checkpoint {checkpoint.id!r}: {checkpoint.path!r} cannot be loaded as a Keras "
            f"model in safe mode: {reason:.300}; expected a .keras file as written by model.save"
        ) from error
    if not isinstance(model, keras.Model):
        raise InputError(
            f"checkpoint {checkpoint.id!r}: {checkpoint.path!r} holds a "
            f"{type(model).__name__}, expected a Keras model"
        )
    return model


def in_float64(model: keras.Model, checkpoint: Checkpoint) -> keras.Model:
    """Returns the same model, weights and all, computing in float64 instead of float32.

    Raises:
        InputError: The model cannot be rebuilt from its own description.
    """
    try:
        description = _with_float64(keras.saving.serialize_keras_object(model))
        rebuilt = keras.saving.deserialize_keras_object(description, safe_mode=True)
        rebuilt.set_weights(model.get_weights())
    except (TypeError, ValueError) as error:
        raise InputError(
            f"checkpoint {checkpoint.id!r}: the model cannot be rebuilt in float64, in which query "
            f"examples are computed: {error}; expected layers that come with Keras"
        ) from error
    return rebuilt


def _with_float64(description: Any) -> Any:
    """Returns a serialized model with every float32 dtype, by name or as a policy, made float64."""
    if isinstance(description, list | tuple):
        return type(description)(_with_float64(item) for item in description)
    if not isinstance(description, dict):
        return description
    if description.get("class_name") == "DTypePolicy" and description["config"] == _FLOAT32:
        return {**description, "config": {"name": "float64"}}
    return {
        name: "float64" if name == "dtype" and value == "float32" else _with_float64(value)
        for name, value in description.items()
    }
