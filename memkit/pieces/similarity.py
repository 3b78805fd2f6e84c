"""Similarity: how alike a token's memory key and a slot's key are, and which slot is most alike.

Taken in float32 or better, of a whole chunk against all live slots, whatever the split of the text.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Count", "Nearest", "Similarity", "best_slot", "search"]

Count = int | Tensor
"""A whole number for all rows, or one per row as a tensor [b, 1, 1]."""

Similarity = Literal["dot", "cosine", "l2"]

RUN, MANY = 64, 1024
"""From so many slots on, the best is looked for in runs of so many."""

AT_ONCE = {"cpu": 2**19}
"""Similarities that are computed and searched at once, per kind of device: what of them stays in the cache is searched
there, and the memory is used again. Elsewhere all of a chunk's."""


@dataclass(frozen=True)
class Nearest:
    """The slot most like each token, all [b, g, c].

    slot: the most similar slot that is no sink, the lowest on ties, −1 where there is none; score: its similarity, −∞
    where there is none; best: the similarity of the most similar slot of all, sinks included.
    """

    slot: Tensor
    score: Tensor
    best: Tensor

    def or_among(self, later: Nearest) -> Nearest:
        """The nearest of these slots and of later ones: those only where they are strictly better, so that ties go to
        the lowest."""
        slot = torch.where(later.score > self.score, later.slot, self.slot)
        return Nearest(slot, torch.maximum(self.score, later.score), torch.maximum(self.best, later.best))


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


def search(kind: Similarity, keys: Tensor, slots: Tensor, live: Count, sinks: int) -> Nearest:
    """For keys [b, g, c, d] among slots [b, g, m, d], of which `live` exist and the first `sinks` are no targets."""
    shape, keys, slots = keys.shape, keys.flatten(0, 1), slots.flatten(0, 1)
    live = live.expand(*shape[:2], 1).flatten(0, 1).unsqueeze(-1) if isinstance(live, Tensor) else live
    asking = keys.shape[0] * keys.shape[1]
    most = max(1, AT_ONCE.get(keys.device.type, sys.maxsize) // (max(1, asking) * RUN)) * RUN
    memory, found = keys.new_empty(asking * min(most, slots.shape[1])), None
    for begin in range(0, max(1, slots.shape[1]), most):
        some = slots[:, begin : begin + most]
        count = some.shape[1]
        scores = similarities(kind, keys, some, memory[: asking * count].view(*keys.shape[:2], count))
        if isinstance(live, Tensor):
            scores.masked_fill_(torch.arange(begin, begin + count, device=scores.device) >= live, -torch.inf)
        first, of_sinks = min(max(sinks - begin, 0), count), None
        if first:
            of_sinks = scores[..., :first].amax(-1)
            scores[..., :first] = -torch.inf
        slot, score = best_slot(scores, first)
        best = score if of_sinks is None else torch.maximum(score, of_sinks)
        found = Nearest(slot, score, best) if found is None else found.or_among(Nearest(slot + begin, score, best))
    assert found is not None
    return Nearest(*(each.view(shape[:3]) for each in (found.slot, found.score, found.best)))


def best_slot(scores: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The lowest slot from `first` on with the highest score, and that score; slot −1 and −∞ where there is none.

    Slots before `first` score −∞.
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
