"""Gradient factors of a Keras model's layers, at every checkpoint of a run."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import keras
import numpy as np

from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import ExampleError, InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, check_finite
from tracin_transforms.core.losses import LOSSES, QUERY_LOSSES
from tracin_transforms.core.protocols import ExampleBatch
from tracin_transforms.core.targets import (
    INDICES,
    VALUES,
    readable_targets,
    target_rows,
    weights_of_classes,
)
from tracin_transforms.models.batch_size import BatchSize
from tracin_transforms.models.devices import share_devices
from tracin_transforms.models.factor_function import ExampleFactors, FactorFunction, Targets
from tracin_transforms.models.gradient_check import check_gradients
from tracin_transforms.models.layer_factors import ChosenMatrix
from tracin_transforms.models.layers import LAST
from tracin_transforms.models.loading import LoadedCheckpoint, ModelLoading, load_checkpoints
from tracin_transforms.models.precision import (
    FLOAT64,
    PRECISIONS,
    can_be_widened,
    set_precision,
    widen_head,
)
from tracin_transforms.models.training_loss import TrainingLoss, loss_of_series

# Enough to see a wrong layer or loss; each costs one backward pass per checkpoint.
_CHECKED_EXAMPLES = 4

# Two blocks are in memory at a time: one is scored while the next is made.
_BLOCK_BYTES = 128 * 2**20
_ROWS_OF_UNKNOWN_SIZE = 256


@dataclass(frozen=True)
class KerasFactorExtractor:
    """Describes the extraction of gradient factors.

    Attributes:
        series: The run's checkpoints.
        layers: Which layers: ``last``, ``all-dense``, ``all``, or names separated by commas, see
            `layers.candidate_layers`.
        batch_size: Examples per call of the compiled model; None for as many as memory has room
            for.
        float64: Compute the whole models in float64, where they can, instead of the head alone.
            For queries: they are few, and a well fitted query's gradient is no more exact than
            its logits are, absolutely, so that in float32 it alone would limit what influences
            are good for.
        loading: How to turn checkpoints into models.
        precision: What the models compute in, one of `precision.PRECISIONS`; None: as saved.
        xla: Compile with XLA.
    """

    series: CheckpointSeries
    layers: str = LAST
    batch_size: int | None = None
    float64: bool = False
    loading: ModelLoading = field(default_factory=ModelLoading)
    precision: str | None = None
    xla: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch size is {self.batch_size}, expected at least 1")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise InputError(
                f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}"
            )

    def load(self) -> "LoadedKerasExtractor":
        """Returns the extractor with all K checkpoints in memory.

        Raises:
            InputError: A checkpoint is not a model, or its model or loss is not supported.
        """
        share_devices()
        return LoadedKerasExtractor(self)


class LoadedKerasExtractor:
    """The K checkpoints of a run, with their models compiled.

    The first batch is checked against automatic differentiation, see `check_gradients`.
    """

    def __init__(self, description: KerasFactorExtractor) -> None:
        self._description = description
        self._batch_size = BatchSize(description.batch_size)
        self._checkpoints = self._load()
        self._loss = loss_of_series(description.series)
        functions: dict[int, FactorFunction] = {}
        for loaded in self._checkpoints:
            if id(loaded.model) not in functions:
                functions[id(loaded.model)] = self._function(loaded)
        self._functions = [functions[id(loaded.model)] for loaded in self._checkpoints]
        # Other networks are checked with the first batch: compiling each twice would take seconds.
        # Settled here: a shard that is done again must be cut into the same blocks.
        self._numbers_per_example = self._functions[0].check()
        self._checked = False

    def extract(self, batch: ExampleBatch) -> FactorBlock:
        """Returns the gradient factors of a batch at all checkpoints, in inference mode.

        Raises:
            ExampleError: Labels that do not fit the model's outputs, or numbers not finite.
            InputError: The inputs do not fit the model, or the factors differ from automatic
                differentiation.
        """
        _check_inputs_finite(batch)
        shapes = [function.output_shape(batch.inputs) for function in self._functions]
        if len(set(shapes)) > 1:
            raise InputError(
                f"the checkpoints' models have outputs of different shapes: {sorted(set(shapes))}: "
                "expected checkpoints of one training run"
            )
        kind = _kind_of_targets(self._loss, batch.targets, shapes[0])
        targets = self._targets(batch, kind, shapes[0])

        def run(at: tuple[FactorFunction, LoadedCheckpoint]) -> ExampleFactors:
            function, loaded = at
            return function(loaded.values, batch.inputs, targets, self._batch_size)

        # Two checkpoints at a time: while one is in a part that keeps a single core busy, such as
        # a layer that does not split, the other has the rest of the machine.
        with ThreadPoolExecutor(max_workers=2) as pool:
            found = list(pool.map(run, zip(self._functions, self._checkpoints, strict=True)))
        block = check_finite(
            FactorBlock(
                shard=batch.shard,
                indices=batch.indices,
                example_ids=batch.example_ids,
                labels=readable_targets(kind, targets.rows),
                predictions=np.stack([f.predictions for f in found], axis=1),
                losses=np.stack([f.losses for f in found], axis=1).astype(np.float32),
                gradients=tuple(
                    GradientFactors(loaded.checkpoint.id, f.layers)
                    for loaded, f in zip(self._checkpoints, found, strict=True)
                ),
            )
        )
        if not self._checked:
            self._check_gradients(batch, targets, block, [f.matrices for f in found])
            self._checked = True
        return block

    def block_rows(self, limit: int) -> int:
        """Returns how many examples, at most `limit`, make a block of no more than 128 MiB."""
        if self._numbers_per_example is None:
            # A model that Keras has no graph of shows its layers with the first examples only.
            return min(limit, _ROWS_OF_UNKNOWN_SIZE)
        factors, loss_inputs = self._numbers_per_example
        # A label is a float64 for each number that the loss takes.
        example = 4 * factors * len(self._functions) + 8 * loss_inputs
        return max(1, min(limit, _BLOCK_BYTES // example))

    def _load(self) -> list[LoadedCheckpoint]:
        series, loading = self._description.series, self._description.loading
        loaded = load_checkpoints(series, loading)
        models: list[keras.Model] = list({id(at.model): at.model for at in loaded}.values())
        must_be_wide = self._description.precision == FLOAT64
        if self._description.float64 or must_be_wide:
            if all(can_be_widened(model) for model in models):
                return loaded
            if must_be_wide:
                raise InputError(
                    f"model {models[0].name!r} cannot compute in float64: expected layers of "
                    "Keras's own, saved in float32; leave out --precision float64"
                )
            # What was tried on them cannot be undone.
            loaded = load_checkpoints(series, loading)
            models = list({id(at.model): at.model for at in loaded}.values())
        for model in models:
            if self._description.precision is not None:
                set_precision(model, self._description.precision)
            widen_head(model)
        return loaded

    def _function(self, loaded: LoadedCheckpoint) -> FactorFunction:
        what = f"checkpoint {loaded.checkpoint.id!r}: model {loaded.model.name!r}"
        return FactorFunction(
            loaded.model,
            self._loss,
            what,
            self._description.layers,
            self._description.series.output,
            self._description.xla,
        )

    def _targets(self, batch: ExampleBatch, kind: str, shape: tuple[int, ...]) -> Targets:
        try:
            rows = target_rows(kind, batch.targets, (len(batch), *shape))
        except ExampleError as error:
            raise _bad_examples(batch, error.problems) from error
        except InputError as error:
            raise InputError(f"shard {batch.shard!r}, loss {self._loss.name!r}: {error}") from error
        weights = weights_of_classes(kind, rows, self._description.series.class_weights)
        if batch.sample_weights is not None:
            _check_weights(batch)
            weights = weights * batch.sample_weights
        return Targets(kind, batch.targets, rows, weights)

    def _check_gradients(
        self,
        batch: ExampleBatch,
        targets: Targets,
        block: FactorBlock,
        matrices: Sequence[Sequence[ChosenMatrix]],
    ) -> None:
        # A well fitted example has hardly a gradient and would pass with any formula.
        worst = np.argsort(-block.losses.sum(axis=1), kind="stable")[:_CHECKED_EXAMPLES]
        few, few_targets = batch.rows(worst), targets.rows_at(worst)
        columns = (self._functions, self._checkpoints, block.rows(worst).gradients, matrices)
        for run, at, gradient, chosen in zip(*columns, strict=True):
            check_gradients(run, self._loss, at.values, few.inputs, few_targets, gradient, chosen)


def _kind_of_targets(loss: TrainingLoss, targets: np.ndarray, shape: tuple[int, ...]) -> str:
    known = LOSSES.get(loss.name) or QUERY_LOSSES.get(loss.name)
    if known and (loss.formula is not None or known.targets != "index"):
        return known.targets
    # Another loss may take labels of any form, such as an index of a class to ignore.
    is_index = targets.ndim <= len(shape) and targets.dtype.kind in "iu" and shape[-1] > 1
    return INDICES if is_index else VALUES


def _check_weights(batch: ExampleBatch) -> None:
    weights = np.asarray(batch.sample_weights)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0))).tolist()
    if bad:
        what = "has the weight {}: expected a finite number >= 0"
        raise _bad_examples(batch, [(row, what.format(weights[row])) for row in bad])


def _check_inputs_finite(batch: ExampleBatch) -> None:
    arrays = batch.inputs.values() if isinstance(batch.inputs, Mapping) else [batch.inputs]
    for array in arrays:
        if array.dtype.kind != "f":
            continue
        finite = np.isfinite(array.reshape(len(batch), -1)).all(axis=1)
        if not finite.all():
            what = "has a NaN or infinite input: expected finite numbers"
            bad = np.flatnonzero(~finite).tolist()
            raise _bad_examples(batch, [(row, what) for row in bad])


def _bad_examples(batch: ExampleBatch, found: Sequence[tuple[int, str]]) -> ExampleError:
    """Returns the error that names the examples in some rows of a batch, and what is wrong."""
    first = str(batch.example_ids[found[0][0]])
    return ExampleError(found, f"example {first!r} of shard {batch.shard!r}: ")
