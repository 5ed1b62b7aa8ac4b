"""Chosen pairs scored with the gradient factors of a store: a shortlist, ranked exactly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import pair_influence
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import InfluenceRows, TopInfluences
from tracin_transforms.storage.factor_shard import PackedBlock, StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.results import read_result

# Pairs that are ranked at a time.
_PAIRS = 2**16


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Pairs of a training example and a query that are to be scored, by example.

    Attributes:
        example_ids: The examples, shape [m], unicode, rising, each once.
        starts: Where the queries of each begin in `columns`, and where the last one's end, shape
            [m + 1], int64.
        columns: Rows of the queries, one for each pair, int64.
    """

    example_ids: np.ndarray
    starts: np.ndarray
    columns: np.ndarray

    @classmethod
    def read(cls, directory: AnyPath, queries: FactorBlock) -> "Shortlist":
        """Returns the pairs of an influence result.

        Args:
            directory: Where `storage.results.write_influence` wrote it.
            queries: Its queries, in any order.
        """
        table = read_result(directory, "influence", ["query_id", "example_id"])
        query_ids, example_ids = (
            np.array(table[name].to_pylist(), dtype=str) for name in ("query_id", "example_id")
        )
        by_id = np.argsort(queries.example_ids)
        columns = by_id[np.searchsorted(queries.example_ids[by_id], query_ids)]
        order = np.argsort(example_ids, kind="stable")
        ids, starts = np.unique(example_ids[order], return_index=True)
        return cls(ids, np.append(starts, len(order)), columns[order])

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.columns)

    def places(self, example_ids: np.ndarray) -> np.ndarray:
        """Returns which example of the shortlist each of some examples is, −1 where none."""
        if not len(self.example_ids):
            return np.full(len(example_ids), -1)
        found = np.searchsorted(self.example_ids, example_ids)
        found = np.minimum(found, len(self.example_ids) - 1)
        return np.where(self.example_ids[found] == example_ids, found, -1)

    def pairs(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pairs of some examples.

        Args:
            places: Which, shape [n].

        Returns:
            For each pair its index among these examples, and its row of the queries, shape [p].
        """
        starts = self.starts[places]
        counts = self.starts[places + 1] - starts
        rows = np.repeat(np.arange(len(places)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.columns[starts[rows] + within]


def rescored_shard(
    shard: StoredShard,
    checkpoint_ids: Sequence[str],
    queries: Queries,
    k: int,
    shortlist: Shortlist,
) -> TopInfluences:
    """Returns the strongest of a shard's pairs on a shortlist, with their influence in float64.

    Only the record batches that hold examples of the shortlist are read, and of these only their
    rows become float32.

    Args:
        shard: The shard, with the gradient factors themselves.
        checkpoint_ids: Of the queries, in order.
        queries: The query examples, with the gradient factors themselves.
        k: Proponents, and opponents, to keep for each.
        shortlist: Which pairs.

    Raises:
        InputError: The factor file is not whole.
    """
    file = shard.sidecar.file
    places = shortlist.places(shard.rows.example_ids)
    wanted = {number: places[file.rows_of(number)] >= 0 for number in range(len(file.batches))}
    top, pairs = TopInfluences.empty(queries.block, k), 0
    for number, block in shard.packed_blocks(checkpoint_ids, lambda i: bool(wanted[i].any())):
        rows = np.flatnonzero(wanted[number])
        of_rows = shortlist.pairs(places[file.rows_of(number)][rows])
        top = _with_pairs(top, block, rows, of_rows, queries)
        pairs += len(of_rows[0])
    return replace(top, pairs=pairs)


def _with_pairs(
    top: TopInfluences,
    block: PackedBlock,
    rows: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    queries: Queries,
) -> TopInfluences:
    """Returns the strongest of those known and the pairs of some of a block's rows."""
    factors = block.rows(rows)
    for start in range(0, len(pairs[0]), _PAIRS):
        at, columns = (indices[start : start + _PAIRS] for indices in pairs)
        found = InfluenceRows(
            query_rows=columns,
            example_ids=factors.example_ids[at],
            labels=factors.labels[at],
            predictions=factors.predictions[at, -1],
            parts=pair_influence(factors, queries.block, queries.weights, at, columns),
        )
        top = top.with_rows(found)
    return top


def lacking(store: FactorStore, example_ids: np.ndarray) -> np.ndarray:
    """Returns those of some example ids that a store does not have."""
    for shard in store.description.shards:
        example_ids = np.setdiff1d(example_ids, store.shard(shard.name).rows.example_ids)
    return example_ids
