"""A chunk that leaves the window, and the memory it meets: what laws of admission and routing are tried on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from memkit.pieces.routing import Leaving
from memkit.testing.cases import DATA, Data, make

__all__ = ["Exit", "exits", "with_margin"]


@dataclass(frozen=True)
class Exit:
    """A chunk that leaves, and the memory it meets.

    size: tokens of the chunk; grant: how many found; forced: how many of those are sinks, at the chunk's front; live:
    slots there are; sinks: how many of those are sinks; joining: whether other tokens join; newest: whether the last
    tokens found, not the most novel ones; heads, width; data, seed.
    """

    size: int = 3
    grant: int = 1
    forced: int = 0
    live: int = 2
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
        return keys, make(self.data, (1, self.heads, self.live, self.width), generator)

    def leaving(self, keys: Tensor, slots: Tensor) -> Leaving:
        """The chunk as a routing is given it."""
        return Leaving(
            keys=keys,
            slots=slots,
            live=self.live,
            sinks=self.sinks,
            forced=self.forced,
            grant=self.grant,
            alone=lambda: keys,
            joining=self.joining,
        )


@st.composite
def exits(draw: st.DrawFn, data: tuple[str, ...] = DATA, min_width: int = 1, joins_new: bool = True) -> Exit:
    """Chunks that leave: grants from none to all, sinks in memory and at the chunk's front, an empty memory.

    joins_new: whether the routing lets tokens join a slot founded in the same step (else an old one must be there).
    """
    size = draw(st.integers(1, 8))
    sinks = draw(st.integers(0, 4))
    live = draw(st.integers(0, 6))
    forced = min(max(sinks - live, 0), size)
    grant = draw(st.integers(forced, size))
    # A token that founds nothing needs a slot to join.
    newest = draw(st.booleans())
    there = live + grant > sinks if joins_new else live > sinks or (live == sinks == 0 < grant and not newest)
    joining = draw(st.booleans()) and (there or grant == size)
    return Exit(
        size=size,
        grant=grant,
        forced=forced,
        live=live,
        sinks=sinks,
        joining=joining,
        newest=newest,
        heads=draw(st.integers(1, 2)),
        width=draw(st.integers(min_width, 4)),
        data=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        seed=draw(st.integers(0, 999)),
    )


def with_margin(joins_new: bool = True) -> st.SearchStrategy[Exit]:
    """Chunks in which no decision is close."""
    return exits(data=("normal",), min_width=3, joins_new=joins_new)
