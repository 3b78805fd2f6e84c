"""Loss by position: does a model still gain from what it read long ago? Compared document by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkit.catalog import load_policy
from memkit.errors import InputError, shown
from memkit.evals.evaluator import mean_and_error
from memkit.evals.reading import losses, read
from memkit.policy import PolicySpec
from memkit.whole import whole_number

__all__ = ["Stretch", "documents_of", "loss_by_position", "stretches", "without_slots"]


@dataclass(frozen=True)
class Stretch:
    """Positions first … last of all documents: the mean loss, or difference of losses, in nats per token.

    error: the standard error over documents, each document's mean being one value. documents: how many.
    """

    first: int
    last: int
    mean: float
    error: float
    documents: int


def documents_of(ids: Sequence[int], tokens: int, documents: int) -> Tensor:
    """So many pieces of equal length out of one long text, evenly spaced and none overlapping, [documents, tokens]."""
    tokens, documents = whole_number("tokens", tokens, 2), whole_number("documents", documents, 1)
    whole = torch.tensor(list(ids), dtype=torch.long)
    if len(whole) < tokens * documents:
        raise InputError(
            f"the text must have tokens × documents, {tokens * documents} tokens, got {len(whole)}; lower either"
        )
    starts = [number * (len(whole) - tokens) // max(1, documents - 1) for number in range(documents)]
    return torch.stack([whole[start : start + tokens] for start in starts])


def loss_by_position(model: Any, documents: Tensor, batch: int = 4) -> Tensor:
    """Loss in nats of token i given all before it, float64 [documents, tokens − 1], i = 1 … tokens − 1.

    model: as for `evaluate`. documents [n, tokens]: ids, see `documents_of`.
    """
    if not isinstance(documents, Tensor) or documents.ndim != 2 or documents.shape[1] < 2:
        raise InputError(f"documents must be ids [documents, tokens], got {shown(documents)}")
    every = torch.ones_like(documents, dtype=torch.bool)
    every[:, 0] = False
    found = [
        losses(read(model, ids), ids, targets)[0].view(len(ids), -1)
        for ids, targets in zip(documents.split(batch), every.split(batch), strict=True)
    ]
    return torch.cat(found)


def stretches(values: Tensor, edges: Sequence[int], against: Tensor | None = None) -> list[Stretch]:
    """Means over stretches of positions, with standard errors over documents.

    Args:
        values: [documents, tokens − 1], as `loss_by_position` gives them: column j is the loss of token j + 1.
        edges: the first token of each stretch, ascending from 1 on; the last stretch goes on to the end.
        against: another model's losses on the same documents: the differences values − against are taken, pair by pair.

    Raises `InputError`.
    """
    if against is not None and against.shape != values.shape:
        raise InputError(
            f"against must be of the same documents, {tuple(values.shape)}, got {tuple(against.shape)}; read them alike"
        )
    ends = [*edges[1:], values.shape[1] + 1]
    if not edges or edges[0] < 1 or any(first >= end for first, end in zip(edges, ends, strict=True)):
        raise InputError(f"edges must ascend from 1 on to at most {values.shape[1]}, got {shown(list(edges))}")
    differences = values if against is None else values - against
    made: list[Stretch] = []
    for first, end in zip(edges, ends, strict=True):
        mean, error = mean_and_error(differences[:, first - 1 : end - 1].mean(1).tolist())
        made.append(Stretch(first, end - 1, mean, error, len(differences)))
    return made


def without_slots(policy: str | PolicySpec) -> PolicySpec:
    """The policy with its slots deleted: its window and its sinks, and nothing of what left the window.

    What shares, judges or evicts slots goes with them; what layers learn for the window stays. Raises `PolicyError` as
    `load_policy` does.
    """
    spec = load_policy(policy)
    name = f"{spec.name or 'policy'}, no slots"
    neutral = {"heads": {}, "admission": {"kind": "novelty"}, "observe": {}, "eviction": "never"}
    return load_policy(spec, {"growth.kind": "none", **neutral}).named(name)
