"""A stretch: steps whose chunks are folded together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit.engine.schedule import Step
from memkit.memory.rows import Chunk, on_device
from memkit.memory.window import Columns, Streams, joined
from memkit.pieces.chunk import Assignment

__all__ = ["Stretch"]


@dataclass(frozen=True)
class Stretch:
    """Steps whose chunks are folded together: the tokens that leave before each, and where they go.

    where: columns of these tokens, the first chunk's first; sizes: how many of them leave before each step; first
    [1, 1, n]: which are of the memory's first chunk, False for none; sums, numbers [b, g, m, …]: what slots hold before
    all of this, as many slots as the last step reads.
    slot [b, g, n]: where they go, −1 for nowhere; founders [b, g, n]: which of them found, None for nobody; drops:
    whether any may go nowhere.
    """

    where: Columns
    sizes: tuple[int, ...]
    first: bool | Tensor
    sums: Tensor
    numbers: Tensor
    slot: Tensor
    founders: Tensor | None = None
    drops: bool = False

    @classmethod
    def of(cls, steps: Sequence[Step], shift: int, held: tuple[Tensor, Tensor]) -> Stretch:
        """The stretch of some steps, before anybody says where tokens go.

        shift: from positions to columns; held: sums and numbers of as many slots as the last step reads.
        """
        leaving = [each for step in steps for each in step.leaving]
        begins, (rows, heads) = [int(each.begin[0]) for each in leaving], held[0].shape[:2]
        ends = [begin + each.size for begin, each in zip(begins, leaving, strict=True)]
        slices = [slice(begin + shift, end + shift) for begin, end in zip(begins, ends, strict=True)]
        first: bool | Tensor = False
        if 0 in begins:
            whose = np.repeat(np.array(begins) == 0, [each.size for each in leaving])
            first = on_device(whose, held[0].device)[None, None]
        return cls(
            joined(slices, rows, held[0].device) if slices else slice(0, 0),
            tuple(sum(each.size for each in step.leaving) for step in steps),
            first,
            *held,
            slot=held[0].new_empty((rows, heads, 0), dtype=torch.long),
        )

    def placed(self, assignments: Sequence[Assignment]) -> Stretch:
        """The stretch, its chunks placed by their assignments."""
        founders = None
        if any(assignment.founds for assignment in assignments):
            founders = torch.cat([assignment.founded for assignment in assignments], dim=2)
        return dataclasses.replace(
            self,
            slot=torch.cat([self.slot, *(assignment.slot for assignment in assignments)], dim=2),
            founders=founders,
            drops=any(assignment.drops for assignment in assignments),
        )

    def apart(self) -> Stretch:
        """The stretch with sums and numbers of its own, so that others may be written into."""
        return dataclasses.replace(self, sums=self.sums.clone(), numbers=self.numbers.clone())

    def chunk(self, streams: Streams) -> Chunk:
        """The tokens that leave."""
        return Chunk.of(streams, self.where, self.first)

    def places(self) -> Tensor:
        """Each token's slot in tensors of what slots hold after each of k steps, [b·k·g·m, …]: [b·g·n]."""
        batch, heads, room = self.sums.shape[:3]
        begins = _begins(batch, heads, self.sizes, room, self.slot.device)
        return (self.slot.clamp(min=0) + begins).flatten()


@functools.lru_cache(maxsize=16)
def _begins(batch: int, heads: int, sizes: tuple[int, ...], room: int, device: torch.device) -> Tensor:
    """Where each token's slots begin among those of all rows, steps and heads, [b, g, n]."""
    with torch.inference_mode(False):
        step = on_device(np.repeat(np.arange(len(sizes)), sizes), device)
        row, head = (torch.arange(count, device=device) for count in (batch, heads))
        return ((row[:, None, None] * len(sizes) + step) * heads + head[:, None]) * room
