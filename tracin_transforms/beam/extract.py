"""Shards of examples to blocks of gradient factors."""

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.protocols import (
    ExampleSource,
    FactorExtractor,
    LoadedExtractor,
    Shard,
)
from tracin_transforms.storage.files import mark


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


@dataclasses.dataclass(eq=False)
class ExtractFactors(beam.PTransform):
    """Computes the gradient factors of every example, in blocks.

    A worker reads a shard once and runs all checkpoints on it.

    Attributes:
        source: Reads the shards.
        extractor: The models.
        block_rows: Examples per block, at most.
        progress: Directory that gets a file ``<shard>-<start>-<rows>`` for each finished block,
            or None.
    """

    source: ExampleSource
    extractor: SharedExtractor
    block_rows: int
    progress: Path | None = None

    def __post_init__(self) -> None:
        if self.block_rows < 1:
            raise ValueError(f"block_rows is {self.block_rows}, expected at least 1")

    def expand(self, shards: beam.PCollection[Shard]) -> beam.PCollection[FactorBlock]:
        """Wires the steps."""
        # Create makes one bundle; without the reshuffle one worker would read every shard.
        return (
            shards
            | "DistributeShards" >> beam.Reshuffle()
            | "ExtractShard"
            >> beam.ParDo(
                _ExtractShard(self.source, self.extractor, self.block_rows, self.progress)
            )
        )


class _ExtractShard(beam.DoFn):
    def __init__(
        self,
        source: ExampleSource,
        extractor: SharedExtractor,
        block_rows: int,
        progress: Path | None,
    ) -> None:
        self._source = source
        self._extractor = extractor
        self._block_rows = block_rows
        self._progress = progress
        # For runners that show a job's counters.
        self._examples = Metrics.counter("tracin", "examples")

    def setup(self) -> None:
        self._loaded = self._extractor.acquire()

    def process(self, shard: Shard) -> Iterator[FactorBlock]:
        for block in one_ahead(self._blocks(shard)):
            yield block
            self._examples.inc(len(block))
            if self._progress is not None:
                mark(self._progress / f"{block.shard}-{block.start:012d}-{len(block)}")

    def _blocks(self, shard: Shard) -> Iterator[FactorBlock]:
        rows = self._loaded.block_rows(self._block_rows)
        for batch in self._source.read(shard, rows):
            yield self._loaded.extract(batch)


def one_ahead(blocks: Iterator[FactorBlock]) -> Iterator[FactorBlock]:
    """Yields blocks in order; while one is in use, the next is made in another thread."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(next, blocks, None)
        while (block := ahead.result()) is not None:
            ahead = pool.submit(next, blocks, None)
            yield block
