"""Chosen pairs scored with the gradient factors of a store: a shortlist, ranked exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.top_scan import TopScan
from tracin_transforms.storage.factor_shard import StoredShard
from tracin_transforms.storage.factor_store import FactorStore
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.results import read_result
from tracin_transforms.storage.shard_scan import scan_pairs


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


def rescore_shard(
    shard: StoredShard, checkpoint_ids: Sequence[str], scan: TopScan, shortlist: Shortlist
) -> None:
    """Adds a shard's pairs on a shortlist to a scan.

    Args:
        shard: The shard, with the gradient factors themselves.
        checkpoint_ids: Of the scan's queries, in order.
        scan: Takes the pairs.
        shortlist: Which pairs.

    Raises:
        InputError: The factor file is not whole.
    """
    places = shortlist.places(shard.rows.example_ids)
    listed = np.flatnonzero(places >= 0)
    rows, columns = shortlist.pairs(places[listed])
    scan_pairs(shard, checkpoint_ids, scan, listed[rows], columns)


def lacking(store: FactorStore, example_ids: np.ndarray) -> np.ndarray:
    """Returns those of some example ids that a store does not have."""
    for shard in store.description.shards:
        example_ids = np.setdiff1d(example_ids, store.shard(shard.name).rows.example_ids)
    return example_ids
