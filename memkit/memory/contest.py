"""Slots and a leaving chunk that compete for slots: how many rows of each there are.

Rows of the batch may have unequal numbers of slots. A row's candidates are its slots but for the first few, and right
behind its last slot the chunk's tokens, so that neighbours stay neighbours; where others have more, nothing follows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit.memory.rows import on_device
from memkit.pieces.chunk import Count, begins

__all__ = ["Contest"]


@dataclass(frozen=True)
class Contest:
    """Whole numbers on the host.

    kept: slots, the first ones, that are no candidates; size: tokens of the chunk; before, after: slots of each row of
    the batch before the fold and after it.
    """

    kept: int
    size: int
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, kept: int, size: int, before: np.ndarray, new: np.ndarray) -> Contest:
        """before, new [b]: slots of each row, and how many more it has afterwards."""
        return cls(kept, size, tuple(before.tolist()), tuple((before + new).tolist()))

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all rows of the batch have the same numbers."""
        return len(set(self.before)) == len(set(self.after)) == 1

    @property
    def most_before(self) -> int:
        """The most slots that any row has before."""
        return max(self.before)

    @property
    def most_new(self) -> int:
        """The most candidates that have a slot afterwards in any row."""
        return max(self.after) - self.kept

    @property
    def most_left(self) -> int:
        """The most candidates that have none in any row."""
        return max(before + self.size - after for before, after in zip(self.before, self.after, strict=True))

    @functools.cached_property
    def all_or_none(self) -> bool:
        """Whether all candidates have a slot afterwards in every row, or none in any."""
        return not self.most_left or not self.most_new

    def new_slots(self, device: torch.device) -> Count:
        """Candidates that have a slot afterwards: one number, or one per row [b, 1, 1]."""
        return self.most_new if self.alike else _per_row(tuple(after - self.kept for after in self.after), device)

    def present(self, device: torch.device) -> Tensor | None:
        """Candidates that there are, [b, 1, 1]; None where rows have equally many."""
        return None if self.alike else _per_row(tuple(n + self.size - self.kept for n in self.before), device)

    def behind(self, slots: Tensor, tokens: Tensor, first: int = 0) -> Tensor:
        """Slots [b, g, m, …], from `first` on as many as the row with the most has, and right behind each row's last
        one the chunk's tokens [b, g, c, …]: [b, g, m + c, …]."""
        both = torch.cat((slots, tokens), dim=2)
        if self.alike:
            return both
        where = _token_columns(self.before, first, self.size, tokens.shape[1], both.shape[2], tokens.device)
        both.flatten(0, 2).index_copy_(0, where, tokens.flatten(0, 2))
        return both

    def of_tokens(self, candidates: Tensor) -> Tensor:
        """What candidates [b, g, n] have, for the chunk's tokens alone, [b, g, c]."""
        if self.alike:
            return candidates[:, :, self.most_before - self.kept :]
        begin = _per_row(tuple(before - self.kept for before in self.before), candidates.device)
        columns = begin + torch.arange(self.size, device=candidates.device)
        return candidates.gather(2, columns.expand(*candidates.shape[:2], -1))

    def empty_after(self, heads: int, device: torch.device) -> Tensor | None:
        """Where in [b, heads, n, …], n the most slots of any row afterwards, there are none: numbers on the first axis
        of [b·heads·n, …]; None: nowhere."""
        return None if len(set(self.after)) == 1 else _beyond(self.after, heads, device)


@functools.lru_cache(maxsize=256)
def _per_row(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return on_device(np.array(numbers), device)[:, None, None]


@functools.lru_cache(maxsize=256)
def _beyond(numbers: tuple[int, ...], heads: int, device: torch.device) -> Tensor:
    most = max(numbers)
    with torch.inference_mode(False):
        rows = [
            np.arange(row * most + number, (row + 1) * most) for row, number in enumerate(np.repeat(numbers, heads))
        ]
        return on_device(np.concatenate(rows), device)


@functools.lru_cache(maxsize=256)
def _token_columns(
    before: tuple[int, ...], first: int, size: int, heads: int, count: int, device: torch.device
) -> Tensor:
    """Where tokens stand in [b, g, count, …] seen as [b·g·count, …], flat."""
    with torch.inference_mode(False):
        offsets = on_device(np.array(before), device)[:, None, None] - first + torch.arange(size, device=device)
        offsets = offsets.expand(-1, heads, -1)
        return (offsets + begins(offsets, count)).flatten()
