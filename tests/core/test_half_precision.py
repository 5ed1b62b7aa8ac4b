import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tracin_transforms.core.half_precision import pack_rows, unpack_rows

finite = st.floats(-(2.0**127), 2.0**127, width=32)


@given(arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 7)), elements=finite))
def test_what_is_lost_is_half_a_unit_of_eleven_bits(values):
    halves, exponents = pack_rows(values)
    assert (halves.dtype, exponents.dtype) == (np.float16, np.int8)
    found = unpack_rows(halves, exponents)
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(axis=1, initial=0.0, keepdims=True)
    # Below float32's normal numbers, its own spacing is coarser.
    bound = np.maximum(2.0**-11 * np.abs(exact), 2.0**-32 * largest) + 2.0**-148
    assert (np.abs(found.astype(np.float64) - exact) <= bound).all()


def test_numbers_of_eleven_bits_are_exact():
    values = np.array([[1024.0, -1.5, 0.0, 2047.0], [2.0**-100, 0, 2.0**-105, 0]], np.float32)
    np.testing.assert_array_equal(unpack_rows(*pack_rows(values)), values)


def test_every_half_becomes_what_a_cast_makes_of_it():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(-1, 32)
    halves = halves[np.isfinite(halves).all(axis=1)]
    for exponent in (-126, -15, 0, 15, 16, 40):
        exponents = np.full(len(halves), exponent, np.int8)
        expected = np.ldexp(halves.astype(np.float32), exponent)
        np.testing.assert_array_equal(unpack_rows(halves, exponents), expected)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (0, 4)])
def test_rows_of_any_shape(shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    halves, exponents = pack_rows(values)
    assert exponents.shape == shape[:1]
    np.testing.assert_allclose(unpack_rows(halves, exponents), values, rtol=2**-11)


def test_small_entries_of_a_row_with_a_large_one_are_kept():
    """As in the error signals of a fitted example: a cast alone would make them 0."""
    values = np.array([[3e-9, -1e-9, 2e-12]], np.float32)
    assert not values.astype(np.float16).any()
    np.testing.assert_allclose(unpack_rows(*pack_rows(values)), values, rtol=2**-11)
