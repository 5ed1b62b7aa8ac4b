"""Factored gradients compared with automatic differentiation, before a job relies on them."""

import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import GradientFactors, LayerFactors
from tracin_transforms.core.products import materialised
from tracin_transforms.core.protocols import ExampleBatch
from tracin_transforms.models.factor_function import FactorFunction
from tracin_transforms.models.training_loss import TrainingLoss

# Both sides are rounded to float32 and add up in another order; a wrong formula is off by far more.
TOLERANCE = 1e-3
# Where the model multiplies in bfloat16 or float16, automatic differentiation rounds to that.
MIXED_PRECISION_TOLERANCE = 3e-2


def check_gradients(
    function: FactorFunction, loss: TrainingLoss, batch: ExampleBatch, factors: GradientFactors
) -> None:
    """Compares the factors with the gradients that TensorFlow computes through the whole model.

    Args:
        function: The checkpoint's model, which gave the factors.
        loss: The run's loss.
        batch: A few examples.
        factors: Gradient factors of these examples at the checkpoint.

    Raises:
        InputError: A layer's differ by more than the tolerance, relative to the largest entry.
    """
    # One backward pass for all examples: weights that differ keep errors from cancelling out.
    weights = 1 + np.arange(len(batch), dtype=np.float32)
    differentiated = _differentiate(function, loss, batch, weights)
    for chosen, layer, expected in zip(
        function.layers, factors.layers, differentiated, strict=True
    ):
        found = weights @ materialised(layer)
        largest, difference = np.abs(expected).max(), np.abs(found - expected).max()
        exact = chosen.layer.compute_dtype in ("float32", "float64")
        tolerance = TOLERANCE if exact else MIXED_PRECISION_TOLERANCE
        if difference > tolerance * largest + _rounding(layer, weights):
            raise InputError(
                f"checkpoint {factors.checkpoint_id!r}: the factored gradients of layer "
                f"{layer.name!r} with loss {loss.name!r} differ from automatic differentiation "
                f"by {difference:.3g}, where the largest entry is {largest:.3g}: check that "
                "'loss' and 'from_logits' in checkpoints.json are those the model was trained with"
            )


def _rounding(layer: LayerFactors, weights: np.ndarray) -> float:
    """What the float32 of a probability does to a gradient, whose true value may be near 0."""
    largest = np.abs(layer.activations).reshape(len(layer), -1).max(axis=1)
    return float(1e-6 * max(1.0, weights @ largest))


def _differentiate(
    function: FactorFunction, loss: TrainingLoss, batch: ExampleBatch, weights: np.ndarray
) -> list[np.ndarray]:
    """Returns the weighted sum of the examples' gradients for each layer, in one row."""
    layers = [chosen.layer for chosen in function.layers]
    variables = [
        [layer.kernel.value, *([layer.bias.value] if layer.use_bias else [])] for layer in layers
    ]
    inputs = function.as_inputs(tf.convert_to_tensor(batch.inputs))
    with tf.GradientTape() as tape:
        tape.watch(variables)
        outputs = function.model(inputs, training=False)
        losses = loss.keras_losses(tf.convert_to_tensor(batch.targets), outputs)
        total = tf.reduce_sum(tf.cast(weights, losses.dtype) * losses)
    return [
        np.concatenate([gradient.numpy().T.ravel() for gradient in gradients])
        for gradients in tape.gradient(total, variables)
    ]
