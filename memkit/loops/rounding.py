"""Numbers of float32 rounded to bfloat16, as PyTorch rounds them."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

__all__ = ["to_bfloat16"]


def to_bfloat16(row):
    """Round numbers in their place, to the nearest, on ties to the even one; float64 stays as it is."""
    raise NotImplementedError("inside compiled loops alone")


@overload(to_bfloat16)
def _to_bfloat16(row):
    return _of_float32 if row.dtype == types.float32 else _of_others


def _of_others(row):
    pass


def _of_float32(row):
    bits = row.view(np.uint32)
    for i in range(bits.shape[0]):
        if not np.isnan(row[i]):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            bits[i] = (bits[i] + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
