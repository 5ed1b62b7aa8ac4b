"""Pairs whose scores in float32 say that they may be among the k strongest of their query."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

# Above this many per query and k their own k-th best value is worth computing.
_PER_K = 4


@dataclass(frozen=True, eq=False)
class Candidates:
    """Some pairs of one direction, proponents or opponents.

    Attributes:
        blocks: Number of the block of each, shape [m], int64.
        rows: Its row in the block, shape [m], int64.
        columns: Index of the query, shape [m], int64.
        scores: Those for opponents with the sign reversed, shape [m], float32.
    """

    blocks: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    scores: np.ndarray

    @classmethod
    def none(cls) -> "Candidates":
        """Returns no pairs."""
        indices = np.empty(0, np.int64)
        return cls(indices, indices, indices, np.empty(0, np.float32))

    @classmethod
    def of_scores(
        cls,
        places: np.ndarray,
        columns: np.ndarray,
        scores: np.ndarray,
        limits: np.ndarray,
        margin: np.ndarray,
        k: int,
    ) -> "Candidates":
        """Returns the pairs of one block whose scores are above the limit of their query.

        Where they are many, those that k others of the query surpass by twice the margin are left
        out: the k-th best is itself off by up to the margin.

        Args:
            places: Row in the block of each row of the scores, shape [n].
            columns: Index of each of c queries.
            scores: Shape [n, c], float32.
            limits: Shape [c], float32.
            margin: How far the scores of a query may be off, shape [c].
            k: How many are sought for each query.
        """
        passing = scores > limits
        if len(scores) > k and passing.sum() > _PER_K * k * scores.shape[1]:
            place = len(scores) - k
            kth = np.partition(scores, place, axis=0)[place].astype(np.float64)
            with np.errstate(over="ignore"):
                passing &= scores >= (kth - 2 * margin).astype(np.float32)
        rows, at = np.nonzero(passing)
        return cls.of_pairs(places[rows], columns[at], scores[rows, at])

    @classmethod
    def of_pairs(cls, rows: np.ndarray, columns: np.ndarray, scores: np.ndarray) -> "Candidates":
        """Returns pairs of one block."""
        return cls(np.zeros(len(rows), np.int64), rows, columns, scores)

    def of_block(self, number: int) -> "Candidates":
        """Returns these pairs as those of a block."""
        return replace(self, blocks=np.full(len(self), number))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, selection: np.ndarray) -> "Candidates":
        """Returns the selected pairs."""
        return Candidates(*(getattr(self, field.name)[selection] for field in fields(self)))

    def joined(self, others: Sequence["Candidates"]) -> "Candidates":
        """Returns these pairs and all others."""
        return Candidates(
            *(
                np.concatenate([getattr(part, field.name) for part in (self, *others)])
                for field in fields(self)
            )
        )

    def are_many(self, k: int, queries: int) -> bool:
        """Returns whether it pays to look for those that cannot be among the k strongest."""
        return len(self) > _PER_K * k * queries

    def strongest(self, k: int, margin: np.ndarray) -> tuple["Candidates", np.ndarray]:
        """Returns the pairs that may be among the k strongest of these, and what that takes.

        Args:
            k: How many are sought for each of q queries.
            margin: How far the scores of a query may be off, shape [q].

        Returns:
            The pairs, and what the k-th strongest of each query reaches at least, shape [q],
            float64; -inf where there are fewer.
        """
        found = self.take(np.lexsort((-self.scores, self.columns)))
        starts = np.searchsorted(found.columns, np.arange(len(margin)))
        counts = np.diff(np.append(starts, len(found)))
        reached = np.full(len(margin), -np.inf)
        full = counts >= k
        reached[full] = found.scores[starts[full] + k - 1] - margin[full]
        keep = found.scores >= (reached - margin)[found.columns]
        return found.take(np.flatnonzero(keep)), reached
