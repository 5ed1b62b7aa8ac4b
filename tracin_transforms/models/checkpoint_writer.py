"""Writes a model as a checkpoint, in a form that keeps all that was trained."""

import uuid
from pathlib import Path

import keras
import tensorflow as tf

from tracin_transforms.models.layers import all_layers
from tracin_transforms.storage.checkpoint_series import checkpoint_files
from tracin_transforms.storage.files import move, written_atomically


def needs_network_file(model: keras.Model) -> bool:
    """Returns whether a model's checkpoints hold weights alone, so that its network is apart.

    Keras merges LoRA into the kernel when it saves a model; a TensorFlow checkpoint keeps it.
    """
    return any(getattr(layer, "lora_enabled", False) for layer in all_layers(model))


def write_network(model: keras.Model, path: Path) -> None:
    """Writes the network, for checkpoints that hold weights alone, as a ``.keras`` file."""
    with written_atomically(path) as temporary:
        model.save(temporary, include_optimizer=False)


def write_checkpoint(model: keras.Model, directory: Path, name: str) -> str:
    """Writes a checkpoint and returns its path, relative to the directory.

    Raises:
        InputError: The system refuses.
    """
    if not needs_network_file(model):
        write_network(model, directory / f"{name}.keras")
        return f"{name}.keras"
    path = directory / f"{name}.ckpt"
    temporary = path.with_name(f".{uuid.uuid4().hex}.ckpt")
    try:
        tf.train.Checkpoint(model=model).write(str(temporary))
        # The index last: without it, there is no checkpoint.
        for file in sorted(checkpoint_files(temporary)):
            move(file, file.with_name(file.name.replace(temporary.name, path.name)))
    finally:
        for file in checkpoint_files(temporary):
            file.unlink()
    return path.name


def remove_checkpoint(path: Path) -> None:
    """Removes the files of a checkpoint."""
    for file in checkpoint_files(path):
        file.unlink(missing_ok=True)
