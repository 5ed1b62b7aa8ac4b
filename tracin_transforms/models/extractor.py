"""Gradient factors of a Keras model's dense layers, at every checkpoint of a run."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, check_finite
from tracin_transforms.core.losses import (
    LOSSES,
    RowError,
    readable_predictions,
    readable_targets,
    target_rows,
)
from tracin_transforms.core.protocols import ExampleBatch
from tracin_transforms.models.factor_function import FactorFunction
from tracin_transforms.models.gradient_check import check_gradients
from tracin_transforms.models.layers import LAST
from tracin_transforms.models.loading import load_model
from tracin_transforms.models.precision import can_be_widened, widen, widen_head
from tracin_transforms.models.training_loss import TrainingLoss, loss_of_series

# Enough to see a wrong layer or loss; each costs one backward pass per checkpoint.
_CHECKED_EXAMPLES = 4

_BLOCK_BYTES = 256 * 2**20
_ROWS_OF_UNKNOWN_SIZE = 256


@dataclass(frozen=True)
class KerasFactorExtractor:
    """Describes the extraction of gradient factors.

    Attributes:
        series: The run's checkpoints, ``.keras`` files.
        layers: Which layers: ``last``, ``all-dense``, or names separated by commas, see
            `layers.candidate_layers`.
        batch_size: Examples per call of the compiled model.
        float64: Compute the whole models in float64, where they can, instead of the head alone.
            For queries: they are few, and a well fitted query's gradient is no more exact than
            its logits are, absolutely, so that in float32 it alone would limit what influences
            are good for.
    """

    series: CheckpointSeries
    layers: str = LAST
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
    """The K models of a run, compiled.

    The first batch is checked against automatic differentiation, see `check_gradients`.
    """

    def __init__(self, description: KerasFactorExtractor) -> None:
        self._description = description
        self._loss = loss_of_series(description.series)
        checkpoints = description.series.checkpoints
        self._float64 = description.float64 and can_be_widened(load_model(checkpoints[0]))
        self._functions = [self._load(checkpoint) for checkpoint in checkpoints]
        # The others are checked with the first batch: compiling each twice would take seconds.
        self._functions[0].check()
        # Settled here: a shard that is done again must be cut into the same blocks.
        self._numbers_per_example = self._functions[0].numbers_per_example
        self._checked = False

    def extract(self, batch: ExampleBatch) -> FactorBlock:
        """Returns the gradient factors of a batch at all checkpoints, in inference mode.

        Raises:
            InputError: The inputs do not fit the model, a label does not fit its outputs, a number
                is not finite, or the factors differ from automatic differentiation.
        """
        _check_inputs_finite(batch)
        shapes = [function.output_shape(batch.inputs) for function in self._functions]
        if len(set(shapes)) > 1:
            raise InputError(
                f"the checkpoints' models have outputs of different shapes: {sorted(set(shapes))}: "
                "expected checkpoints of one training run"
            )
        targets = _Targets(self._loss, batch, shapes[0])
        size = self._description.batch_size
        # Two checkpoints at a time: while one is in a part that keeps a single core busy, such as
        # a layer that does not split, the other has the rest of the machine.
        with ThreadPoolExecutor(max_workers=2) as pool:
            found = list(
                pool.map(lambda run: run(batch.inputs, targets.taken, size), self._functions)
            )
        ids = [checkpoint.id for checkpoint in self._description.series.checkpoints]
        block = check_finite(
            FactorBlock(
                shard=batch.shard,
                start=batch.start,
                example_ids=batch.example_ids,
                labels=targets.readable,
                predictions=readable_predictions(targets.kind, found[-1].loss_inputs),
                losses=np.stack([f.losses for f in found], axis=1).astype(np.float32),
                gradients=tuple(
                    GradientFactors(name, f.layers) for name, f in zip(ids, found, strict=True)
                ),
            )
        )
        if not self._checked:
            self._check_gradients(batch, block)
            self._checked = True
        return block

    def block_rows(self, limit: int) -> int:
        """Returns how many examples, at most `limit`, make a block of no more than 256 MiB."""
        numbers = self._numbers_per_example
        if numbers is None:
            # A model that Keras has no graph of shows its layers with the first examples only.
            return min(limit, _ROWS_OF_UNKNOWN_SIZE)
        return max(1, min(limit, _BLOCK_BYTES // (4 * numbers * len(self._functions))))

    def _load(self, checkpoint: Checkpoint) -> FactorFunction:
        model = load_model(checkpoint)
        (widen if self._float64 else widen_head)(model)
        what = f"checkpoint {checkpoint.id!r}: model {model.name!r}"
        return FactorFunction(model, self._loss, what, self._description.layers)

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
        for run, gradient in zip(self._functions, block.rows(worst).gradients, strict=True):
            check_gradients(run, self._loss, few, gradient)


class _Targets:
    """A batch's targets, in the forms that the loss and the reader take."""

    def __init__(self, loss: TrainingLoss, batch: ExampleBatch, shape: tuple[int, ...]) -> None:
        known = LOSSES.get(loss.name)
        is_index = batch.targets.ndim < len(shape) and batch.targets.dtype.kind in "iu"
        self.kind = known.targets if known else "index" if is_index and shape[-1] > 1 else "value"
        try:
            rows = target_rows(self.kind, batch.targets, shape)
        except RowError as error:
            example = str(batch.example_ids[error.row])
            raise InputError(
                f"example {example!r} of shard {batch.shard!r}: {error.problem}"
            ) from error
        self.readable = readable_targets(self.kind, rows)
        self.taken = batch.targets if loss.formula is None else rows


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
