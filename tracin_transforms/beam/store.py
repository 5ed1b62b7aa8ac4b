"""Shards to a factor store, and a factor store to blocks."""

import dataclasses
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics

from tracin_transforms.beam.extract import Extraction
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.protocols import BadExample, Shard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.shard_writer import ShardWriter


@dataclasses.dataclass(eq=False)
class WriteFactors(beam.PTransform):
    """Computes the gradient factors of shards and stores them; gives the shards' names.

    A worker writes a shard where it computes it: factors are not shuffled. What a shard holds of
    other checkpoints already is kept; a shard that is complete, written by another worker or run
    meanwhile, is left alone. In a store of sketches, the factors are projected before they are
    stored.

    Attributes:
        extraction: How to compute them.
        checkpoint_ids: Those that the extractor computes.
        store: Where they go.
        dtype: ``float16`` or ``float32``.
    """

    extraction: Extraction
    checkpoint_ids: tuple[str, ...]
    store: FactorStore
    dtype: str

    def expand(self, shards: beam.PCollection[Shard]) -> beam.PCollection[str]:
        """Wires the steps."""
        return (
            shards
            | "DistributeShards" >> beam.Reshuffle()
            | "WriteShard" >> beam.ParDo(_WriteShard(self))
        )


class _WriteShard(beam.DoFn):
    def __init__(self, job: WriteFactors) -> None:
        self._extraction = job.extraction
        self._new = job.checkpoint_ids
        self._store = job.store
        self._dtype = job.dtype
        self._examples = Metrics.counter("tracin", "examples")
        self._bytes = Metrics.counter("tracin", "bytes_written")

    def setup(self) -> None:
        self._loaded = self._extraction.extractor.acquire()

    def process(self, shard: Shard) -> Iterator[str]:
        paths = self._store.paths(shard.name)
        known = self._store.stored_shard(shard)
        if known is not None and not {*self._new} - {*known.sidecar.layout.checkpoint_ids}:
            yield shard.name
            return
        bad: list[BadExample] = []
        described = self._store.description
        weights, sketch = described.sorting_weights, described.sketch
        with ShardWriter(paths, shard, weights, self._dtype, known, self._new, sketch) as writer:
            for block in self._extraction.blocks(self._loaded, shard, bad):
                writer.add(block)
                self._examples.inc(len(block))
            sidecar = writer.finish(bad)
        if self._extraction.notes is not None:
            self._extraction.notes.stored(shard.name)
        self._bytes.inc(sidecar.file.size)
        yield shard.name


@dataclasses.dataclass(eq=False)
class ReadFactors(beam.PTransform):
    """Reads the gradient factors of shards, given by name, in blocks.

    Attributes:
        store: Where they are.
        checkpoint_ids: Which checkpoints are wanted, in order.
    """

    store: FactorStore
    checkpoint_ids: Sequence[str]

    def expand(self, names: beam.PCollection[str]) -> beam.PCollection[FactorBlock]:
        """Wires the steps."""
        return (
            names
            | "DistributeShards" >> beam.Reshuffle()
            | "ReadShard" >> beam.FlatMap(_read_shard, self.store, tuple(self.checkpoint_ids))
        )


def _read_shard(
    name: str, store: FactorStore, checkpoint_ids: tuple[str, ...]
) -> Iterator[FactorBlock]:
    return store.shard(name).blocks(checkpoint_ids)
