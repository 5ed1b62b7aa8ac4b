"""Loading checkpoints as Keras models, without running what an untrusted file may contain."""

import re

import keras

from tracin_transforms.core.checkpoints import Checkpoint
from tracin_transforms.core.errors import InputError
from tracin_transforms.models.layers import all_layers


def check_loadable(model: keras.Model, what: str) -> None:
    """Raises InputError if the model has a layer that Keras's safe mode would not load.

    Args:
        model: The model.
        what: What to call the model in the message.
    """
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.Lambda):
            raise InputError(
                f"{what} has a Lambda layer {layer.name!r}, whose checkpoints Keras does not load "
                "in safe mode: expected a layer of Keras's own, such as Rescaling"
            )


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
        # Keras says which class it does not know at the end of a long description of the layer.
        unknown = re.search(r"Could not locate class '[^']*'", reason)
        reason = unknown[0] if unknown else reason
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
