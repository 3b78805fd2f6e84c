"""Whole numbers as arguments: their type, shape and range, checked in one place.

A float is no whole number, not even 2.0, and neither is true: a mask is not a list of rows. Python's numbers, NumPy's
and tensors' are taken alike.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit.errors import InputError, MemkitError, shown

__all__ = ["MOST", "SEEDS", "is_finite", "whole_number", "whole_numbers"]

MOST = 2**40
"""The largest size that is taken anywhere, in tokens, slots or channels: a trillion, so that sums of products stay
exact and finite."""

SEEDS = (-(2**63), 2**64 - 1)
"""What torch takes as a seed."""


def whole_number(
    name: str,
    given: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    kind: type[MemkitError] = InputError,
    remedy: str = "",
) -> int:
    """`given` as an int, at least `least` and at most `most`; else raises `kind`: rule, value, `remedy`."""
    number = _plain(given)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        bounds = "" if least is None else f", at least {least}"
        if most is not None and number is not None and number > most:
            bounds = f", at most {most}"
        raise kind(f"{name} must be a whole number{bounds}, got {shown(given)}{remedy}")
    return number


def whole_numbers(
    name: str,
    given: Any,
    least: int,
    most: int,
    *,
    count: int | None = None,
    per: str = "row",
    limits: str = "",
    kind: type[MemkitError] = InputError,
    remedy: str = "",
) -> Tensor:
    """A list, array or tensor of whole numbers from `least` to `most` as a tensor [n] int64 on the CPU.

    Args:
      count: how many there must be, one per `per`; None: any number.
      limits: the range in words where numbers alone would not say what they are.
      kind: of the error.
      remedy: what else may be done; ends the message.

    Raises `kind`: rule, value, remedy.
    """
    rule = "must be a list of whole numbers" if count is None else f"must be one whole number per {per}"
    shape = "" if count is None else f", shape ({count},)"
    array = _array(given)
    if array is None or array.ndim != 1 or (count is not None and len(array) != count):
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, (Tensor, np.ndarray)) else shown(given)
        raise kind(f"{name} {rule}{shape}, got {got}{remedy}")
    if len(array) and not least <= int(array.min()) <= int(array.max()) <= most:
        listed = shown(array.tolist())
        raise kind(f"{name} must {limits or f'lie between {least} and {most}'}, got {listed}{remedy}")
    return torch.from_numpy(array.astype(np.int64))


def is_finite(given: Any) -> bool:
    """Whether an argument is one real number, and neither infinite nor NaN; true is no number."""
    if isinstance(given, Tensor):
        given = given.item() if given.ndim == 0 and not given.is_meta else None
    if isinstance(given, (bool, np.bool_)) or not isinstance(given, numbers.Real):
        return False
    try:
        return math.isfinite(given)
    except OverflowError:  # a whole number beyond the floats
        return False


def _plain(given: Any) -> int | None:
    """One whole number of any make; None where it is none."""
    if isinstance(given, (bool, np.bool_)):
        return None
    if isinstance(given, Tensor) and (given.ndim or given.is_meta or not _counts(given.dtype)):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def _array(given: Any) -> np.ndarray | None:
    """Whole numbers of any make; None where some are none."""
    if isinstance(given, Tensor):
        return given.detach().cpu().numpy() if _counts(given.dtype) and not given.is_meta else None
    if isinstance(given, np.ndarray):
        return given if given.dtype.kind in "iu" else None
    if not isinstance(given, (list, tuple, range)):
        return None
    numbers = [_plain(each) for each in given]
    if any(each is None for each in numbers):
        return None
    # Python's own numbers where one is too large for NumPy's: the range says what is wrong with it.
    fits = all(-(2**63) <= each < 2**63 for each in numbers if each is not None)
    return np.array(numbers, dtype=np.int64 if fits else object)


def _counts(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of whole numbers."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
