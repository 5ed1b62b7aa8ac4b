"""Which pairs are likely to be among the strongest, from the largest error signals alone.

With many classes nearly all influence is between examples that have large error signals for the
same classes. With T the few largest entries of e, and U those of e', influence is about

    Σ_k η_k Σ_{c∈T∩U} e_c e'_c √(‖h‖² + 1) √(‖h'‖² + 1)

as if all activations pointed the same way. What is really the strongest may not be among the pairs
found so; but how strong these are says how strong others have to be.
"""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import csr_array

from tracin_transforms.core.peaks import Peaks
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.threads import Threads

# Entries of each error signal that are looked at.
_ENTRIES = 4
# Pairs that are chosen at either end, as a multiple of k: not all are of the sign they seem to be.
_PER_K = 2
# A pair on its own takes as long as so many that are multiplied together, and likely ones may take
# this share of the time for all.
_PAIR_COST = 100
_MOST_SHARE = 0.05
# Estimates that are made at a time.
_ESTIMATES = 2**20


class LikelyPairs:
    """Chooses pairs by the peaks of both sides.

    Args:
        queries: The query examples.
        k: Proponents, and opponents, that are sought for each.
        shards: How many shards are looked at.
        threads: What the work is shared among.
    """

    def __init__(self, queries: Queries, k: int, shards: int, threads: Threads) -> None:
        self._count = -(-_PER_K * k // shards)
        self._threads = threads
        peaks = Peaks.of_block(queries.block)
        self.are_known = peaks.count > 0
        self._classes = queries.block.gradients[0].layers[0].error_signals.shape[-1]
        if self.are_known:
            self._queries = self._entries(peaks, queries.weights)

    def of(self, peaks: Peaks) -> tuple[np.ndarray, np.ndarray]:
        """Returns the likely pairs of a shard, each once; none where it has too few rows to pay.

        Args:
            peaks: Of its n examples, at the checkpoints of the queries.

        Returns:
            The example and the query of each pair, in the order of the examples; shape [m], int64.
        """
        n = len(peaks.rests)
        if not peaks.count or 2 * self._count * _PAIR_COST > _MOST_SHARE * n:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        found = self._threads.map(self._strongest, self._parts(peaks))
        numbers = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
        return np.divmod(numbers, self._queries.shape[0])

    def _parts(self, peaks: Peaks) -> Iterator[tuple[np.ndarray, csr_array, slice]]:
        """Yields some examples, their entries, and queries to compare them with."""
        n, queries = len(peaks.rests), self._queries.shape[0]
        # Rows side by side may be alike: each part has some of all.
        parts = min(self._count, n)
        for first in range(parts):
            rows = np.arange(first, n, parts)
            entries = self._entries(peaks.take(rows), np.ones(peaks.rests.shape[1])).T
            step = max(1, _ESTIMATES // len(rows))
            for start in range(0, queries, step):
                yield rows, entries, slice(start, start + step)

    def _strongest(self, part: tuple[np.ndarray, csr_array, slice]) -> np.ndarray:
        """Returns the numbers of the strongest pair of each query at either end."""
        rows, entries, columns = part
        estimates = (self._queries[columns] @ entries).toarray()
        at = np.concatenate([estimates.argmax(axis=1), estimates.argmin(axis=1)])
        queries = self._queries.shape[0]
        numbers: np.ndarray = rows[at] * queries + np.tile(np.arange(queries)[columns], 2)
        return numbers

    def _entries(self, peaks: Peaks, factors: np.ndarray) -> csr_array:
        """Returns the largest entries at all K checkpoints side by side, shape [n, K C]."""
        sizes = -np.abs(peaks.values)
        at = np.argpartition(sizes, _ENTRIES, axis=2)[:, :, :_ENTRIES]
        values = np.take_along_axis(peaks.values, at, axis=2)
        n, checkpoints, _ = values.shape
        offsets = np.arange(checkpoints, dtype=np.int32) * self._classes
        columns = np.take_along_axis(peaks.classes, at, axis=2) + offsets[:, None]
        values = values * factors.astype(np.float32)[:, None]
        ends = np.arange(0, values.size + 1, checkpoints * _ENTRIES, dtype=np.int32)
        shape = (n, checkpoints * self._classes)
        return csr_array((values.ravel(), columns.ravel(), ends), shape=shape)
