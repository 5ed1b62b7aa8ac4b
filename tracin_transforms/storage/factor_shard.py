"""The gradient factors of one shard of a factor store, read block by block.

A factor file is an uncompressed Arrow IPC file whose columns all have a fixed width. One read
brings a block into memory, where NumPy views its numbers without another copy. Rows are sorted by
falling self-influence.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock
from tracin_transforms.storage.buffers import Buffers
from tracin_transforms.storage.files import AnyPath
from tracin_transforms.storage.remote import refusals_named
from tracin_transforms.storage.sidecar import Rows, Sidecar, read_sidecar

# Two in use, and one for the reader ahead.
_READ = Buffers(3)


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
class StoredShard:
    """A complete shard of a store.

    Attributes:
        paths: Where it lies.
        sidecar: What is known of it, rows included.
    """

    paths: ShardPaths
    sidecar: Sidecar

    @classmethod
    def open(cls, paths: ShardPaths) -> "StoredShard":
        """Returns the shard at its place, without its factors.

        Raises:
            FileNotFoundError: It is not there.
            InputError: Its sidecar is damaged.
        """
        return cls(paths, read_sidecar(paths.sidecar))

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
        chosen, rows = (
            self.sidecar.layout.of_checkpoints(checkpoint_ids),
            self.rows_of(checkpoint_ids),
        )
        start = 0
        for batch in self.batches():
            part = rows.take(slice(start, start + batch.num_rows))
            start += batch.num_rows
            yield FactorBlock(
                shard=self.sidecar.shard.name,
                indices=part.indices,
                example_ids=part.example_ids,
                labels=part.labels,
                predictions=part.predictions,
                losses=part.losses,
                gradients=chosen.unpack(batch, batch.num_rows),
            )

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the record batches of the factor file, in order.

        While one is in use, the next is read.

        Raises:
            InputError: The file is not whole.
        """
        file, schema = self.sidecar.file, self.sidecar.layout.schema
        if not file.batches:
            return
        largest = max(size for _, size in file.batches)
        with refusals_named(self.paths.factors, "read"):
            opened = self.paths.factors.open("rb", buffering=0)
            with opened, ThreadPoolExecutor(1) as pool:
                self._check_size(opened)

                def read(i: int) -> pa.RecordBatch:
                    start, size = file.batches[i]
                    view = _READ.take(largest)[:size].data
                    self._read_into(opened, start, view)
                    message = pa.ipc.read_message(pa.py_buffer(view))
                    return pa.ipc.read_record_batch(message, schema)

                ahead = pool.submit(read, 0)
                for i in range(len(file.batches)):
                    batch = ahead.result()
                    if i + 1 < len(file.batches):
                        ahead = pool.submit(read, i + 1)
                    yield batch

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
