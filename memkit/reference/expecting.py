"""Expected attention (arXiv 2510.00636), reader by reader: what share those who go on will pay each row."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.pieces.admission import ExpectedAttentionSpec
from memkit.reference.rules import Rules

__all__ = ["Reader", "but_sinks", "expected"]

Reader = tuple[Tensor, int, Tensor]
"""An observed query, its head and its rotary position."""


def expected(rules: Rules, readers: list[Reader], end: Tensor, keys: Tensor, biases: Tensor, slots: int) -> list[float]:
    """The expected share of each row: `slots` slots and then the window's tokens, keys [m, d], biases [m].

    Of each head, a reader stands where it would on the average over the next places from `end` on. Were scores of a row
    normally distributed over readers, log E exp(score) = their mean + half their variance: of this the softmax over
    rows that are no sinks.
    """
    spec = rules.spec.admission
    assert isinstance(spec, ExpectedAttentionSpec)
    heads = sorted({head for _, head, _ in readers})
    rows = range(min(rules.spec.sinks, len(keys)), len(keys))
    shares = [0.0] * len(keys)
    for head in heads:
        learned = (rules.memory_scale, rules.window_scale)
        scales = [rules.scale * (1.0 if each is None else float(each[head].detach())) for each in learned]
        turned = [turned_ahead(rules, query, place, end, spec.future) for query, at, place in readers if at == head]
        logits: list[float] = []
        for j in rows:
            scores = [scales[0 if j < slots else 1] * float(keys[j] @ query) for query in turned]
            mean = sum(scores) / len(scores)
            variance = sum((score - mean) ** 2 for score in scores) / len(scores) if spec.covariance else 0.0
            logits.append(mean + variance / 2 + float(biases[j]))
        if logits:
            for j, share in zip(rows, torch.tensor(logits, dtype=torch.float64).softmax(0).tolist(), strict=True):
                shares[j] += share / len(heads)
    return shares


def turned_ahead(rules: Rules, query: Tensor, place: Tensor, end: Tensor, future: int) -> Tensor:
    """A query's mean over the places end … end + future − 1."""
    return torch.stack([rules.treatment.rotated(query, end + f - place, +1) for f in range(future)]).mean(0)


def but_sinks(readers: list[tuple[Reader, int]], sinks: int) -> list[Reader]:
    """The readers (with their tokens' positions) that are no sinks; all of them where there is no other."""
    others = [reader for reader, position in readers if position >= sinks]
    return others or [reader for reader, _ in readers]
