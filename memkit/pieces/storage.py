"""Storage: in which form slots are held between calls. While a chunk is folded in they are sums in float32 or better.

model    as they are read, in the model's dtype, and nothing twice; in half precision with eight bits more of each
         number that is merged into, so that many small shares still add up
float32  as their sums in float32 (float64 for a float64 model), exactly; decoding reads a copy
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from memkit.pieces.registry import Spec

__all__ = ["Storage", "StorageSpec"]

BITS = 8
"""Bits that are kept of what rounding to half precision took."""


class StorageSpec(Spec):
    """Declares the form of slots between calls: as they are read, by default."""

    dtype: Literal["model", "float32"] = Field(
        default="model",
        description="model: as they are read, in the model's dtype, held once; float32: as exact sums, beside a copy "
        "for decoding",
    )

    def build(self) -> Storage:
        """The storage."""
        return Storage(self)


class Storage:
    """How numbers are rounded, and made whole again."""

    def __init__(self, spec: StorageSpec) -> None:
        self.once = spec.dtype == "model"

    @staticmethod
    def saves(dtype: torch.dtype) -> bool:
        """Whether slots of a model of this dtype take less room so than as sums, before anything is decoded."""
        return dtype.itemsize == 2

    @staticmethod
    def rest(exact: Tensor, rounded: Tensor) -> Tensor:
        """What rounding took, in 2^−BITS of the last place of each number: int8."""
        taken = torch.ldexp(exact.float() - rounded.float(), -_unit(rounded))
        return taken.round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1).to(torch.int8)

    @staticmethod
    def whole(rounded: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers again, in a wider dtype, to BITS more places than they were rounded to."""
        whole = rounded.to(dtype)
        return whole if rest is None else whole + torch.ldexp(rest.to(dtype), _unit(rounded))


def _unit(rounded: Tensor) -> Tensor:
    """Exponents of 2: the last place of each number, BITS further down."""
    places = {torch.bfloat16: 8, torch.float16: 11}[rounded.dtype]
    return torch.frexp(rounded.float()).exponent - places - BITS
