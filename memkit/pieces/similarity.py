"""Similarity: how alike a token's memory key and a slot's key are, and which slot is most alike.

Taken in float32 or better, of a whole chunk against all live slots, whatever the split of the text.
"""

from __future__ import annotations

import functools
import sys
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Count", "NearestSlots", "Similarity", "search", "similarities"]

Count = int | Tensor
"""A whole number for all rows, or one per row as a tensor [b, 1, 1]."""

Similarity = Literal["dot", "cosine", "l2"]

RUN, MANY = 64, 1024
"""From so many slots on, the best is looked for in runs of so many."""

AT_ONCE = {"cpu": 2**19}
"""Similarities that are computed and searched at once, per kind of device: what of them stays in the cache is searched
there, and the memory is used again. Elsewhere all of a chunk's."""


class NearestSlots:
    """The slot most like each token. Only what is asked for is found.

    scores [b, g, c, m]: similarities to some slots; begin: the number of the first of these; sinks: how many of all
    slots are sinks, which are no targets.
    """

    def __init__(self, scores: Tensor, begin: int, sinks: int) -> None:
        self._scores, self._begin = scores, begin
        self._first = min(max(sinks - begin, 0), scores.shape[-1])

    @classmethod
    def known(cls, slot: Tensor, score: Tensor, best: Tensor) -> NearestSlots:
        """What has been found."""
        nearest = cls.__new__(cls)
        vars(nearest).update(slot=slot, score=score, best=best)
        return nearest

    @functools.cached_property
    def slot(self) -> Tensor:
        """The most similar slot that is no sink, the lowest on ties, −1 where there is none, [b, g, c]."""
        slot, begin = _best_slot(self._targets, self._of_runs), self._begin + self._first
        return slot.add_(begin) if self._targets.shape[-1] and begin else slot

    @functools.cached_property
    def score(self) -> Tensor:
        """Its similarity, −∞ where there is none, [b, g, c]."""
        return _highest(self._of_runs)

    @functools.cached_property
    def best(self) -> Tensor:
        """The similarity of the most similar slot of all, sinks included, [b, g, c]."""
        return _highest(self._scores) if self._first else self.score

    @property
    def _targets(self) -> Tensor:
        return self._scores[..., self._first :]

    @functools.cached_property
    def _of_runs(self) -> Tensor:
        """The highest score of each run of slots; of few slots, their scores. The last run may be shorter."""
        scores, size = self._targets, self._targets.shape[-1]
        if size < MANY:
            return scores
        whole = size // RUN
        runs = scores[..., : whole * RUN].unflatten(-1, (whole, RUN)).amax(-1)
        if whole * RUN == size:
            return runs
        return torch.cat((runs, scores[..., whole * RUN :].amax(-1, keepdim=True)), dim=-1)

    def settled(self) -> NearestSlots:
        """The same, found now."""
        return NearestSlots.known(self.slot, self.score, self.best)

    def or_among(self, later: NearestSlots) -> NearestSlots:
        """The nearest of these slots and of later ones: those only where they are strictly better, so that ties go to
        the lowest."""
        slot = torch.where(later.score > self.score, later.slot, self.slot)
        return NearestSlots.known(slot, torch.maximum(self.score, later.score), torch.maximum(self.best, later.best))

    def only(self, offsets: Tensor) -> NearestSlots:
        """The same of some tokens, [b, g, n]."""
        return NearestSlots.known(*(each.gather(2, offsets) for each in (self.slot, self.score, self.best)))


def similarities(kind: Similarity, keys: Tensor, slots: Tensor, memory: Tensor | None = None) -> Tensor:
    """Of keys [..., c, d] and slots [..., m, d], on any leading axes: [..., c, m], in `memory` if given.

    l2 is −½·distance².
    """
    scores = torch.matmul(keys, slots.mT, out=memory)
    if kind == "cosine":  # of whole products, so that exact dot products give exact ties
        lengths = keys.norm(dim=-1).unsqueeze(-1) * slots.norm(dim=-1).unsqueeze(-2)
        return scores.div_(lengths.clamp_(min=1e-30))
    if kind == "l2":  # the keys' own term changes no token's slot, but which tokens are novel
        return scores.sub_(slots.square().sum(-1).unsqueeze(-2) / 2).sub_(keys.square().sum(-1).unsqueeze(-1) / 2)
    return scores


def search(kind: Similarity, keys: Tensor, slots: Tensor, live: Count, sinks: int) -> NearestSlots:
    """For keys [b, g, c, d] among slots [b, g, m, d], of which `live` exist and the first `sinks` are no targets."""
    shape, keys, slots = keys.shape, keys.flatten(0, 1), slots.flatten(0, 1)
    live = live.expand(*shape[:2], 1).unsqueeze(-1) if isinstance(live, Tensor) else live
    asking = keys.shape[0] * keys.shape[1]
    most = max(1, AT_ONCE.get(keys.device.type, sys.maxsize) // (max(1, asking) * RUN)) * RUN
    memory, nearest = keys.new_empty(asking * min(most, slots.shape[1])), None
    for begin in range(0, max(1, slots.shape[1]), most):
        some = slots[:, begin : begin + most]
        count = some.shape[1]
        scores = similarities(kind, keys, some, memory[: asking * count].view(*keys.shape[:2], count))
        scores = scores.view(*shape[:3], count)
        if isinstance(live, Tensor):
            scores.masked_fill_(torch.arange(begin, begin + count, device=scores.device) >= live, -torch.inf)
        # What is found of several blocks is found before the next one takes the memory.
        part = NearestSlots(scores, begin, sinks)
        nearest = part if slots.shape[1] <= most else part.settled() if nearest is None else nearest.or_among(part)
    assert nearest is not None
    return nearest


def _best_slot(scores: Tensor, of_runs: Tensor) -> Tensor:
    """The lowest slot with the highest score, −1 where there is none: scores [..., m] → [...]; of_runs: those of runs,
    where there are many."""
    size = scores.shape[-1]
    if not size:
        return torch.full(scores.shape[:-1], -1, device=scores.device)
    if size < MANY:
        return _argmax(scores)
    # Where the highest score stands costs more to find than the score itself: look in the first run that has it. The
    # last run may reach back into the one before it, whose scores are lower if it was not chosen.
    start = (_argmax(of_runs) * RUN).clamp_(max=size - RUN)
    inside = scores.gather(-1, start.unsqueeze(-1) + torch.arange(RUN, device=scores.device))
    return start + _argmax(inside)


def _highest(scores: Tensor) -> Tensor:
    """The highest score, −∞ where there is none: [..., m] → [...]."""
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)


def _argmax(scores: Tensor) -> Tensor:
    """Where the highest number of the last axis stands first. On the CPU by NumPy: its search is vectorised."""
    return torch.from_numpy(scores.numpy().argmax(-1)) if scores.device.type == "cpu" else scores.argmax(-1)
