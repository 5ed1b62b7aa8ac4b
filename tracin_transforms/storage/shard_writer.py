"""Writing a shard of a factor store: gathered block by block, sorted, written in one piece.

The order of the rows is for those who look for the strongest influence, so that those that can
have much lie together. With few classes the rows are in the order of self-influence, and the first
of them, the head, say how much influence it takes. With many, they lie by their largest class.
"""

import hashlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.core.influence import squared_gradient_norms
from tracin_transforms.core.peaks import Peaks
from tracin_transforms.core.protocols import BadExample, Shard
from tracin_transforms.core.sketching import TWO_SIDED, Sketch
from tracin_transforms.storage.factor_shard import ShardPaths, StoredShard
from tracin_transforms.storage.files import written_atomically
from tracin_transforms.storage.remote import RemotePath, refusals_named
from tracin_transforms.storage.row_layout import RowLayout
from tracin_transforms.storage.sidecar import (
    Batch,
    FactorFile,
    Rows,
    Sidecar,
    joined_rows,
    write_sidecar,
)

# Rows that are read, and scored, together: enough for matrix products at full speed, few enough
# for memory.
_BLOCK_ROWS = 2048
_BLOCK_BYTES = 32 * 2**20
# The head is this share of a shard, but not fewer rows than these.
_HEAD_SHARE = 1 / 16
_HEAD_ROWS = 64


class ShardWriter:
    """Gathers the blocks of a shard, and writes factor file and sidecar when all are there.

    Rows wait in a temporary file without a name, which goes with the process: a factor file is
    sorted, and memory is not to grow with the shard.

    Args:
        paths: Where the shard is to lie.
        shard: Which.
        weights: Of each checkpoint by id, in the order in which they are stored. Rows are sorted
            by self-influence with the weights of those that the shard gets.
        dtype: ``float16`` or ``float32``.
        known: The shard as it is stored already, of which other checkpoints are kept.
        new: Ids of the checkpoints whose factors come.
        sketch: What they are projected by before they are stored, if they are. Gradient norms,
            and so self-influence and the order of the rows, are those before.
    """

    def __init__(
        self,
        paths: ShardPaths,
        shard: Shard,
        weights: dict[str, float],
        dtype: str,
        known: StoredShard | None = None,
        new: Sequence[str] = (),
        sketch: Sketch | None = None,
    ) -> None:
        self._paths = paths
        self._shard = shard
        self._dtype = dtype
        self._sketch = sketch
        kept = [] if known is None else known.checkpoints_but(new)
        self._known = _Known(known.paths, kept) if known is not None and kept else None
        self._weights = weights
        if self._known is not None:
            self._weights = {key: w for key, w in weights.items() if key in {*new, *kept}}
        self._layout: RowLayout | None = None
        self._new_layout: RowLayout | None = None
        self._rows: list[Rows] = []
        directory = None if isinstance(paths.factors, RemotePath) else paths.factors.parent
        with refusals_named(paths.factors, "written"):
            # Closed by __exit__.
            self._spool: Any = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def add(self, block: FactorBlock) -> None:
        """Takes the next rows of the shard, with their factors as they were extracted.

        Raises:
            InputError: Their factors are of another form than those before, or do not fit the
                sketch; the disk is full.
        """
        norms = _gradient_norms(block)
        if self._sketch is not None:
            block = self._sketch.project(block)
        rows = Rows(
            block.indices,
            block.example_ids,
            block.labels,
            block.predictions,
            block.losses,
            norms,
            self._peaks(block),
            None if self._sketch is None else _gradient_norms(block),
        )
        if self._known is not None:
            there = self._known.holds(block.indices)
            block, rows = block.rows(there), rows.take(there)
            if not len(rows):
                return
        if self._new_layout is None:
            self._new_layout = RowLayout.of_block(block, self._dtype)
            self._layout = (
                self._new_layout
                if self._known is None
                else self._new_layout.joined(self._known.layout, list(self._weights))
            )
        assert self._layout is not None
        packed = self._new_layout.pack(block)
        if self._known is not None:
            packed |= self._known.packed(rows.indices)
            rows = self._known.joined(rows, block.checkpoint_ids, list(self._weights))
        records = np.empty(len(rows), self._layout.record)
        for name, values in packed.items():
            records[name] = values
        with refusals_named(self._paths.factors, "written"):
            self._spool.write(records.data)
        self._rows.append(rows)

    def _peaks(self, block: FactorBlock) -> Peaks:
        """Returns the peaks of a block's rows; none of projected error signals, which are even."""
        if self._sketch is not None and self._sketch.kind == TWO_SIDED:
            return Peaks.none(len(block), len(block.gradients))
        return Peaks.of_block(block)

    def finish(self, bad: Sequence[BadExample]) -> Sidecar:
        """Writes the shard.

        Args:
            bad: Its examples that cannot be used.

        Returns:
            The sidecar that was written.

        Raises:
            InputError: The system refuses.
        """
        if self._layout is None:
            # A shard without examples, or without any that can be used.
            self._layout = RowLayout(tuple(self._weights), (), self._dtype)
            self._rows = [Rows.none(len(self._weights))]
        known_bad = () if self._known is None else self._known.bad
        # What is bad at both times is told once.
        by_index = {example.index: example for example in (*bad, *known_bad)}
        bad = [by_index[index] for index in sorted(by_index)]
        rows = joined_rows(self._rows)
        own = (rows.gradient_norms.astype(np.float64) ** 2).sum(axis=2) @ np.array(
            list(self._weights.values())
        )
        order, head = _order(rows, own)
        with refusals_named(self._paths.factors, "written"):
            self._spool.flush()
        file = self._write_factors(order, head)
        sidecar = Sidecar(
            self._shard, self._layout, file, tuple(bad), rows.take(order), count=len(rows)
        )
        write_sidecar(self._paths.sidecar, sidecar, own[order])
        return sidecar

    def _write_factors(self, order: np.ndarray, head: int) -> FactorFile:
        assert self._layout is not None
        layout = self._layout
        # An empty file cannot be mapped.
        records = (
            np.memmap(self._spool, layout.record, mode="r", shape=order.shape)
            if len(order)
            else np.empty(0, layout.record)
        )
        block_rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(1, layout.record.itemsize)))
        blocks = [*_pieces(0, head, block_rows), *_pieces(head, len(order), block_rows)]
        ends = []
        with written_atomically(self._paths.factors) as temporary:
            with temporary.open("wb") as raw:
                hashed = _Hashed(raw)
                sink = pa.PythonFile(hashed, mode="w")
                with pa.ipc.new_file(sink, layout.schema) as writer:
                    for block in blocks:
                        writer.write_batch(_record_batch(layout, records[order[block]]))
                        ends.append(hashed.size)
            starts = [_end_of_schema(temporary), *ends] if ends else []
        batches = tuple(
            Batch(start, end - start, block.stop - block.start)
            for start, end, block in zip(starts, ends, blocks, strict=False)
        )
        in_head = sum(block.stop <= head for block in blocks)
        return FactorFile(hashed.size, hashed.digest.hexdigest(), batches, in_head)


class _Known:
    """What a shard holds already of some checkpoints, by the index of its rows."""

    def __init__(self, paths: ShardPaths, checkpoint_ids: Sequence[str]) -> None:
        shard = StoredShard.open(paths, with_peaks=True)
        self._rows = shard.rows_of(checkpoint_ids)
        self.layout = shard.sidecar.layout.of_checkpoints(checkpoint_ids)
        self.bad = shard.sidecar.bad
        self._order = np.argsort(self._rows.indices)
        self._sorted = self._rows.indices[self._order]
        path = shard.paths.factors
        with refusals_named(path, "read"):
            # A local file is only looked at where its rows are wanted.
            is_remote = isinstance(path, RemotePath)
            source = pa.BufferReader(path.read_bytes()) if is_remote else pa.memory_map(str(path))
            self._table = pa.ipc.open_file(source).read_all()

    def holds(self, indices: np.ndarray) -> np.ndarray:
        """Returns which indices the shard holds; the others are among its bad examples."""
        return np.isin(indices, self._sorted)

    def packed(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the columns of the rows with these indices, by name."""
        table = self._table.take(pa.array(self._places(indices)))
        found = {}
        for column in self.layout.columns:
            values = table[column.name].combine_chunks()
            numbers = values.values.slice(
                values.offset * values.type.list_size, len(values) * values.type.list_size
            )
            found[column.name] = numbers.to_numpy(zero_copy_only=True).reshape(-1, *column.shape)
            if column.is_packed:
                name = f"{column.name}_exponent"
                found[name] = table[name].to_numpy()
        return found

    def joined(self, rows: Rows, new: Sequence[str], checkpoint_ids: list[str]) -> Rows:
        """Returns rows with what is known at the new checkpoints and at the others."""
        known = self._rows.take(self._places(rows.indices))
        ids = [*new, *self.layout.checkpoint_ids]
        places = [ids.index(checkpoint_id) for checkpoint_id in checkpoint_ids]
        names = ["predictions", "losses", "gradient_norms"]
        if rows.sketch_norms is not None:
            names.append("sketch_norms")
        both = {
            name: np.concatenate([getattr(rows, name), getattr(known, name)], axis=1)[:, places]
            for name in names
        }
        return replace(rows, **both, peaks=rows.peaks.joined(known.peaks).of_checkpoints(places))

    def _places(self, indices: np.ndarray) -> np.ndarray:
        return self._order[np.searchsorted(self._sorted, indices)]


def _gradient_norms(block: FactorBlock) -> np.ndarray:
    """Returns the norm of each layer's gradient, shape [n, K, L], float32."""
    return np.sqrt(squared_gradient_norms(block)).astype(np.float32)


class _Hashed(io.RawIOBase):
    """A file that is written once, from beginning to end, and hashed meanwhile."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size


def _record_batch(layout: RowLayout, records: np.ndarray) -> pa.RecordBatch:
    arrays = []
    for field in layout.schema:
        values = np.ascontiguousarray(records[field.name]).reshape(-1)
        array = pa.array(values)
        if pa.types.is_fixed_size_list(field.type):
            array = pa.FixedSizeListArray.from_arrays(array, field.type.list_size)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=layout.schema)


def _end_of_schema(path: Path) -> int:
    """Returns where the first record batch of an Arrow file begins."""
    with pa.OSFile(str(path)) as file:
        file.seek(len(b"ARROW1\0\0"))
        pa.ipc.read_message(file)
        place: int = file.tell()
        return place


def _order(rows: Rows, own: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns the order of a shard's rows, and how many are its head.

    Args:
        rows: n rows.
        own: Their self-influence, shape [n].
    """
    order = np.lexsort((rows.example_ids, -own))
    if rows.peaks.count:
        classes, _ = rows.peaks.take(order).largest(1)
        return order[np.argsort(classes[:, 0], kind="stable")], 0
    return order, min(len(order), max(_HEAD_ROWS, int(len(order) * _HEAD_SHARE)))


def _pieces(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]
