"""A chunk that leaves the window, as admission and routing see it. Nothing here carries a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memkit.pieces.evidence import Evidence
from memkit.pieces.similarity import Count, NearestSlots, Similarity, search, similarities

__all__ = ["Assignment", "ChunkContext", "Count", "Parted", "begins", "picked"]


@dataclass(frozen=True)
class Parted:
    """A chunk's tokens in two: offsets of those that found, [b, g, n], and of the others, [b, g, k], each in order.

    In rows where fewer found, others follow them; the others are None where nobody knows how many there are. Where rows
    have unequal numbers of tokens, `stay` [b, 1, k] says which of the others are some; None: all are.
    """

    founders: Tensor
    others: Tensor | None
    stay: Tensor | None = None


@dataclass(frozen=True)
class ChunkContext:
    """A chunk that leaves the window, and the memory as it is before that.

    Where slots compete with tokens (`eviction: weakest`), "tokens" are both: the slots that are no sinks come first, in
    the order of their age, and `slots` are the sinks alone.

    keys [b, g, c, d]: memory keys, float32 or float64; values [b, g, c, v]: read when somebody asks, None where only a
    plan is made.
    slots [b, g, m, d]: the slots' keys as read, not rotated, where anybody compares.
    slots_before: slots that exist (m of them at most); sinks: how many of all slots are sinks, which are no targets.
    sink_tokens: tokens at the chunk's front that are sinks, and found in any case; new_slots ≥ sink_tokens: tokens that
    found.
    evidence: what observed queries told of the tokens, None where none are observed.
    joins: whether tokens that found nothing join a slot, or are dropped. similarity: what "alike" means.
    alone(): the tokens' keys as slots of their own would be read, [b, g, c, d]; read_values(): `values`.
    most_new: the most tokens that found in any row, where the caller knows; asking a tensor would wait for the device.
    present: how many of the tokens there are in each row, [b, 1, 1]; what stands behind them is none. None: all are.
    most_left: with `present`, the most of them that found nothing in any row.
    competes: whether these are slots and tokens that compete; nobody then founds only because he is the first.
    """

    keys: Tensor
    slots: Tensor
    slots_before: Count
    sinks: int
    sink_tokens: Count
    new_slots: Count
    joins: bool
    alone: Callable[[], Tensor]
    read_values: Callable[[], Tensor | None] = lambda: None
    evidence: Evidence | None = None
    similarity: Similarity = "dot"
    most_new: int | None = None
    present: Tensor | None = None
    most_left: int = 0
    competes: bool = False

    @property
    def shape(self) -> torch.Size:
        """[b, g, c]."""
        return self.keys.shape[:3]

    @functools.cached_property
    def values(self) -> Tensor | None:
        """The tokens' values, [b, g, c, v]."""
        return self.read_values()

    @functools.cached_property
    def offsets(self) -> Tensor:
        """Each token's place in the chunk, [c]."""
        return _places(self.keys.shape[2], self.keys.device)

    @functools.cached_property
    def absent(self) -> Tensor | None:
        """Which of the tokens are none, bool [b, 1, c]; None where all are there."""
        return None if self.present is None else self.offsets >= self.present

    @property
    def max_new_slots(self) -> int:
        """The most tokens that found in any row."""
        if self.most_new is not None:
            return self.most_new
        return self.new_slots if isinstance(self.new_slots, int) else int(self.new_slots.max())

    @functools.cached_property
    def nearest(self) -> NearestSlots:
        """For each token the slot most like it."""
        return search(self.similarity, self.keys, self.slots, self.slots_before, self.sinks)

    @functools.cached_property
    def is_first(self) -> bool | Tensor:
        """Whether token 0 founds the memory's first slot, and the others are compared with it; a bool, or [b, 1, 1]."""
        return (self.slots_before == 0) & (self.new_slots > 0)

    @functools.cached_property
    def redundancy(self) -> Tensor:
        """Each token's best similarity to the slots there are, sinks included, [b, g, c]."""
        best = self.nearest.best
        if isinstance(self.is_first, Tensor) or self.is_first:
            first = self.alike(self.alone()[:, :, :1])[..., 0]
            best = torch.where(as_tensor(self.is_first, best), first, best)
        return best

    def parted(self, founded: Tensor) -> Parted:
        """The tokens that found, and the others. The last answer is kept: routing asks, and the fold after it."""
        known = vars(self).get("_parted")
        if known is None or known[0] is not founded:
            known = self.__dict__["_parted"] = founded, self._parted(founded)
        return known[1]

    def _parted(self, founded: Tensor) -> Parted:
        most, place = self.max_new_slots, (~founded).byte()
        if self.absent is not None:
            place = place + self.absent  # behind all others
        order = torch.argsort(place, dim=-1, stable=True)
        if self.present is not None:
            index = self.new_slots + torch.arange(self.most_left, device=order.device)
            stay = index < self.present
            index = torch.where(stay, index, 0)  # somebody else: what is said of a founder does not matter
            return Parted(order[..., :most], order.gather(2, index.expand(*order.shape[:2], -1)), stay)
        return Parted(order[..., :most], order[..., most:] if isinstance(self.new_slots, int) else None)

    def only(self, offsets: Tensor) -> ChunkContext:
        """Some tokens, [b, g, n], with the slots as they are: for asking what they are most like, and nothing else."""
        some = replace(self, keys=picked(self.keys, offsets))
        if "nearest" in vars(self):  # asked before, of all
            some.__dict__["nearest"] = self.nearest.only(offsets)
        return some

    def alike(self, slots: Tensor) -> Tensor:
        """Similarity of the tokens to slots [b, g, m, d]: [b, g, c, m]."""
        return similarities(self.similarity, self.keys, slots)


@dataclass(frozen=True)
class Assignment:
    """Each token's slot (−1: dropped) and whether it founded it; both [b, g, c].

    drops: whether any slot may be −1; founds: whether any token may found. Who knows better saves the fold some work.
    parted: who founded and who did not, where somebody knows.
    """

    slot: Tensor
    founded: Tensor
    drops: bool = True
    founds: bool = True
    parted: Parted | None = None

    @property
    def founders(self) -> Tensor | None:
        """`founded`, or None where nobody is known to."""
        return self.founded if self.founds else None


def picked(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows [b, g, c, d] at offsets [b, g, n]: [b, g, n, d], a tensor of its own."""
    where = offsets + begins(offsets, rows.shape[2])
    return rows.flatten(0, 2).index_select(0, where.flatten()).view(*offsets.shape, rows.shape[3])


def begins(offsets: Tensor, count: int) -> Tensor:
    """Where each head's rows begin in a tensor [b, g, count, …] seen as [b·g·count, …]: [b, g, 1], for offsets."""
    batch, heads, _ = offsets.shape
    return _begins(batch, heads, count, offsets.device)


@functools.lru_cache(maxsize=256)
def _begins(batch: int, heads: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return (torch.arange(batch * heads, device=device) * count).view(batch, heads, 1)


def as_tensor(condition: Count | bool, like: Tensor) -> Tensor:
    """A condition for all rows as a tensor."""
    return condition if isinstance(condition, Tensor) else _flag(bool(condition), like.device)


@functools.lru_cache(maxsize=64)
def _flag(condition: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), condition, device=device)


@functools.lru_cache(maxsize=64)
def _places(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, device=device)


def maximum(one: Count, other: Count | bool) -> Count:
    """The larger of two counts."""
    if isinstance(other, Tensor):
        return torch.maximum(other.long(), one) if isinstance(one, Tensor) else other.long().clamp(min=one)
    return one.clamp(min=int(other)) if isinstance(one, Tensor) else max(one, int(other))
