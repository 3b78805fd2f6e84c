"""Planted faults: what tells heads apart must notice when they are mixed up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memkit import loops
from memkit.engine import competing, heads_as_rows, lanes
from memkit.engine import heads as by_runs
from memkit.engine.observe import Observer
from memkit.memory.contest import Contest
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
    monkeypatch.setattr(heads_as_rows, "ENABLED", False)
    with pytest.raises(AssertionError), torch.no_grad():
        notices("untrained-observed", "torch")


def test_a_rows_budget_given_to_another_head_is_noticed(monkeypatch: pytest.MonkeyPatch):
    whole = heads_as_rows._as_rows
    swapped: list[bool] = []

    def turned(inputs):
        made = whole(inputs)
        assert made.row_policies is not None
        swapped.append(True)
        return dataclasses.replace(made, row_policies=made.row_policies[::-1])

    monkeypatch.setattr(heads_as_rows, "_as_rows", turned)
    with pytest.raises((AssertionError, RuntimeError)), torch.no_grad():
        notices("untrained-observed", "torch")
    assert swapped


def test_slots_that_only_fill_up_are_noticed_where_they_are_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Observer, "_hiding", lambda _, view, live: view)
    monkeypatch.setattr(lanes, "ENABLED", False)
    with pytest.raises(AssertionError), torch.no_grad():
        notices("untrained-observed", "torch")


@pytest.mark.skipif(not loops.installed() or not loops.with_products(), reason="needs loops with products")
def test_a_lane_that_takes_anothers_place_is_noticed(monkeypatch: pytest.MonkeyPatch):
    hand_back = competing.CompetingLanes._hand_back
    monkeypatch.setattr(
        competing.CompetingLanes, "_hand_back", lambda self, each, *rest: hand_back(self, each[::-1], *rest)
    )
    with pytest.raises((AssertionError, RuntimeError)), torch.no_grad():
        notices("untrained-observed", "torch")


def test_tokens_that_stand_apart_from_their_neighbours_are_noticed(monkeypatch: pytest.MonkeyPatch):
    def apart(contest, slots, tokens, first=0):
        return torch.cat((slots, tokens), dim=2)

    monkeypatch.setattr(Contest, "behind", apart)
    monkeypatch.setattr(loops, "ENABLED", False)
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
