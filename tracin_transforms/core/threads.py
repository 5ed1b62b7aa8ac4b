"""Threads that share the work on a block, each with a BLAS of one thread.

Rows scored side by side need no locks, and what surrounds a matrix product (conversion, sums,
comparisons) is shared out with it; BLAS's own threads would take part in the product alone.
"""

import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

_SWITCH_SECONDS = 1e-4
# Below this, threads wait for each other between array operations longer than they work.
_FEWEST_OPERATIONS = 3e8

A = TypeVar("A")
B = TypeVar("B")


class Threads:
    """A number of threads.

    From the first on that is made, BLAS works with one thread in this process, and threads hand
    over the interpreter at once: they hold it for the moments between array operations only.

    Args:
        count: How many, usually cores / worker processes.
    """

    def __init__(self, count: int) -> None:
        threadpool_limits(1, "blas")
        sys.setswitchinterval(_SWITCH_SECONDS)
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def start(
        self, function: Callable[[A], B], items: Iterable[A], operations: float = np.inf
    ) -> Callable[[], list[B]]:
        """Begins to do something with each item, while the caller does something else.

        Args:
            function: What is done.
            items: With what.
            operations: About how many all of it takes; few are done at once, as they are not
                worth a second thread.

        Returns:
            What waits, and gives the results in order; it raises the first error.
        """
        if self._pool is None or operations < _FEWEST_OPERATIONS:
            done = [function(item) for item in items]
            return lambda: done
        futures = [self._pool.submit(function, item) for item in items]
        return lambda: [future.result() for future in futures]

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> list[B]:
        """Returns the function's result for each item, in order; the first error is raised."""
        return self.start(function, items)()

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()
