"""The compiled function from inputs and targets to a model's gradient factors."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import LayerFactors
from tracin_transforms.core.protocols import Inputs, input_rows
from tracin_transforms.core.targets import readable_predictions
from tracin_transforms.models.batch_size import BatchSize
from tracin_transforms.models.error_signals import LossEnd, loss_end
from tracin_transforms.models.layer_factors import ChosenMatrix, layer_factors
from tracin_transforms.models.layers import ALL, ALL_DENSE, LAST, candidate_layers
from tracin_transforms.models.model_ends import ModelEnds, kinds
from tracin_transforms.models.taps import Tap, tapped
from tracin_transforms.models.training_loss import TrainingLoss

# The chosen weights; and losses, inputs of the loss, activations and error signals of each.
_Traced = tuple[list[ChosenMatrix], tuple[tf.Tensor, ...]]
# One at a time: layers are changed while a function is compiled.
_COMPILING = threading.Lock()
_STAND_IN = TrainingLoss("mean_squared_error", None, {})
# The values of a model's variables at one checkpoint.
Values = Sequence[tf.Tensor]


@dataclass(frozen=True, eq=False)
class ExampleFactors:
    """What a model gives for n examples.

    Attributes:
        losses: Shape [n], float64.
        predictions: See `core.targets.readable_predictions`, shape [n] or [n, m].
        matrices: The chosen weights.
        layers: The factors of each.
    """

    losses: np.ndarray
    predictions: np.ndarray
    matrices: Sequence[ChosenMatrix]
    layers: tuple[LayerFactors, ...]


@dataclass(frozen=True, eq=False)
class Targets:
    """The labels of n examples, in the forms that losses take, with their weights.

    Attributes:
        kind: See `core.targets.target_rows`.
        given: As the examples have them.
        rows: What `core.targets.target_rows` made of them, shape [n, ..., C], float64.
        weights: What each example's loss is multiplied with, shape [n], float64.
    """

    kind: str
    given: np.ndarray
    rows: np.ndarray
    weights: np.ndarray

    def rows_at(self, selection: slice | np.ndarray) -> "Targets":
        """Returns the targets of the selected examples."""
        parts = (part[selection] for part in (self.given, self.rows, self.weights))
        return Targets(self.kind, *parts)

    def tensors(self) -> list[tf.Tensor]:
        """Returns labels, rows and weights as tensors."""
        return [tf.constant(part) for part in (self.given, self.rows, self.weights)]


@dataclass(frozen=True, eq=False)
class Compiled:
    """The function for inputs and targets of some shapes.

    Attributes:
        function: From tensors of inputs, labels, rows, weights and the variables' values to losses,
            what the loss takes, and activations and error signals of each weight.
        matrices: The weights.
    """

    function: Any
    matrices: Sequence[ChosenMatrix]

    def numbers_per_example(self) -> tuple[int, int]:
        """Returns how many numbers the factors, and the inputs of the loss, of an example are."""
        _, loss_inputs, *factors = self.function.structured_outputs
        numbers = sum(math.prod(factor.shape[1:]) for factor in factors)
        return numbers, math.prod(loss_inputs.shape[1:])


class FactorFunction:
    """A model with its loss, compiled once for all checkpoints.

    Args:
        model: The model; its variables' values are given with each call.
        loss: What it was trained with.
        what: What to call the model in messages.
        layers: Which layers, see `candidate_layers`.
        output: Which of its outputs the loss takes, by name, where it has several.
        xla: Compile with XLA.

    Raises:
        InputError: The model has no such layer.
    """

    def __init__(
        self,
        model: keras.Model,
        loss: TrainingLoss,
        what: str,
        layers: str = LAST,
        output: str | None = None,
        xla: bool = False,
    ) -> None:
        self.model = model
        self.ends = ModelEnds(model, what, output)
        self._loss = loss
        self._what = what
        self._xla = xla
        self._compiled: dict[Any, Compiled] = {}
        self._choice = layers
        try:
            self._candidates = candidate_layers(model, layers)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error

    def __call__(
        self, values: Values, inputs: Inputs, targets: Targets, batch_size: BatchSize
    ) -> ExampleFactors:
        """Returns the losses and gradient factors of examples, some at a time.

        Args:
            values: Of the model's variables, in their order.
            inputs: Of n examples.
            targets: Of the same.
            batch_size: Examples per call of the model; fewer, where memory does not suffice.

        Raises:
            InputError: The model's layers or its end are not supported, found when it is compiled;
                or it cannot compute an example, such as one with an index beyond an embedding.
        """
        compiled = self.compiled(inputs, targets)
        n, start, size = len(targets.weights), 0, batch_size.of(compiled.function)
        parts = []
        while start < n:
            rows = slice(start, start + size)
            arguments = tf.nest.map_structure(tf.constant, input_rows(inputs, rows))
            arguments = [arguments, *targets.rows_at(rows).tensors(), list(values)]
            try:
                found, loss_inputs, *factors = (t.numpy() for t in compiled.function(*arguments))
            except tf.errors.ResourceExhaustedError as error:
                size = batch_size.halve(size, error)
            except tf.errors.InvalidArgumentError as error:
                raise InputError(f"{self._what}: {_reason(error)}") from error
            else:
                # Not the inputs of the loss themselves: for images they would take more memory
                # than anything else.
                parts.append((found, readable_predictions(targets.kind, loss_inputs), *factors))
                start += size
        losses, predictions, *factors = map(np.concatenate, zip(*parts, strict=True))
        self._check_rows(n, compiled.matrices, factors)
        layers = tuple(
            LayerFactors(name, activations, signals, chosen.has_bias, chosen.groups)
            for name, chosen, activations, signals in zip(
                _names(compiled.matrices),
                compiled.matrices,
                factors[::2],
                factors[1::2],
                strict=True,
            )
        )
        return ExampleFactors(losses, predictions, compiled.matrices, layers)

    def compiled(self, inputs: Inputs, targets: Targets) -> Compiled:
        """Returns the compiled function for such inputs and targets, any number of them."""
        with _COMPILING:
            key = (kinds(inputs), kinds(targets.given), kinds(targets.rows))
            if key not in self._compiled:
                dtypes = self.ends.dtypes(inputs)

                def run(inputs: Any, *arguments: Any) -> _Traced:
                    return self._run(self._loss, self.ends.cast(inputs, dtypes), *arguments)

                arrays = [inputs, targets.given, targets.rows, targets.weights]
                signature = tf.nest.map_structure(_any_number_of, arrays)
                self._compiled[key] = self._compile(signature, run)
            return self._compiled[key]

    def check(self) -> tuple[int, int] | None:
        """Compiles the function without examples, as far as the model says what it takes.

        A loss without a formula may take labels of any shape; another stands in for it.

        Returns:
            How many numbers the gradient factors of an example are, and how many the loss takes;
            None where the model does not say what it takes.

        Raises:
            InputError: The model's layers or its end are not supported.
        """
        inputs = self.ends.declared_inputs()
        if inputs is None or None in self.ends.declared_output().shape[1:]:
            return None
        loss = _STAND_IN if self._loss.formula is None else self._loss
        shape = self.ends.declared_output().shape
        given = rows = tf.TensorSpec(shape, tf.float64)
        if loss.formula is not None and loss.formula.targets == "index":
            given = tf.TensorSpec(shape[:-1], tf.int64)
        signature = [inputs, given, rows, tf.TensorSpec([None], tf.float64)]
        with _COMPILING:
            return self._compile(signature, partial(self._run, loss)).numbers_per_example()

    def output_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Returns the shape of the output that counts, see `ModelEnds.output_shape`."""
        with _COMPILING:
            return self.ends.output_shape(inputs)

    def forward(self, values: Values, inputs: Any) -> Any:
        """Returns the output that counts, in inference mode, for tensors of inputs."""
        variables = list(zip(self.model.variables, values, strict=True))
        with _COMPILING, keras.StatelessScope(state_mapping=variables):
            return self.ends.selected(self.model(inputs, training=False))

    def _compile(self, signature: list[Any], run: Callable[..., _Traced]) -> Compiled:
        traced: list[ChosenMatrix] = []

        def tensors(*arguments: Any) -> tuple[tf.Tensor, ...]:
            traced[:], found = run(*arguments)
            return found

        values = [tf.TensorSpec(v.shape, v.value.dtype) for v in self.model.variables]
        # Without autograph, which would wrap our errors in its own.
        function = tf.function(
            tensors, [*signature, values], autograph=False, jit_compile=self._xla
        ).get_concrete_function()
        return Compiled(function, traced)

    def _run(
        self,
        loss: TrainingLoss,
        inputs: Any,
        given: tf.Tensor,
        rows: tf.Tensor,
        weights: tf.Tensor,
        values: Values,
    ) -> _Traced:
        variables = list(zip(self.model.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=variables):
            tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
            with tape, tapped(self._candidates, tape) as taps:
                outputs = self.ends.selected(self.model(inputs, training=False))
            try:
                end = loss_end(loss, taps, outputs, given, rows, weights, tape)
                taps, signals = self._chosen(taps, end)
                matrices, factors = layer_factors(taps, signals, self.ends.takes_any_length)
            except InputError as error:
                raise InputError(f"{self._what}: {error}") from error
        if not factors:
            raise InputError(f"{self._what}: no weight of the chosen layers is trained")
        return matrices, (end.losses, end.loss_inputs, *factors)

    def _chosen(self, taps: list[Tap], end: LossEnd) -> tuple[list[Tap], list[tf.Tensor | None]]:
        """Returns the calls of the chosen layers, and their error signals."""
        if not taps:
            raise InputError("none of the chosen layers is called")
        if self._choice == LAST:
            # The last that leads to the output: there may be others behind another one.
            for layer in dict.fromkeys(tap.layer for tap in reversed(taps)):
                own = [tap for tap in taps if tap.layer is layer]
                _check_reachable(own)
                signals = end.signals(own)
                if any(signal is not None for signal in signals):
                    return own, signals
        else:
            _check_reachable(taps)
            signals = end.signals(taps)
            every = self._choice in (ALL, ALL_DENSE)
            reached = {t.layer for t, s in zip(taps, signals, strict=True) if s is not None}
            if reached and (every or reached == {tap.layer for tap in taps}):
                return taps, signals
        names = ", ".join(sorted({repr(tap.layer.name) for tap in taps}))
        raise InputError(
            f"the output does not depend on all of the layers {names}: expected layers that lead "
            "to it"
        )

    def _check_rows(
        self, n: int, matrices: Sequence[ChosenMatrix], factors: Sequence[np.ndarray]
    ) -> None:
        for chosen, activations in zip(matrices, factors[::2], strict=True):
            if len(activations) != n:
                raise InputError(
                    f"{self._what}: layer {chosen.layer.name!r} is called with "
                    f"{len(activations)} rows for {n} examples: expected each example to have its "
                    "own row, with positions on other axes"
                )


def _check_reachable(taps: Sequence[Tap]) -> None:
    graph = tf.compat.v1.get_default_graph()
    for tap in taps:
        if tap.pre_activations.graph is not graph:
            raise InputError(
                f"layer {tap.layer.name!r} is called within a loop, such as that of a recurrent "
                "network: expected layers outside; name those to take with --layers"
            )


def _names(matrices: Sequence[ChosenMatrix]) -> list[str]:
    """Returns the names of the weights' layers; their paths, where names are not unique."""
    names = [layer.name for layer in dict.fromkeys(chosen.layer for chosen in matrices)]
    found = []
    for chosen in matrices:
        name, part = chosen.layer.name, chosen.matrix.part
        name = name if names.count(name) == 1 else chosen.layer.path
        found.append(f"{name}/{part}" if part else name)
    return found


def _reason(error: tf.errors.InvalidArgumentError) -> str:
    """Returns what TensorFlow says after the lines of code that led to it."""
    lines = [line.strip() for line in str(error.message).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("[[", "File", "Detected at"))]
    return f"it cannot compute some of the examples: {lines[-1] if lines else error:.200}"


def _any_number_of(array: np.ndarray) -> tf.TensorSpec:
    return tf.TensorSpec([None, *array.shape[1:]], tf.as_dtype(array.dtype))
