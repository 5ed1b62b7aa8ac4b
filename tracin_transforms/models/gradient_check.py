"""Factored gradients compared with automatic differentiation, before a job relies on them."""

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import GradientFactors
from tracin_transforms.core.protocols import ExampleBatch
from tracin_transforms.models.training_loss import TrainingLoss

# Both sides are rounded to float32 and add up in another order; a wrong formula is off by far more.
TOLERANCE = 1e-3
# Where the model multiplies in bfloat16 or float16, automatic differentiation rounds to that.
MIXED_PRECISION_TOLERANCE = 3e-2


def check_gradients(
    model: keras.Model,
    layer: keras.layers.Dense,
    loss: TrainingLoss,
    batch: ExampleBatch,
    factors: GradientFactors,
) -> None:
    """Compares e hᵀ and e with the gradient that TensorFlow computes through the whole model.

    Args:
        model: The checkpoint's model, from inputs to what the loss takes.
        layer: The dense layer of the factors.
        loss: The run's loss.
        batch: A few examples.
        factors: Gradient factors of these examples at the checkpoint.

    Raises:
        InputError: They differ by more than the tolerance, relative to the largest entry.
    """
    factored = factors.layers[0]
    # One backward pass for all examples: weights that differ keep errors from cancelling out.
    weights = 1 + np.arange(len(batch), dtype=np.float32)
    expected = _differentiate(model, layer, loss, batch, weights)
    weighted = weights[:, None] * factored.error_signals
    found = [factored.activations.T @ weighted]
    if factored.has_bias:
        found.append(weighted.sum(axis=0))
    largest = max(float(np.abs(b).max()) for b in expected)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    # What a probability's float32 rounding does to a gradient, whose true value may be near 0.
    rounding = 1e-6 * float((np.abs(factored.activations).T @ weights).max(initial=1.0))
    exact = layer.compute_dtype in ("float32", "float64")
    tolerance = TOLERANCE if exact else MIXED_PRECISION_TOLERANCE
    if difference > tolerance * largest + rounding:
        raise InputError(
            f"checkpoint {factors.checkpoint_id!r}: the factored gradients of layer "
            f"{factored.name!r} with loss {loss.name!r} differ from automatic differentiation "
            f"by {difference:.3g}, where the largest entry is {largest:.3g}: check that "
            "'loss' and 'from_logits' in checkpoints.json are those the model was trained with"
        )


def _differentiate(
    model: keras.Model,
    layer: keras.layers.Dense,
    loss: TrainingLoss,
    batch: ExampleBatch,
    weights: np.ndarray,
) -> list[np.ndarray]:
    variables = [layer.kernel.value] + ([layer.bias.value] if layer.use_bias else [])
    inputs = tf.cast(batch.inputs, model.inputs[0].dtype)
    with tf.GradientTape() as tape:
        tape.watch(variables)
        losses = loss.keras_losses(
            tf.convert_to_tensor(batch.targets), model(inputs, training=False)
        )
        total = tf.reduce_sum(tf.cast(weights, losses.dtype) * losses)
    return [gradient.numpy() for gradient in tape.gradient(total, variables)]
