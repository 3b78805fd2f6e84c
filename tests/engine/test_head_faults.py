"""Planted faults: what tells heads apart must notice when they are mixed up."""

from __future__ import annotations

import pytest
import torch

from memkit.engine import heads as by_runs
from tests.engine.test_heads import test_each_head_is_as_it_would_be_alone as notices


def test_a_heads_rows_counted_to_another_are_noticed(monkeypatch: pytest.MonkeyPatch):
    whole = by_runs.by_heads

    def turned(given):
        parts = list(whole(given))
        policies = [part.policy for _, part in parts]
        for (queries, part), policy in zip(parts, policies[::-1], strict=True):
            part.policy = policy
            yield queries, part

    monkeypatch.setattr(by_runs, "by_heads", turned)
    with pytest.raises(AssertionError), torch.no_grad():
        notices("untrained-observed", "torch")


def test_queries_of_another_head_are_noticed(monkeypatch: pytest.MonkeyPatch):
    whole = by_runs.by_heads

    def turned(given):
        for queries, part in whole(given):
            assert part.queries is not None
            part.queries = part.queries.flip(1)
            yield queries, part

    monkeypatch.setattr(by_runs, "by_heads", turned)
    with pytest.raises(AssertionError), torch.no_grad():
        notices("kvm-sqrt-16", "torch")
