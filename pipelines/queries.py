"""The query examples of a job: computed by the models, or read from a store."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.inputs import keras_extractor, query_blocks, query_series, sources
from pipelines.training import Training, query_options
from tracin_transforms.core.checkpoints import CheckpointSeries
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, concatenate_blocks
from tracin_transforms.core.protocols import ExampleSource, fingerprint
from tracin_transforms.core.sketching import Sketch
from tracin_transforms.storage.factor_store import FactorStore

_STORE = "store:"
# What the queries of one pass over the training examples may take of a process's memory.
_GROUP_BYTES = 512 * 2**20
_PAIR_BYTES = 160
_SHORTLIST_PER_K = 10


@dataclass(frozen=True, eq=False)
class _Queries:
    """What all queries have.

    Attributes:
        sketch: By which their factors are yet to be projected, to be scored with those of the
            training examples; None if by none.
    """

    sketch: Sketch | None

    def as_stored(self, block: FactorBlock) -> FactorBlock:
        """Returns some of the queries with factors like those of the training examples."""
        return block if self.sketch is None else self.sketch.project(block)


@dataclass(frozen=True, eq=False)
class ComputedQueries(_Queries):
    """Query examples whose gradient factors the job computes, in float64 where models can.

    Attributes:
        options: By which the models are loaded.
        series: The checkpoints, with the loss that the queries are asked about.
        source: The examples.
    """

    options: argparse.Namespace
    series: CheckpointSeries
    source: ExampleSource
    # A query that cannot be used ends the job.
    skipped = 0

    def described(self) -> dict[str, Any]:
        """Returns what determines the queries, for a manifest."""
        loss = [self.series.loss, self.series.from_logits, dict(self.series.loss_options)]
        return {"queries": fingerprint(self.source, self.source.shards()), "query_loss": loss}

    def blocks(self) -> Iterator[FactorBlock]:
        """Yields the gradient factors of all queries, in their order."""
        extractor = keras_extractor(self.series, self.options, float64=True)
        return query_blocks(self.source, extractor.load())


@dataclass(frozen=True, eq=False)
class StoredQueries(_Queries):
    """Query examples whose gradient factors are in a store.

    Attributes:
        store: The store.
        checkpoint_ids: The checkpoints of the job, in order.
    """

    store: FactorStore
    checkpoint_ids: tuple[str, ...]

    @property
    def skipped(self) -> int:
        """How many query examples could not be used when the store was written."""
        return sum(len(sidecar.bad) for sidecar in self.store.stored().values())

    def described(self) -> dict[str, Any]:
        """Returns what determines the queries, for a manifest."""
        document = self.store.description.to_json()
        return {"queries": {key: document[key] for key in ("factors", "checkpoints", "shards")}}

    def blocks(self) -> Iterator[FactorBlock]:
        """Yields the gradient factors of all queries, in the order of their source."""
        for shard in self.store.description.shards:
            found = list(self.store.shard(shard.name).blocks(self.checkpoint_ids))
            if found:
                block = concatenate_blocks(found)
                yield block.rows(np.argsort(block.indices))


Asked = ComputedQueries | StoredQueries


def kept_of_each(options: argparse.Namespace) -> int:
    """Returns how many proponents, and opponents, of each query a pass over the examples keeps."""
    if options.rescore is None:
        return int(options.k)
    return int(options.shortlist or _SHORTLIST_PER_K * options.k)


def groups(blocks: Iterator[FactorBlock], k: int) -> Iterator[FactorBlock]:
    """Yields query examples in groups that memory has room for, in their order.

    Args:
        blocks: The query examples.
        k: Proponents, and opponents, that are kept for each.
    """
    waiting: list[FactorBlock] = []
    for block in blocks:
        size = max(1, _GROUP_BYTES // _bytes_per_query(block, k))
        while len(block):
            room = size - sum(map(len, waiting))
            waiting.append(block.rows(slice(0, room)))
            block = block.rows(slice(room, None))
            if len(block):
                yield _taken(waiting)
        # A group is not held here while it is asked for.
        del block
    if waiting:
        yield _taken(waiting)


def _taken(waiting: list[FactorBlock]) -> FactorBlock:
    """Returns the rows of all blocks, and takes these out of the list."""
    joined = concatenate_blocks(waiting)
    waiting.clear()
    return joined


def _bytes_per_query(block: FactorBlock, k: int) -> int:
    checkpoints = len(block.gradients)
    layers = block.gradients[0].layers
    # Error signals are held again with weights, and a third time by class.
    factors = sum(3 * layer.numbers_per_example for layer in layers) * 4 * checkpoints
    # Each pair with its parts, its id and what goes with it, known and new and merged.
    return factors + 3 * 2 * k * (8 * checkpoints * len(layers) + _PAIR_BYTES)


def open_queries(options: argparse.Namespace, training: Training) -> Asked:
    """Reads and validates what the options say of queries.

    Raises:
        InputError: They cannot be read, or do not fit the training examples.
    """
    if options.queries.startswith(_STORE):
        return _stored(options, training)
    source = sources(options)(options.queries)
    source.shards()
    loading = query_options(training, options)
    series = query_series(training.series, options.query_loss)
    return ComputedQueries(training.sketch, loading, series, source)


def _stored(options: argparse.Namespace, training: Training) -> StoredQueries:
    store = FactorStore.open(options.queries.removeprefix(_STORE))
    if options.query_loss is not None:
        raise InputError(
            f"--query-loss {options.query_loss!r}: the queries' gradient factors are in a store "
            "already; leave it out, or name the query examples themselves"
        )
    names = check_same(store, training, f"--queries {options.queries!r}")
    own, sketch = store.description.sketch, training.sketch
    if own is None:
        return StoredQueries(sketch, store, names)
    if sketch is None:
        raise InputError(
            f"--queries {options.queries!r}: it holds sketches of gradient factors, which say "
            "nothing beside the factors themselves of the training examples: expected a store "
            "without --sketch"
        )
    if own != sketch:
        raise InputError(
            f"--queries {options.queries!r}: its sketch is {own.to_json()}, that of the training "
            f"examples {sketch.to_json()}: expected the same, or a store without --sketch"
        )
    return StoredQueries(None, store, names)


def check_same(store: FactorStore, training: Training, name: str) -> tuple[str, ...]:
    """Returns the ids of the job's checkpoints, if a store has the same gradients at them.

    Args:
        store: A store of other examples, or of the same ones.
        training: The training examples.
        name: How the user named the store.

    Raises:
        InputError: The store is not finished, lacks checkpoints, or was made of other ones or by
            another model or loss.
    """
    store.check_finished()
    wanted = training.described()
    names = tuple(checkpoint["id"] for checkpoint in wanted["checkpoints"])
    try:
        store.check_complete(names)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    hashes = {c["id"]: c["sha256"] for c in store.description.checkpoints}
    for checkpoint in wanted["checkpoints"]:
        if hashes[checkpoint["id"]] != checkpoint["sha256"]:
            raise InputError(
                f"{name}: its checkpoint {checkpoint['id']!r} is another one than that of the "
                "training examples: expected the same file"
            )
    same = ("model", "output", "layers", "loss", "from_logits", "loss_options", "class_weights")
    for key in same:
        known, here = wanted[key], store.description.factors[key]
        if known != here:
            raise InputError(
                f"{name}: {key} is {here!r}, that of the training examples {known!r}: expected "
                "the same"
            )
    return names
