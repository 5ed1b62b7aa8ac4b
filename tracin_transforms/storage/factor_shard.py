"""The gradient factors of one shard of a factor store, read block by block.

A factor file is an uncompressed Arrow IPC file whose columns all have a fixed width. One read
brings a block into memory, where NumPy views its numbers without another copy; of a block with
few rows that are wanted, these alone are read. `shard_writer` says how the rows are ordered.
"""

import io
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tracin_transforms.core.buffers import Buffers
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.remote import RemotePath, refusals_named
from tracin_transforms.storage.row_layout import RowLayout
from tracin_transforms.storage.sidecar import Batch, Rows, Sidecar, read_sidecar

# Those in use are not counted: as many as one reader ahead and a scan give back.
_READ = Buffers(3)
# What it takes to bring a run of rows of a column from a disk, in bytes that are read meanwhile.
_READ_COST = 2**16
# Not on macOS.
_CAN_SEND_FOR = hasattr(os, "posix_fadvise")
# Rows so near to each other are sent for together with those between them.
_NEAR = 4


@dataclass(frozen=True)
class ShardPaths:
    """Where a shard of a store lies.

    Attributes:
        factors: The factor file.
        sidecar: The sidecar.
    """

    factors: AnyPath
    sidecar: AnyPath


@dataclass(frozen=True, eq=False)
class PackedBlock:
    """Some rows of a shard as they are stored; those that are asked for become float32.

    Attributes:
        shard: Name of the shard.
        known: The rows without their gradient factors.
        layout: Of the checkpoints that are wanted.
        batch: The gradient factors, of these checkpoints and others.
    """

    shard: str
    known: Rows
    layout: RowLayout
    batch: pa.RecordBatch

    def __len__(self) -> int:
        return len(self.known)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the gradient factors take, packed."""
        size: int = self.batch.nbytes
        return size

    def rows(self, selection: slice | np.ndarray) -> FactorBlock:
        """Returns the selected rows with their gradient factors in float32."""
        known = self.known.take(selection)
        return FactorBlock(
            shard=self.shard,
            indices=known.indices,
            example_ids=known.example_ids,
            labels=known.labels,
            predictions=known.predictions,
            losses=known.losses,
            gradients=tuple(self.gradients_of(selection)),
        )

    def gradients_of(self, selection: slice | np.ndarray) -> Iterator[GradientFactors]:
        """Yields the gradient factors of the selected rows, each checkpoint's when asked for."""
        return self.layout.unpack(self.batch, selection)


@dataclass(frozen=True, eq=False)
class StoredShard:
    """A complete shard of a store.

    Attributes:
        paths: Where it lies.
        sidecar: What is known of it, rows included.
    """

    paths: ShardPaths
    sidecar: Sidecar

    @classmethod
    def open(cls, paths: ShardPaths, with_peaks: bool = False) -> "StoredShard":
        """Returns the shard at its place, without its factors.

        Args:
            paths: Where it lies.
            with_peaks: Whether to read the largest entries of its error signals.

        Raises:
            FileNotFoundError: It is not there.
            InputError: Its sidecar is damaged.
        """
        return cls(paths, read_sidecar(paths.sidecar, with_peaks=with_peaks))

    @property
    def rows(self) -> Rows:
        """The shard's examples."""
        assert self.sidecar.rows is not None
        return self.sidecar.rows

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, in order, at the first checkpoint."""
        layout = self.sidecar.layout
        return tuple(
            layer.name for layer in layout.of_checkpoints(layout.checkpoint_ids[:1]).layers
        )

    def rows_of(self, checkpoint_ids: Sequence[str]) -> Rows:
        """Returns the examples with what is known at some checkpoints."""
        known = self.sidecar.layout.checkpoint_ids
        return self.rows.of_checkpoints([known.index(name) for name in checkpoint_ids])

    def checkpoints_but(self, others: Sequence[str]) -> list[str]:
        """Returns the ids of the shard's checkpoints that are not among others."""
        return [name for name in self.sidecar.layout.checkpoint_ids if name not in others]

    def blocks(self, checkpoint_ids: Sequence[str]) -> Iterator[FactorBlock]:
        """Yields the shard's blocks, with the gradient factors of some checkpoints.

        Raises:
            InputError: The factor file is not whole.
        """
        for _, block in self.packed_blocks(checkpoint_ids):
            yield block.rows(slice(None))

    def packed_blocks(
        self,
        checkpoint_ids: Sequence[str],
        wanted: Callable[[int], np.ndarray | None] = lambda _: None,
    ) -> Iterator[tuple[int, PackedBlock]]:
        """Yields the shard's blocks as they are stored, each with its number.

        Args:
            checkpoint_ids: Whose factors are wanted.
            wanted: Which rows of a block, by its number, are to be read, rising; all if None. The
                others hold anything; a block without a row is left out. Asked in order, for each
                block before the one ahead of it is used.

        Raises:
            InputError: The factor file is not whole.
        """
        layout, rows = (
            self.sidecar.layout.of_checkpoints(checkpoint_ids),
            self.rows_of(checkpoint_ids),
        )
        for i, batch in self.batches(wanted):
            known = rows.take(self.sidecar.file.rows_of(i))
            block = PackedBlock(self.sidecar.shard.name, known, layout, batch)
            # Who takes a block alone holds its memory.
            del batch
            yield i, block
            del block

    def batches(
        self, wanted: Callable[[int], np.ndarray | None] = lambda _: None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yields the record batches of the factor file that are wanted, each with its number.

        While one is in use, the next is read.

        Args:
            wanted: As for `packed_blocks`.

        Raises:
            InputError: The file is not whole.
        """
        numbers = range(len(self.sidecar.file.batches))
        asked = ((i, rows) for i in numbers if (rows := wanted(i)) is None or len(rows))
        first = next(asked, None)
        if first is None:
            return
        with refusals_named(self.paths.factors, "read"):
            opened = self.paths.factors.open("rb", buffering=0)
            with opened, ThreadPoolExecutor(1) as pool:
                self._check_size(opened)
                number, batch = first[0], self._read(opened, *first)
                while following := next(asked, None):
                    ahead = pool.submit(self._read, opened, *following)
                    yield number, batch
                    del batch
                    number, batch = following[0], ahead.result()
                    del ahead
                yield number, batch

    def _read(self, opened: Any, number: int, rows: np.ndarray | None) -> pa.RecordBatch:
        """Returns a record batch, read as a whole; mapped, where few of its rows are wanted."""
        file, schema = self.sidecar.file, self.sidecar.layout.schema
        batch = file.batches[number]
        runs = None if rows is None else _runs(rows)
        if runs is not None and self._are_few(runs, batch):
            return _mapped(opened, batch, schema, runs)
        memory = _READ.take(max(batch.size for batch in file.batches))[: batch.size]
        self._read_into(opened, batch.start, memory.data)
        return _record_batch(memory, schema)

    def _are_few(self, runs: list[tuple[int, int]], batch: Batch) -> bool:
        """Returns whether runs of rows are sooner brought from a disk than the whole batch."""
        if isinstance(self.paths.factors, RemotePath) or not _CAN_SEND_FOR:
            return False
        rows = sum(last - first for first, last in runs)
        reads = len(runs) * len(self.sidecar.layout.columns)
        return rows * batch.size / batch.rows + reads * _READ_COST < batch.size

    def _check_size(self, opened: Any) -> None:
        size = opened.seek(0, io.SEEK_END)
        if size != self.sidecar.file.size:
            raise InputError(
                f"{str(self.paths.factors)!r} has {size} bytes, its sidecar says "
                f"{self.sidecar.file.size}: unless 'tracin extract' is just adding to the store, "
                "run it again, which computes the shard anew"
            )

    def _read_into(self, opened: Any, start: int, view: memoryview) -> None:
        opened.seek(start)
        while view.nbytes:
            read = opened.readinto(view)
            if not read:
                raise InputError(f"{str(self.paths.factors)!r} ended while it was read")
            view = view[read:]


def _record_batch(memory: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    """Returns the record batch whose message is in memory, as views of it."""
    return pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(memory.data)), schema)


def _mapped(
    opened: Any, batch: Batch, schema: pa.Schema, runs: list[tuple[int, int]]
) -> pa.RecordBatch:
    """Returns a record batch that is read where it is looked at: in some rows, which are sent for.

    The system begins to bring them into memory, all at once, if they are not there.

    Args:
        opened: The factor file.
        batch: Where it lies in it.
        schema: Its columns.
        runs: Where rows that follow each other begin and end.
    """
    before = batch.start % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(
        opened.fileno(), before + batch.size, access=mmap.ACCESS_READ, offset=batch.start - before
    )
    mapped.madvise(mmap.MADV_RANDOM)
    memory = np.frombuffer(mapped, np.uint8, offset=before)
    found = _record_batch(memory, schema)
    for column in found.columns:
        is_list = pa.types.is_fixed_size_list(column.type)
        values = column.values if is_list else column
        start = batch.start + values.buffers()[1].address - memory.ctypes.data
        width = (column.type.list_size if is_list else 1) * values.type.bit_width // 8
        # What is narrow lies in a page or two.
        for first, last in runs if width > 1 else [(0, len(found))]:
            place, size = start + first * width, (last - first) * width
            os.posix_fadvise(opened.fileno(), place, size, os.POSIX_FADV_WILLNEED)
    return found


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Returns where rows that follow each other begin and end; those near each other are joined."""
    breaks = np.flatnonzero(np.diff(rows) > _NEAR) + 1
    starts, stops = rows[np.append(0, breaks)], rows[np.append(breaks - 1, len(rows) - 1)] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))
