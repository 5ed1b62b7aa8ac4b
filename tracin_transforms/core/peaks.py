"""The few largest entries of error signals, which with many classes say nearly everything.

With a thousand classes the error signals of two examples are nearly orthogonal unless they have
classes in common, so that the product of their norms says little about their inner product. The
largest entries bound it much better. With T the largest entries of e, U some entries of e', and
all others left, by the inequalities of Hölder (1, ∞) and of Cauchy and Schwarz,

    |e·e'| ≤ |Σ_{c∈T} e_c e'_c| + max_{c∉T} |e_c| ‖e'_U‖₁ + ‖e_{∉T}‖ ‖e'_{∉U}‖
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.factors import FactorBlock, LayerFactors

# Entries that are kept of each error signal.
COUNT = 16
# With fewer classes they would hardly be fewer numbers.
_FEWEST_CLASSES = 256
# Rows that are sorted out at a time.
_PIECE = 4096


@dataclass(frozen=True, eq=False)
class Peaks:
    """The largest entries of the error signals of some examples, times the activations' norms.

    Attributes:
        classes: Which entries, shape [n, K, count], int32.
        values: ``e_c √(‖h‖² + 1)``, without the 1 where there is no bias; shape [n, K, count],
            float32.
        next: The largest of the other entries, in size, times the same; shape [n, K], float32.
        rests: The norm of the other entries, times the same; shape [n, K], float32.
    """

    classes: np.ndarray
    values: np.ndarray
    next: np.ndarray
    rests: np.ndarray

    @classmethod
    def none(cls, n: int, checkpoints: int) -> "Peaks":
        """Returns no entries of n examples."""
        return cls(
            np.empty((n, checkpoints, 0), np.int32),
            np.empty((n, checkpoints, 0), np.float32),
            np.zeros((n, checkpoints), np.float32),
            np.zeros((n, checkpoints), np.float32),
        )

    @classmethod
    def of_block(cls, block: FactorBlock) -> "Peaks":
        """Returns the largest entries of a block's error signals.

        None are kept but for a single dense layer that is applied once and has many outputs, as
        the last one of a network for many classes.
        """
        layers = [layer for gradient in block.gradients for layer in gradient.layers]
        if len(layers) != len(block.gradients) or not all(map(_has_peaks, layers)):
            return cls.none(len(block), len(block.gradients))
        parts = [_peaks(layer) for layer in layers]
        return cls(*(np.stack(part, axis=1) for part in zip(*parts, strict=True)))

    @classmethod
    def of_rows(cls, parts: "Sequence[Peaks]") -> "Peaks":
        """Returns those of the rows of all parts, of which there is at least one."""
        arrays = zip(*map(cls._arrays, parts), strict=True)
        return cls(*map(np.concatenate, arrays))

    def joined(self, other: "Peaks") -> "Peaks":
        """Returns those at the checkpoints of both, for the same rows."""
        pairs = zip(self._arrays(), other._arrays(), strict=True)
        return Peaks(*(np.concatenate(pair, axis=1) for pair in pairs))

    def largest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the first few entries of each, the largest first, at the last checkpoint.

        Returns:
            Which entries, shape [n, count], int32, and their values, [n, count], float32.
        """
        classes, values = self.classes[:, -1], self.values[:, -1]
        at = np.argsort(-np.abs(values), axis=1)[:, :count]
        return np.take_along_axis(classes, at, axis=1), np.take_along_axis(values, at, axis=1)

    @property
    def count(self) -> int:
        """How many entries there are of each error signal."""
        return self.classes.shape[2]

    def take(self, selection: np.ndarray | slice) -> "Peaks":
        """Returns those of the selected examples."""
        return Peaks(*(array[selection] for array in self._arrays()))

    def of_checkpoints(self, places: list[int]) -> "Peaks":
        """Returns those at some checkpoints, given by their places."""
        return Peaks(*(array[:, places] for array in self._arrays()))

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.classes, self.values, self.next, self.rests


def _has_peaks(layer: LayerFactors) -> bool:
    wide = layer.error_signals.shape[-1] >= _FEWEST_CLASSES
    return wide and layer.error_signals.ndim == 2 and layer.groups == 1 and not layer.is_one_hot


def _peaks(layer: LayerFactors) -> tuple[np.ndarray, ...]:
    h = layer.activations
    norms = np.sqrt(np.einsum("ij,ij->i", h, h, dtype=np.float64) + layer.has_bias)
    n = len(layer)
    classes = np.empty((n, COUNT), np.int32)
    values = np.empty((n, COUNT), np.float32)
    following, rests = np.empty((2, n), np.float32)
    for start in range(0, n, _PIECE):
        rows = slice(start, start + _PIECE)
        sizes = np.abs(layer.error_signals[rows])
        at = np.argpartition(sizes, -COUNT, axis=1)[:, -COUNT:]
        classes[rows] = np.sort(at, axis=1)
        entries = np.take_along_axis(layer.error_signals[rows], classes[rows], axis=1)
        np.put_along_axis(sizes, classes[rows], 0, axis=1)
        rest = np.sqrt(np.einsum("ij,ij->i", sizes, sizes, dtype=np.float64))
        values[rows] = entries * norms[rows, None]
        following[rows] = sizes.max(axis=1) * norms[rows]
        rests[rows] = rest * norms[rows]
    return classes, values, following, rests
