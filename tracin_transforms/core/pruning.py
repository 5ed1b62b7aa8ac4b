r"""Which pairs can still be among the strongest, from bounds that need no gradient factors.

By the inequality of Cauchy and Schwarz, at each checkpoint and layer,

    |influence(z, z')| ≤ Σ_k |η_k| Σ_l ‖∇ℓ_kl(z)‖ ‖∇ℓ_kl(z')‖                           (norms)

and, for one dense layer with many outputs, with what `peaks` says of |e·e'|,

    |influence(z, z')| ≤ Σ_k |η_k| |e·e'| √(‖h‖² + 1) √(‖h'‖² + 1)                      (peaks)

A pair whose bound is below what it takes to be among the k strongest need not be multiplied. The
result is that of multiplying all of them. Rows are looked at in strips, by the largest norms of the
strip; then, where that leaves much and it pays, one by one by their peaks.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from tracin_transforms.core.influence import squared_gradient_norms
from tracin_transforms.core.peaks import Peaks
from tracin_transforms.core.queries import Queries
from tracin_transforms.core.threads import Threads
from tracin_transforms.core.top_scan import PAIR_COST, Piece

# Rows that norms tell apart, and rows that peaks do.
_STRIP = 64
_UNIT = 8
# Bounds that are computed at a time: what stays near.
_BOUNDS = 2**18
# Entries of a query's error signals that are large.
_LARGE = 4
# Bounds are sums in float32: this much is granted for their rounding.
_SLACK = 2.0**-18
_TINY = 2.0**-100
# Peaks are looked at where norms leave more than this share of a block's pairs, and go on being
# looked at if they leave less than the other share; else after some blocks again.
_OPEN_SHARE = 0.02
_PAYS_SHARE = 0.7
_BLOCKS_WITHOUT = 8
# What work takes, in operations of a matrix product: that of one more piece, for each layer and
# checkpoint; of bringing one number of a row into float32; of copying one number of a query.
_PIECE_COST = 6e6
_ROW_COST = 60
_QUERY_COST = 30
# Pairs of a piece in which they are scored one by one.
_PAIRS = 1024


@dataclass(frozen=True, eq=False)
class RowBounds:
    """What bounds the influence of some rows.

    Attributes:
        norms: At least ‖∇ℓ_kl‖, shape [n, K * L], float32.
        peaks: Of the same rows; of no entries where there are none.
        rounding: By which share of itself each number of the factors may differ from what peaks
            were taken of.
    """

    norms: np.ndarray
    peaks: Peaks
    rounding: float

    @classmethod
    def of_stored(cls, norms: np.ndarray, peaks: Peaks, rounding: float) -> "RowBounds":
        """Returns the bounds of rows whose factors were rounded after norms and peaks were taken.

        Args:
            norms: ‖∇ℓ_kl‖ before, shape [n, K, L].
            peaks: As before.
            rounding: By which share of itself each number of the factors may have changed.
        """
        more = np.float32((1 + rounding) ** 2 + _SLACK)
        return cls(norms.reshape(len(norms), -1) * more, peaks, rounding)

    def __len__(self) -> int:
        return len(self.norms)

    def rows(self, selection: slice | np.ndarray) -> "RowBounds":
        """Returns those of the selected rows."""
        return RowBounds(self.norms[selection], self.peaks.take(selection), self.rounding)


@dataclass(frozen=True, eq=False)
class _Unit:
    """Some rows, and for which queries each of them is open, shape [rows, q]."""

    rows: np.ndarray
    is_open: np.ndarray

    @property
    def wanted(self) -> np.ndarray:
        """Which queries any of them is open for, shape [q]."""
        return np.logical_or.reduce(self.is_open, axis=0)


class Pruner:
    """Chooses the pairs of blocks that are worth multiplying.

    Args:
        queries: The query examples.
        tile_rows: How many rows may be multiplied together.
        threads: What the work is shared among.
    """

    def __init__(self, queries: Queries, tile_rows: int, threads: Threads) -> None:
        self._queries = queries
        self._tile_rows = max(_STRIP, tile_rows)
        self._threads = threads
        block, factors = queries.block, np.abs(np.outer(queries.scales, queries.weights))
        norms = np.sqrt(squared_gradient_norms(block)) * factors[:, :, None]
        self._norms = norms.reshape(len(queries), -1).T
        layers = block.gradients[0].layers
        self._numbers = len(block.gradients) * sum(layer.numbers_per_example for layer in layers)
        self._parts = len(block.gradients) * len(layers)
        self._signals = self._error_signals(factors)
        self._signal_norms = _norms_of_parts(self._signals) if self._signals else None
        self._without = 0

    def pieces(self, rows: RowBounds, needed: np.ndarray) -> list[Piece] | None:
        """Returns the pairs of a block that can still be among the strongest, in pieces.

        Args:
            rows: Bounds of its n rows.
            needed: What the influence of a pair must reach, in size, shape [q], float64.

        Returns:
            The pieces; None where all pairs can.
        """
        limits = self._queries.scales * needed * (1 - _SLACK)
        starts = np.arange(0, len(rows), _STRIP)
        upper = np.maximum.reduceat(rows.norms, starts, axis=0).astype(np.float64) @ self._norms
        is_open = (upper >= limits) & (upper > 0)
        strips = np.flatnonzero(is_open.any(axis=1))
        in_strips = [np.arange(start, min(start + _STRIP, len(rows))) for start in starts[strips]]
        if rows.peaks.count and self._signals and is_open.mean() > _OPEN_SHARE:
            if not self._without:
                return self._grouped(self._open_by_peaks(rows, np.concatenate(in_strips), limits))
            self._without -= 1
        if is_open.all():
            return None
        return self._grouped(
            [
                _Unit(at, np.broadcast_to(is_open[i], (len(at), len(limits))))
                for at, i in zip(in_strips, strips, strict=True)
            ]
        )

    def _error_signals(self, factors: np.ndarray) -> list[np.ndarray]:
        """Returns |η_k| √(‖h'‖² + 1) e' of each checkpoint, shape [C, q]; none without peaks."""
        block = self._queries.block
        if not Peaks.of_block(block).count:
            return []
        found = []
        for gradient, factor in zip(block.gradients, factors.T, strict=True):
            layer = gradient.layers[0]
            h = layer.activations.astype(np.float64)
            norms = np.sqrt(np.vecdot(h, h) + layer.has_bias)
            scaled = layer.error_signals * (factor * norms)[:, None]
            found.append(np.ascontiguousarray(scaled.T, np.float32))
        return found

    def _open_by_peaks(
        self, rows: RowBounds, places: np.ndarray, limits: np.ndarray
    ) -> list[_Unit]:
        """Returns the rows, of those at some places, that are open by their peaks.

        Rows that are open for the same queries most of all lie together.
        """
        # Below this, float32 would round a bound to nothing.
        limits = np.where(limits < _TINY, 0, limits).astype(np.float32)
        step = max(_STRIP, _BOUNDS // len(self._queries))
        parts = [places[at : at + step] for at in range(0, len(places), step)]

        def look(part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            bounds = self._bounds_by_peaks(rows.rows(part))
            is_open = bounds >= limits
            at = np.flatnonzero(is_open.any(axis=1))
            return part[at], is_open[at], bounds[at].argmax(axis=1)

        found = self._threads.map(look, parts)
        kept, is_open, strongest = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        if is_open.sum() > _PAYS_SHARE * len(places) * len(limits):
            self._without = _BLOCKS_WITHOUT
        order = np.argsort(strongest, kind="stable")
        return [
            _Unit(kept[at], is_open[at])
            for at in np.split(order, range(_UNIT, len(order), _UNIT))
            if len(at)
        ]

    def _bounds_by_peaks(self, rows: RowBounds) -> np.ndarray:
        """Returns the bound of each row and query, shape [n, q], float32."""
        n, peaks = len(rows), rows.peaks
        ends = np.arange(0, n * peaks.count + 1, peaks.count, dtype=np.int32)
        # Rounding changes e by at most a share of its norm, and h by at most a share of itself; the
        # sums below are off by a share of the norms, too, where their terms cancel.
        rounded = np.float32(rows.rounding + _SLACK) * rows.norms
        bounds: np.ndarray = np.hstack([peaks.next, peaks.rests, rounded]) @ self._signal_norms
        for k, signals in enumerate(self._signals):
            entries = (peaks.values[:, k].ravel(), peaks.classes[:, k].ravel(), ends)
            products = csr_array(entries, shape=(n, len(signals))) @ signals
            bounds += np.abs(products, out=products)
        bounds *= np.float32(1 + rows.rounding + _SLACK)
        return bounds

    def _grouped(self, units: list[_Unit]) -> list[Piece]:
        """Returns pieces with all pairs of units; those side by side share one if it pays.

        Where few pairs of a unit are open, they are paired.
        """
        groups: list[tuple[list[np.ndarray], int, np.ndarray, float]] = []
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for unit in units:
            rows, wanted = len(unit.rows), unit.wanted
            cost = self._cost(rows, wanted)
            if self._cost_of_pairs(unit) < cost:
                at, columns = np.nonzero(unit.is_open)
                pairs.append((unit.rows[at], columns))
                continue
            if groups:
                others, count, known, cost_before = groups[-1]
                both = wanted | known
                together = self._cost(count + rows, both)
                if count + rows <= self._tile_rows and together <= cost_before + cost:
                    groups[-1] = ([*others, unit.rows], count + rows, both, together)
                    continue
            groups.append(([unit.rows], rows, wanted, cost))
        found = [
            Piece(_as_slice(np.concatenate(rows)), self._queries.columns(wanted))
            for rows, _, wanted, _ in groups
        ]
        return found + (self._paired(pairs) if pairs else [])

    def _paired(self, pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[Piece]:
        """Returns pairs in pieces, by row, as many for each thread."""
        rows, columns = (np.concatenate(side) for side in zip(*pairs, strict=True))
        order = np.argsort(rows, kind="stable")
        rounds = -(-len(rows) // (_PAIRS * self._threads.count))
        return [
            Piece(rows[at], columns[at], is_paired=True)
            for at in np.array_split(order, rounds * self._threads.count)
            if len(at)
        ]

    def _cost_of_pairs(self, unit: _Unit) -> float:
        """Returns what the open pairs of a unit take one by one."""
        pairs = int(np.count_nonzero(unit.is_open))
        return (pairs * PAIR_COST + len(unit.rows) * _ROW_COST) * self._numbers

    def _cost(self, rows: int, wanted: np.ndarray) -> float:
        """Returns what a piece takes, in operations of a matrix product."""
        columns = int(np.count_nonzero(wanted))
        numbers = rows * (2 * columns + _ROW_COST) + columns * _QUERY_COST
        return self._parts * _PIECE_COST + numbers * self._numbers


def _as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """Returns rows as a slice where they follow each other: that need not be copied."""
    if rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _norms_of_parts(signals: list[np.ndarray]) -> np.ndarray:
    """Returns what the entries of a row that are no peaks are multiplied with, at most.

    Args:
        signals: Of each of K checkpoints, shape [C, q].

    Returns:
        ‖e'_U‖₁ of the largest entries, the norm of the others, and ‖e'‖: K rows each, shape
        [3 K, q], float32.
    """
    sizes = [-np.sort(-np.abs(signal), axis=0) for signal in signals]
    return np.vstack(
        [
            *(size[:_LARGE].sum(axis=0) for size in sizes),
            *(np.linalg.norm(size[_LARGE:], axis=0) for size in sizes),
            *(np.linalg.norm(size, axis=0) for size in sizes),
        ]
    )
