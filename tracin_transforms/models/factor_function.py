"""The compiled function from inputs and targets to one model's gradient factors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import LayerFactors
from tracin_transforms.models.error_signals import error_signals
from tracin_transforms.models.layer_factors import ChosenLayer, layer_factors
from tracin_transforms.models.layers import ALL_DENSE, LAST, candidate_layers
from tracin_transforms.models.taps import Tap, tapped
from tracin_transforms.models.training_loss import TrainingLoss

_Tensors = tuple[tf.Tensor, ...]


@dataclass(frozen=True, eq=False)
class ExampleFactors:
    """What a model gives for n examples.

    Attributes:
        losses: Shape [n], float64.
        layers: The factors of each chosen layer.
        loss_inputs: The logits or outputs that the loss takes, shape [n, ..., C], float64.
    """

    losses: np.ndarray
    layers: tuple[LayerFactors, ...]
    loss_inputs: np.ndarray


class FactorFunction:
    """A model with its loss, compiled.

    Args:
        model: With one input and one output.
        loss: What it was trained with.
        what: What to call the model in messages.
        layers: Which layers, see `candidate_layers`.

    Raises:
        InputError: The model has no such layer, or several inputs or outputs.
    """

    def __init__(
        self, model: keras.Model, loss: TrainingLoss, what: str, layers: str = LAST
    ) -> None:
        self.model = model
        self._loss = loss
        self._what = what
        self._compiled: dict[Any, Callable[[tf.Tensor, tf.Tensor], _Tensors]] = {}
        self._output_shapes: dict[tuple[np.dtype, tuple[int, ...]], tuple[int, ...]] = {}
        # The layers whose factors are taken, and how many numbers those of one example are; known
        # when the function has been compiled.
        self.layers: list[ChosenLayer] = []
        self.numbers_per_example: int | None = None
        self._choice = layers
        try:
            self._candidates = candidate_layers(model, layers)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        for ends in ("inputs", "outputs"):
            # A subclassed model has neither.
            found = getattr(model, ends, None) or []
            if len(found) > 1:
                raise InputError(f"{what} has {len(found)} {ends}: expected one")

    def __call__(self, inputs: np.ndarray, targets: np.ndarray, batch_size: int) -> ExampleFactors:
        """Returns the losses and gradient factors of examples, `batch_size` at a time.

        Args:
            inputs: Shape [n, ...].
            targets: As `error_signals` takes them.
            batch_size: Examples per call of the model.

        Raises:
            InputError: The model's layers or its end are not supported; found when it is compiled.
        """
        function = self._function(inputs, targets)
        parts = []
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(function(tf.constant(inputs[rows]), tf.constant(targets[rows])))
        losses, loss_inputs, *factors = (
            np.concatenate([tensor.numpy() for tensor in tensors])
            for tensors in zip(*parts, strict=True)
        )
        layers = tuple(
            LayerFactors(chosen.layer.name, activations, signals, chosen.has_bias)
            for chosen, activations, signals in zip(
                self.layers, factors[::2], factors[1::2], strict=True
            )
        )
        return ExampleFactors(losses, layers, loss_inputs)

    def as_inputs(self, examples: tf.Tensor) -> tf.Tensor:
        """Returns examples in the dtype that the model takes."""
        return tf.cast(examples, self._input_dtype(np.dtype(examples.dtype.as_numpy_dtype)))

    def check(self) -> None:
        """Compiles the function without examples, as far as the model says what it takes.

        Raises:
            InputError: The model's layers or its end are not supported.
        """
        if self._loss.formula is None or not getattr(self.model, "inputs", None):
            return
        inputs, outputs = self.model.inputs[0], self.model.outputs[0]
        if None in (*inputs.shape[1:], *outputs.shape[1:]):
            return
        signature = [
            tf.TensorSpec(inputs.shape, inputs.dtype),
            tf.TensorSpec(outputs.shape, tf.float64),
        ]
        tf.function(self._run, signature, autograph=False).get_concrete_function()

    def output_shape(self, inputs: np.ndarray) -> tuple[int, ...]:
        """Returns the shape of the model's output for some inputs, [n, ..., C].

        Raises:
            InputError: The model does not take such inputs, or gives something else.
        """
        key = (inputs.dtype, inputs.shape[1:])
        if key not in self._output_shapes:
            self._check_shape(inputs.shape[1:])
            self._output_shapes[key] = self._infer_output_shape(*key)
        return (len(inputs), *self._output_shapes[key])

    def _infer_output_shape(self, dtype: np.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
        spec = keras.KerasTensor((None, *shape), self._input_dtype(dtype))
        try:
            output = self.model.compute_output_spec(spec)
        # Whatever a layer raises for an input that it does not take.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self._what} does not take inputs of shape {shape}: {reason:.300}"
            ) from error
        if not isinstance(output, keras.KerasTensor) or None in output.shape[1:]:
            raise InputError(
                f"{self._what} gives {str(output):.100}: expected one output of a known shape"
            )
        return tuple(output.shape[1:])

    def _check_shape(self, found: tuple[int, ...]) -> None:
        declared = getattr(self.model, "inputs", None)
        if not declared:
            return
        wanted = tuple(declared[0].shape[1:])
        fits = len(found) == len(wanted) and all(
            size in (None, length) for size, length in zip(wanted, found, strict=True)
        )
        if not fits:
            raise InputError(
                f"{self._what} takes inputs of shape {wanted}, the examples have {found}"
            )

    def _input_dtype(self, found: np.dtype) -> str:
        declared = getattr(self.model, "inputs", None)
        if declared:
            return str(declared[0].dtype)
        return str(keras.backend.floatx() if found.kind == "f" else found)

    def _function(
        self, inputs: np.ndarray, targets: np.ndarray
    ) -> Callable[[tf.Tensor, tf.Tensor], _Tensors]:
        """Returns the compiled function for such inputs and targets, any number of them."""
        key = tuple((array.dtype, array.shape[1:]) for array in (inputs, targets))
        if key not in self._compiled:
            # Without autograph, which would wrap our errors in its own.
            self._compiled[key] = tf.function(
                self._run,
                input_signature=[tf.TensorSpec([None, *shape], dtype) for dtype, shape in key],
                autograph=False,
            )
        return self._compiled[key]

    def _run(self, inputs: tf.Tensor, targets: tf.Tensor) -> _Tensors:
        inputs = self.as_inputs(inputs)
        with (
            tf.GradientTape(watch_accessed_variables=False) as tape,
            tapped(self._candidates, tape) as taps,
        ):
            outputs = self.model(inputs, training=False)
        try:
            taps = self._chosen(taps)
            losses, signals, loss_inputs = error_signals(self._loss, taps, outputs, targets, tape)
            self.layers, factors = layer_factors(taps, signals)
            self.numbers_per_example = sum(math.prod(factor.shape[1:]) for factor in factors)
            if not factors or (self._choice != ALL_DENSE and None in signals):
                names = ", ".join(sorted({repr(tap.layer.name) for tap in taps}))
                raise InputError(
                    f"the output does not depend on the Dense layer(s) {names}: expected layers "
                    "that lead to it"
                )
        except InputError as error:
            raise InputError(f"{self._what}: {error}") from error
        return losses, loss_inputs, *factors

    def _chosen(self, taps: list[Tap]) -> list[Tap]:
        if not taps:
            raise InputError("none of the chosen layers is called")
        if self._choice != LAST:
            return taps
        return [tap for tap in taps if tap.layer is taps[-1].layer]
