"""Routing: which slot every token of a leaving chunk goes to, and which tokens found one.

Nothing here carries a gradient. All of a chunk is routed before any sum changes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from memkit.pieces.registry import FamilySpec, register

__all__ = ["Leaving", "Nearest", "NearestSpec", "Placement", "Routing", "RoutingSpec", "Segment", "SegmentSpec"]

Count = int | Tensor
"""A whole number for all rows, or one per row as a tensor [b, 1, 1]."""

RUN, MANY = 64, 1024
"""From so many slots on, the best is looked for in runs of so many."""

AT_ONCE = {"cpu": 2**22}
"""Similarities that are computed and searched at once, per kind of device: more cost fresh memory every time. Elsewhere
all of a chunk's."""


@dataclass(frozen=True)
class Leaving:
    """A chunk that leaves the window, and the memory as it is before that.

    keys [b, g, c, d]: memory keys, float32 or float64; slots [b, g, m, d]: the slots' keys as read, not rotated.
    live: slots that exist (m of them at most); sinks: how many of those are never a target;
    forced: tokens at the chunk's front that are sinks and found in any case; grant ≥ forced: tokens that found.
    alone(): the tokens' keys as slots of their own would be read, [b, g, c, d].
    joining: whether tokens that found nothing join a slot, or are dropped.
    most: the most tokens that found in any row, where the caller knows; asking a tensor would wait for the device.
    """

    keys: Tensor
    slots: Tensor
    live: Count
    sinks: int
    forced: Count
    grant: Count
    alone: Callable[[], Tensor]
    joining: bool
    most: int | None = None

    @property
    def offsets(self) -> Tensor:
        """Each token's place in the chunk, [c]."""
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    @property
    def max_grant(self) -> int:
        """The most tokens that found in any row."""
        if self.most is not None:
            return self.most
        return self.grant if isinstance(self.grant, int) else int(self.grant.max())


@dataclass(frozen=True)
class Placement:
    """Each token's slot (−1: dropped) and whether it founded it; both [b, g, c].

    drops: whether any slot may be −1; founds: whether any token may found. Who knows better saves the fold some work.
    """

    slot: Tensor
    founded: Tensor
    drops: bool = True
    founds: bool = True

    @property
    def founders(self) -> Tensor | None:
        """`founded`, or None where nobody is known to."""
        return self.founded if self.founds else None


Priority = Callable[[Tensor, Count, Count, Tensor | None], Tensor]
"""An admission's order; see `memkit.pieces.admission.Admission.priority`."""


class Routing(ABC):
    """Places the tokens of a chunk."""

    founds: ClassVar[bool] = False
    """Whether the routing itself decides who founds; then the policy's admission is `none`."""
    compares: ClassVar[bool] = False
    """Whether it looks at slot keys at all."""

    @abstractmethod
    def place(self, chunk: Leaving, priority: Priority | None, redundancy: bool) -> Placement:
        """Where each token goes. `priority` is the admission's order, `redundancy` whether that wants similarities."""


class RoutingSpec(FamilySpec):
    """Declares a routing."""

    family: ClassVar[str] = "routing"

    @abstractmethod
    def build(self) -> Routing:
        """The routing."""


@register
class NearestSpec(RoutingSpec):
    """Every token that founds nothing joins the most similar slot that is no sink; ties go to the lowest slot."""

    kind: Literal["nearest"] = "nearest"
    similarity: Literal["dot", "cosine", "l2"] = Field(
        default="dot",
        description="of a token's memory key and a slot's key as read: dot product, cosine, or least distance",
    )
    new_slots: bool = Field(
        default=True, description="whether a token may join a slot founded in the same step (KVM yes, OVQ no)"
    )

    def build(self) -> Nearest:
        return Nearest(self.similarity, self.new_slots)


class Nearest(Routing):
    """slot_j = argmax_i similarity(key_j, slot_i) over slots that are no sinks, the newly founded ones included."""

    compares = True

    def __init__(self, similarity: Literal["dot", "cosine", "l2"], new_slots: bool) -> None:
        self.kind, self.new_slots = similarity, new_slots

    def similarity(self, keys: Tensor, slots: Tensor) -> Tensor:
        """Of keys [..., c, d] and slots [..., m, d], on any leading axes: [..., c, m], a tensor of its own.

        l2 is −½·distance².
        """
        scores = keys @ slots.mT
        if self.kind == "cosine":  # of whole products, so that exact dot products give exact ties
            lengths = keys.norm(dim=-1).unsqueeze(-1) * slots.norm(dim=-1).unsqueeze(-2)
            return scores / lengths.clamp(min=1e-30)
        if self.kind == "l2":  # the keys' own term changes no token's slot, but which tokens are novel
            return scores - slots.square().sum(-1).unsqueeze(-2) / 2 - keys.square().sum(-1).unsqueeze(-1) / 2
        return scores

    def place(self, chunk: Leaving, priority: Priority | None, redundancy: bool) -> Placement:
        size, offsets = chunk.keys.shape[2], chunk.offsets
        everyone = chunk.keys.new_ones(chunk.keys.shape[:3], dtype=torch.bool)
        if isinstance(chunk.grant, int) and chunk.grant == size:
            return Placement((chunk.live + offsets).expand(everyone.shape), everyone, drops=False)

        target, score, best = self._search(chunk)
        if not chunk.max_grant:
            nobody = torch.zeros_like(everyone)
            if not chunk.joining:
                return Placement(torch.full_like(target, -1), nobody, founds=False)
            return Placement(target, nobody, drops=False, founds=False)

        assert priority is not None
        forced = chunk.forced
        first_is_there = False  # in an empty memory token 0 founds a slot, and the rest are judged against it
        if redundancy:
            first_is_there = (chunk.live == 0) & (chunk.grant > 0)
            if isinstance(first_is_there, Tensor) or first_is_there:
                first = self.similarity(chunk.keys, chunk.alone()[:, :, :1])[..., 0]
                best = torch.where(_tensor(first_is_there, best), first, best)
                forced = _maximum(forced, first_is_there)
        seen = best if redundancy else None
        order = priority(offsets - forced, size - forced, chunk.grant - forced, seen).expand(everyone.shape)
        order = order.to(chunk.keys.dtype).masked_fill(offsets < forced, -torch.inf)
        rank = order.argsort(dim=-1, stable=True).argsort(dim=-1)
        founded = rank < chunk.grant

        slot = torch.where(founded, chunk.live + founded.cumsum(-1) - 1, -1)
        if chunk.joining:
            fresh = self._founders(chunk, founded, first_is_there)
            new_target, new_score = _best(fresh, 0)
            target = torch.where(new_score > score, new_target + chunk.live, target)
            slot = torch.where(founded, slot, target)
        return Placement(slot, founded, drops=not chunk.joining)

    def _search(self, chunk: Leaving) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's best slot that is no sink, its similarity to that, and to the best of all slots; [b, g, c]."""
        keys, slots = chunk.keys.flatten(0, 1), chunk.slots.flatten(0, 1)
        live = chunk.live.expand(*chunk.keys.shape[:2], 1).flatten(0, 1) if isinstance(chunk.live, Tensor) else None
        each = max(1, AT_ONCE.get(keys.device.type, sys.maxsize) // max(1, keys.shape[1] * slots.shape[1]))
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for begin in range(0, len(keys), each):
            some = slice(begin, begin + each)
            scores = self.similarity(keys[some], slots[some])
            if live is not None:
                beyond = torch.arange(scores.shape[-1], device=scores.device) >= live[some].unsqueeze(-1)
                scores = scores.masked_fill(beyond, -torch.inf)
            sinks = scores[..., : chunk.sinks].clone()
            scores[..., : chunk.sinks] = -torch.inf  # no targets
            target, score = _best(scores, chunk.sinks)
            best = torch.maximum(score, sinks.amax(-1)) if sinks.shape[-1] else score
            found.append((target, score, best))
        target, score, best = (torch.cat(parts).view(chunk.keys.shape[:3]) for parts in zip(*found, strict=True))
        return target, score, best

    def _founders(self, chunk: Leaving, founded: Tensor, first_is_there: Count | bool) -> Tensor:
        """Similarity to the slots founded in this step, in token order, [b, g, c, max grant]; −inf: not a target."""
        most, alone = chunk.max_grant, chunk.alone()
        # Founders' offsets first, in order; the offsets of the others behind them are masked below.
        where = torch.argsort((~founded).long(), dim=-1, stable=True)[..., :most]
        scores = self.similarity(chunk.keys, alone.gather(2, where.unsqueeze(-1).expand(*where.shape, alone.shape[-1])))
        nth = torch.arange(most, device=scores.device)
        barred = (nth >= chunk.grant) | (where < chunk.forced)
        if not self.new_slots:
            barred = barred | (nth > 0) | ~_tensor(first_is_there, barred)
        return scores.masked_fill(barred.unsqueeze(-2), -torch.inf)


@register
class SegmentSpec(RoutingSpec):
    """The chunk is cut into as many runs as slots are granted; each run's first token founds, the rest join it."""

    kind: Literal["segment"] = "segment"

    def build(self) -> Segment:
        return Segment()


class Segment(Routing):
    """Run i holds tokens ⌊i·C/g⌋ … ⌊(i + 1)·C/g⌋ − 1; with g = 0 all join the newest slot that is no sink.

    Sinks at the chunk's front found by themselves; C and g then count the rest.
    """

    founds = True

    def place(self, chunk: Leaving, priority: Priority | None, redundancy: bool) -> Placement:
        offset = chunk.offsets - chunk.forced
        size, runs = chunk.keys.shape[2] - chunk.forced, chunk.grant - chunk.forced
        run = ((offset + 1) * runs - 1) // _maximum(size, 1)  # the last i with ⌊i·C/g⌋ ≤ offset; −1 where g = 0
        start = run * size // _maximum(runs, 1)
        sink = offset < 0
        founded = sink | ((offset == start) & (run >= 0))
        slot = chunk.live + torch.where(sink, chunk.offsets, chunk.forced + run)
        if not chunk.joining:
            slot = torch.where(founded, slot, -1)
        shape = chunk.keys.shape[:3]
        return Placement(slot.expand(shape), founded.expand(shape), drops=not chunk.joining)


def _best(scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The lowest slot from `first` on with the highest score, and that score; slot −1 and −inf where there is none.

    Slots before `first` score −inf.
    """
    size = scores.shape[-1]
    if size <= first:
        none = scores.new_full(scores.shape[:-1], -torch.inf)
        return none.new_full(none.shape, -1, dtype=torch.long), none
    if size < MANY:
        return _argmax(scores).clamp_(min=first), scores.amax(-1)
    # Where the highest score stands costs more to find than the score itself: look in the first run that has it. The
    # last run may reach back into the one before it, whose scores are lower if it was not chosen.
    whole = size // RUN
    runs = scores[..., : whole * RUN].unflatten(-1, (whole, RUN)).amax(-1)
    if whole * RUN < size:
        runs = torch.cat((runs, scores[..., whole * RUN :].amax(-1, keepdim=True)), dim=-1)
    start = (_argmax(runs) * RUN).clamp_(max=size - RUN)
    inside = scores.gather(-1, start.unsqueeze(-1) + torch.arange(RUN, device=scores.device))
    return (start + _argmax(inside)).clamp_(min=first), runs.amax(-1)


def _argmax(scores: Tensor) -> Tensor:
    """Where the highest number of the last axis stands first. On the CPU by NumPy: its search is vectorised."""
    return torch.from_numpy(scores.numpy().argmax(-1)) if scores.device.type == "cpu" else scores.argmax(-1)


def _tensor(condition: Count | bool, like: Tensor) -> Tensor:
    return condition if isinstance(condition, Tensor) else torch.full((), bool(condition), device=like.device)


def _maximum(one: Count, other: Count | bool) -> Count:
    if isinstance(other, Tensor):
        return torch.maximum(other.long(), one) if isinstance(one, Tensor) else other.long().clamp(min=one)
    return one.clamp(min=int(other)) if isinstance(one, Tensor) else max(one, int(other))
