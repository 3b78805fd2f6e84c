"""The strategies: everything valid can be drawn, nothing else is, and it shrinks to something readable."""

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st
from pydantic import Field

import memkit
from memkit.pieces import Merging, MergingSpec, registry
from memkit.pieces.growth import SqrtGrowthSpec
from memkit.pieces.registry import Spec, kinds
from memkit.testing import Case, calls, cases, plans, policies, scaled_down, specs, splits
from memkit.testing.cases import DATA, make

QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SMALLEST = settings(max_examples=300, derandomize=True, database=None, deadline=None, phases=list(Phase))


@functools.cache
def drawn() -> list[memkit.PolicySpec]:
    """What the strategy gives in a thousand draws, the same each time: none of it made smaller."""
    seen = list[memkit.PolicySpec]()

    @settings(max_examples=1000, phases=[Phase.generate], derandomize=True, database=None, deadline=None)
    @given(policies(registered=False))
    def draw(spec: memkit.PolicySpec) -> None:
        seen.append(spec)

    draw()
    return seen


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family in ("window", "growth", "admission", "routing", "merging", "rotary")
        for kind in kinds(family)
    ],
)
def test_every_kind_is_drawn(family, kind):
    assert any(getattr(spec, family).kind == kind for spec in drawn())


@pytest.mark.parametrize(
    "wanted",
    [
        lambda spec: spec.sinks > spec.chunker.build().size and spec.growth.kind != "none",
        lambda spec: getattr(spec.growth, "first_chunk", "") == "whole" and spec.sinks == 1,
        lambda spec: getattr(spec.growth, "cap", None) is not None,
        lambda spec: getattr(spec.routing, "new_slots", True) is False and spec.merging.kind == "mean",
        lambda spec: spec.routing.kind == "segment" and spec.admission.kind == "novelty",
        lambda spec: spec.routing.kind == "segment" and spec.readout.value == "birth-radius",
        lambda spec: spec.readout.value == "birth-radius" and spec.readout.bias == "count",
        lambda spec: spec.chunker.kind == "boundaries" and spec.growth.kind != "none",
        lambda spec: spec.eviction == "weakest" and spec.observe.queries > 0 and spec.merging.kind != "drop",
        lambda spec: spec.eviction == "weakest" and spec.observe.queries == 0,
        lambda spec: getattr(spec.merging, "weight", "") == "share" and spec.readout.bias == "mass",
        lambda spec: getattr(spec.merging, "of", "") == "values" and spec.observe.queries == 0,
        lambda spec: spec.heads.uneven is not None and spec.eviction == "weakest",
    ],
)
def test_awkward_policies_are_drawn(wanted: Callable[[memkit.PolicySpec], bool]):
    assert any(wanted(spec) for spec in drawn())


def test_a_policy_shrinks_to_the_least_that_shows_it():
    found = find(policies(registered=False), lambda spec: spec.growth.kind == "sqrt", settings=SMALLEST)

    assert found.chunker.build().size == 1
    assert found.sinks == 0
    assert found.merging.kind in ("mean", "drop")
    assert found.growth == SqrtGrowthSpec(factor=1.0)


def test_a_case_shrinks_to_one_short_row_of_small_numbers():
    policy = memkit.load_policy("kvm-sqrt-16", {"chunker.size": 2}).build()
    found = find(cases(policy), lambda case: case.tokens > 5, settings=SMALLEST)

    assert found == Case(lengths=(6,), width=found.width, value_width=found.value_width)


def test_registered_kinds_are_drawn_from_their_annotations(monkeypatch):
    class Detail(Spec):
        deep: bool = False

    class MineSpec(MergingSpec):
        kind: Literal["mine"] = "mine"
        rate: float = Field(gt=0, lt=1)
        steps: int = Field(ge=2, le=4)
        mode: Literal["a", "b"] = "a"
        detail: Detail = Detail()
        most: int | None = None

        def build(self) -> Merging:
            return Merging()

    monkeypatch.setitem(registry._REGISTRY["merging"], "mine", MineSpec)
    seen = set()

    @QUICK
    @given(specs("merging", "mine"))
    def drawn(spec):
        assert 0 < spec.rate < 1
        assert 2 <= spec.steps <= 4
        seen.add((spec.mode, spec.detail.deep))

    drawn()
    assert len(seen) == 4
    find(policies(), lambda spec: spec.merging.kind == "mine", settings=SMALLEST)


@QUICK
@given(calls())
def test_drawn_policies_run_on_their_cases(call):
    spec, case = call
    inputs = case.inputs(spec.build())
    output, memory = inputs.attend(spec.build())

    assert output.shape[2] == case.tokens
    assert memory.seen.tolist() == list(case.lengths)


@QUICK
@given(st.data())
def test_any_drawn_plan_is_followed_alike_by_engine_and_oracle(data):
    spec, case = data.draw(calls())
    policy = spec.build()
    assume(policy.chunk and policy.plans_ahead)
    case = replace(case, keys="integers", values="integers", dtype="float64", positions=False)
    plan = data.draw(plans(policy, case))
    made, inputs = case.inputs(policy).plan(policy), case.inputs(policy)

    assert plan.slots.tolist() == made.slots.tolist()
    assert plan.founded.sum(-1).tolist() == made.founded.sum(-1).tolist()
    output, memory = inputs.attend(policy, plan=plan)
    wanted, remembered = inputs.attend(policy, plan=plan, backend="reference")
    # Sums of whole numbers, at most a few hundred of them, and one softmax over them.
    assert (output - wanted).abs().max() <= 2**12 * torch.finfo(torch.float64).eps * (1 + wanted.abs().max())
    assert torch.equal(memory.counts, remembered.counts)


def test_a_plan_shrinks_to_the_lowest_slots():
    policy = memkit.load_policy("kvm-fixed-256", {"chunker.size": 4, "growth.slots": 4}).build()
    case = Case(lengths=(20,))
    found = find(plans(policy, case), lambda plan: plan.slot.numel() > 0, settings=SMALLEST)

    assert found.slot[0, 0, :4].tolist() == [0, 1, 2, 3]
    assert set(found.slot[0, 0, 4:].tolist()) == {1}


@QUICK
@given(st.sampled_from(DATA), st.integers(1, 9), st.integers(0, 99))
def test_data_are_finite_and_the_same_every_time(kind, tokens, seed):
    first, second = (make(kind, (2, 1, tokens, 3), torch.Generator().manual_seed(seed)) for _ in range(2))

    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.shape == (2, 1, tokens, 3)


@QUICK
@given(splits(), st.integers(1, 20))
def test_splits_cover_a_sequence(pieces, tokens):
    cuts = list(Case(lengths=(tokens,), pieces=pieces).cuts())

    assert cuts[0][0] == 0
    assert cuts[-1][1] == tokens
    assert all(left[1] == right[0] for left, right in pairwise(cuts))


@pytest.mark.parametrize("name", memkit.policy_names())
def test_policies_in_small_have_as_many_slots_per_chunk(name):
    spec = memkit.load_policy(name)
    small = scaled_down(spec)
    large, little = spec.build(), small.build()

    assert small.chunker.build().size in (4, 8)
    if large.growth is None:
        return
    for chunks in (3, 10, 40):  # sinks are as many as before, and whole slots round
        ratio = large.slots_after_chunk(chunks) / large.chunk
        slack = (spec.sinks + 2) / little.chunk
        assert little.slots_after_chunk(chunks) / little.chunk == pytest.approx(ratio, rel=0.25, abs=slack)


@pytest.mark.parametrize("fields", [{"pieces": ()}, {"pieces": (2, 0)}, {"ends": (0,)}, {"lengths": ()}])
def test_a_case_that_would_never_end_is_none(fields: dict[str, tuple[int, ...]]):
    with pytest.raises(memkit.InputError, match="a case's"):
        Case(**fields)
