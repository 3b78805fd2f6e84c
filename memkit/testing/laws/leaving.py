"""A chunk that leaves the window, and the memory it meets: what laws of admission and routing are tried on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from memkit.pieces.chunk import ChunkContext
from memkit.pieces.evidence import Evidence
from memkit.pieces.similarity import Similarity
from memkit.testing.cases import DATA, Data, make

__all__ = ["LeavingExample", "leaving_examples", "with_margin"]


@dataclass(frozen=True)
class LeavingExample:
    """A chunk that leaves, and the memory it meets.

    size: tokens of the chunk; new_slots: how many of them found; sink_tokens: how many of those are sinks, at the
    chunk's front; slots_before: slots there are; sinks: how many of all slots are sinks; joining: whether other tokens
    join; newest: whether the last tokens found, not the most novel ones or those that a routing says; heads, width;
    data, seed.
    """

    size: int = 3
    new_slots: int = 1
    sink_tokens: int = 0
    slots_before: int = 2
    sinks: int = 0
    joining: bool = True
    newest: bool = False
    heads: int = 1
    width: int = 2
    data: Data = "integers"
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Memory keys [1, g, c, d] and the slots' keys as they are read [1, g, m, d], float64."""
        generator = torch.Generator().manual_seed(self.seed)
        keys = make(self.data, (1, self.heads, self.size, self.width), generator)
        return keys, make(self.data, (1, self.heads, self.slots_before, self.width), generator)

    def chunk(self, keys: Tensor, slots: Tensor, similarity: Similarity = "dot") -> ChunkContext:
        """The chunk as an admission and a routing are given it; slots are all that is there.

        Values and what observed queries told follow from a token's key, so that they go where it goes.
        """
        first = keys[..., 0]
        return ChunkContext(
            keys=keys,
            slots=slots,
            slots_before=slots.shape[2],
            sinks=self.sinks,
            sink_tokens=self.sink_tokens,
            new_slots=self.new_slots,
            joins=self.joining,
            alone=lambda: keys,
            similarity=similarity,
            read_values=lambda: keys.roll(1, dims=-1),
            evidence=Evidence(error=first.abs(), share=first.sigmoid()),
        )


@st.composite
def leaving_examples(
    draw: st.DrawFn, data: tuple[str, ...] = DATA, min_width: int = 1, joins_new: bool = True
) -> LeavingExample:
    """Chunks that leave: founders from none to all, sinks in memory and at the chunk's front, an empty memory.

    joins_new: whether the routing lets tokens join a slot founded in the same step (else an old one must be there).
    """
    size = draw(st.integers(1, 8))
    sinks = draw(st.integers(0, 4))
    slots_before = draw(st.integers(0, 6))
    sink_tokens = min(max(sinks - slots_before, 0), size)
    new_slots = draw(st.integers(sink_tokens, size))
    # A token that founds nothing needs a slot to join.
    newest = draw(st.booleans())
    there = (
        slots_before + new_slots > sinks
        if joins_new
        else slots_before > sinks or (slots_before == sinks == 0 < new_slots and not newest)
    )
    joining = draw(st.booleans()) and (there or new_slots == size)
    return LeavingExample(
        size=size,
        new_slots=new_slots,
        sink_tokens=sink_tokens,
        slots_before=slots_before,
        sinks=sinks,
        joining=joining,
        newest=newest,
        heads=draw(st.integers(1, 2)),
        width=draw(st.integers(min_width, 4)),
        data=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        seed=draw(st.integers(0, 999)),
    )


def with_margin(joins_new: bool = True) -> st.SearchStrategy[LeavingExample]:
    """Chunks in which no decision is close."""
    return leaving_examples(data=("normal",), min_width=3, joins_new=joins_new)
