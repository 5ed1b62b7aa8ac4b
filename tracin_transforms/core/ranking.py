"""Rankings: the strongest proponents and opponents of each query, and by self-influence.

The order is total, by score and then by example id, so a ranking does not depend on the order in
which its parts were computed or merged.
"""

from dataclasses import dataclass, fields

import numpy as np

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import (
    absolute_gradient_norms,
    influence,
    magnification,
    pair_influence,
    rounding_bound,
)

# Above this many candidates per query and k the block's own k-th best value is worth computing.
_CANDIDATES_PER_K = 4


@dataclass(frozen=True, eq=False)
class InfluenceRows:
    """Pairs of a query and a training example, with the influence of the one on the other.

    Attributes:
        query_rows: Row of the query, shape [m], int64.
        example_ids: Shape [m], unicode.
        labels: Shape [m, ...], as in `FactorBlock`.
        predictions: Shape [m, ...].
        parts: Each checkpoint's and layer's part of the influence, shape [m, K, L], float64.
    """

    query_rows: np.ndarray
    example_ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    parts: np.ndarray

    @classmethod
    def empty(cls, queries: FactorBlock) -> "InfluenceRows":
        """Returns no rows, of labels and checkpoints like those of the queries."""
        return cls(
            query_rows=np.empty(0, dtype=np.int64),
            example_ids=np.empty(0, dtype="U1"),
            labels=queries.labels[:0],
            predictions=queries.predictions[:0, -1],
            parts=np.empty((0, len(queries.gradients), len(queries.layer_names))),
        )

    def __len__(self) -> int:
        return len(self.query_rows)

    @property
    def influence(self) -> np.ndarray:
        """The influence, summed over checkpoints and layers, shape [m], float64."""
        return self.parts.sum(axis=(1, 2))

    def joined(self, other: "InfluenceRows") -> "InfluenceRows":
        """Returns the rows of both."""
        # No rows have the labels of the queries, whose kind another loss may have made another.
        if not len(self) or not len(other):
            return self if len(self) else other
        return InfluenceRows(
            *(
                np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in fields(self)
            )
        )

    def take(self, selection: np.ndarray) -> "InfluenceRows":
        """Returns the selected rows, in the order of the selection."""
        return InfluenceRows(*(getattr(self, field.name)[selection] for field in fields(self)))


@dataclass(frozen=True, eq=False)
class TopInfluences:
    """Up to k proponents and k opponents of each query.

    Proponents have influence > 0 and opponents < 0, so a query may have fewer than k. `merge` is
    associative and commutative, with `empty` as identity, and merging the parts of a training set
    in any way gives the same as ranking it in one piece.

    Attributes:
        query_ids: Shape [q], unicode; row i of the queries has id ``query_ids[i]``.
        k: Number of proponents and of opponents to keep for each query.
        proponents: Sorted by query, falling influence, example id.
        opponents: Sorted by query, rising influence, example id.
    """

    query_ids: np.ndarray
    k: int
    proponents: InfluenceRows
    opponents: InfluenceRows

    @classmethod
    def empty(cls, queries: FactorBlock, k: int) -> "TopInfluences":
        """Returns the identity of `merge`."""
        none = InfluenceRows.empty(queries)
        return cls(queries.example_ids, k, none, none)

    def merge(self, other: "TopInfluences") -> "TopInfluences":
        """Returns the strongest of both.

        Raises:
            ValueError: The two rank other queries or another k.
        """
        if self.k != other.k or not np.array_equal(self.query_ids, other.query_ids):
            raise ValueError("expected top influences of the same queries and the same k")
        return TopInfluences(
            self.query_ids,
            self.k,
            proponents=_strongest(self.proponents, other.proponents, self.k, sign=1),
            opponents=_strongest(self.opponents, other.opponents, self.k, sign=-1),
        )


def merge_block(
    best: TopInfluences, block: FactorBlock, queries: FactorBlock, weights: np.ndarray
) -> TopInfluences:
    """Returns `best` merged with the influences of one block of training examples.

    All pairs are scored in float32. Those that could be among the k strongest, the rounding
    error granted, are computed again in float64: the result is the exact ranking of the float32
    factors, however the rows were put into blocks.

    Args:
        best: What is known so far; its query_ids are those of `queries`.
        block: Training examples at K checkpoints.
        queries: Query examples at the same checkpoints.
        weights: η_k, shape [K].
    """
    # Influence on a query that is all but perfectly fitted would be lost below float32's range.
    norms = absolute_gradient_norms(queries)
    scales = magnification(norms)
    scores = influence(block, queries.scaled(scales), weights)
    margin = scales * rounding_bound(block, norms, weights)
    ends = []
    for sign, known in ((1, best.proponents), (-1, best.opponents)):
        thresholds = scales * _thresholds(known, best.k, sign, len(queries))
        rows, columns = _candidates(sign * scores, thresholds, margin, best.k)
        found = InfluenceRows(
            query_rows=columns,
            example_ids=block.example_ids[rows],
            labels=block.labels[rows],
            predictions=block.predictions[rows, -1],
            parts=pair_influence(block, queries, weights, rows, columns),
        )
        ends.append(_strongest(known, found, best.k, sign))
    return TopInfluences(best.query_ids, best.k, *ends)


def _thresholds(known: InfluenceRows, k: int, sign: int, queries: int) -> np.ndarray:
    """Returns each query's k-th best sign * influence so far, 0 where there are fewer than k."""
    counts = np.bincount(known.query_rows, minlength=queries)
    ends = np.cumsum(counts)
    thresholds = np.zeros(queries)
    full = counts == k
    thresholds[full] = sign * known.influence[ends[full] - 1]
    return thresholds


def _candidates(
    signed_scores: np.ndarray, thresholds: np.ndarray, margin: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and columns of the scores that may be among the k largest of their column.

    A score counts if it is above the column's threshold less the margin; the margin is 0 only
    where every score is exactly 0.
    """
    passing = signed_scores > (thresholds - margin).astype(np.float32)
    if passing.sum() > _CANDIDATES_PER_K * k * signed_scores.shape[1] and len(signed_scores) > k:
        place = len(signed_scores) - k
        in_block = np.partition(signed_scores, place, axis=0)[place].astype(np.float64)
        # The k-th best of the block is itself off by up to the margin.
        passing &= signed_scores >= (in_block - 2 * margin).astype(np.float32)
    rows, columns = np.nonzero(passing)
    return rows, columns


def _strongest(known: InfluenceRows, found: InfluenceRows, k: int, sign: int) -> InfluenceRows:
    """Returns the k largest sign * influence > 0 of each query, in the ranking's order."""
    joined = known.joined(found)
    signed = sign * joined.influence
    order = np.lexsort((joined.example_ids, -signed, joined.query_rows))
    order = order[signed[order] > 0]
    query_rows = joined.query_rows[order]
    place = np.arange(len(order)) - np.searchsorted(query_rows, query_rows)
    return joined.take(order[place < k])
