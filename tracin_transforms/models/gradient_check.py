"""Factored gradients compared with automatic differentiation, before a job relies on them."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import GradientFactors
from tracin_transforms.core.protocols import ExampleBatch

# Both sides are float32 and add up in another order; a wrong formula is off by far more.
TOLERANCE = 1e-3


def check_gradients(
    model: keras.Model,
    layer: keras.layers.Dense,
    series: CheckpointSeries,
    batch: ExampleBatch,
    factors: GradientFactors,
) -> None:
    """Compares e hᵀ and e with the gradient that TensorFlow computes through the whole model.

    Args:
        model: The checkpoint's model, from inputs to what the loss takes.
        layer: The dense layer of the factors.
        series: The run, for its loss.
        batch: A few examples.
        factors: Gradient factors of these examples at the checkpoint.

    Raises:
        InputError: They differ by more than `TOLERANCE` of the batch's largest gradient entry.
    """
    loss = keras_loss(series)
    factored = factors.layers[0]
    largest_difference = largest = 0.0
    for row in range(len(batch)):
        expected = _differentiate(model, layer, loss, batch, row)
        error_signal = factored.error_signals[row]
        found = [np.outer(factored.activations[row], error_signal)]
        if factored.has_bias:
            found.append(error_signal)
        for a, b in zip(found, expected, strict=True):
            largest_difference = max(largest_difference, float(np.abs(a - b).max()))
            largest = max(largest, float(np.abs(b).max()))
    # Below 1e-6 a float32 probability and the error signal made from it have no digits left.
    if largest_difference > TOLERANCE * largest + 1e-6:
        raise InputError(
            f"checkpoint {factors.checkpoint_id!r}: the factored gradients of layer "
            f"{factored.name!r} with loss {series.loss!r} differ from automatic differentiation "
            f"by {largest_difference:.3g}, where the largest entry is {largest:.3g}: check that "
            "'loss' and 'from_logits' in checkpoints.json are those the model was trained with"
        )


def keras_loss(series: CheckpointSeries) -> Callable[[Any, Any], Any]:
    """Returns Keras's own per-example loss of a run, called with (targets, outputs)."""
    return keras.losses.get(
        {
            "class_name": "".join(part.capitalize() for part in series.loss.split("_")),
            "config": {"from_logits": series.from_logits, "reduction": "none"},
        }
    )


def _differentiate(
    model: keras.Model,
    layer: keras.layers.Dense,
    loss: Callable[[Any, Any], Any],
    batch: ExampleBatch,
    row: int,
) -> list[np.ndarray]:
    variables = [layer.kernel.value] + ([layer.bias.value] if layer.use_bias else [])
    inputs = tf.cast(batch.inputs[row : row + 1], model.inputs[0].dtype)
    with tf.GradientTape() as tape:
        tape.watch(variables)
        outputs = model(inputs, training=False)
        value = tf.reduce_sum(loss(batch.targets[row : row + 1], outputs))
    return [gradient.numpy() for gradient in tape.gradient(value, variables)]
