"""Matrix products inside loops: by the BLAS that PyTorch brings, which loops find by its name (`sgemm_`, `dgemm_`)."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import ctypes
from pathlib import Path

import llvmlite.binding
import numpy as np
import torch
from numba import types
from numba.extending import overload

__all__ = ["FOUND", "product"]

NAMES = {types.float32: "sgemm_", types.float64: "dgemm_"}


def _found() -> bool:
    """Whether PyTorch's library gives its BLAS away, as wheels for Linux do; the compiler then knows it by name."""
    folder = Path(torch.__file__).parent / "lib"
    for path in sorted(folder.glob("*torch_cpu.*")):
        try:
            library = ctypes.CDLL(str(path))
            addresses = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in NAMES.values()}
        except (OSError, AttributeError):
            continue
        for name, address in addresses.items():
            llvmlite.binding.add_symbol(name, address)
        return True
    return False


FOUND = _found()
"""Whether there are products inside loops."""

TRANSPOSED, PLAIN = np.uint8(ord("T")), np.uint8(ord("N"))


def product(left, left_stride, turned, right, right_stride, right_turned, sizes, scale, keeps, out, out_stride):
    """out [m, n] = scale·left·right, and what was in it if it `keeps` that; sizes: m, n, k.

    left [m, k], or [k, m] where it is to be turned; right [k, n], or [n, k]; each array begins where the matrix does,
    whose rows stand so many numbers apart.
    """
    raise NotImplementedError("inside compiled loops alone")


@overload(product)
def _product(left, left_stride, turned, right, right_stride, right_turned, sizes, scale, keeps, out, out_stride):
    dtype = out.dtype
    gemm = types.ExternalFunction(NAMES[dtype], types.void(*[types.voidptr] * 13))
    of_type = np.float32 if dtype == types.float32 else np.float64

    def run(left, left_stride, turned, right, right_stride, right_turned, sizes, scale, keeps, out, out_stride):
        # BLAS counts columns first: it makes outᵀ = rightᵀ·leftᵀ.
        m, n, k = sizes
        marks = np.empty(2, np.uint8)
        marks[0], marks[1] = TRANSPOSED if right_turned else PLAIN, TRANSPOSED if turned else PLAIN
        # Numbers of 64 bits, of which a BLAS that takes 32 reads the lower half, which stands first.
        whole = np.array([n, m, k, right_stride, left_stride, out_stride], np.int64)
        factors = np.array([scale, 1.0 if keeps else 0.0], of_type)
        gemm(
            marks.ctypes,
            marks[1:].ctypes,
            whole.ctypes,
            whole[1:].ctypes,
            whole[2:].ctypes,
            factors.ctypes,
            right.ctypes,
            whole[3:].ctypes,
            left.ctypes,
            whole[4:].ctypes,
            factors[1:].ctypes,
            out.ctypes,
            whole[5:].ctypes,
        )

    return run
