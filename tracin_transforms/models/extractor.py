"""Gradient factors of a Keras model's last dense layer, at every checkpoint of a run."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import (
    FactorBlock,
    GradientFactors,
    LayerFactors,
    check_finite,
)
from tracin_transforms.core.losses import LOSSES, LossValues, RowError
from tracin_transforms.core.protocols import ExampleBatch
from tracin_transforms.models.gradient_check import check_gradients
from tracin_transforms.models.layers import LastDense, check_end, find_last_dense
from tracin_transforms.models.loading import load_model
from tracin_transforms.models.precision import widen, widen_head

# Enough to see a wrong layer or loss; each costs one backward pass per checkpoint.
_CHECKED_EXAMPLES = 4


@dataclass(frozen=True)
class KerasFactorExtractor:
    """Describes the extraction of last-layer gradient factors.

    Attributes:
        series: The run's checkpoints, ``.keras`` files.
        batch_size: Examples per call of the compiled model.
        float64: Compute the whole models in float64 instead of the head alone, see `precision`.
            For queries: they are few, and a well fitted query's gradient is no more exact than
            its logits are, absolutely, so that in float32 it alone would limit what influences
            are good for.
    """

    series: CheckpointSeries
    batch_size: int = 512
    float64: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}, expected at least 1")

    def load(self) -> "LoadedKerasExtractor":
        """Returns the extractor with all K models in memory.

        Raises:
            InputError: A checkpoint is not a model, or its model or loss is not supported.
        """
        return LoadedKerasExtractor(self)


class LoadedKerasExtractor:
    """The K models of a run, compiled up to the last dense layer.

    The first batch is checked against automatic differentiation, see `check_gradients`.
    """

    def __init__(self, description: KerasFactorExtractor) -> None:
        self._description = description
        self._models = [
            _Model(checkpoint, description) for checkpoint in description.series.checkpoints
        ]
        self._checked = False

    def extract(self, batch: ExampleBatch) -> FactorBlock:
        """Returns the gradient factors of a batch at all checkpoints, in inference mode.

        Raises:
            InputError: The inputs do not fit the model, a label is out of range, a number is not
                finite, or the factors differ from automatic differentiation.
        """
        _check_inputs_finite(batch)
        # Two checkpoints at a time: while one is in a part that keeps a single core busy, in NumPy
        # or in a layer that does not split, the other has the rest of the machine.
        with ThreadPoolExecutor(max_workers=2) as pool:
            found = list(pool.map(lambda model: model.extract(batch), self._models))
        values = [values for values, _ in found]
        block = check_finite(
            FactorBlock(
                shard=batch.shard,
                start=batch.start,
                example_ids=batch.example_ids,
                labels=values[-1].labels,
                predictions=values[-1].predictions,
                losses=np.stack([v.losses for v in values], axis=1).astype(np.float32),
                gradients=tuple(gradient for _, gradient in found),
            )
        )
        if not self._checked:
            self._check_gradients(batch, block)
            self._checked = True
        return block

    def _check_gradients(self, batch: ExampleBatch, block: FactorBlock) -> None:
        # A well fitted example has hardly a gradient and would pass with any formula.
        worst = np.argsort(-block.losses.sum(axis=1), kind="stable")[:_CHECKED_EXAMPLES]
        few = ExampleBatch(
            shard=batch.shard,
            start=batch.start,
            example_ids=batch.example_ids[worst],
            inputs=batch.inputs[worst],
            targets=batch.targets[worst],
        )
        series = self._description.series
        for model, gradient in zip(self._models, block.rows(worst).gradients, strict=True):
            check_gradients(model.model, model.dense.layer, series, few, gradient)


class _Model:
    """One checkpoint's model and the compiled function to its last dense layer."""

    def __init__(self, checkpoint: Checkpoint, description: KerasFactorExtractor) -> None:
        series = description.series
        self.checkpoint = checkpoint
        self.model = load_model(checkpoint)
        what = f"checkpoint {checkpoint.id!r}: model {self.model.name!r}"
        self.dense: LastDense = find_last_dense(self.model, what)
        check_end(self.dense, series.loss, series.from_logits, what)
        if description.float64:
            widen(self.model)
        else:
            widen_head(self.model)
        self._loss = series.loss
        self._batch_size = description.batch_size
        self._compiled: dict[Any, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]] = {}

    def extract(self, batch: ExampleBatch) -> tuple[LossValues, GradientFactors]:
        """Returns the batch's losses and gradient factors at this checkpoint."""
        activations, logits = self.forward(batch.inputs)
        values = self.loss_values(logits, batch)
        return values, self.gradient_factors(activations, values)

    def forward(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns activations [n, d], float32, and logits [n, C], float64."""
        self._check_shape(inputs)
        function = self._function(inputs.dtype)
        parts = [
            function(tf.constant(inputs[start : start + self._batch_size]))
            for start in range(0, len(inputs), self._batch_size)
        ]
        activations = np.concatenate([part[0].numpy() for part in parts])
        logits = np.concatenate([part[1].numpy() for part in parts])
        return activations, logits

    def loss_values(self, logits: np.ndarray, batch: ExampleBatch) -> LossValues:
        """Returns losses and error signals from logits [n, C], float64.

        Raises:
            InputError: A logit is not finite or a target does not fit; the example is named.
        """
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise InputError(
                f"example {str(batch.example_ids[row])!r} gives non-finite logits at checkpoint "
                f"{self.checkpoint.id!r}; check whether training had diverged by then"
            )
        try:
            return LOSSES[self._loss](logits, batch.targets)
        except RowError as error:
            example = str(batch.example_ids[error.row])
            raise InputError(
                f"example {example!r} of shard {batch.shard!r}: {error.problem}"
            ) from error

    def gradient_factors(self, activations: np.ndarray, values: LossValues) -> GradientFactors:
        """Returns the factors of one layer, from activations [n, d], float32."""
        layer = LayerFactors(
            name=self.dense.layer.name,
            activations=activations,
            error_signals=values.error_signals.astype(np.float32),
            has_bias=self.dense.layer.use_bias,
        )
        return GradientFactors(self.checkpoint.id, (layer,))

    def _function(self, dtype: Any) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
        """Returns the compiled function for inputs of a dtype and any number of examples."""
        if dtype not in self._compiled:
            until_input, layer = self.dense.until_input, self.dense.layer
            wanted = self.model.inputs[0]

            def forward(inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                activations = until_input(tf.cast(inputs, wanted.dtype), training=False)
                # An error signal is as exact, relatively, as the logits are absolutely: in
                # float32 this one product would lose as much as all layers before it.
                logits = tf.matmul(
                    tf.cast(activations, tf.float64), tf.cast(layer.kernel, tf.float64)
                )
                if layer.use_bias:
                    logits += tf.cast(layer.bias, tf.float64)
                return tf.cast(activations, tf.float32), logits

            signature = tf.TensorSpec([None, *wanted.shape[1:]], dtype)
            self._compiled[dtype] = tf.function(forward, input_signature=[signature])
        return self._compiled[dtype]

    def _check_shape(self, inputs: np.ndarray) -> None:
        wanted = tuple(self.model.inputs[0].shape[1:])
        found = inputs.shape[1:]
        fits = len(found) == len(wanted) and all(
            size in (None, length) for size, length in zip(wanted, found, strict=True)
        )
        if not fits:
            raise InputError(
                f"examples have inputs of shape {found}, but the model of checkpoint "
                f"{self.checkpoint.id!r} takes {wanted}"
            )


def _check_inputs_finite(batch: ExampleBatch) -> None:
    if batch.inputs.dtype.kind != "f":
        return
    finite = np.isfinite(batch.inputs.reshape(len(batch), -1)).all(axis=1)
    if not finite.all():
        example = str(batch.example_ids[np.flatnonzero(~finite)[0]])
        raise InputError(
            f"example {example!r} of shard {batch.shard!r} has a NaN or infinite input: "
            "expected finite numbers"
        )
