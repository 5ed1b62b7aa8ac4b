"""Shards of examples to blocks of gradient factors."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from tracin_transforms.core.errors import ExampleError, InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.protocols import (
    BadExample,
    ExampleBatch,
    ExampleSource,
    FactorExtractor,
    LoadedExtractor,
    Shard,
)
from tracin_transforms.storage.job_notes import JobNotes


class SharedExtractor:
    """An extractor of which each process keeps one loaded copy.

    Args:
        extractor: Describes the models.
    """

    def __init__(self, extractor: FactorExtractor) -> None:
        self._extractor = extractor
        self._shared = Shared()

    def acquire(self) -> LoadedExtractor:
        """Returns this process's loaded extractor; it is unloaded when nobody holds it."""
        loaded: LoadedExtractor = self._shared.acquire(self._extractor.load)
        return loaded

    @contextlib.contextmanager
    def loaded(self) -> Iterator[LoadedExtractor]:
        """Keeps this process's extractor loaded for the time of a with block."""
        loaded = self.acquire()
        yield loaded


@dataclasses.dataclass(frozen=True, eq=False)
class Extraction:
    """How a worker turns a shard into blocks; small and picklable.

    Attributes:
        source: Reads the shards.
        extractor: The models.
        block_rows: Examples per block, at most.
        notes: Where workers note what they have done, and bad examples; or None.
        max_bad_examples: How many examples may be unusable, in all shards together, before the
            job fails; the others are left out.
        bad_before: How many an earlier run found.
    """

    source: ExampleSource
    extractor: SharedExtractor
    block_rows: int
    notes: JobNotes | None = None
    max_bad_examples: int = 0
    bad_before: int = 0

    def __post_init__(self) -> None:
        if self.block_rows < 1:
            raise ValueError(f"block_rows is {self.block_rows}, expected at least 1")
        if self.max_bad_examples and self.notes is None:
            raise ValueError("max_bad_examples needs notes, to count bad examples of all workers")

    def blocks(
        self, loaded: LoadedExtractor, shard: Shard, bad: list[BadExample]
    ) -> Iterator[FactorBlock]:
        """Yields the blocks of a shard; the next is extracted while one is in use.

        Args:
            loaded: The extractor, loaded.
            shard: Which.
            bad: Gets the examples that cannot be used.

        Raises:
            InputError: The shard cannot be read, has other examples than it should, too many
                cannot be used, or memory does not suffice; the message names the shard.
        """
        running = contextlib.nullcontext() if self.notes is None else self.notes.running(shard.name)
        with running:
            try:
                for block in _one_ahead(self._extracted(loaded, shard, bad)):
                    yield block
                    if self.notes is not None:
                        start = int(block.indices[0])
                        self.notes.finished(shard.name, start, len(block), block.example_ids)
            except MemoryError as error:
                raise InputError(
                    f"shard {shard.name!r}: out of memory ({error}): give the job more, or fewer "
                    "worker processes, or a smaller --batch-size"
                ) from error

    def _extracted(
        self, loaded: LoadedExtractor, shard: Shard, bad: list[BadExample]
    ) -> Iterator[FactorBlock]:
        examples = 0
        for batch in self._read(shard, loaded.block_rows(self.block_rows)):
            examples += len(batch) + len(batch.bad)
            block, found = _extracted_batch(loaded, batch)
            if found:
                bad += found
                self._note(found)
            if block is not None:
                yield block
        if shard.count not in (None, examples):
            raise InputError(
                f"shard {shard.name!r} has {examples} examples, expected {shard.count}: did its "
                "file change?"
            )

    def _read(self, shard: Shard, rows: int) -> Iterator[ExampleBatch]:
        """Yields the shard's batches; what goes wrong in reading names it."""
        try:
            yield from self.source.read(shard, rows)
        except (InputError, MemoryError):
            raise
        except OSError as error:
            raise InputError(f"shard {shard.name!r} cannot be read: {error}") from error
        except Exception as error:
            # A defect, perhaps in a source of the user's own.
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(f"shard {shard.name!r} cannot be read: {what}") from error

    def _note(self, found: Sequence[BadExample]) -> None:
        number = len(found)
        if self.max_bad_examples:
            assert self.notes is not None
            number = self.bad_before + self.notes.bad(found)
        if number > self.max_bad_examples:
            first = min(found, key=lambda example: example.index)
            one = (
                f"example {first.example_id!r} of shard {first.shard!r}, index {first.index}: "
                f"{first.error}"
            )
            raise InputError(
                f"{one}; --max-bad-examples N leaves out as many as N such examples"
                if not self.max_bad_examples
                else f"{number} examples cannot be used, --max-bad-examples allows "
                f"{self.max_bad_examples}; one of them: {one}"
            )


def _extracted_batch(
    loaded: LoadedExtractor, batch: ExampleBatch
) -> tuple[FactorBlock | None, list[BadExample]]:
    """Returns the block of a batch, None where nothing of it can be used, and what cannot."""
    bad = list(batch.bad)
    while len(batch):
        try:
            return loaded.extract(batch), bad
        except ExampleError as error:
            # Each check finds all rows that fail it, so there are few rounds.
            bad += [
                BadExample(str(batch.example_ids[row]), batch.shard, int(batch.indices[row]), what)
                for row, what in error.problems
            ]
            rows = [row for row, _ in error.problems]
            batch = batch.rows(np.setdiff1d(np.arange(len(batch)), rows))
    return None, bad


def _one_ahead(blocks: Iterator[FactorBlock]) -> Iterator[FactorBlock]:
    """Yields blocks in order; while one is in use, the next is made in another thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(next, blocks, None)
        while (block := ahead.result()) is not None:
            ahead = pool.submit(next, blocks, None)
            yield block


@dataclasses.dataclass(eq=False)
class ExtractFactors(beam.PTransform):
    """Computes the gradient factors of every example, in blocks.

    A worker reads a shard once and runs all checkpoints on it.

    Attributes:
        extraction: How.
    """

    extraction: Extraction

    def expand(self, shards: beam.PCollection[Shard]) -> beam.PCollection[FactorBlock]:
        """Wires the steps."""
        # Create makes one bundle; without the reshuffle one worker would read every shard.
        return (
            shards
            | "DistributeShards" >> beam.Reshuffle()
            | "ExtractShard" >> beam.ParDo(_ExtractShard(self.extraction))
        )


class _ExtractShard(beam.DoFn):
    def __init__(self, extraction: Extraction) -> None:
        self._extraction = extraction
        # For runners that show a job's counters.
        self._examples = Metrics.counter("tracin", "examples")

    def setup(self) -> None:
        self._loaded = self._extraction.extractor.acquire()

    def process(self, shard: Shard) -> Iterator[FactorBlock]:
        for block in self._extraction.blocks(self._loaded, shard, []):
            yield block
            self._examples.inc(len(block))
