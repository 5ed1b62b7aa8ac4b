"""Query examples, prepared once for many blocks of training examples."""

from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import absolute_gradient_norms, magnification

# Copying the factors of some queries pays only if they are not nearly all.
_NEARLY_ALL = 0.8


@dataclass(frozen=True, eq=False)
class Queries:
    """Query examples with what scoring needs of them; `prepare` makes it.

    Attributes:
        block: q query examples at K checkpoints.
        weights: η_k, shape [K], float64.
        norms: What `absolute_gradient_norms` gives, shape [q, K], float64.
        scales: Powers of two by which scores are magnified, so that influence on a query that is
            all but perfectly fitted is not lost below float32's range; shape [q], float64.
        scored: The block with weights and scales multiplied into its error signals: its inner
            products with training examples are their scores.
    """

    block: FactorBlock
    weights: np.ndarray
    norms: np.ndarray
    scales: np.ndarray
    scored: FactorBlock

    @classmethod
    def prepare(cls, block: FactorBlock, weights: np.ndarray) -> "Queries":
        """Returns query examples, prepared.

        Args:
            block: q query examples at K checkpoints.
            weights: η_k, shape [K].

        Raises:
            ValueError: The weights are not one for each checkpoint.
        """
        norms = absolute_gradient_norms(block)
        scales = magnification(norms, weights)
        return cls(block, weights, norms, scales, block.scaled(np.outer(scales, weights)))

    def __len__(self) -> int:
        return len(self.block)

    def columns(self, wanted: np.ndarray) -> np.ndarray:
        """Returns the queries to multiply with where some are wanted: these, or all.

        Args:
            wanted: Which, shape [q], bool.

        Returns:
            Indices, rising.
        """
        if wanted.sum() > _NEARLY_ALL * len(self):
            return np.arange(len(self))
        return np.flatnonzero(wanted)

    def scored_columns(self, columns: np.ndarray) -> FactorBlock:
        """Returns `scored` for some queries, given by their indices."""
        return self.scored if len(columns) == len(self) else self.scored.rows(columns)
