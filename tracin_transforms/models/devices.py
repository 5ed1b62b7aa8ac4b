"""GPUs, where there are any."""

import contextlib

import tensorflow as tf


def share_devices() -> None:
    """Lets TensorFlow take memory of GPUs as it needs it, so that processes can share them.

    By default the first process takes nearly all. A process that has used its GPUs already keeps
    what it has.
    """
    for device in tf.config.list_physical_devices("GPU"):
        with contextlib.suppress(RuntimeError):
            tf.config.experimental.set_memory_growth(device, True)
