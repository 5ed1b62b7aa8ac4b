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
