"""Examples in Parquet files, by their columns or as a function of the user's own makes them."""

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import ExampleBatch, ExampleSource, Shard
from tracin_transforms.examples.assembly import assemble, chunks
from tracin_transforms.examples.columns import column_tensor, columns_of, kind_of, row_values
from tracin_transforms.examples.decoding import Broken
from tracin_transforms.examples.fields import Fields, Record, examples_of
from tracin_transforms.examples.parsing import examples_parsed
from tracin_transforms.examples.shard_files import NamedFile, named_files
from tracin_transforms.storage.files import AnyPath, existing_file
from tracin_transforms.storage.remote import RemotePath, refusals_named

_SHARD_ROWS = 10_000
# Row groups can be larger than memory: their columns are read piece by piece.
_BUFFER_BYTES = 2**22
# Footers of files in object stores take long to come.
_READERS = 16
_ID_KINDS = ("integer", "text")
_TARGET_KINDS = ("integer", "number", "list")
_NUMBER_KINDS = ("integer", "number")


@dataclasses.dataclass(frozen=True)
class ParquetExamples(ExampleSource):
    """Examples from the rows of Parquet files.

    A shard is a run of row groups of a file, with up to 10,000 rows or a single row group. Without
    a column of ids, row i of ``train.parquet`` has the id ``train:i``.

    Attributes:
        pattern: The files, as in ``data/train-*.parquet``.
        fields: Which columns are the example. An input may be several columns of numbers, with
            commas between, which make a float32 vector.
        parse: ``module:function``, which makes (x, y) of a dict of columns, instead of `fields`.
        columns: Those that `parse` gets; None for all that TensorFlow has a type for.
    """

    pattern: str
    fields: Fields = Fields()
    parse: str | None = None
    columns: tuple[str, ...] | None = None

    def shards(self) -> tuple[Shard, ...]:
        """Returns runs of row groups in the order of the files' names.

        Raises:
            InputError: No file matches, or two would have the same name; a file is not Parquet, or
                has no such column, or one of another type; there are no rows.
        """
        with ThreadPoolExecutor(_READERS) as readers:
            by_file = list(readers.map(self._shards_of, named_files(self.pattern, "parquet")))
        shards = tuple(shard for shards in by_file for shard in shards)
        if not shards:
            raise InputError(f"examples parquet: {self.pattern!r} has no rows: expected examples")
        return shards

    def read(self, shard: Shard, batch_size: int) -> Iterator[ExampleBatch]:
        """Yields the shard's examples in order, `batch_size` at a time; the last may be fewer.

        Raises:
            InputError: The file changed since its shards were listed, or is damaged; inputs are of
                different shapes.
        """
        file = existing_file(shard.path, "examples file")
        name = shard.name.rsplit("-", 3)[0]
        if shard not in self._shards_of(NamedFile(name, file, 0)):
            raise InputError(
                f"examples file {shard.path!r} changed: shard {shard.name!r} is no longer what it "
                "was when the shards were listed; run the job again"
            )
        records = self._records(file, name, shard, batch_size)
        for chunk in chunks(records, batch_size):
            if self.parse is None:
                examples = examples_of(shard.name, chunk, self.fields)
            else:
                examples = examples_parsed(shard.name, chunk, _tensors, self.parse)
            yield assemble(shard.name, examples)

    def describe(self) -> dict[str, Any]:
        """Returns which columns are read and how."""
        if self.parse is None:
            return {"kind": "parquet", **self.fields.describe()}
        columns = {"columns": list(self.columns)} if self.columns else {}
        return {"kind": "parquet", "parse": self.parse, **columns}

    def _shards_of(self, file: NamedFile) -> list[Shard]:
        """Returns the shards of a file, after checking its columns."""
        with _opened(file.path) as opened:
            self._check_columns(str(file.path), opened.schema_arrow)
            groups = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
        runs: list[list[Any]] = []
        for group in groups:
            if not runs or sum(g.num_rows for g in runs[-1]) + group.num_rows > _SHARD_ROWS:
                runs.append([])
            runs[-1].append(group)
        runs = [run for run in runs if any(group.num_rows for group in run)]
        counts = [sum(group.num_rows for group in run) for run in runs]
        return [
            Shard(
                name=f"{file.name}-{i:05d}-of-{len(runs):05d}",
                path=str(file.path),
                start=sum(counts[:i]),
                count=counts[i],
                size=sum(_compressed_bytes(group) for group in run),
            )
            for i, run in enumerate(runs)
        ]

    def _check_columns(self, file: str, schema: pa.Schema) -> None:
        try:
            if self.parse is not None:
                for name in self.columns or ():
                    _check(name, schema, ("integer", "number", "text", "bytes", "list"))
                return
            for _, field in self.fields.by_input:
                several = len(columns_of(field.field, schema)) > 1
                others = () if several else ("text", "bytes", "list")
                _check(field.field, schema, (*_NUMBER_KINDS, *others))
            _check(self.fields.targets, schema, _TARGET_KINDS)
            if self.fields.example_ids is not None:
                _check(self.fields.example_ids, schema, _ID_KINDS)
            if self.fields.sample_weights is not None:
                _check(self.fields.sample_weights, schema, _NUMBER_KINDS)
        except InputError as error:
            raise InputError(f"{file!r}: {error}") from error

    def _records(self, file: AnyPath, name: str, shard: Shard, batch_size: int) -> Iterator[Record]:
        with _opened(file) as opened:
            schema = opened.schema_arrow
            names = self.fields.names if self.parse is None else self._parsed_columns(schema)
            columns = [column for field in names for column in columns_of(field, schema)]
            index = 0
            for batch in opened.iter_batches(
                batch_size, _row_groups(opened.metadata, shard), list(dict.fromkeys(columns))
            ):
                values = {field: row_values(field, batch) for field in names}
                for row in range(batch.num_rows):
                    found: Any = {field: column[row] for field, column in values.items()}
                    if self.parse is not None:
                        found = next((v for v in found.values() if isinstance(v, Broken)), found)
                    yield Record(index, f"{name}:{shard.start + index}", found)
                    index += 1

    def _parsed_columns(self, schema: pa.Schema) -> tuple[str, ...]:
        known = [field.name for field in schema if kind_of(field.type) != "other"]
        return self.columns or tuple(known)


@contextlib.contextmanager
def _opened(file: AnyPath) -> Iterator[pq.ParquetFile]:
    with refusals_named(file, "read"):
        source = file.open("rb") if isinstance(file, RemotePath) else str(file)
        with pq.ParquetFile(
            source, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        ) as opened:
            yield opened


def _check(field: str, schema: pa.Schema, kinds: tuple[str, ...]) -> None:
    for name in columns_of(field, schema):
        found = schema.field(name).type
        if kind_of(found) not in kinds:
            raise InputError(f"column {name!r} has type {found}, expected {' or '.join(kinds)}")


def _row_groups(metadata: Any, shard: Shard) -> list[int]:
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = np.cumsum([0, *rows[:-1]]).tolist()
    end = shard.start + (shard.count or 0)
    return [i for i, start in enumerate(starts) if shard.start <= start < end]


def _compressed_bytes(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _tensors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: column_tensor([row[name] for row in rows]) for name in rows[0]}
