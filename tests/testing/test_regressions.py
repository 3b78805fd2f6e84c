"""Counter-examples that the laws have found, each as small as it was found."""

import torch

from memkit import PolicySpec, attend
from memkit.testing import Case, laws
from tests.testing.ema import EmaSpec


def test_a_token_may_join_a_slot_whose_founder_stands_behind_it():
    """A rule that is not additive lost the token: the founder's row replaced it."""
    spec = PolicySpec(
        chunker={"kind": "fixed", "size": 2},
        window={"kind": "block", "chunks": 1},
        sinks=2,
        growth={"kind": "fixed", "floor": 3, "slots": 0},
        merging=EmaSpec(),
    )
    laws.same_plan_same_answer(spec, Case(lengths=(5,), width=1, value_width=1))


def test_learned_weights_without_growth():
    """The reference wanted weights that a policy without slots has not."""
    spec = PolicySpec(
        window={"kind": "sliding", "size": 6}, sinks=1, merging={"kind": "weighted-mean", "weight": "learned"}
    )
    laws.same_plan_same_answer(spec, Case(lengths=(10,), weights="some-zero"))


def test_weights_that_want_gradients_are_checked_without_a_warning():
    spec = PolicySpec(
        chunker={"kind": "fixed", "size": 2},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": 2},
        merging={"kind": "weighted-mean", "weight": "learned"},
    )
    laws.same_plan_same_answer(spec, Case(lengths=(7,), weights="positive", gradients=True))


def test_gradients_of_a_memory_that_may_hold_nothing():
    """The backward pass looked for slots where the budget allows none."""
    spec = PolicySpec(
        chunker={"kind": "fixed", "size": 1},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": 0},
        merging={"kind": "drop"},
    )
    laws.same_plan_same_answer(spec, Case(lengths=(3,), gradients=True))


def test_directions_are_those_of_means():
    """Below 1e-12 a vector has no direction: the reference measured the sum, the engine the mean."""
    spec = PolicySpec(
        chunker={"kind": "fixed", "size": 1},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": 1},
        admission={"kind": "none"},
        routing={"kind": "segment"},
        readout={"key": "l2", "value": "mean-norm"},
    )
    laws.same_plan_same_answer(spec, Case(lengths=(3,), width=1, value_width=1, values="tiny"))
    laws.same_plan_same_answer(spec, Case(lengths=(5,), keys="tiny", values="tiny"))


def test_a_rule_is_asked_about_tokens_that_join_alone():
    """On an empty slot a rule that divides by the mass gave NaN, and NaN · 0 spoiled the gradients."""

    class Normed(EmaSpec):
        def build(self):
            class Rule(type(EmaSpec().build())):
                def combine(self, slot, token):
                    return slot / slot[:, -1:] + token

            return Rule()

    spec = PolicySpec(
        chunker={"kind": "fixed", "size": 2},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": 3},
        merging=Normed(),
    )
    keys = torch.randn(1, 1, 9, 2, requires_grad=True)
    output, _ = attend(spec, keys, keys, keys)
    assert torch.autograd.grad(output.sum(), keys)[0].isfinite().all()
