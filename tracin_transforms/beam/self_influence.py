"""Blocks of gradient factors to files of self-influence scores."""

import dataclasses
from collections.abc import Iterator

import apache_beam as beam
import numpy as np

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import self_influence
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.results import write_scores


@dataclasses.dataclass(eq=False)
class ScoreSelfInfluence(beam.PTransform):
    """Writes the self-influence of every example, one file per block, and gives their paths.

    Only the paths travel on; `storage.results.write_self_influence` ranks the files.

    Attributes:
        weights: Weight of each checkpoint, shape [K].
        directory: Where the files go.
    """

    weights: np.ndarray
    directory: AnyPath

    def expand(self, blocks: beam.PCollection[FactorBlock]) -> beam.PCollection[AnyPath]:
        """Wires the steps."""
        return blocks | "ScoreBlock" >> beam.Map(_score_block, self.weights, self.directory)


@dataclasses.dataclass(eq=False)
class ScoreStored(beam.PTransform):
    """Writes the self-influence of a store's examples, from sidecars alone; gives the paths.

    Attributes:
        store: The store.
        checkpoint_ids: Which checkpoints count, in order.
        weights: Weight of each checkpoint, shape [K].
        directory: Where the files go.
    """

    store: FactorStore
    checkpoint_ids: tuple[str, ...]
    weights: np.ndarray
    directory: AnyPath

    def expand(self, names: beam.PCollection[str]) -> beam.PCollection[AnyPath]:
        """Wires the steps."""
        return (
            names
            | "DistributeShards" >> beam.Reshuffle()
            | "ScoreShard"
            >> beam.FlatMap(
                _score_shard, self.store, self.checkpoint_ids, self.weights, self.directory
            )
        )


def _score_shard(
    name: str,
    store: FactorStore,
    checkpoint_ids: tuple[str, ...],
    weights: np.ndarray,
    directory: AnyPath,
) -> Iterator[AnyPath]:
    shard = store.shard(name)
    rows = shard.rows_of(checkpoint_ids)
    if not len(rows):
        return
    parts = rows.gradient_norms.astype(np.float64) ** 2 * weights[:, None]
    yield write_scores(directory, name, rows, parts, shard.layer_names)


def _score_block(block: FactorBlock, weights: np.ndarray, directory: AnyPath) -> AnyPath:
    name = f"{block.shard}-{int(block.indices[0]):012d}"
    return write_scores(directory, name, block, self_influence(block, weights), block.layer_names)
