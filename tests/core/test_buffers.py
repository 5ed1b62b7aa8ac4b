import gc

import numpy as np
import pyarrow as pa

from tracin_transforms.core.buffers import Buffers


def _address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_nothing_holds_it():
    buffers = Buffers(2)
    first = buffers.take(1000)
    place = _address(first)
    # Each of these holds it: a view of a view, and Arrow's view of the bytes.
    view = first[10:900].view(np.uint16)[5:]
    held = pa.py_buffer(first[:500].data)
    del first
    gc.collect()
    assert _address(buffers.take(1000)) != place
    del view
    gc.collect()
    assert _address(buffers.take(1000)) != place
    del held
    gc.collect()
    assert _address(buffers.take(800)) == place


def test_what_is_given_has_the_size_asked_for():
    buffers = Buffers(1)
    small = buffers.take(10)
    del small
    large = buffers.take(5000)
    large[:] = 7
    assert len(large) == 5000
    # No more are kept than wanted.
    several = [buffers.take(100) for _ in range(4)]
    del several, large
    gc.collect()
    assert len(buffers._free) == 1
