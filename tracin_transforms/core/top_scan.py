"""Finds the strongest proponents and opponents of queries, block by block.

All pairs of a piece are scored in float32. Those that could be among the k strongest, the rounding
error granted, are computed again in float64, so that the result is the exact ranking of the
float32 factors, however the rows were put into blocks. As the k strongest become known, ever fewer
pairs need to be looked at twice.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from tracin_transforms.core.candidates import Candidates
from tracin_transforms.core.factors import FactorBlock, GradientFactors
from tracin_transforms.core.influence import (
    absolute_gradient_norms,
    check_in_range,
    inner_products,
    pair_influence,
    paired_products,
    rounding_bound,
)
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.ranking import InfluenceRows, Thresholds, TopInfluences
from tracin_transforms.core.threads import Threads

# Rows whose factors, in float32, and scores stay in a core's share of the last cache; products of
# whole multiples of some rows are faster.
_TILE_BYTES = 12 * 2**20
_ROWS = 32
# Small blocks are held until they are so many bytes: what is strong in one of them may be weak
# beside the next, and need not be computed again.
_HELD_BYTES = 32 * 2**20
# What it takes to bring a number of a row into float32, and to score a pair on its own, or compute
# it again, for each of its numbers; in operations of a matrix product.
_ROW_COST = 30
PAIR_COST = 30
# Pairs that one thread computes again at a time.
_PAIRS = 1024
# Chosen pairs wait until they are so many.
_NEW_PAIRS = 2**16
# Where a block has fewer candidates than this share of what is sought, what is known hardly
# changes: the next block need not wait for it.
_FEW_SHARE = 0.05
# Pairs that were computed again wait until they are this share of what is known already.
_NEW_SHARE = 0.25


class Rows(Protocol):
    """Training examples whose gradient factors come into being where they are asked for.

    A `FactorBlock` is one.
    """

    def __len__(self) -> int:
        """Returns n."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the gradient factors take."""
        ...

    def rows(self, selection: slice | np.ndarray) -> FactorBlock:
        """Returns the selected rows with their gradient factors in float32."""
        ...

    def gradients_of(self, selection: slice | np.ndarray) -> Iterator[GradientFactors]:
        """Yields the gradient factors of the selected rows, each checkpoint's when asked for."""
        ...


@dataclass(frozen=True, eq=False)
class Piece:
    """Pairs that are scored together: some rows of a block with some queries, or one by one.

    Attributes:
        rows: Of the block; a slice has a beginning and an end.
        columns: Indices of the queries, rising; those of the rows, one for each, where they are
            paired.
        is_paired: Whether each row is scored with its own query alone.
    """

    rows: slice | np.ndarray
    columns: np.ndarray
    is_paired: bool = False

    @property
    def places(self) -> np.ndarray:
        """The rows' numbers in the block."""
        if isinstance(self.rows, slice):
            return np.arange(self.rows.start, self.rows.stop)
        return self.rows

    @property
    def pairs(self) -> int:
        """How many they are."""
        return len(self.columns) * (1 if self.is_paired else len(self.places))


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
        self._new: list[InfluenceRows] = []
        self._exact_pairs: Callable[[], list[InfluenceRows]] = list
        self._scored: Callable[[], None] | None = None
        self._is_steady = False
        self._reach = self._scaled(self._floor)
        self._blocks: list[Rows] = []
        self._found = [Candidates.none(), Candidates.none()]
        self._margin = np.zeros(len(queries))
        self._pairs = 0

    @property
    def needed(self) -> np.ndarray:
        """What the influence of a pair must reach, in size, to matter still; shape [q]."""
        if not self._is_steady:
            self._take_scored()
        found: np.ndarray = np.minimum(*self._reach) / self._queries.scales
        return found

    @property
    def tile_rows(self) -> int:
        """How many rows of a block, at most, are scored together."""
        # One checkpoint's factors, and three matrices of scores.
        numbers = 3 * len(self._queries) + self._numbers
        return max(_ROWS, _TILE_BYTES // (4 * numbers) // _ROWS * _ROWS)

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
            rows = np.unique(np.concatenate([piece.places for piece in pieces]))
            largest = absolute_gradient_norms(block.rows(rows)).max(axis=0)
        if not self._is_steady:
            self._take_scored()
        margin = self._margin_of(largest)
        # A margin beyond float32 is that of scores which will be refused.
        with np.errstate(over="ignore"):
            limits = [(reach - margin).astype(np.float32) for reach in self._reach]
        score = partial(self._score, block, limits, margin)
        operations = sum(map(self._operations, pieces))
        scored = self._threads.start(score, pieces, operations)
        self._pairs += sum(piece.pairs for piece in pieces)
        # While threads score this block, the one before is seen to, if it has not been yet.
        self._take_scored()
        self._scored = partial(self._take, block, margin, scored)

    def add_pairs(self, block: Rows, rows: np.ndarray, columns: np.ndarray) -> None:
        """Takes chosen pairs of a block, none of which it takes otherwise.

        Args:
            block: Training examples at the queries' checkpoints.
            rows: Row of the block of each pair, shape [m], rising.
            columns: Index of the query of each pair, shape [m].
        """
        parts = [slice(at, at + _PAIRS) for at in range(0, len(rows), _PAIRS)]
        exact = partial(_exact, self._queries, block)
        self._new += self._threads.map(lambda part: exact(rows[part], columns[part]), parts)
        self._pairs += len(rows)
        if sum(map(len, self._new)) > max(_NEW_PAIRS, _NEW_SHARE * self._known):
            self._merge()

    def top(self) -> TopInfluences:
        """Returns the strongest pairs of all blocks so far."""
        self._take_scored()
        self._settle()
        self._merge()
        return replace(self._best, pairs=self._pairs)

    def _take_scored(self) -> None:
        if self._scored is not None:
            self._scored()
            self._scored = None

    def _take(
        self, block: Rows, margin: np.ndarray, scored: Callable[[], list[list[Candidates]]]
    ) -> None:
        """Takes the candidates of a block, and holds it for them."""
        number, pieces = len(self._blocks), scored()
        self._margin = np.maximum(self._margin, margin)
        for end, parts in enumerate(zip(*pieces, strict=True)):
            found = self._found[end].joined([part.of_block(number) for part in parts])
            if found.are_many(self._k, len(self._queries)):
                found, reached = found.strongest(self._k, self._margin)
                self._reach[end] = np.maximum(self._reach[end], reached)
            self._found[end] = found
        self._blocks.append(block)
        few = _FEW_SHARE * self._k * len(self._queries)
        self._is_steady = sum(len(part) for piece in pieces for part in piece) < few
        if sum(block.nbytes for block in self._blocks) > _HELD_BYTES:
            self._settle()

    def _tiles(self, block: Rows) -> list[Piece]:
        """Returns pieces with all pairs of a block."""
        # As many for each thread, of the same size: none waits for another.
        rounds = -(-len(block) // (self.tile_rows * self._threads.count))
        step = max(1, -(-len(block) // max(1, rounds * self._threads.count)))
        every = np.arange(len(self._queries))
        return [
            Piece(slice(start, min(start + step, len(block))), every)
            for start in range(0, len(block), step)
        ]

    def _operations(self, piece: Piece) -> float:
        """Returns about how many operations of a matrix product a piece takes."""
        of_pairs = piece.pairs * (PAIR_COST if piece.is_paired else 2)
        numbers = self._numbers * len(self._queries.weights)
        return numbers * (_ROW_COST * len(piece.places) + of_pairs)

    @property
    def _numbers(self) -> int:
        layers = self._queries.block.gradients[0].layers
        return sum(layer.numbers_per_example for layer in layers)

    def _scaled(self, thresholds: Thresholds) -> list[np.ndarray]:
        """Returns what scores must reach, for proponents and for opponents."""
        scales = self._queries.scales
        return [scales * thresholds.proponents, scales * thresholds.opponents]

    def _margin_of(self, largest: np.ndarray) -> np.ndarray:
        """Returns how far scores of a block may be off, shape [q]; 0 where all are exactly 0."""
        queries = self._queries
        bound = rounding_bound(largest, queries.norms, queries.weights, self._numbers)
        return queries.scales * bound

    def _score(
        self, block: Rows, limits: list[np.ndarray], margin: np.ndarray, piece: Piece
    ) -> list[Candidates]:
        """Returns the candidates of a piece for proponents, and those for opponents."""
        if piece.is_paired:
            return self._score_pairs(block, limits, piece)
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
            found.append(
                Candidates.of_scores(
                    piece.places,
                    columns,
                    sign * scores[:, at],
                    limit[columns],
                    margin[columns],
                    self._k,
                )
            )
        return found

    def _score_pairs(self, block: Rows, limits: list[np.ndarray], piece: Piece) -> list[Candidates]:
        rows, places = np.unique(piece.places, return_inverse=True)
        gradients, columns = self._queries.scored.gradients, piece.columns
        scores = paired_products(block.gradients_of(rows), gradients, places, columns)
        if not np.isfinite(scores).all():
            check_in_range(block.rows(piece.places), scores[:, None])
        signs = zip((1, -1), limits, strict=True)
        passing = [np.flatnonzero(sign * scores > limit[columns]) for sign, limit in signs]
        return [
            Candidates.of_pairs(piece.places[at], columns[at], sign * scores[at])
            for sign, at in zip((1, -1), passing, strict=True)
        ]

    def _settle(self) -> None:
        """Begins to compute the candidates' influence in float64, and lets go of their blocks."""
        groups: list[tuple[int, Rows, Candidates]] = []
        for sign, found in zip((1, -1), self._found, strict=True):
            found = found.strongest(self._k, self._margin)[0]
            found = found.take(np.lexsort((found.rows, found.blocks)))
            edges = np.searchsorted(found.blocks, np.arange(len(self._blocks) + 1))
            for block, start, stop in zip(self._blocks, edges, edges[1:], strict=False):
                for at in range(start, stop, _PAIRS):
                    part = found.take(np.arange(at, min(at + _PAIRS, stop)))
                    groups.append((sign, block, part))
        pairs = sum(len(found) for _, _, found in groups)
        operations = PAIR_COST * pairs * self._numbers * len(self._queries.weights)
        before = self._exact_pairs
        self._exact_pairs = self._threads.start(self._exact_of, groups, operations)
        self._blocks, self._found = [], [Candidates.none(), Candidates.none()]
        self._margin = np.zeros(len(self._queries))
        self._new += before()
        if not self._is_steady:
            self._new += self._exact_pairs()
            self._exact_pairs = list
        if sum(map(len, self._new)) > _NEW_SHARE * self._known:
            self._merge()

    @property
    def _known(self) -> int:
        return len(self._best.proponents) + len(self._best.opponents)

    def _exact_of(self, group: tuple[int, Rows, Candidates]) -> InfluenceRows:
        """Returns a block's candidates with their influence in float64, if it is of the sign."""
        sign, block, found = group
        pairs = _exact(self._queries, block, found.rows, found.columns)
        # Rounding may have given a score near 0 the other sign.
        return pairs.take(np.flatnonzero(sign * pairs.influence > 0))

    def _merge(self) -> None:
        self._new += self._exact_pairs()
        self._exact_pairs = list
        if not self._new:
            return
        first, *more = self._new
        self._new = []
        self._best = self._best.with_rows(first.joined(*more))
        reach = self._scaled(self._best.thresholds().at_least(self._floor))
        self._reach = [np.maximum(a, b) for a, b in zip(self._reach, reach, strict=True)]


def _exact(queries: Queries, block: Rows, rows: np.ndarray, columns: np.ndarray) -> InfluenceRows:
    """Returns chosen pairs of a block with their influence in float64."""
    rows, places = np.unique(rows, return_inverse=True)
    part = block.rows(rows)
    return InfluenceRows(
        query_rows=columns,
        example_ids=part.example_ids[places],
        labels=part.labels[places],
        predictions=part.predictions[places, -1],
        parts=pair_influence(part, queries.block, queries.weights, places, columns),
    )
