"""Rankings: the strongest proponents and opponents of each query, and by self-influence.

The order is total, by score and then by example id, so a ranking does not depend on the order in
which its parts were computed or merged.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from tracin_transforms.core.factors import FactorBlock


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

    def joined(self, *others: "InfluenceRows") -> "InfluenceRows":
        """Returns these rows and all others."""
        # No rows have the labels of the queries, whose kind another loss may have made another.
        parts = [part for part in (self, *others) if len(part)]
        if len(parts) < 2:
            return parts[0] if parts else self
        return InfluenceRows(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
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
    in any way gives the same as ranking it in one piece. A pair that is in several parts counts
    once.

    Attributes:
        query_ids: Shape [q], unicode; row i of the queries has id ``query_ids[i]``.
        k: Number of proponents and of opponents to keep for each query.
        proponents: Sorted by query, falling influence, example id.
        opponents: Sorted by query, rising influence, example id.
        pairs: How many pairs were scored to find them.
    """

    query_ids: np.ndarray
    k: int
    proponents: InfluenceRows
    opponents: InfluenceRows
    pairs: int = 0

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
            proponents=_strongest(self.proponents.joined(other.proponents), self.k, sign=1),
            opponents=_strongest(self.opponents.joined(other.opponents), self.k, sign=-1),
            pairs=self.pairs + other.pairs,
        )

    def with_rows(self, found: InfluenceRows) -> "TopInfluences":
        """Returns the strongest of these and other rows, whose influence may have either sign.

        Only the queries that have such rows are ranked anew.
        """
        touched = np.zeros(len(self.query_ids), dtype=bool)
        touched[found.query_rows] = True
        ends = []
        for known, sign in ((self.proponents, 1), (self.opponents, -1)):
            at = touched[known.query_rows]
            ranked = _strongest(known.take(np.flatnonzero(at)).joined(found), self.k, sign)
            joined = known.take(np.flatnonzero(~at)).joined(ranked)
            ends.append(joined.take(np.argsort(joined.query_rows, kind="stable")))
        return replace(self, proponents=ends[0], opponents=ends[1])

    def thresholds(self) -> "Thresholds":
        """Returns what a pair must reach to be among the k strongest."""
        ends = []
        for rows, sign in ((self.proponents, 1), (self.opponents, -1)):
            found = np.zeros(len(self.query_ids))
            counts = np.bincount(rows.query_rows, minlength=len(found))
            full = counts[rows.query_rows] == self.k
            weakest = np.full(len(found), np.inf)
            np.minimum.at(weakest, rows.query_rows[full], sign * rows.influence[full])
            found[counts == self.k] = weakest[counts == self.k]
            ends.append(found)
        return Thresholds(*ends)


@dataclass(frozen=True, eq=False)
class Thresholds:
    """What a pair must reach to be among the k strongest of its query; 0 where any may be.

    Attributes:
        proponents: Influence of the k-th proponent, shape [q], float64, >= 0.
        opponents: Influence of the k-th opponent, its sign reversed, shape [q], float64, >= 0.
    """

    proponents: np.ndarray
    opponents: np.ndarray

    @classmethod
    def none(cls, queries: int) -> "Thresholds":
        """Returns those of queries of which nothing is known."""
        return cls(np.zeros(queries), np.zeros(queries))

    def at_least(self, floor: "Thresholds") -> "Thresholds":
        """Returns the higher of both."""
        return Thresholds(
            np.maximum(self.proponents, floor.proponents),
            np.maximum(self.opponents, floor.opponents),
        )


def _strongest(rows: InfluenceRows, k: int, sign: int) -> InfluenceRows:
    """Returns the k largest sign * influence > 0 of each query, in the ranking's order.

    Of a pair that is there twice, with the same influence, one is returned.
    """
    signed = sign * rows.influence
    order = np.flatnonzero(signed > 0)
    order = order[np.lexsort((-signed[order], rows.query_rows[order]))]
    query_rows, sorted_scores = rows.query_rows[order], signed[order]
    tied = np.zeros(len(order) + 1, dtype=bool)
    tied[1:-1] = (np.diff(query_rows) == 0) & (np.diff(sorted_scores) == 0)
    # Ids, which are slow to compare, are only where scores are equal.
    again = np.flatnonzero(tied[1:] | tied[:-1])
    if len(again):
        ids = rows.example_ids[order[again]]
        keys = (ids, -sorted_scores[again], query_rows[again])
        order[again] = order[again[np.lexsort(keys)]]
        ids = rows.example_ids[order[again]]
        is_copy = np.zeros(len(order), dtype=bool)
        is_copy[again[1:]] = tied[again[1:]] & (ids[1:] == ids[:-1])
        order = order[~is_copy]
    query_rows = rows.query_rows[order]
    place = np.arange(len(order)) - np.searchsorted(query_rows, query_rows)
    return rows.take(order[place < k])
