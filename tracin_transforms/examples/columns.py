"""Columns of Arrow tables, as values of single rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from tracin_transforms.core.errors import InputError
from tracin_transforms.examples.decoding import Broken

# The field of a struct that holds an image, as Hugging Face's datasets store them beside its path.
_IMAGE_BYTES = "bytes"


def kind_of(column: pa.DataType) -> str:
    """Returns what a column of this type holds: number, integer, text, bytes, list or other."""
    column = _plain(column)
    if types.is_integer(column):
        return "integer"
    if types.is_floating(column) or types.is_boolean(column):
        return "number"
    if types.is_string(column) or types.is_large_string(column):
        return "text"
    if types.is_binary(column) or types.is_large_binary(column):
        return "bytes"
    if types.is_struct(column) and column.get_field_index(_IMAGE_BYTES) >= 0:
        return kind_of(column.field(_IMAGE_BYTES).type)
    if _is_list(column) and kind_of(column.value_type) in ("integer", "number", "list"):
        return "list"
    return "other"


def columns_of(field: str, schema: pa.Schema) -> list[str]:
    """Returns the columns that a field names: one, or several between commas.

    Raises:
        InputError: There is no such column.
    """
    names = [field] if field in schema.names else field.split(",")
    for name in names:
        if name not in schema.names:
            raise InputError(
                f"no column {name!r}: found {', '.join(schema.names)}; name the columns as in "
                "?x=image&y=label&id=name"
            )
    return names


def row_values(field: str, batch: pa.RecordBatch) -> Any:
    """Returns the value of a field in each row; Broken where it is null.

    Args:
        field: A column, or several of numbers between commas, which make a float32 vector.
        batch: Some rows.
    """
    columns = [_values(name, batch.column(name)) for name in columns_of(field, batch.schema)]
    if len(columns) == 1:
        return columns[0]
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)
    return [
        next((v for v in row if isinstance(v, Broken)), None) or np.array(row, np.float32)
        for row in zip(*columns, strict=True)
    ]


def column_tensor(values: Sequence[Any]) -> Any:
    """Returns values of a column, none of them Broken, as something that `tf.data` slices."""
    import tensorflow as tf

    if isinstance(values[0], str | bytes):
        return tf.constant(values, tf.string)
    if np.ndim(values[0]) == 1:
        return tf.RaggedTensor.from_row_lengths(np.concatenate(values), [len(v) for v in values])
    return np.stack(values)


def _values(name: str, array: pa.Array) -> Any:
    """Returns the rows' values: an array where all are numbers, else a list."""
    if isinstance(array, pa.ExtensionArray):
        return _values(name, array.storage)
    if types.is_dictionary(array.type):
        return _values(name, array.dictionary_decode())
    if types.is_struct(array.type):
        return _values(f"{name}.{_IMAGE_BYTES}", pc.struct_field(array, _IMAGE_BYTES))
    is_null = array.is_null().to_numpy(zero_copy_only=False)
    if _is_list(array.type):
        values = _list_values(name, array)
    elif kind_of(array.type) in ("text", "bytes"):
        values = array.to_pylist()
    else:
        # With nulls in them, integers would become floats.
        values = array.fill_null(False if types.is_boolean(array.type) else 0)
        values = values.to_numpy(zero_copy_only=False)
    if not is_null.any():
        return values
    null = Broken(f"{name!r} is null")
    return [null if missing else value for value, missing in zip(values, is_null, strict=True)]


def _list_values(name: str, array: pa.Array) -> list[Any]:
    values = _values(name, array.flatten())
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    return [
        _joined(name, values[end - length : end])
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]


def _joined(name: str, values: Any) -> Any:
    if not len(values):
        return Broken(f"{name!r} is empty: expected values")
    if isinstance(values, np.ndarray):
        return values
    broken = next((value for value in values if isinstance(value, Broken)), None)
    if broken is not None:
        return Broken(f"{name!r} has a value in it that is missing")
    try:
        return np.stack(values)
    except ValueError:
        return Broken(f"{name!r} holds lists of different lengths")


def _plain(column: pa.DataType) -> pa.DataType:
    """Returns the type of the values behind extensions and dictionaries."""
    if isinstance(column, pa.BaseExtensionType):
        return _plain(column.storage_type)
    if types.is_dictionary(column):
        return _plain(column.value_type)
    return column


def _is_list(column: pa.DataType) -> bool:
    return bool(
        types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column)
    )
