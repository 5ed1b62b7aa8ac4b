"""Factored gradients compared with automatic differentiation, before a job relies on them."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import GradientFactors, LayerFactors
from tracin_transforms.core.products import gradient_sum
from tracin_transforms.core.protocols import Inputs
from tracin_transforms.models.error_signals import losses_of_examples
from tracin_transforms.models.factor_function import FactorFunction, Targets, Values
from tracin_transforms.models.layer_factors import ChosenMatrix
from tracin_transforms.models.layers import all_layers
from tracin_transforms.models.training_loss import TrainingLoss

# Both sides are rounded to float32 and add up in another order; a wrong formula is off by far more.
TOLERANCE = 1e-3
# Where the model computes in bfloat16 or float16 anywhere, its two passes round to that apart.
MIXED_PRECISION_TOLERANCE = 3e-2


def check_gradients(
    function: FactorFunction,
    loss: TrainingLoss,
    values: Values,
    inputs: Inputs,
    targets: Targets,
    factors: GradientFactors,
    matrices: Sequence[ChosenMatrix],
) -> None:
    """Compares the factors with the gradients that TensorFlow computes through the whole model.

    Args:
        function: The checkpoint's model, which gave the factors.
        loss: The run's loss.
        values: Of the model's variables at the checkpoint.
        inputs: Of a few examples.
        targets: Of the same.
        factors: Gradient factors of these examples at the checkpoint.
        matrices: The weights they belong to.

    Raises:
        InputError: A layer's differ by more than the tolerance, relative to the largest entry.
    """
    dtypes = {layer.compute_dtype for layer in all_layers(function.model)}
    tolerance = TOLERANCE if dtypes <= {"float32", "float64"} else MIXED_PRECISION_TOLERANCE
    # One backward pass for all examples: weights that differ keep errors from cancelling out.
    mix = 1 + np.arange(len(targets.weights), dtype=np.float32)
    differentiated = _differentiate(function, loss, values, inputs, targets, matrices, mix)
    for chosen, layer, expected in zip(matrices, factors.layers, differentiated, strict=True):
        width = layer.activations.shape[-1]
        if layer.is_one_hot:
            width = chosen.matrix.variable.shape[0]
        found = gradient_sum(layer, mix, width)
        largest, difference = np.abs(expected).max(), np.abs(found - expected).max()
        if difference > tolerance * largest + _rounding(layer, mix):
            raise InputError(
                f"checkpoint {factors.checkpoint_id!r}: the factored gradients of layer "
                f"{layer.name!r} with loss {loss.name!r} differ from automatic differentiation "
                f"by {difference:.3g}, where the largest entry is {largest:.3g}: "
                f"{_likely_cause(chosen, found, expected, loss.formula is None)}; or the rounding "
                "of a deep network, which --precision float64 avoids"
            )


def _rounding(layer: LayerFactors, mix: np.ndarray) -> float:
    """What the float32 of a probability does to a gradient, whose true value may be near 0."""
    if layer.is_one_hot:
        return float(1e-6 * mix.sum())
    largest = np.abs(layer.activations).reshape(len(layer), -1).max(axis=1)
    return float(1e-6 * max(1.0, mix @ largest))


def _likely_cause(
    chosen: ChosenMatrix, found: np.ndarray, expected: np.ndarray, is_own_loss: bool
) -> str:
    layer = chosen.layer
    module = type(layer).__module__
    if not module.startswith("keras."):
        return (
            f"layer {layer.name!r} is a {type(layer).__name__} of {module}, which seems to compute "
            "something else than the Keras layer it derives from: name other layers with --layers"
        )
    size = found @ found
    factor = (found @ expected) / size if size else 0.0
    if np.abs(factor * found - expected).max() <= TOLERANCE * np.abs(expected).max():
        return (
            f"they are {factor:.4g} times as large. Check that 'loss' and 'from_logits' in "
            "checkpoints.json are those the model was trained with"
        )
    causes = (
        "its weights are used elsewhere in the model as well, or 'loss' and 'from_logits' in "
        "checkpoints.json are not those the model was trained with"
    )
    if is_own_loss:
        return f"{causes}, or an example's loss depends on others in its batch"
    return causes


def _differentiate(
    function: FactorFunction,
    loss: TrainingLoss,
    values: Values,
    inputs: Inputs,
    targets: Targets,
    matrices: Sequence[ChosenMatrix],
    mix: np.ndarray,
) -> list[np.ndarray]:
    """Returns the weighted sum of the examples' gradients for each weight, in one row."""
    place = {id(variable): i for i, variable in enumerate(function.model.variables)}
    sought = [
        [
            values[place[id(variable)]]
            for variable in (chosen.matrix.variable, chosen.matrix.bias)
            if variable is not None
        ]
        for chosen in matrices
    ]
    tensors = tf.nest.map_structure(tf.constant, inputs)
    examples = function.ends.cast(tensors, function.ends.dtypes(inputs))
    given, rows, weights = targets.tensors()
    with tf.GradientTape() as tape:
        tape.watch(sought)
        outputs = function.forward(values, examples)
        losses = losses_of_examples(loss, outputs, given, rows, weights)
        total = tf.reduce_sum(tf.cast(mix, losses.dtype) * losses)
    return [
        _one_row(chosen, gradients)
        for chosen, gradients in zip(matrices, tape.gradient(total, sought), strict=True)
    ]


def _one_row(chosen: ChosenMatrix, gradients: Sequence[tf.Tensor]) -> np.ndarray:
    kernel, *bias = (tf.convert_to_tensor(gradient).numpy() for gradient in gradients)
    rows = chosen.matrix.rows(kernel)
    return np.concatenate([rows.ravel(), *(gradient.ravel() for gradient in bias)])
