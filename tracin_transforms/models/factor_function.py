"""The compiled function from inputs and targets to one model's gradient factors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import LayerFactors
from tracin_transforms.models.error_signals import error_signals
from tracin_transforms.models.layers import dense_layers
from tracin_transforms.models.taps import Tap, tapped
from tracin_transforms.models.training_loss import TrainingLoss

_Tensors = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]


@dataclass(frozen=True, eq=False)
class ExampleFactors:
    """What a model gives for n examples.

    Attributes:
        losses: Shape [n], float64.
        layer: The factors of the last dense layer.
        loss_inputs: The logits or outputs that the loss takes, shape [n, ..., C], float64.
    """

    losses: np.ndarray
    layer: LayerFactors
    loss_inputs: np.ndarray


class FactorFunction:
    """A model with its loss, compiled.

    Args:
        model: With one input and one output.
        loss: What it was trained with.
        what: What to call the model in messages.

    Raises:
        InputError: The model has no dense layer, or several inputs or outputs.
    """

    def __init__(self, model: keras.Model, loss: TrainingLoss, what: str) -> None:
        self.model = model
        self._loss = loss
        self._what = what
        self._compiled: dict[Any, Callable[[tf.Tensor, tf.Tensor], _Tensors]] = {}
        self._layer: keras.layers.Dense | None = None
        self._dense_layers = dense_layers(model)
        if not self._dense_layers:
            raise InputError(f"{what} has no Dense layer: expected at least one")
        for ends in ("inputs", "outputs"):
            # A subclassed model has neither.
            found = getattr(model, ends, None) or []
            if len(found) > 1:
                raise InputError(f"{what} has {len(found)} {ends}: expected one")

    @property
    def layer(self) -> keras.layers.Dense:
        """The layer whose factors are taken; known when the function has been called."""
        assert self._layer is not None
        return self._layer

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
        losses, signals, activations, loss_inputs = (
            np.concatenate([part[i].numpy() for part in parts]) for i in range(4)
        )
        layer = LayerFactors(self.layer.name, activations, signals, self.layer.use_bias)
        return ExampleFactors(losses, layer, loss_inputs)

    def check(self) -> None:
        """Compiles the function without examples, as far as the model says what it takes.

        Raises:
            InputError: The model's layers or its end are not supported.
        """
        if self._loss.formula is None or not getattr(self.model, "inputs", None):
            return
        inputs, outputs = self.model.inputs[0], self.model.outputs[0]
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
        spec = keras.KerasTensor((None, *inputs.shape[1:]), self._input_dtype(inputs.dtype))
        self._check_shape(inputs.shape[1:])
        try:
            output = self.model.compute_output_spec(spec)
        # Whatever a layer raises for an input that it does not take.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self._what} does not take inputs of shape {inputs.shape[1:]}: {reason:.300}"
            ) from error
        if not isinstance(output, keras.KerasTensor) or None in output.shape[1:]:
            raise InputError(
                f"{self._what} gives {str(output):.100}: expected one output of a known shape"
            )
        return (len(inputs), *output.shape[1:])

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
        inputs = tf.cast(inputs, self._input_dtype(np.dtype(inputs.dtype.as_numpy_dtype)))
        with (
            tf.GradientTape(watch_accessed_variables=False) as tape,
            tapped(self._dense_layers, tape) as taps,
        ):
            outputs = self.model(inputs, training=False)
        try:
            tap = _last(taps)
            losses, signals, loss_inputs = error_signals(self._loss, tap, outputs, targets, tape)
        except InputError as error:
            raise InputError(f"{self._what}: {error}") from error
        self._layer = tap.layer
        factors = tf.cast(signals, tf.float32), tf.cast(tap.activations, tf.float32)
        return losses, *factors, loss_inputs


def _last(taps: list[Tap]) -> Tap:
    tap = taps[-1]
    calls = sum(other.layer is tap.layer for other in taps)
    if calls > 1:
        raise InputError(
            f"the last Dense layer {tap.layer.name!r} is called {calls} times: expected once"
        )
    if len(tap.activations.shape) != 2:
        raise InputError(
            f"the last Dense layer {tap.layer.name!r} takes an input of shape "
            f"{tuple(tap.activations.shape)}: expected [examples, width]"
        )
    return tap
