"""How many examples a compiled function takes at a time: as many as memory has room for."""

import logging
from typing import Any

import tensorflow as tf

_LOGGER = logging.getLogger(__name__)

# What the tensors of one call may take. Two calls run at a time.
_BUDGET_BYTES = 512 * 2**20
_DEVICE_BUDGET_BYTES = 4 * 2**30
# More gain nothing on CPUs.
_LARGEST = 512
_LARGEST_ON_DEVICE = 2048


class BatchSize:
    """The number of examples per call: given, or found from a function's graph.

    Args:
        given: The number, or None to find it.
    """

    def __init__(self, given: int | None) -> None:
        self._given = given
        self._limit: int | None = None

    def of(self, function: Any) -> int:
        """Returns the number for a concrete function."""
        size = self._given or _power_of_two_within(peak_bytes_per_example(function.graph))
        return size if self._limit is None else min(size, self._limit)

    def halve(self, size: int, error: Exception) -> int:
        """Returns half of a number that was too large for memory, and remembers it.

        Raises:
            MemoryError: There is nothing left to halve.
        """
        if size == 1:
            raise MemoryError("not even one example at a time has room") from error
        self._limit = size // 2
        _LOGGER.warning(
            "out of memory with %d examples at a time: going on with %d", size, size // 2
        )
        return self._limit


def peak_bytes_per_example(graph: Any) -> int:
    """Returns what a graph's tensors take at once, at most, for each example.

    They are counted from the operation that makes them to the last that takes them, operations in
    the order they were made. What does not grow with the number of examples is left out, as is
    what is inside loops.
    """
    operations = graph.get_operations()
    last_use = {}
    for i, operation in enumerate(operations):
        for tensor in operation.inputs:
            last_use[tensor.name] = i
    for tensor in graph.outputs:
        last_use[tensor.name] = len(operations)
    freed = [0] * (len(operations) + 1)
    peak = held = 0
    for i, operation in enumerate(operations):
        for tensor in operation.outputs:
            size = _bytes_per_example(tensor)
            held += size
            freed[last_use.get(tensor.name, i)] += size
        peak = max(peak, held)
        held -= freed[i]
    return peak


def _bytes_per_example(tensor: tf.Tensor) -> int:
    shape = tensor.shape
    if not shape.rank or shape[0] is not None or None in shape[1:]:
        return 0
    return int(shape[1:].num_elements()) * tensor.dtype.size


def _power_of_two_within(bytes_per_example: int) -> int:
    on_device = bool(tf.config.list_logical_devices("GPU"))
    budget = _DEVICE_BUDGET_BYTES if on_device else _BUDGET_BYTES
    largest = _LARGEST_ON_DEVICE if on_device else _LARGEST
    fitting = max(1, budget // max(1, bytes_per_example))
    return min(largest, 2 ** (fitting.bit_length() - 1))
