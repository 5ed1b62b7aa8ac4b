"""How the gradient factors of one example lie in a row of fixed width.

A row holds, for every checkpoint and layer, activations and error signals; as float16 with an
exponent each, see `core.half_precision`, or as they are.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from tracin_transforms.core.buffers import Buffers
from tracin_transforms.core.errors import InputError
from tracin_transforms.core.factors import FactorBlock, GradientFactors, LayerFactors
from tracin_transforms.core.half_precision import pack_rows, unpack_rows

FLOAT16, FLOAT32 = "float16", "float32"

# Some threads have an array each, and are about to have another.
_UNPACKED = Buffers(6)


@dataclass(frozen=True)
class LayerLayout:
    """One layer's factors at one checkpoint.

    Attributes:
        checkpoint_id: The checkpoint.
        name: The layer's name.
        has_bias: As in `LayerFactors`.
        groups: As in `LayerFactors`.
        activations: Shape of one example's: (d,), or (P, d) at P positions.
        error_signals: Shape of one example's: (C,), or (P, C).
        one_hot: Whether the activations are indices, int32.
    """

    checkpoint_id: str
    name: str
    has_bias: bool
    groups: int
    activations: tuple[int, ...]
    error_signals: tuple[int, ...]
    one_hot: bool


@dataclass(frozen=True)
class Column:
    """A column of a factor file.

    Attributes:
        name: ``checkpoint/layer/activations`` or ``checkpoint/layer/error_signals``.
        shape: Of one example's numbers.
        dtype: Their NumPy name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_packed(self) -> bool:
        """Whether another column, ``NAME_exponent``, has the power of two of each row."""
        return self.dtype == FLOAT16


@dataclass(frozen=True)
class RowLayout:
    """The columns of a row: checkpoint by checkpoint, layer by layer.

    Attributes:
        checkpoint_ids: The checkpoints, in order.
        layers: One entry for each checkpoint and layer; none where there are no rows to tell.
        dtype: ``float16`` or ``float32``.
    """

    checkpoint_ids: tuple[str, ...]
    layers: tuple[LayerLayout, ...]
    dtype: str

    @classmethod
    def of_block(cls, block: FactorBlock, dtype: str) -> "RowLayout":
        """Returns the layout of a block's factors."""
        return cls(
            block.checkpoint_ids,
            tuple(
                LayerLayout(
                    checkpoint_id=gradient.checkpoint_id,
                    name=layer.name,
                    has_bias=layer.has_bias,
                    groups=layer.groups,
                    activations=layer.activations.shape[1:],
                    error_signals=layer.error_signals.shape[1:],
                    one_hot=layer.is_one_hot,
                )
                for gradient in block.gradients
                for layer in gradient.layers
            ),
            dtype,
        )

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "RowLayout":
        """Returns the layout that `to_json` described."""
        layers = []
        for entry in document["layers"]:
            shapes = {key: tuple(entry[key]) for key in ("activations", "error_signals")}
            layers.append(LayerLayout(**{**entry, **shapes}))
        return cls(tuple(document["checkpoint_ids"]), tuple(layers), document["dtype"])

    def to_json(self) -> dict[str, Any]:
        """Returns the layout as JSON values."""
        return asdict(self)

    def of_checkpoints(self, checkpoint_ids: Sequence[str]) -> "RowLayout":
        """Returns the layout of some checkpoints' factors, in the order given."""
        return RowLayout(
            tuple(checkpoint_ids),
            tuple(
                layer
                for checkpoint_id in checkpoint_ids
                for layer in self.layers
                if layer.checkpoint_id == checkpoint_id
            ),
            self.dtype,
        )

    def joined(self, other: "RowLayout", checkpoint_ids: Sequence[str]) -> "RowLayout":
        """Returns the layout of both layouts' checkpoints, in the order given."""
        both = RowLayout((), self.layers + other.layers, self.dtype)
        return both.of_checkpoints(checkpoint_ids)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The columns of numbers, without those of exponents."""
        found = []
        for layer in self.layers:
            prefix = f"{layer.checkpoint_id}/{layer.name}"
            kind = "int32" if layer.one_hot else self.dtype
            found.append(Column(f"{prefix}/activations", layer.activations, kind))
            found.append(Column(f"{prefix}/error_signals", layer.error_signals, self.dtype))
        return tuple(found)

    @cached_property
    def record(self) -> np.dtype[Any]:
        """A row as a NumPy record."""
        fields: list[tuple[Any, ...]] = []
        for column in self.columns:
            fields.append((column.name, column.dtype, column.shape))
            if column.is_packed:
                fields.append((exponent_name(column), "int8"))
        return np.dtype(fields)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of an Arrow file."""
        fields = []
        for column in self.columns:
            number = pa.from_numpy_dtype(np.dtype(column.dtype))
            width = math.prod(column.shape)
            fields.append(pa.field(column.name, pa.list_(number, width), nullable=False))
            if column.is_packed:
                fields.append(pa.field(exponent_name(column), pa.int8(), nullable=False))
        return pa.schema(fields)

    def pack(self, block: FactorBlock) -> dict[str, np.ndarray]:
        """Returns the columns of a block's rows, by name.

        Raises:
            InputError: The block's factors are of another layout.
        """
        found = RowLayout.of_block(block, self.dtype)
        if found != self:
            raise InputError(
                f"shard {block.shard!r}: the gradient factors of its examples differ in form from "
                f"row {int(block.indices[0])} on: expected inputs of the same shape throughout"
            )
        arrays: dict[str, np.ndarray] = {}
        numbers = (
            numbers
            for gradient in block.gradients
            for layer in gradient.layers
            for numbers in (layer.activations, layer.error_signals)
        )
        for column, values in zip(self.columns, numbers, strict=True):
            if column.is_packed:
                arrays[column.name], arrays[exponent_name(column)] = pack_rows(values)
            else:
                arrays[column.name] = values
        return arrays

    def unpack(
        self, batch: pa.RecordBatch, selection: slice | np.ndarray
    ) -> Iterator[GradientFactors]:
        """Yields the factors in some rows of a record batch, as float32, by checkpoint."""
        columns = iter(self.columns)
        for checkpoint_id, group in itertools.groupby(self.layers, lambda x: x.checkpoint_id):
            layers = [
                LayerFactors(
                    layer.name,
                    _numbers(batch, next(columns), selection),
                    _numbers(batch, next(columns), selection),
                    layer.has_bias,
                    layer.groups,
                )
                for layer in group
            ]
            yield GradientFactors(checkpoint_id, tuple(layers))


def exponent_name(column: Column) -> str:
    """Returns the name of the column with the exponents of a packed one."""
    return f"{column.name}_exponent"


def _numbers(batch: pa.RecordBatch, column: Column, selection: slice | np.ndarray) -> np.ndarray:
    values = batch.column(column.name).values.to_numpy(zero_copy_only=True)
    numbers: np.ndarray = values.reshape(-1, *column.shape)[selection]
    if not column.is_packed:
        return numbers
    exponents = batch.column(exponent_name(column)).to_numpy(zero_copy_only=True)
    out = _UNPACKED.take(4 * numbers.size).view(np.float32).reshape(numbers.shape)
    return unpack_rows(numbers, exponents[selection], out)
