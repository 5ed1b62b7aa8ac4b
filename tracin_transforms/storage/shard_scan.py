"""Looks for the strongest influence in a stored shard, and reads what cannot be ruled out."""

from collections.abc import Sequence

import numpy as np

from tracin_transforms.core.likely_pairs import LikelyPairs
from tracin_transforms.core.pruning import Pruner, RowBounds
from tracin_transforms.core.top_scan import Piece, TopScan
from tracin_transforms.storage.factor_shard import PackedBlock, StoredShard
from tracin_transforms.storage.row_layout import FLOAT16, RowLayout

# By which share of their norm storing may have changed the numbers of a row: each by 2⁻¹¹ of itself
# and, where it is far smaller than the largest, by 2⁻³² of that, see `core.half_precision`.
_ROUNDING = {FLOAT16: 2.0**-11 + 2.0**-24}
_NONE = np.empty(0, np.int64)


def scan_shard(
    shard: StoredShard,
    checkpoint_ids: Sequence[str],
    scan: TopScan,
    pruner: Pruner | None = None,
) -> None:
    """Adds the rows of a shard to a scan.

    Args:
        shard: The shard; for a pruner, with its peaks.
        checkpoint_ids: Of the scan's queries, in order.
        scan: Takes the blocks.
        pruner: Chooses the pairs that are scored, of those that `scout_shard` leaves; all of them
            if not given.

    Raises:
        InputError: The factor file is not whole, or an influence is beyond float32.
    """
    file, rows = shard.sidecar.file, shard.rows_of(checkpoint_ids)
    rounding = _rounding(shard)
    bounds = RowBounds.of_stored(rows.stored_norms, rows.peaks, rounding) if pruner else None
    planned: dict[int, list[Piece] | None] = {}

    def wanted(number: int) -> np.ndarray | None:
        if pruner is None or bounds is None:
            return None
        if number < file.head:
            return _NONE
        pieces = pruner.pieces(bounds.rows(file.rows_of(number)), scan.needed)
        planned[number] = pieces
        return None if pieces is None else _rows_of(pieces)

    for number, block in shard.packed_blocks(checkpoint_ids, wanted):
        scan.add(block, planned.pop(number, None), _largest(block, rounding))
        del block


def scout_shard(
    shard: StoredShard, checkpoint_ids: Sequence[str], scan: TopScan, likely: LikelyPairs
) -> None:
    """Adds some pairs of a shard to a scan that tell how strong others have to be.

    All pairs with the shard's head, if it has one; else those that are likely to be strong.

    Args:
        shard: The shard, with its peaks.
        checkpoint_ids: Of the scan's queries, in order.
        scan: Takes the pairs.
        likely: Chooses them.

    Raises:
        InputError: The factor file is not whole, or an influence is beyond float32.
    """
    file, rows = shard.sidecar.file, shard.rows_of(checkpoint_ids)
    if not file.head and likely.are_known:
        scan_pairs(shard, checkpoint_ids, scan, *likely.of(rows.peaks))
        return
    head = file.head
    blocks = shard.packed_blocks(checkpoint_ids, lambda number: None if number < head else _NONE)
    for _, block in blocks:
        scan.add(block, None, _largest(block, _rounding(shard)))


def scan_pairs(
    shard: StoredShard,
    checkpoint_ids: Sequence[str],
    scan: TopScan,
    rows: np.ndarray,
    columns: np.ndarray,
) -> None:
    """Adds chosen pairs of a shard to a scan; only their rows are read, where that is less.

    Args:
        shard: The shard.
        checkpoint_ids: Of the scan's queries, in order.
        scan: Takes the pairs.
        rows: Row of the shard of each pair, shape [m], rising.
        columns: Index of the query of each pair, shape [m].

    Raises:
        InputError: The factor file is not whole.
    """
    file = shard.sidecar.file
    starts = [file.rows_of(number).start for number in range(len(file.batches))]
    edges = np.append(np.searchsorted(rows, starts), len(rows))

    def pairs(number: int) -> slice:
        return slice(edges[number], edges[number + 1])

    def wanted(number: int) -> np.ndarray:
        return np.unique(rows[pairs(number)]) - starts[number]

    for number, block in shard.packed_blocks(checkpoint_ids, wanted):
        at = pairs(number)
        scan.add_pairs(block, rows[at] - starts[number], columns[at])


def _rows_of(pieces: list[Piece]) -> np.ndarray:
    return np.unique(np.concatenate([_NONE, *(piece.places for piece in pieces)]))


def _rounding(shard: StoredShard) -> float:
    return _ROUNDING.get(shard.sidecar.layout.dtype, 0.0)


def _largest(block: PackedBlock, rounding: float) -> np.ndarray | None:
    """Returns the largest gradient norms by checkpoint, None where positions may cancel."""
    if _has_positions(block.layout):
        return None
    norms = block.known.stored_norms.astype(np.float64)
    largest: np.ndarray = np.sqrt((norms**2).sum(axis=2)).max(axis=0) * (1 + rounding) ** 2
    return largest


def _has_positions(layout: RowLayout) -> bool:
    return any(len(layer.error_signals) > 1 or layer.groups > 1 for layer in layout.layers)
