"""Arrays as columns of Parquet files."""

import numpy as np
import pyarrow as pa


def as_column(values: np.ndarray) -> pa.Array:
    """Returns numbers [n] as they are, and rows of numbers [n, ...] as flat lists."""
    if values.ndim == 1:
        return pa.array(values)
    width = int(np.prod(values.shape[1:], dtype=int))
    offsets = np.arange(len(values) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))


def as_strings(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of strings, shape [n], unicode.

    Strings of one length in ASCII, as most ids are, are widened together, not one by one.
    """
    array = as_array(column)
    n = len(array)
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :][: n + 1] if n else [0]
    width = int(offsets[1] - offsets[0]) if n else 0
    if width and not (np.diff(offsets) != width).any():
        data = np.frombuffer(array.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        # NumPy would take zeros at the end for the end.
        if data.max() < 128 and data.reshape(n, width)[:, -1].all():
            return data.astype(np.uint32).view(f"U{width}")
    return np.array(array.to_pylist(), dtype=str)


def as_array(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column in one piece."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        return pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    return array
