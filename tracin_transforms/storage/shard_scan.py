"""Looks for the strongest influence in a stored shard, and reads what cannot be ruled out."""

from collections.abc import Sequence
from enum import Enum

import numpy as np

from tracin_transforms.core.pruning import Pruner, RowBounds
from tracin_transforms.core.top_scan import Piece, TopScan
from tracin_transforms.storage.factor_shard import PackedBlock, StoredShard
from tracin_transforms.storage.row_layout import FLOAT16, RowLayout

# By which share of their norm storing may have changed the numbers of a row: each by 2⁻¹¹ of itself
# and, where it is far smaller than the largest, by 2⁻³² of that, see `core.half_precision`.
_ROUNDING = {FLOAT16: 2.0**-11 + 2.0**-24}


class Part(Enum):
    """Which rows of a shard are looked at."""

    HEAD = "those that promise most"
    REST = "the others"
    WHOLE = "all"


def scan_shard(
    shard: StoredShard,
    checkpoint_ids: Sequence[str],
    scan: TopScan,
    part: Part = Part.WHOLE,
    pruner: Pruner | None = None,
) -> int:
    """Adds rows of a shard to a scan.

    Args:
        shard: The shard; for a pruner, with its peaks.
        checkpoint_ids: Of the scan's queries, in order.
        scan: Takes the blocks.
        part: Which rows.
        pruner: Chooses the pairs that are scored; all of them if not given.

    Returns:
        How many rows the part has.

    Raises:
        InputError: The factor file is not whole, or an influence is beyond float32.
    """
    file, rows = shard.sidecar.file, shard.rows_of(checkpoint_ids)
    rounding = _ROUNDING.get(shard.sidecar.layout.dtype, 0.0)
    wanted = {
        Part.HEAD: range(file.head),
        Part.REST: range(file.head, len(file.batches)),
        Part.WHOLE: range(len(file.batches)),
    }[part]
    bounds = RowBounds.of_stored(rows.stored_norms, rows.peaks, rounding) if pruner else None
    planned: dict[int, list[Piece] | None] = {}

    def is_wanted(number: int) -> bool:
        if number not in wanted:
            return False
        if pruner is None or bounds is None:
            return True
        at = bounds.rows(file.rows_of(number))
        planned[number] = pruner.pieces(at, scan.needed)
        return planned[number] is None or bool(planned[number])

    for number, block in shard.packed_blocks(checkpoint_ids, is_wanted):
        scan.add(block, planned.pop(number, None), _largest(block, rounding))
    return sum(file.batches[number].rows for number in wanted)


def _largest(block: PackedBlock, rounding: float) -> np.ndarray | None:
    """Returns the largest gradient norms by checkpoint, None where positions may cancel."""
    if _has_positions(block.layout):
        return None
    norms = block.known.stored_norms.astype(np.float64)
    largest: np.ndarray = np.sqrt((norms**2).sum(axis=2)).max(axis=0) * (1 + rounding) ** 2
    return largest


def _has_positions(layout: RowLayout) -> bool:
    return any(len(layer.error_signals) > 1 or layer.groups > 1 for layer in layout.layers)
