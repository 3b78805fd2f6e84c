"""Where tokens are, by the marks in the sums: it is what the plan says, whatever the policy does."""

import numpy as np
import pytest
import torch

import memkit
from memkit.errors import InputError
from memkit.viz.trace import Trace, trace

SMALL = {"chunker.size": 8}
TOKENS = 90
ROTATION = memkit.Rotation("half-split", 4, torch.tensor([1.0, 0.1]))


def tensors(tokens: int = TOKENS):
    torch.manual_seed(0)
    topics = torch.randn(5, 16)
    keys = topics[torch.randint(5, (tokens,))] + 0.3 * torch.randn(tokens, 16)
    return torch.randn(2, tokens, 16), keys, torch.randn(tokens, 12)


def traced(name: str, overrides: dict[str, object] | None = None) -> Trace:
    policy = memkit.load_policy(name, {**SMALL, **(overrides or {})}).build()
    return trace(policy, *tensors(), rotation=ROTATION if policy.needs_rotation else None)


SMALL_POLICIES = [
    ("untrained-kvm-fixed", {"growth.slots": 20}),
    ("untrained-kvm-sqrt", {"growth.floor": 0, "growth.factor": 2.0}),
    ("block-mean-8", {}),
    ("kvm-sqrt-16", {"growth.floor": 10, "growth.factor": 2.0}),
    ("ovq-1024", {}),
]


@pytest.mark.parametrize(("name", "overrides"), SMALL_POLICIES)
def test_tokens_are_where_the_plan_puts_them(name: str, overrides: dict[str, object]):
    found = traced(name, overrides)
    policy = memkit.load_policy(name, {**SMALL, **overrides}).build()
    rotation = ROTATION if policy.needs_rotation else None
    plan = memkit.plan(policy, tensors()[1][None, None], rotation=rotation)
    left = int(plan.length[0])
    assert found.window_begin[-1] == left
    assert found.slots[-1, :left].tolist() == plan.slot[0, 0, :left].tolist()
    assert (found.slots[-1, left:] == -1).all()
    assert found.live[-1] == plan.slots[0, -1]


@pytest.mark.parametrize(("name", "overrides"), SMALL_POLICIES)
def test_every_token_that_left_is_in_one_slot(name: str, overrides: dict[str, object]):
    found = traced(name, overrides)
    for look, left in enumerate(found.window_begin):
        assert found.counts(look).sum() == left
        assert found.forgotten(look) == 0
        assert (found.counts(look) > 0).all()


OBSERVED = {"growth.slots": 12, "window.chunks": 2, "observe.queries": 8}


def test_where_slots_compete_and_merge_nothing_is_lost():
    found = traced("untrained-observed", OBSERVED)
    assert found.joins
    assert found.counts().sum() == found.window_begin[-1]
    assert found.slots[-1, :4].tolist() == [0, 1, 2, 3], "sinks"


def test_what_is_evicted_is_forgotten_and_scores_say_why():
    found = traced("h2o-512", OBSERVED)
    assert not found.joins
    assert found.forgotten() == found.window_begin[-1] - found.live[-1]
    assert (found.counts() == 1).all()
    decision = found.decisions[-1]
    assert decision.chosen.sum() == found.live[-1] - found.sinks
    assert decision.slots + 8 == len(decision.score)
    assert decision.score[decision.chosen].min() >= decision.score[~decision.chosen].max()


def test_a_sliding_window_keeps_its_sinks():
    found = trace(memkit.load_policy("streaming-4-512", {"window.size": 20}), *tensors())
    assert found.slots[-1, :4].tolist() == [0, 1, 2, 3]
    assert found.forgotten() == TOKENS - 20 - 4
    assert found.decisions == ()


def test_full_attention_has_no_slots():
    found = trace("full", *tensors())
    assert found.live[-1] == 0
    assert (found.slots == -1).all()


def test_ages_are_of_the_tokens_inside():
    found = traced("block-mean-8", {})
    tokens = np.flatnonzero(found.slots[-1] == 0)
    assert found.ages()[0] == pytest.approx((TOKENS - 1 - tokens).mean())
    assert found.first_tokens()[0] == tokens[0]


def test_one_head_at_a_time():
    queries, keys, values = tensors()
    with pytest.raises(InputError, match="one head at a time"):
        trace("full", queries[None], keys, values)
