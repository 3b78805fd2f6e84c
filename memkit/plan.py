"""Plans: the integer record of a pass. No gradient flows through a plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

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

    def __repr__(self) -> str:
        rows, heads, tokens = self.slot.shape
        return f"Plan({rows} rows × {heads} heads, {tokens} tokens leave, slots after each chunk {self.slots.tolist()})"
