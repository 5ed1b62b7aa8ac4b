"""Rows of numbers in float16 with an exponent each, and quickly back to float32.

A row is scaled by a power of two so that its largest entry lies at the top of float16's range.
Without that, most entries of error signals would be subnormal or zero. Scaling by powers of two
is exact; what is lost is the rounding to 11 bits, at most 2⁻¹¹ of each entry that is not smaller
than 2⁻²⁹ of the row's largest.
"""

import numpy as np

# The largest entry of a row comes to lie in [2¹⁴, 2¹⁵).
_TOP = 15
_SMALLEST, _LARGEST = -126, 127
_SIGN_AND_VALUE = np.int32(-0x70000000 - 0x2000)  # 0x8FFFE000
# What moves a float16's exponent, put where float32 has its own, to its value.
_REBIAS = 112


def pack_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows in float16, and the power of two to multiply each with.

    Args:
        values: Shape [n, ...], float32, none beyond 2¹²⁷.

    Returns:
        Halves of the same shape, float16; exponents of shape [n], int8: `values` is about
        ``halves * 2**exponents``.
    """
    rows = values.reshape(len(values), _width(values))
    _, exponents = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
    exponents = np.clip(exponents - _TOP, _SMALLEST, _LARGEST)
    halves = np.ldexp(rows, -exponents[:, None]).astype(np.float16)
    return halves.reshape(values.shape), exponents.astype(np.int8)


def unpack_rows(halves: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Returns the float32 values of rows in float16.

    Works on the bits: a cast takes several times as long, on subnormal numbers forty times.

    Args:
        halves: Shape [n, ...], float16, finite, contiguous.
        exponents: Shape [n], int8.

    Returns:
        Shape [n, ...], float32.
    """
    rows = halves.reshape(len(halves), _width(halves)).view(np.int16)
    bits = np.empty(rows.shape, np.int32)
    # The cast repeats the sign above the exponent's place, where the mask clears it.
    np.left_shift(rows, 13, out=bits, dtype=np.int32)
    bits &= _SIGN_AND_VALUE
    values = bits.view(np.float32)
    # Rows beyond 2³⁰ need a second step: 2¹²⁷ is the largest power of two.
    exponents = exponents.astype(np.int32)
    first = np.minimum(exponents, 127 - _REBIAS)
    values *= np.ldexp(np.float32(1), first + _REBIAS)[:, None]
    if (rest := exponents - first).any():
        values *= np.ldexp(np.float32(1), rest)[:, None]
    return values.reshape(halves.shape)


def _width(rows: np.ndarray) -> int:
    return int(np.prod(rows.shape[1:], dtype=int))
