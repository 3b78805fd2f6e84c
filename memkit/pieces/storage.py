"""Storage: in which form slots are held between calls. While a chunk is folded in they are sums in float32 or better.

model    as they are read, in the model's dtype, and nothing twice; in half precision with four bits more of each
         number that is merged into, so that many small shares still add up
float32  as their sums in float32 (float64 for a float64 model), exactly; decoding reads a copy
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from memkit.pieces.registry import Spec

__all__ = ["Storage", "StorageSpec"]

BITS, MOST = 4, 7
"""Bits that are kept of what rounding to half precision took, two numbers' in a byte: from −7 to 7, half of the last
place down or up. Both ends are kept, for one number's upper end is the next one's lower."""
LOW, SIGN = 2**BITS - 1, 2 ** (BITS - 1)
"""The lower of a byte's two numbers, and its sign."""
GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927
"""1/φ and 1/ρ, of the golden and of the plastic ratio: their multiples' fractions are spread as evenly as any."""
MARGIN = 2**-8
"""How far a turn stays from 0 and 1, of which float32 arithmetic takes less away from what was kept before."""


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
    def rest(exact: Tensor, rounded: Tensor, counts: Tensor) -> Tensor:
        """What rounding took of numbers [..., m, d], in fourteenths of the last place of each: int8 [..., m, ⌈d/2⌉].

        counts [..., m]: tokens of each slot. What is less than that goes up or down by turns, as often as its share
        asks for: else tokens that change a mean by less would never be seen in it.
        """
        taken = torch.ldexp(exact.float() - rounded.float(), -_last_place(rounded)).mul_(2 * MOST)
        taken = taken.add_(_turn(counts, exact.shape[-1])).floor_().clamp_(-MOST, MOST).to(torch.int8)
        taken = pad(taken, (0, exact.shape[-1] % 2))
        return (taken[..., 1::2] << BITS) + (taken[..., 0::2] & LOW)

    @staticmethod
    def whole(rounded: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The numbers again, in a wider dtype, to BITS more places than they were rounded to."""
        whole = rounded.to(dtype)
        if rest is None:
            return whole
        first = ((rest & LOW) ^ SIGN) - SIGN
        taken = torch.stack((first, rest >> BITS), dim=-1).flatten(-2)[..., : whole.shape[-1]]
        return whole + torch.ldexp(taken.to(dtype) / (2 * MOST), _last_place(rounded))


def _turn(counts: Tensor, width: int) -> Tensor:
    """Between 0 and 1 for each number, evenly spread over the counts that a slot has one after the other, and over its
    channels; so far from both that what was kept before is kept again."""
    channel = torch.arange(width, device=counts.device, dtype=torch.float64)
    spread = counts.double().unsqueeze(-1) * GOLDEN + channel * PLASTIC
    return ((spread - spread.floor()) * (1 - 2 * MARGIN) + MARGIN).float()


def _last_place(rounded: Tensor) -> Tensor:
    """Exponents of 2: the last place of each number."""
    places = {torch.bfloat16: 8, torch.float16: 11}[rounded.dtype]
    return torch.frexp(rounded.float()).exponent - places
