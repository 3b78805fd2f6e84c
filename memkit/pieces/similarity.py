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

AT_ONCE = {"cpu": 2**22}
"""Similarities that are computed and searched at once, per kind of device: more cost fresh memory every time. Elsewhere
all of a chunk's."""


@dataclass(frozen=True)
class Nearest:
    """The slot most like each token, all [b, g, c].

    slot: the most similar slot that is no sink, the lowest on ties, −1 where there is none; score: its similarity, −∞
    where there is none; best: the similarity of the most similar slot of all, sinks included.
    """

    slot: Tensor
    score: Tensor
    best: Tensor


def similarities(kind: Similarity, keys: Tensor, slots: Tensor) -> Tensor:
    """Of keys [..., c, d] and slots [..., m, d], on any leading axes: [..., c, m], a tensor of its own.

    l2 is −½·distance².
    """
    scores = keys @ slots.mT
    if kind == "cosine":  # of whole products, so that exact dot products give exact ties
        lengths = keys.norm(dim=-1).unsqueeze(-1) * slots.norm(dim=-1).unsqueeze(-2)
        return scores / lengths.clamp(min=1e-30)
    if kind == "l2":  # the keys' own term changes no token's slot, but which tokens are novel
        return scores - slots.square().sum(-1).unsqueeze(-2) / 2 - keys.square().sum(-1).unsqueeze(-1) / 2
    return scores


def search(kind: Similarity, keys: Tensor, slots: Tensor, live: Count, sinks: int) -> Nearest:
    """For keys [b, g, c, d] among slots [b, g, m, d], of which `live` exist and the first `sinks` are no targets."""
    shape, keys, slots = keys.shape, keys.flatten(0, 1), slots.flatten(0, 1)
    live = live.expand(*shape[:2], 1).flatten(0, 1) if isinstance(live, Tensor) else live
    each = max(1, AT_ONCE.get(keys.device.type, sys.maxsize) // max(1, keys.shape[1] * slots.shape[1]))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for begin in range(0, len(keys), each):
        some = slice(begin, begin + each)
        scores = similarities(kind, keys[some], slots[some])
        if isinstance(live, Tensor):
            beyond = torch.arange(scores.shape[-1], device=scores.device) >= live[some].unsqueeze(-1)
            scores = scores.masked_fill(beyond, -torch.inf)
        of_sinks = scores[..., :sinks].clone()
        scores[..., :sinks] = -torch.inf
        slot, score = best_slot(scores, sinks)
        parts.append((slot, score, torch.maximum(score, of_sinks.amax(-1)) if of_sinks.shape[-1] else score))
    found = parts[0] if len(parts) == 1 else [torch.cat(each_of) for each_of in zip(*parts, strict=True)]
    return Nearest(*(each.view(shape[:3]) for each in found))


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
