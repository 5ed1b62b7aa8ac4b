"""Finds the strongest proponents and opponents of queries, block by block.

All pairs of a piece are scored in float32. Those that could be among the k strongest, the rounding
error granted, are computed again in float64, so that the result is the exact ranking of the
float32 factors, however the rows were put into blocks. As the k strongest become known, ever fewer
pairs need to be looked at twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from tracin_transforms.core.factors import FactorBlock, GradientFactors
from tracin_transforms.core.influence import (
    absolute_gradient_norms,
    check_in_range,
    inner_products,
    pair_influence,
    rounding_bound,
)
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import InfluenceRows, Thresholds, TopInfluences
from tracin_transforms.core.threads import Threads

# Rows whose factors, in float32, and scores stay in a core's share of the last cache; products of
# whole multiples of some rows are faster.
_TILE_BYTES = 12 * 2**20
_ROWS = 32
# Above this many candidates per query and k their own k-th best value is worth computing.
_CANDIDATES_PER_K = 4
# Pairs that one thread computes again at a time.
_PAIRS = 2048
# Candidates wait until they are this share of what is known already.
_PENDING_SHARE = 0.25


class Rows(Protocol):
    """Training examples whose gradient factors come into being where they are asked for.

    A `FactorBlock` is one.
    """

    def __len__(self) -> int:
        """Returns n."""
        ...

    def rows(self, selection: slice | np.ndarray) -> FactorBlock:
        """Returns the selected rows with their gradient factors in float32."""
        ...

    def gradients_of(self, selection: slice | np.ndarray) -> Iterator[GradientFactors]:
        """Yields the gradient factors of the selected rows, each checkpoint's when asked for."""
        ...


@dataclass(frozen=True, eq=False)
class Piece:
    """Pairs that are scored together: some rows of a block with some queries.

    Attributes:
        rows: Of the block.
        columns: Indices of the queries, rising.
    """

    rows: slice
    columns: np.ndarray

    @property
    def pairs(self) -> int:
        """How many they are."""
        return (self.rows.stop - self.rows.start) * len(self.columns)


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Pairs that may be among the k strongest.

    Attributes:
        rows: Of the block, shape [m].
        columns: Indices of the queries, shape [m].
        scores: Their scores, those for opponents with the sign reversed, shape [m], float32.
        signs: 1 for proponents, -1 for opponents, shape [m], int8.
    """

    rows: np.ndarray
    columns: np.ndarray
    scores: np.ndarray
    signs: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, selection: np.ndarray) -> "_Candidates":
        return _Candidates(
            self.rows[selection],
            self.columns[selection],
            self.scores[selection],
            self.signs[selection],
        )


class TopScan:
    """Takes blocks, and knows the strongest pairs among them.

    Args:
        queries: The query examples.
        k: Proponents, and opponents, to keep for each.
        threads: What the work on a block is shared among.
        floor: What pairs must reach to be of interest, where others have been scored elsewhere.
    """

    def __init__(
        self, queries: Queries, k: int, threads: Threads, floor: Thresholds | None = None
    ) -> None:
        self._queries = queries
        self._k = k
        self._threads = threads
        self._floor = Thresholds.none(len(queries)) if floor is None else floor
        self._best = TopInfluences.empty(queries.block, k)
        self._thresholds = self._floor
        self._pending: list[InfluenceRows] = []
        self._pairs = 0

    @property
    def thresholds(self) -> Thresholds:
        """What a pair must reach to be among the strongest, as far as is known."""
        return self._thresholds

    def add(
        self, block: Rows, pieces: list[Piece] | None = None, largest: np.ndarray | None = None
    ) -> None:
        """Takes a block.

        Args:
            block: n training examples at the queries' checkpoints.
            pieces: Which of its pairs to score; the others are known not to matter. All, if not
                given.
            largest: At least the largest `absolute_gradient_norms` of its rows at each
                checkpoint, shape [K]; computed if not given.

        Raises:
            InputError: An influence is beyond float32; the message names the example.
        """
        if pieces is None:
            pieces = self._tiles(block)
        if not pieces:
            return
        if largest is None:
            largest = absolute_gradient_norms(block.rows(slice(None))).max(axis=0)
        margin = self._margin(largest)
        limits = [
            (self._queries.scales * thresholds - margin).astype(np.float32)
            for thresholds in (self._thresholds.proponents, self._thresholds.opponents)
        ]
        scored = self._threads.map(lambda piece: self._score(block, piece, limits, margin), pieces)
        found = _joined([self._fewer(_joined(end), margin) for end in zip(*scored, strict=True)])
        found = found.take(np.argsort(found.rows, kind="stable"))
        parts = np.split(np.arange(len(found)), range(_PAIRS, len(found), _PAIRS))
        self._pending += self._threads.map(partial(self._exact, block), map(found.take, parts))
        self._pairs += sum(piece.pairs for piece in pieces)
        self._merge_if_many()

    def top(self) -> TopInfluences:
        """Returns the strongest pairs of all blocks so far."""
        self._merge()
        return self._best.sorted(self._pairs)

    def _tiles(self, block: Rows) -> list[Piece]:
        """Returns pieces with all pairs of a block."""
        step = max(1, min(self.tile_rows, -(-len(block) // self._threads.count)))
        every = np.arange(len(self._queries))
        return [
            Piece(slice(start, min(start + step, len(block))), every)
            for start in range(0, len(block), step)
        ]

    @property
    def tile_rows(self) -> int:
        """How many rows of a block, at most, are scored together."""
        # One checkpoint's factors, and three matrices of scores.
        numbers = 3 * len(self._queries) + self._numbers
        return max(_ROWS, _TILE_BYTES // (4 * numbers) // _ROWS * _ROWS)

    @property
    def _numbers(self) -> int:
        layers = self._queries.block.gradients[0].layers
        return sum(layer.numbers_per_example for layer in layers)

    def _margin(self, largest: np.ndarray) -> np.ndarray:
        """Returns how far scores of a block may be off, shape [q]; 0 where all are exactly 0."""
        queries = self._queries
        bound = rounding_bound(largest, queries.norms, queries.weights, self._numbers)
        return queries.scales * bound

    def _score(
        self, block: Rows, piece: Piece, limits: list[np.ndarray], margin: np.ndarray
    ) -> list[_Candidates]:
        """Returns the candidates of a piece for proponents, and those for opponents."""
        queries = self._queries.scored_columns(piece.columns)
        scores = inner_products(block.gradients_of(piece.rows), queries.gradients)
        # One pass each says which queries have candidates; NaN and infinity come through.
        highest, lowest = scores.max(axis=0), scores.min(axis=0)
        if not (np.isfinite(highest).all() and np.isfinite(lowest).all()):
            check_in_range(block.rows(piece.rows), scores)
        found = []
        for sign, extreme, limit in ((1, highest, limits[0]), (-1, lowest, limits[1])):
            at = np.flatnonzero(sign * extreme > limit[piece.columns])
            columns = piece.columns[at]
            signed = sign * scores[:, at]
            rows, places = _passing(signed, limit[columns], 2 * margin[columns], self._k)
            signs = np.full(len(rows), sign, np.int8)
            scored = signed[rows, places]
            found.append(_Candidates(rows + piece.rows.start, columns[places], scored, signs))
        return found

    def _fewer(self, found: _Candidates, margin: np.ndarray) -> _Candidates:
        """Returns the candidates without those that k others of the same query surpass."""
        if len(found) <= _CANDIDATES_PER_K * self._k * len(self._queries):
            return found
        found = found.take(np.lexsort((-found.scores, found.columns)))
        starts = np.searchsorted(found.columns, np.arange(len(self._queries)))
        counts = np.diff(np.append(starts, len(found.columns)))
        limits = np.full(len(self._queries), -np.inf)
        full = counts > self._k
        kth = starts[full] + self._k - 1
        # The k-th best is itself off by up to the margin.
        limits[full] = found.scores[kth] - 2 * margin[full]
        return found.take(np.flatnonzero(found.scores >= limits[found.columns]))

    def _exact(self, block: Rows, found: _Candidates) -> InfluenceRows:
        """Returns candidates with their influence in float64, if it is of their sign."""
        if not len(found):
            return InfluenceRows.empty(self._queries.block)
        rows, places = np.unique(found.rows, return_inverse=True)
        part = block.rows(rows)
        queries = self._queries
        pairs = InfluenceRows(
            query_rows=found.columns,
            example_ids=part.example_ids[places],
            labels=part.labels[places],
            predictions=part.predictions[places, -1],
            parts=pair_influence(part, queries.block, queries.weights, places, found.columns),
        )
        # Rounding may have given a score near 0 the other sign.
        return pairs.take(np.flatnonzero(found.signs * pairs.influence > 0))

    def _merge_if_many(self) -> None:
        waiting = sum(map(len, self._pending))
        known = len(self._best.proponents) + len(self._best.opponents)
        if waiting > _PENDING_SHARE * known:
            self._merge()

    def _merge(self) -> None:
        if not self._pending:
            return
        first, *more = self._pending
        self._pending = []
        self._best = self._best.with_rows(first.joined(*more))
        self._thresholds = self._best.thresholds().at_least(self._floor)


def _passing(
    signed: np.ndarray, limits: np.ndarray, margin: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns of scores above their column's limit.

    Where they are many, those that k others of the column surpass by the margin are left out.
    """
    passing = signed > limits
    if len(signed) > k and passing.sum() > _CANDIDATES_PER_K * k * signed.shape[1]:
        place = len(signed) - k
        kth = np.partition(signed, place, axis=0)[place].astype(np.float64)
        passing &= signed >= (kth - margin).astype(np.float32)
    rows, columns = np.nonzero(passing)
    return rows, columns


def _joined(parts: Sequence[_Candidates]) -> _Candidates:
    return _Candidates(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.signs for part in parts]),
    )
