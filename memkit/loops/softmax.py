"""The softmax of a row, in loops that compilers turn into operations on many numbers at once."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from memkit.loops.compiling import IN_ORDER, exact, loop, numbers

__all__ = ["softmax"]

LOWEST = np.float32(-104.0)
"""Where exp rounds to 0 in float32."""

PER_LOG2 = np.float32(1.4426950408889634)
LOG2_FIRST, LOG2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
"""log 2 in two parts, of which the first times a small whole number is exact."""

ROUNDS = np.float32(12582912.0)
"""1.5·2²³: a number that is added to it and taken away again is rounded, and stands in its lowest bits in between."""

TERMS = tuple(np.float32(1 / np.prod(np.arange(1.0, n + 1))) for n in range(8))
"""1/n!, of the series of exp on |r| ≤ log(2)/2, whose rest is below 10⁻⁸ there."""


@loop
def softmax(row, wholes):
    """The softmax of scores [n], in their place; NaN where one is NaN or +inf. wholes [2, n]: int32, for its use."""
    if not row.shape[0]:
        return
    wrong = row.dtype.type(0)
    for i in range(row.shape[0]):
        wrong += row[i] * row.dtype.type(0)
    if not np.isfinite(wrong):
        _of_any(row)
        return
    exponentials(row, _top(row), wholes)
    total = row.dtype.type(0)
    for i in range(row.shape[0]):
        total += row[i]
    share = 1 / total
    for i in range(row.shape[0]):
        row[i] *= share


@exact
def _of_any(row):
    """The softmax of scores of which some are no numbers."""
    highest, wrong = row.dtype.type(-np.inf), False
    for i in range(row.shape[0]):
        wrong |= np.isnan(row[i])
        highest = max(highest, row[i])
    if wrong or np.isinf(highest):
        row[:] = np.nan
        return
    total = row.dtype.type(0)
    for i in range(row.shape[0]):
        row[i] = np.exp(row[i] - highest)
        total += row[i]
    for i in range(row.shape[0]):
        row[i] /= total


@numbers
def _top(row):
    highest = row[0]
    for i in range(row.shape[0]):
        highest = max(highest, row[i])
    return highest


def exponentials(row, highest, wholes):
    """exp of numbers less the highest of them, in their place."""
    raise NotImplementedError("inside compiled loops alone")


@overload(exponentials, jit_options=IN_ORDER)  # pyright: ignore[reportArgumentType]
def _exponentials(row, highest, wholes):
    return _of_float32 if row.dtype == types.float32 else _of_others


def _of_others(row, highest, wholes):
    for i in range(row.shape[0]):
        row[i] = np.exp(row[i] - highest)


def _of_float32(row, highest, wholes):
    # exp(x) = 2ⁿ·exp(r), n = round(x / log 2), r = x − n·log 2. A power of 2 is a number whose exponent's bits say so,
    # and 2ⁿ is two of them, for the smallest numbers have no exponent of their own.
    one, other = wholes[0], wholes[1]
    for i in range(row.shape[0]):
        x = max(row[i] - highest, LOWEST)
        whole = (x * PER_LOG2 + ROUNDS) - ROUNDS
        r = (x - whole * LOG2_FIRST) - whole * LOG2_REST
        half = np.int32(whole) >> np.int32(1)
        one[i] = (half + np.int32(127)) << np.int32(23)
        other[i] = (np.int32(whole) - half + np.int32(127)) << np.int32(23)
        series = TERMS[7]
        series = series * r + TERMS[6]
        series = series * r + TERMS[5]
        series = series * r + TERMS[4]
        series = series * r + TERMS[3]
        series = series * r + TERMS[2]
        series = series * r + TERMS[1]
        row[i] = series * r + TERMS[0]
    powers = wholes.view(np.float32)
    for i in range(row.shape[0]):
        row[i] = row[i] * powers[0, i] * powers[1, i]
