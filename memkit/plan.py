"""Plans: the integer record of a pass. No gradient flows through a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit.errors import InputError

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Where each token that leaves the window during one call goes.

    Column j of row r is the token at position begin[r] + j, for j < length[r]; later columns are padding.

    slot [b, g, n] int64: the slot it founded or joined, −1 for dropped tokens and padding;
    founded [b, g, n] bool: whether it founded that slot;
    begin, length [b] int64: first token that leaves in this call, and how many do;
    slots [b, chunks] int64: slots there are after each chunk that leaves (the last number repeats in shorter rows).
    """

    slot: Tensor
    founded: Tensor
    begin: np.ndarray
    length: np.ndarray
    slots: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.slot, Tensor) or self.slot.dtype != torch.long or self.slot.ndim != 3:
            raise InputError("plan.slot must be a tensor [b, g, n] of int64; make a plan with memkit.plan")
        same = isinstance(self.founded, Tensor) and self.founded.dtype == torch.bool
        if not same or self.founded.shape != self.slot.shape:
            raise InputError("plan.founded must be a tensor of bool as plan.slot; make a plan with memkit.plan")
        rows, _, tokens = self.slot.shape
        for name, axes in (("begin", 1), ("length", 1), ("slots", 2)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != axes or len(array) != rows:
                shape = f"({rows},)" if axes == 1 else f"({rows}, chunks)"
                raise InputError(f"plan.{name} must be an array {shape} of int64; make a plan with memkit.plan")
        if (self.begin < 0).any() or (self.length < 0).any() or (self.length > tokens).any():
            raise InputError(
                f"plan.begin must be at least 0 and plan.length between 0 and its {tokens} tokens, "
                f"got {self.begin.tolist()} and {self.length.tolist()}"
            )

    def __repr__(self) -> str:
        rows, heads, tokens = self.slot.shape
        return f"Plan({rows} rows × {heads} heads, {tokens} tokens leave, slots after each chunk {self.slots.tolist()})"
