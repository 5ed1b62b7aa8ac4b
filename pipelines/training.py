"""Where a job gets the gradient factors of the training examples: from models, or from a store."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np

from pipelines.inputs import (
    BLOCK_ROWS,
    describe_run,
    keras_extractor,
    open_series,
    sources,
    weighted_series,
)
from tracin_transforms.beam.extract import ExtractFactors, Extraction, SharedExtractor
from tracin_transforms.core.checkpoints import Checkpoint, CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.protocols import BadExample, ExampleSource, Shard, fingerprint
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.checkpoint_series import (
    checkpoint_files,
    checkpoint_hash,
    is_run,
    read_checkpoint_series,
    series_of_files,
)
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import any_path
from tracin_transforms.storage.job_notes import JobNotes


@dataclass(frozen=True, eq=False)
class FromExamples:
    """Training examples whose factors the job computes.

    Attributes:
        options: The command's.
        series: The run's checkpoints.
        weights: Weight of each, shape [K].
        source: The training examples.
        shards: Their shards.
        fingerprint: What identifies their content.
        extractor: The models.
    """

    options: argparse.Namespace
    series: CheckpointSeries
    weights: np.ndarray
    source: ExampleSource
    shards: tuple[Shard, ...]
    fingerprint: dict[str, Any]
    extractor: SharedExtractor | None = None
    # Factors that are computed are not projected.
    sketch = None

    @property
    def count(self) -> int | None:
        """Number of training examples, None where only reading them would tell."""
        return known_count(self.shards)

    @property
    def size(self) -> int:
        """Bytes to read, about."""
        return sum(shard.size for shard in self.shards)

    def described(self, **more: Any) -> dict[str, Any]:
        """Returns what determines a result, for its manifest."""
        return describe_run(
            self.options, self.series, self.weights, examples=self.fingerprint, **more
        )

    @contextlib.contextmanager
    def ready(self) -> Iterator["FromExamples"]:
        """Gives this with the models loaded.

        Held from before the pipeline starts: a bad checkpoint is an error of this process, and
        workers that are threads of it find the models loaded.
        """
        extractor = SharedExtractor(keras_extractor(self.series, self.options))
        with extractor.loaded():
            yield replace(self, extractor=extractor)

    def blocks(self, pipeline: beam.Pipeline, notes: JobNotes) -> beam.PCollection[FactorBlock]:
        """Adds the steps that give the blocks."""
        assert self.extractor is not None
        extraction = Extraction(
            self.source, self.extractor, BLOCK_ROWS, notes, self.options.max_bad_examples
        )
        return pipeline | "Shards" >> beam.Create(self.shards) | ExtractFactors(extraction)

    def finished(self, notes: JobNotes) -> tuple[int, list[BadExample]]:
        """Returns how many examples were used, and those that could not be.

        Raises:
            InputError: The examples are not those any more that the job began with, or an id
                occurs twice.
        """
        self.check_unchanged()
        notes.check_unique()
        return notes.examples(), notes.all_bad()

    def check_unchanged(self) -> None:
        """Raises InputError if the examples are not those that the job began with."""
        if fingerprint(self.source, self.source.shards()) != self.fingerprint:
            raise InputError(
                f"examples {self.options.examples!r} changed while the job ran: run it again"
            )


@dataclass(frozen=True, eq=False)
class FromStore:
    """Training examples whose factors are in a store.

    Attributes:
        options: The command's.
        store: The store.
        series: Its checkpoints that are wanted.
        weights: Weight of each, shape [K].
        count: Number of examples.
        size: Bytes of their factors.
        bad: Examples that could not be used when the store was written.
    """

    options: argparse.Namespace
    store: FactorStore
    series: CheckpointSeries
    weights: np.ndarray
    count: int
    size: int
    bad: tuple[BadExample, ...]

    @property
    def checkpoint_ids(self) -> tuple[str, ...]:
        """Ids of the checkpoints that are wanted, in order."""
        return tuple(checkpoint.id for checkpoint in self.series.checkpoints)

    @property
    def sketch(self) -> Sketch | None:
        """How the store's factors were projected; None where they are the gradients' own."""
        return self.store.description.sketch

    @property
    def shard_names(self) -> list[str]:
        """The names of the store's shards."""
        return [shard.name for shard in self.store.description.shards]

    def described(self, **more: Any) -> dict[str, Any]:
        """Returns what determines a result, for its manifest."""
        hashes = {c["id"]: c["sha256"] for c in self.store.description.checkpoints}
        checkpoints = [
            {"id": c.id, "step": c.step, "weight": weight, "sha256": hashes[c.id]}
            for c, weight in zip(self.series.checkpoints, self.weights.tolist(), strict=True)
        ]
        shards = [[shard.name, shard.count, shard.size] for shard in self.store.description.shards]
        return {
            "command": self.options.command,
            **self.store.description.factors,
            "checkpoints": checkpoints,
            "shards": shards,
            **more,
        }

    @contextlib.contextmanager
    def ready(self) -> Iterator["FromStore"]:
        """Gives this: nothing needs to be loaded."""
        yield self

    def names(self, pipeline: beam.Pipeline) -> beam.PCollection[str]:
        """Adds the step that gives the names of the shards."""
        return pipeline | "Shards" >> beam.Create(self.shard_names)

    def finished(self, notes: JobNotes) -> tuple[int, list[BadExample]]:
        """Returns how many examples were used, and those that could not be."""
        return self.count, list(self.bad)


Training = FromExamples | FromStore


def open_training(options: argparse.Namespace) -> Training:
    """Reads and validates what the options say of checkpoints and training examples.

    Raises:
        InputError: Something is missing or inconsistent.
    """
    if options.store is not None:
        return _open_store(options)
    # Where a store is to be written, the weights say which checkpoints, if they are given.
    weights_given = options.checkpoint_weights or "equal"
    series, weights = weighted_series(open_series(options), weights_given)
    return open_examples(options, series, weights)


def open_examples(
    options: argparse.Namespace, series: CheckpointSeries, weights: np.ndarray
) -> FromExamples:
    """Reads and validates what the options say of training examples.

    Raises:
        InputError: They cannot be read, or are inconsistent.
    """
    source = sources(options)(options.examples)
    shards = source.shards()
    return FromExamples(options, series, weights, source, shards, fingerprint(source, shards))


def known_count(shards: Sequence[Shard]) -> int | None:
    """Returns the number of examples in shards, None where only reading them would tell."""
    counts = [shard.count for shard in shards]
    return None if None in counts else sum(count or 0 for count in counts)


def query_options(training: Training, options: argparse.Namespace) -> argparse.Namespace:
    """Returns the options by which the models of queries are loaded: those of a store, if any.

    Raises:
        InputError: The checkpoints are not where they were when the store was written, or are
            other ones.
    """
    if isinstance(training, FromExamples):
        return options
    description = training.store.description
    for checkpoint in training.series.checkpoints:
        if not checkpoint_files(any_path(checkpoint.path)):
            raise InputError(
                f"checkpoint {checkpoint.id!r} of store {options.store!r} is not at "
                f"{checkpoint.path!r} any more: say where the run is now with --checkpoints, or "
                "ask with queries from a store, as in --queries store:DIR"
            )
        known = {c["id"]: c["sha256"] for c in description.checkpoints}[checkpoint.id]
        if checkpoint_hash(checkpoint.path) != known:
            raise InputError(
                f"checkpoint {checkpoint.id!r}: {checkpoint.path!r} is not the file that store "
                f"{options.store!r} was written with: expected SHA-256 {known}"
            )
    loading = {
        "layers": description.factors["layers"],
        "precision": description.factors["precision"],
        "model": options.model or description.loading["model"],
        "imports": [*description.loading["imports"], *options.imports],
    }
    return argparse.Namespace(**{**vars(options), **loading})


def _open_store(options: argparse.Namespace) -> FromStore:
    store = FactorStore.open(options.store)
    series, weights = weighted_series(_series_of_store(store), options.checkpoint_weights)
    stored = store.check_complete([checkpoint.id for checkpoint in series.checkpoints])
    store.check_finished()
    if options.checkpoints is not None:
        series = _moved(series, store, options)
    bad = tuple(example for sidecar in stored.values() for example in sidecar.bad)
    count = sum(sidecar.count for sidecar in stored.values())
    size = sum(sidecar.file.size for sidecar in stored.values())
    return FromStore(options, store, series, weights, count, size, bad)


def _moved(
    series: CheckpointSeries, store: FactorStore, options: argparse.Namespace
) -> CheckpointSeries:
    """Returns the checkpoints of a store at the places where they are now."""
    if is_run(options.checkpoints):
        there = read_checkpoint_series(options.checkpoints)
    else:
        there = series_of_files(options.checkpoints, None, loss=series.loss, from_logits=None)
    places = {checkpoint_hash(checkpoint.path): checkpoint.path for checkpoint in there.checkpoints}
    hashes = {c["id"]: c["sha256"] for c in store.description.checkpoints}
    found = []
    for checkpoint in series.checkpoints:
        if hashes[checkpoint.id] not in places:
            raise InputError(
                f"--checkpoints {options.checkpoints!r}: no file of it is checkpoint "
                f"{checkpoint.id!r} of store {options.store!r}: expected one with SHA-256 "
                f"{hashes[checkpoint.id]}"
            )
        found.append(replace(checkpoint, path=places[hashes[checkpoint.id]]))
    return replace(series, checkpoints=tuple(found), model=there.model or series.model)


def _series_of_store(store: FactorStore) -> CheckpointSeries:
    factors = store.description.factors
    return CheckpointSeries(
        checkpoints=tuple(
            Checkpoint(c["id"], c["path"], c["learning_rate"], c["step"])
            for c in store.description.checkpoints
        ),
        loss=factors["loss"],
        from_logits=factors["from_logits"],
        loss_options=factors["loss_options"],
        output=factors["output"],
        class_weights={int(index): weight for index, weight in factors["class_weights"].items()},
        model=store.description.loading["network"],
    )
