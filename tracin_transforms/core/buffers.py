"""Memory for blocks, used again when nothing holds it any more.

Fresh memory is given page by page, which takes several times as long as reading into it.
"""

import weakref

import numpy as np


class Buffers:
    """Gives memory, and takes it back by itself when the last view of it is gone.

    Args:
        keep: Free buffers to keep, at most.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        # Appending and popping are atomic: a buffer may come back in any thread, at any time.
        self._free: list[np.ndarray] = []
        self._given: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}

    def take(self, size: int) -> np.ndarray:
        """Returns bytes of that number, with any content."""
        memory = None
        while memory is None or len(memory) < size:
            try:
                memory = self._free.pop()
            except IndexError:
                memory = np.empty(size, np.uint8)
        # Not a plain slice, which would be a view of `memory`; views of it hold this object.
        given = np.frombuffer(memory.data, np.uint8, size)
        # A bare reference: `weakref.finalize` takes longer than some of what is done here.
        reference = weakref.ref(given, self._give_back)
        self._given[id(reference)] = (reference, memory)
        return given

    def _give_back(self, reference: "weakref.ref[np.ndarray]") -> None:
        _, memory = self._given.pop(id(reference))
        if len(self._free) < self._keep:
            self._free.append(memory)
