"""Routing: which slot each token of a leaving chunk joins that founds none.

Nothing here carries a gradient. All of a chunk is routed before any sum changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from memkit.errors import PolicyError
from memkit.pieces.chunk import ChunkContext, as_tensor, maximum, picked
from memkit.pieces.registry import FamilySpec, register
from memkit.pieces.similarity import NearestSlots, Similarity

__all__ = ["Discard", "Nearest", "NearestSpec", "Routing", "RoutingSpec", "Segment", "SegmentSpec"]


class Routing(ABC):
    """Sends the tokens that found nothing to slots."""

    founds: ClassVar[bool] = False
    """Whether the routing can itself say who founds (`founders`), where the policy's admission is `none`."""
    compares: ClassVar[bool] = False
    """Whether it looks at slot keys."""
    drops: bool = False
    """Whether it may send a token nowhere (−1), though the merge rule would let it join."""
    similarity: Similarity = "dot"
    """What "alike" means, to it and to an admission that compares."""

    def founders(self, chunk: ChunkContext) -> Tensor:
        """Which tokens found, sinks included, bool, broadcastable to [b, g, c]. Only where `founds`."""
        raise PolicyError(f"{type(self).__name__} founds no slots; use an admission other than none")

    @abstractmethod
    def targets(self, chunk: ChunkContext, founded: Tensor | None) -> Tensor:
        """The slot that each token joins, broadcastable to [b, g, c]; what it says of founders does not matter.

        founded [b, g, c]: which tokens found slots `chunk.slots_before` …, in their order; None: none does.
        """


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
    similarity: Similarity = Field(
        default="dot",
        description="of a token's memory key and a slot's key as read: dot product, cosine, or least distance",
    )
    new_slots: bool = Field(
        default=True, description="whether a token may join a slot founded in the same step (KVM yes, OVQ no)"
    )

    least: float | None = Field(
        default=None,
        description="below this similarity a token joins no slot and is dropped; left out: it always joins",
    )

    def build(self) -> Nearest:
        return Nearest(self.similarity, self.new_slots, self.least)


class Nearest(Routing):
    """slot_j = argmax_i similarity(key_j, slot_i) over slots that are no sinks, the newly founded ones included."""

    compares = True

    def __init__(self, similarity: Similarity, new_slots: bool, least: float | None = None) -> None:
        self.similarity, self.new_slots, self.least = similarity, new_slots, least
        self.drops = least is not None

    def targets(self, chunk: ChunkContext, founded: Tensor | None) -> Tensor:
        if founded is None:
            return self._near_enough(chunk.nearest)
        parted = chunk.parted(founded)
        founders, others = parted.founders, parted.others
        asking = chunk if others is None else chunk.only(others)
        to_founders = NearestSlots(self._to_founders(chunk, founders, asking), 0, 0)
        fresh, score = to_founders.slot + chunk.slots_before, to_founders.score
        if chunk.slots.shape[2] <= chunk.sinks:  # but for sinks there is none that stood before
            nearest = NearestSlots.known(torch.where(score > -torch.inf, fresh, -1), score, score)
        else:
            nearest = asking.nearest.or_among(NearestSlots.known(fresh, score, score))
        target = self._near_enough(nearest)
        return target if others is None else torch.zeros_like(founded, dtype=torch.long).scatter_(2, others, target)

    def _near_enough(self, nearest: NearestSlots) -> Tensor:
        """The slot most like each token, [b, g, c], −1 where it is not similar enough."""
        return nearest.slot if self.least is None else torch.where(nearest.score < self.least, -1, nearest.slot)

    def _to_founders(self, chunk: ChunkContext, founders: Tensor, asking: ChunkContext) -> Tensor:
        """Similarity of who asks to the slots founded in this step, in token order, [b, g, n, max new]; −∞: no target.

        founders [b, g, max new]: their offsets in the chunk.
        """
        scores = asking.alike(picked(chunk.alone(), founders))
        if (
            self.new_slots
            and isinstance(chunk.new_slots, int)
            and isinstance(chunk.sink_tokens, int)
            and not chunk.sink_tokens
        ):
            return scores
        nth = torch.arange(chunk.max_new_slots, device=scores.device)
        barred = (nth >= chunk.new_slots) | (founders < chunk.sink_tokens)
        if not self.new_slots:  # but for the very first slot, which all others are compared with
            barred = barred | (nth > 0) | ~as_tensor(chunk.is_first, barred)
        return scores.masked_fill_(barred.unsqueeze(-2), -torch.inf)


@register
class SegmentSpec(RoutingSpec):
    """Runs: a token that founds nothing joins the newest slot before it.

    With admission `none` the chunk is cut into as many even runs as slots are granted; each run's first token founds.
    """

    kind: Literal["segment"] = "segment"

    def build(self) -> Segment:
        return Segment()


class Segment(Routing):
    """slot_j is the slot of the last founder before j, or the newest slot there was; sinks are no targets.

    With admission `none`, run i holds tokens ⌊i·C/g⌋ … ⌊(i + 1)·C/g⌋ − 1; with g = 0 all join the newest slot. Sinks at
    the chunk's front found by themselves; C and g then count the rest.
    """

    founds = True

    def founders(self, chunk: ChunkContext) -> Tensor:
        offset = chunk.offsets - chunk.sink_tokens
        size, runs = chunk.keys.shape[2] - chunk.sink_tokens, chunk.new_slots - chunk.sink_tokens
        run = ((offset + 1) * runs - 1) // maximum(size, 1)  # the last i with ⌊i·C/g⌋ ≤ offset; −1 where g = 0
        start = run * size // maximum(runs, 1)
        return (offset < 0) | ((offset == start) & (run >= 0))

    def targets(self, chunk: ChunkContext, founded: Tensor | None) -> Tensor:
        newest = chunk.slots_before - 1
        if founded is not None:
            newest = newest + founded.cumsum(-1)
        # Before the first slot that is no sink there is nothing to join but that one.
        return newest.clamp(min=chunk.sinks) if isinstance(newest, Tensor) else chunk.offsets * 0 + newest


class Discard(Routing):
    """Nothing but sinks is kept: what growth `none` routes by."""

    founds = True

    def founders(self, chunk: ChunkContext) -> Tensor:
        return chunk.offsets < chunk.sink_tokens

    def targets(self, chunk: ChunkContext, founded: Tensor | None) -> Tensor:
        return torch.full_like(chunk.offsets, -1)
