"""Small words that the oracle is written in."""

from __future__ import annotations

from decimal import Decimal
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["TINY", "as_double", "definitely", "direction", "in_order", "ratio", "stacked", "written_as"]

T = TypeVar("T")

TINY = 1e-12
"""The least norm by which a vector is divided."""


def direction(vector: Tensor) -> Tensor:
    """x / ‖x‖, 0 for 0."""
    return vector / vector.norm().clamp(min=TINY)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; 0 where the whole is 0 (a slot without mass is read as zero)."""
    return part / whole if whole > 0 else torch.zeros_like(part)


def in_order(scores: list[float]) -> list[int]:
    """Indices from the lowest score to the highest; ties: the earliest."""
    return sorted(range(len(scores)), key=lambda i: scores[i])


def stacked(vectors: list[Tensor], like: Tensor) -> Tensor:
    """Vectors as rows, none of them included."""
    return torch.stack(vectors) if vectors else like.new_zeros(0, *like.shape)


def written_as(number: float) -> Decimal:
    """The number as a person wrote it: 0.1 is one tenth."""
    return Decimal(repr(number))


def as_double(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float64, if there is one."""
    return None if tensor is None else tensor.double()


def definitely(thing: T | None) -> T:
    """What cannot be missing here."""
    assert thing is not None
    return thing
