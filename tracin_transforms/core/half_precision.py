"""Rows of numbers in float16 with an exponent each, and quickly back to float32.

A row is scaled by a power of two so that its largest entry lies near the top of float16's range.
Without that, most entries of error signals would be subnormal or zero. Scaling by powers of two
is exact; what is lost is the rounding to 11 bits, at most 2⁻¹¹ of each entry that is not smaller
than 2⁻²¹ of the row's largest, and 2⁻³² of the largest where it is. The powers are few, so that
rows side by side mostly have the same, and are multiplied with it together.
"""

import math

import numpy as np

# The largest entry of a row comes to lie in [2⁷, 2¹⁵).
_TOP = 15
_STEP = 8
_SMALLEST, _LARGEST = -120, 120
_SIGN_AND_VALUE = np.int32(-0x70000000 - 0x2000)  # 0x8FFFE000
# What moves a float16's exponent, put where float32 has its own, to its value.
_REBIAS = 112
# Rows beyond 2³⁰ need a second step: 2¹²⁷ is the largest power of two.
_FIRST = 127 - _REBIAS
_EXPONENTS = np.arange(256).astype(np.uint8).view(np.int8).astype(np.int32)
_FACTORS = np.ldexp(np.float32(1), np.minimum(_EXPONENTS, _FIRST) + _REBIAS)
_MORE = np.ldexp(np.float32(1), np.maximum(_EXPONENTS - _FIRST, 0))
# Values that are converted together: more than a core's cache holds, as threads wait for each other
# between the steps.
_PIECE = 2**20


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
    exponents = -((_TOP - exponents) // _STEP) * _STEP
    exponents = np.clip(exponents, _SMALLEST, _LARGEST)
    halves = np.ldexp(rows, -exponents[:, None]).astype(np.float16)
    return halves.reshape(values.shape), exponents.astype(np.int8)


def unpack_rows(
    halves: np.ndarray, exponents: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Returns the float32 values of rows in float16.

    Works on the bits: a cast takes several times as long, on subnormal numbers forty times.

    Args:
        halves: Shape [n, ...], float16, finite, contiguous.
        exponents: Shape [n], int8.
        out: Where to put the values, of the same shape, float32, contiguous; made if not given.

    Returns:
        Shape [n, ...], float32.
    """
    values = np.empty(halves.shape, np.float32) if out is None else out
    rows = halves.reshape(len(halves), _width(halves)).view(np.int16)
    numbers = values.reshape(rows.shape)
    bits = numbers.view(np.int32)
    step = max(1, _PIECE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        # The cast repeats the sign above the exponent's place, where the mask clears it.
        bits[piece] = rows[piece]
        bits[piece] <<= 13
        bits[piece] &= _SIGN_AND_VALUE
        powers = exponents[piece]
        if (powers == powers[0]).all():
            powers = powers[:1]
        numbers[piece] *= _FACTORS[powers.view(np.uint8), None]
        if powers.max() > _FIRST:
            numbers[piece] *= _MORE[powers.view(np.uint8), None]
    return values


def _width(rows: np.ndarray) -> int:
    return math.prod(rows.shape[1:])
