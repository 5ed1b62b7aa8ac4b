"""The few largest entries of error signals, which with many classes say nearly everything.

With a thousand classes the error signals of two examples are nearly orthogonal unless they have
classes in common, so that the product of their norms says little about their inner product. The
largest entries and the norm of the rest bound it much better:
``|e·e'| ≤ |Σ_c e_c e'_c| + ‖rest of e‖ ‖e'‖``, c over the largest entries of e.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracin_transforms.core.factors import FactorBlock, LayerFactors

# Entries that are kept of each error signal.
COUNT = 8
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
        rests: ``‖rest of e‖ √(‖h‖² + 1)``, shape [n, K], float32.
    """

    classes: np.ndarray
    values: np.ndarray
    rests: np.ndarray

    @classmethod
    def none(cls, n: int, checkpoints: int) -> "Peaks":
        """Returns no entries of n examples."""
        return cls(
            np.empty((n, checkpoints, 0), np.int32),
            np.empty((n, checkpoints, 0), np.float32),
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
        classes, values, rests = (np.stack(part, axis=1) for part in zip(*parts, strict=True))
        return cls(classes, values, rests)

    @classmethod
    def of_rows(cls, parts: "Sequence[Peaks]") -> "Peaks":
        """Returns those of the rows of all parts, of which there is at least one."""
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("classes", "values", "rests")
            )
        )

    def joined(self, other: "Peaks") -> "Peaks":
        """Returns those at the checkpoints of both, for the same rows."""
        return Peaks(
            *(
                np.concatenate([getattr(self, name), getattr(other, name)], axis=1)
                for name in ("classes", "values", "rests")
            )
        )

    def largest(self) -> np.ndarray:
        """Returns which entry is the largest of each, in size, shape [n, K], int32."""
        at = np.abs(self.values).argmax(axis=2)
        found: np.ndarray = np.take_along_axis(self.classes, at[..., None], axis=2)[..., 0]
        return found

    @property
    def count(self) -> int:
        """How many entries there are of each error signal."""
        return self.classes.shape[2]

    def take(self, selection: np.ndarray | slice) -> "Peaks":
        """Returns those of the selected examples."""
        return Peaks(self.classes[selection], self.values[selection], self.rests[selection])

    def of_checkpoints(self, places: list[int]) -> "Peaks":
        """Returns those at some checkpoints, given by their places."""
        return Peaks(self.classes[:, places], self.values[:, places], self.rests[:, places])


def _has_peaks(layer: LayerFactors) -> bool:
    wide = layer.error_signals.shape[-1] >= _FEWEST_CLASSES
    return wide and layer.error_signals.ndim == 2 and layer.groups == 1 and not layer.is_one_hot


def _peaks(layer: LayerFactors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    h = layer.activations
    norms = np.sqrt(np.einsum("ij,ij->i", h, h, dtype=np.float64) + layer.has_bias)
    n = len(layer)
    classes = np.empty((n, COUNT), np.int32)
    values, rests = np.empty((n, COUNT), np.float32), np.empty(n, np.float32)
    for start in range(0, n, _PIECE):
        rows = slice(start, start + _PIECE)
        sizes = np.abs(layer.error_signals[rows])
        at = np.argpartition(sizes, -COUNT, axis=1)[:, -COUNT:]
        classes[rows] = np.sort(at, axis=1)
        entries = np.take_along_axis(layer.error_signals[rows], classes[rows], axis=1)
        np.put_along_axis(sizes, classes[rows], 0, axis=1)
        rest = np.sqrt(np.einsum("ij,ij->i", sizes, sizes, dtype=np.float64))
        values[rows] = entries * norms[rows, None]
        rests[rows] = rest * norms[rows]
    return classes, values, rests
