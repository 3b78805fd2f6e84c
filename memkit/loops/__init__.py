"""Loops over rows of numbers, compiled by Numba where it is installed (extra `fast`): each does on the CPU in one pass
what PyTorch does in some twenty operations on small tensors.

They say what PyTorch's operations say, to rounding; without Numba, elsewhere than on the CPU, or where autograd is to
follow, those are used. Here stands who may use them. `lines.py` has single contests and what queries tell, for
`engine/contests.py` and `pieces/evidence.py`. A *lane* is one key/value head of one row of the batch, with the query
heads that share it: `competing.py` and `folding.py` take one through whole chunks, for the modules of these names in
`engine`, and it reads by `reading.py`, which is all that `engine/sliding.py` wants. How loops are compiled is
`compiling.py`; `blas.py` and `softmax.py` they share.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit.errors import SlowPathWarning, warn

__all__ = [
    "ENABLED",
    "compiled",
    "flat",
    "installed",
    "of_competing",
    "of_folding",
    "of_reading",
    "rows",
    "usable",
    "with_products",
]

ENABLED = True
"""Whether loops are used where they can be. Off, PyTorch does all: for who wonders what is wrong."""

DTYPES = {torch.float32, torch.float64}
"""What they compute in."""


def installed() -> bool:
    """Whether Numba is there."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def compiled() -> Any:
    """The module of loops; None where Numba is not there, or does not run here, which is said once."""
    return _imported("lines") if installed() else None


def _imported(name: str) -> Any:
    """A module of loops; None where Numba does not run here, which is said."""
    try:
        return importlib.import_module(f"memkit.loops.{name}")
    except Exception as error:  # whatever an installation has that does not fit
        warn(f"Numba does not run here, so that PyTorch does its work, slower: {error}", SlowPathWarning)
        return None


def with_products() -> bool:
    """Whether loops find PyTorch's matrix products, which lanes need."""
    return compiled() is not None and _products_found()


@functools.cache
def _products_found() -> bool:
    blas = _imported("blas")
    return blas is not None and blas.FOUND


def of_competing() -> Any:
    """The module of loops over whole chunks where slots compete."""
    return importlib.import_module("memkit.loops.competing")


def of_folding() -> Any:
    """The module of loops over whole chunks whose tokens are summed by the nearest slot."""
    return importlib.import_module("memkit.loops.folding")


def of_reading() -> Any:
    """The module of loops by which queries of a lane meet slots and window."""
    return importlib.import_module("memkit.loops.reading")


def usable(*tensors: Tensor) -> bool:
    """Whether loops can be run on these tensors."""
    if not ENABLED or any(each.device.type != "cpu" or each.dtype not in DTYPES for each in tensors):
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return False
    return compiled() is not None


def flat(tensor: Tensor, axes: int = 2) -> Tensor:
    """The tensor with all but its last axes as one, contiguous; of the same memory where it is so already."""
    leading = tensor.ndim - axes
    return tensor.detach().reshape(math.prod(tensor.shape[:leading]), *tensor.shape[leading:]).contiguous()


def rows(tensor: Tensor, axes: int = 2) -> np.ndarray:
    """The same as an array."""
    return flat(tensor, axes).numpy()
