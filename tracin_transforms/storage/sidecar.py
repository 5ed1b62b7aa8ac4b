"""What is known of a shard's examples without their gradient factors, in one small Parquet file.

The sidecar is written after the shard's factor file and describes it: where it is, the shard is
complete.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tracin_transforms.core.errors import InputError
from tracin_transforms.core.protocols import BadExample, Shard
from tracin_transforms.storage.columns import as_column
from tracin_transforms.storage.files import AnyPath, written_atomically
from tracin_transforms.storage.remote import refusals_named
from tracin_transforms.storage.row_layout import RowLayout

_KEY = b"tracin"
FORMAT = 1


@dataclass(frozen=True)
class FactorFile:
    """A file of gradient factors.

    Attributes:
        size: In bytes.
        sha256: Of its content, in hexadecimal.
        block_rows: Rows of each record batch but the last.
        batches: Place and size of each record batch's message in the file, in bytes.
    """

    size: int
    sha256: str
    block_rows: int
    batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Some of a shard's examples, in the order of its factor file.

    Attributes:
        indices: As in `FactorBlock`, shape [n], int64.
        example_ids: Shape [n], unicode.
        labels: As in `FactorBlock`.
        predictions: As in `FactorBlock`, of all K checkpoints.
        losses: Shape [n, K], float32, in nats.
        gradient_norms: ‖∇ℓ(w_k, z)‖ of each layer, shape [n, K, L], float32.
    """

    indices: np.ndarray
    example_ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    losses: np.ndarray
    gradient_norms: np.ndarray

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
        )

    def of_checkpoints(self, places: list[int]) -> "Rows":
        """Returns the rows with what is known at some checkpoints only, by their places."""
        return Rows(
            self.indices,
            self.example_ids,
            self.labels,
            self.predictions[:, places],
            self.losses[:, places],
            self.gradient_norms[:, places],
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
    floats = ["losses", "self_influence", "gradient_norms", "gradient_norms_per_layer"]
    leaves = [
        name if name == "self_influence" else f"{name}.list.element"
        for name in floats
        if name in columns
    ]
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


def read_sidecar(path: AnyPath, with_rows: bool = True) -> Sidecar:
    """Returns the sidecar in a file.

    Raises:
        FileNotFoundError: There is none.
        InputError: The file is not a sidecar, or damaged.
    """
    with refusals_named(path, "read"), path.open("rb") as opened:
        try:
            file = pq.ParquetFile(opened, page_checksum_verification=True)
            return _sidecar(file, with_rows)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            # Arrow has no error of its own for a page whose checksum is wrong.
            if isinstance(error, OSError) and "CRC" not in str(error):
                raise
            raise InputError(
                f"{str(path)!r} cannot be read as the sidecar of a shard, or was written by "
                f"another version ({error}): remove it and run the same 'tracin extract' again"
            ) from error


def _sidecar(file: pq.ParquetFile, with_rows: bool) -> Sidecar:
    description = json.loads(file.schema_arrow.metadata[_KEY])
    if description["format"] != FORMAT:
        raise ValueError(f"its format is {description['format']}, expected {FORMAT}")
    layout = RowLayout.from_json(description["layout"])
    batches = tuple((start, size) for start, size in description["file"]["batches"])
    return Sidecar(
        shard=Shard(**description["shard"]),
        layout=layout,
        file=FactorFile(**(description["file"] | {"batches": batches})),
        bad=tuple(BadExample(**bad) for bad in description["bad"]),
        rows=_rows(file.read(), layout, description) if with_rows else None,
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
        example_ids=np.array(table["example_id"].to_pylist(), dtype=str),
        labels=_numbers(table["label"], (n, *description["label_shape"])),
        predictions=_numbers(table["predictions"], (n, *description["prediction_shape"])),
        losses=_numbers(table["losses"], (n, k)),
        gradient_norms=_numbers(table[norms], (n, k, -1)),
    )


def _numbers(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    while pa.types.is_list(array.type):
        array = array.flatten()
    return np.asarray(array).reshape(shape)
