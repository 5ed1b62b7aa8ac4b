"""What is known of a shard's examples without their gradient factors, in one small Parquet file.

The sidecar is written after the shard's factor file and describes it: where it is, the shard is
complete.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.peaks import Peaks
from tracin_transforms.core.protocols import BadExample, Shard
from tracin_transforms.storage.columns import as_array, as_column, as_strings
from tracin_transforms.storage.files import AnyPath, written_atomically
from tracin_transforms.storage.remote import refusals_named
from tracin_transforms.storage.row_layout import RowLayout

_KEY = b"tracin"
# Columns of floats in lists.
_FLOATS = (
    *("losses", "gradient_norms", "gradient_norms_per_layer", "sketch_norms"),
    *("peak_values", "peak_next", "peak_rests"),
)
_PEAKS = ("peak_classes", "peak_values", "peak_next", "peak_rests")
FORMAT = 2


@dataclass(frozen=True)
class Batch:
    """A record batch of a factor file.

    Attributes:
        start: Where its message begins in the file, in bytes.
        size: Of the message, in bytes.
        rows: Number of its rows.
    """

    start: int
    size: int
    rows: int


@dataclass(frozen=True)
class FactorFile:
    """A file of gradient factors.

    Attributes:
        size: In bytes.
        sha256: Of its content, in hexadecimal.
        batches: Its record batches, in order.
        head: How many of the first ones hold the head, the rows that promise most.
    """

    size: int
    sha256: str
    batches: tuple[Batch, ...]
    head: int

    def rows_of(self, number: int) -> slice:
        """Returns which rows of the shard a record batch holds."""
        start = sum(batch.rows for batch in self.batches[:number])
        return slice(start, start + self.batches[number].rows)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of a shard's examples, in the order of its factor file.

    Attributes:
        indices: As in `FactorBlock`, shape [n], int64.
        example_ids: Shape [n], unicode.
        labels: As in `FactorBlock`.
        predictions: As in `FactorBlock`, of all K checkpoints.
        losses: Shape [n, K], float32, in nats.
        gradient_norms: ‖∇ℓ(w_k, z)‖ of each layer, shape [n, K, L], float32; also where the
            factors are sketches, that of the gradient itself.
        peaks: The largest entries of the stored error signals, as `core.peaks.Peaks`; of no
            entries where they were not stored or not read.
        sketch_norms: Norms of the sketches, of the same shape; None where factors are no sketches.
    """

    indices: np.ndarray
    example_ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    losses: np.ndarray
    gradient_norms: np.ndarray
    peaks: Peaks
    sketch_norms: np.ndarray | None = None

    @property
    def stored_norms(self) -> np.ndarray:
        """Norms of what the factor file holds, gradients or sketches, shape [n, K, L], float32."""
        return self.gradient_norms if self.sketch_norms is None else self.sketch_norms

    @classmethod
    def none(cls, checkpoints: int) -> "Rows":
        """Returns no rows."""
        return cls(
            indices=np.empty(0, np.int64),
            example_ids=np.empty(0, "U1"),
            labels=np.empty(0, np.int32),
            predictions=np.empty((0, checkpoints), np.int32),
            losses=np.empty((0, checkpoints), np.float32),
            gradient_norms=np.empty((0, checkpoints, 1), np.float32),
            peaks=Peaks.none(0, checkpoints),
        )

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, selection: np.ndarray | slice) -> "Rows":
        """Returns the selected rows."""
        return Rows(
            self.indices[selection],
            self.example_ids[selection],
            self.labels[selection],
            self.predictions[selection],
            self.losses[selection],
            self.gradient_norms[selection],
            self.peaks.take(selection),
            None if self.sketch_norms is None else self.sketch_norms[selection],
        )

    def of_checkpoints(self, places: list[int]) -> "Rows":
        """Returns the rows with what is known at some checkpoints only, by their places."""
        if places == list(range(self.losses.shape[1])):
            return self
        return Rows(
            self.indices,
            self.example_ids,
            self.labels,
            self.predictions[:, places],
            self.losses[:, places],
            self.gradient_norms[:, places],
            self.peaks.of_checkpoints(places),
            None if self.sketch_norms is None else self.sketch_norms[:, places],
        )


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all parts, of which there is at least one."""
    none = {"sketch_norms"} if parts[0].sketch_norms is None else set()
    arrays = Rows.__dataclass_fields__.keys() - {"peaks"} - none
    return Rows(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays},
        peaks=Peaks.of_rows([part.peaks for part in parts]),
    )


@dataclass(frozen=True, eq=False)
class Sidecar:
    """A complete shard of a factor store.

    Attributes:
        shard: Which.
        layout: Of its factors.
        file: Its factors.
        bad: Its examples that could not be used.
        rows: Its other examples; None where only the description was read.
    """

    shard: Shard
    layout: RowLayout
    file: FactorFile
    bad: tuple[BadExample, ...]
    rows: Rows | None = None
    count: int = 0

    def is_of(self, shard: Shard) -> bool:
        """Returns whether a shard of the source is the one that was stored."""
        return (self.shard.count, self.shard.size) == (shard.count, shard.size)


def write_sidecar(path: AnyPath, sidecar: Sidecar, self_influence: np.ndarray) -> None:
    """Writes a sidecar.

    Args:
        path: Where to.
        sidecar: With its rows.
        self_influence: Of each row, shape [n]: what they are sorted by.
    """
    rows = sidecar.rows
    assert rows is not None
    n, k, layers = rows.gradient_norms.shape
    norms = rows.gradient_norms.astype(np.float64)
    columns = {
        "example_id": pa.array(rows.example_ids.tolist(), pa.string()),
        "index": pa.array(rows.indices),
        "label": as_column(rows.labels),
        "predictions": as_column(rows.predictions),
        "losses": as_column(rows.losses),
        "self_influence": pa.array(self_influence.astype(np.float32)),
        "gradient_norms": as_column(np.sqrt((norms**2).sum(axis=2)).astype(np.float32)),
    }
    if layers > 1:
        columns["gradient_norms_per_layer"] = as_column(rows.gradient_norms.reshape(n, k * layers))
    if rows.sketch_norms is not None:
        columns["sketch_norms"] = as_column(rows.sketch_norms.reshape(n, k * layers))
    if rows.peaks.count:
        columns["peak_classes"] = as_column(rows.peaks.classes.reshape(n, -1))
        columns["peak_values"] = as_column(rows.peaks.values.reshape(n, -1))
        columns["peak_next"] = as_column(rows.peaks.next)
        columns["peak_rests"] = as_column(rows.peaks.rests)
    description = {
        "format": FORMAT,
        "shard": asdict(sidecar.shard) | {"path": ""},
        "layout": sidecar.layout.to_json(),
        "file": asdict(sidecar.file),
        "bad": [asdict(bad) for bad in sidecar.bad],
        "prediction_shape": rows.predictions.shape[1:],
        "label_shape": rows.labels.shape[1:],
    }
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(description)})
    leaves = ["self_influence"] + [f"{name}.list.element" for name in _FLOATS if name in columns]
    with written_atomically(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            # Floating-point numbers hardly repeat, their upper bytes do.
            use_dictionary=["label", "predictions.list.element"],
            use_byte_stream_split=leaves,
            write_page_checksum=True,
        )


def read_sidecar(path: AnyPath, with_rows: bool = True, with_peaks: bool = False) -> Sidecar:
    """Returns the sidecar in a file.

    Args:
        path: The file.
        with_rows: Whether to read the rows, too.
        with_peaks: Whether to read their `peaks`.

    Raises:
        FileNotFoundError: There is none.
        InputError: The file is not a sidecar, or damaged.
    """
    with refusals_named(path, "read"), path.open("rb") as opened:
        try:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            return _sidecar(file, with_rows, with_peaks)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            # Arrow has no error of its own for a page whose checksum is wrong.
            if isinstance(error, OSError) and "CRC" not in str(error):
                raise
            raise InputError(
                f"{str(path)!r} cannot be read as the sidecar of a shard, or was written by "
                f"another version ({error}): remove it and run the same 'tracin extract' again"
            ) from error


def _sidecar(file: pq.ParquetFile, with_rows: bool, with_peaks: bool) -> Sidecar:
    description = json.loads(file.schema_arrow.metadata[_KEY])
    if description["format"] != FORMAT:
        raise ValueError(f"its format is {description['format']}, expected {FORMAT}")
    layout = RowLayout.from_json(description["layout"])
    batches = tuple(Batch(**batch) for batch in description["file"]["batches"])
    names = [n for n in file.schema_arrow.names if with_peaks or n not in _PEAKS]
    return Sidecar(
        shard=Shard(**description["shard"]),
        layout=layout,
        file=FactorFile(**(description["file"] | {"batches": batches})),
        bad=tuple(BadExample(**bad) for bad in description["bad"]),
        rows=_rows(file.read(names), layout, description) if with_rows else None,
        count=file.metadata.num_rows,
    )


def _rows(table: pa.Table, layout: RowLayout, description: dict[str, Any]) -> Rows:
    n, k = len(table), len(layout.checkpoint_ids)
    if not n:
        return Rows.none(k)
    # Of several layers, each has its own norm.
    per_layer = "gradient_norms_per_layer"
    norms = per_layer if per_layer in table.column_names else "gradient_norms"
    return Rows(
        indices=table["index"].to_numpy(),
        example_ids=as_strings(table["example_id"]),
        labels=_numbers(table["label"], (n, *description["label_shape"])),
        predictions=_numbers(table["predictions"], (n, *description["prediction_shape"])),
        losses=_numbers(table["losses"], (n, k)),
        gradient_norms=_numbers(table[norms], (n, k, -1)),
        peaks=_peaks(table, n, k),
        sketch_norms=(
            _numbers(table["sketch_norms"], (n, k, -1))
            if "sketch_norms" in table.column_names
            else None
        ),
    )


def _peaks(table: pa.Table, n: int, k: int) -> Peaks:
    if _PEAKS[0] not in table.column_names:
        return Peaks.none(n, k)
    classes, values, following, rests = (table[name] for name in _PEAKS)
    entries = (_numbers(column, (n, k, -1)) for column in (classes, values))
    return Peaks(*entries, *(_numbers(column, (n, k)) for column in (following, rests)))


def _numbers(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    array = as_array(column)
    while pa.types.is_list(array.type):
        array = array.flatten()
    return np.asarray(array).reshape(shape)
