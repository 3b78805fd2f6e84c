"""Plans: which tokens found a slot and which one the others join, by hand, by the oracle, and on exact ties."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import memkit
from memkit.engine import lanes
from memkit.memory import Memory
from memkit.reference.rules import Rules
from tests.engine.cases import (
    WIDTH,
    Case,
    assert_close,
    assert_same_plan,
    awkward_lengths,
    checked_plan_call,
    make_case,
    small,
    tolerance,
)

NAMES = [name for name in memkit.policy_names() if memkit.load_policy(name).build().plans_ahead]


# By hand: keys on a line, one row, one head


def plan_of(keys: list[list[float]], *, oracle: bool, dtype: torch.dtype = torch.float64, **fields: Any) -> memkit.Plan:
    """The plan of tokens with these keys, chunks of 4 and a window of one chunk unless `fields` say otherwise."""
    declared: dict[str, Any] = {
        "chunker": {"kind": "fixed", "size": 4},
        "window": {"kind": "block", "chunks": 1},
        "growth": {"kind": "fixed", "slots": 2},
        **fields,
    }
    # One more token, so that the last chunk leaves.
    tensor = torch.tensor([[*keys, keys[0]]], dtype=dtype)[None]
    case = Case(memkit.PolicySpec(**declared), {"keys": tensor}, {})
    return case.oracle_plan() if oracle else case.plan()


def line(*angles: float) -> list[list[float]]:
    """Unit keys at these angles, in degrees."""
    turned = np.deg2rad(np.array(angles))
    return np.stack((np.cos(turned), np.sin(turned)), axis=1).tolist()


SEGMENT = {"admission": {"kind": "none"}, "routing": {"kind": "segment"}}
ABSORBED = {"counts": "absorbed"}

BY_HAND = [
    pytest.param(
        # Token 0 founds slot 0; 180° is the least like it and founds slot 1; 90° is as far from both.
        line(0, 10, 90, 180), {}, [0, 0, 0, 1], [1, 0, 0, 1],
        id="novelty in an empty memory: token 0, then the least like it",
    ),
    pytest.param(
        line(0, 180, 100, 170), {"routing": {"kind": "nearest", "new_slots": False}}, [0, 1, 0, 0], [1, 1, 0, 0],
        id="no joining of slots founded in the same step, but for an empty memory's first",
    ),
    pytest.param(
        # Chunk 0 founds whole; nothing more is granted; chunk 1 joins what is nearest.
        [*line(0, 90, 180, 270), *line(1, 91, 181, 271)],
        {"growth": {"kind": "fixed", "slots": 2, "first_chunk": "whole"}},
        [0, 1, 2, 3, 0, 1, 2, 3], [1, 1, 1, 1, 0, 0, 0, 0],
        id="a first chunk founds whole, whatever the budget",
    ),
    pytest.param(
        # One sink; slot 1 is the last of chunk 0. In chunk 1 all tokens look like the sink, and must go to slot 1.
        [*line(0, 90, 90, 90), *line(0, 1, 2, 3)], {"sinks": 1}, [0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0],
        id="a sink is no target",
    ),
    pytest.param(
        # Budgets 1 and 2: a single slot is enough to tell which token of chunk 1 is the least like it.
        [*line(0, 10, 20, 30), *line(5, 180, 0, 10)], {"growth": {"kind": "linear", "fraction": 0.25}},
        [0, 0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1, 0, 0],
        id="novelty against a single slot",
    ),
    pytest.param(
        # Five sinks: all of chunk 0, and the first token of chunk 1. Of the other three, two found and one joins.
        [*line(0, 1, 2, 3), *line(4, 180, 90, 170)], {"sinks": 5, "growth": {"kind": "fixed", "slots": 7}},
        [0, 1, 2, 3, 4, 5, 6, 6], [1, 1, 1, 1, 1, 1, 0, 1],
        id="sinks over two chunks",
    ),
    pytest.param(
        line(0, 90, 180, 270), {"admission": {"kind": "recency"}}, [1, 0, 0, 1], [0, 0, 1, 1],
        id="recency: the last two found",
    ),
    pytest.param(
        # Offsets ⌊0·4/3⌋, ⌊1·4/3⌋, ⌊2·4/3⌋ = 0, 1, 2.
        line(0, 90, 180, 271), {"admission": {"kind": "stride"}, "growth": {"kind": "fixed", "slots": 3}},
        [0, 1, 2, 0], [1, 1, 1, 0], id="stride: tokens 0, 1, 2 of 4 for three slots",
    ),
    pytest.param(
        # The sink stands apart; of the three others those at offsets 0 and ⌊3/2⌋ = 1 found.
        line(0, 90, 180, 179), {"admission": {"kind": "stride"}, "sinks": 1, "growth": {"kind": "fixed", "slots": 3}},
        [0, 1, 2, 2], [1, 1, 1, 0], id="stride among the tokens that are no sinks",
    ),
    pytest.param(
        line(0, 0, 0, 0), {**SEGMENT, "growth": {"kind": "fixed", "slots": 3}}, [0, 1, 2, 2], [1, 1, 1, 0],
        id="segment: runs of 1, 1 and 2 tokens",
    ),
    pytest.param(
        line(*[0] * 8), {**SEGMENT, "growth": {"kind": "linear", "fraction": 0.375, **ABSORBED}},
        [0, 0, 0, 0, 1, 1, 2, 2], [1, 0, 0, 0, 1, 0, 1, 0], id="segment: one slot in 4 tokens, then two",
    ),
    pytest.param(
        line(*[0] * 8), {**SEGMENT, "growth": {"kind": "fixed", "slots": 2}},
        [0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0, 0], id="segment: nothing granted, all join the newest slot",
    ),
    pytest.param(
        line(*[0] * 8), {**SEGMENT, "sinks": 2, "growth": {"kind": "fixed", "slots": 3}},
        [0, 1, 2, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0], id="segment: sinks apart, the newest slot is none",
    ),
    pytest.param(
        line(0, 10, 90, 180), {"merging": {"kind": "drop"}}, [0, -1, -1, 1], [1, 0, 0, 1],
        id="drop: who founds nothing is gone",
    ),
    pytest.param(
        line(0, 10, 90, 180), {"growth": {"kind": "none"}, "sinks": 2}, [0, 1, -1, -1], [1, 1, 0, 0],
        id="no growth: sinks and nothing else",
    ),
    pytest.param(
        # Distances to 0: 3, 1, 2, of which the farthest founds; 2 is nearer to 3 than to 0.
        [[0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [2.0, 0.0]], {"routing": {"kind": "nearest", "similarity": "l2"}},
        [0, 1, 0, 1], [1, 1, 0, 0], id="l2: the farthest founds",
    ),
    pytest.param(
        # By dot product the third token would be the most novel, by direction it is the second.
        [[1.0, 0.0], [5.0, 5.0], [0.2, 0.1], [9.0, 8.0]], {"routing": {"kind": "nearest", "similarity": "cosine"}},
        [0, 1, 1, 1], [1, 1, 0, 0], id="cosine: lengths do not count",
    ),
]  # fmt: skip


@pytest.mark.parametrize("oracle", [False, True], ids=["torch", "reference"])
@pytest.mark.parametrize(("keys", "fields", "slot", "founded"), BY_HAND)
def test_by_hand(keys: list[list[float]], fields: dict, slot: list[int], founded: list[int], oracle: bool):
    plan = plan_of(keys, oracle=oracle, **fields)
    assert plan.slot[0, 0].tolist() == slot
    assert plan.founded[0, 0].int().tolist() == founded
    assert plan.begin.tolist() == [0]
    assert plan.length.tolist() == [len(keys)]


def test_a_plan_says_how_many_slots_there_are_after_each_chunk():
    case = make_case(memkit.load_policy(small("block-mean-8"), {"growth.fraction": 0.25}), 49, rows=3)
    for plan in (case.plan(lengths=[49, 41, 3]), case.oracle_plan(lengths=np.array([49, 41, 3]))):
        # A window of 4 chunks: two chunks have left after 49 tokens, none after 3.
        assert plan.slots.tolist() == [[2, 4, 6], [2, 4, 4], [0, 0, 0]]
        assert plan.length.tolist() == [24, 16, 0]


# Engine and oracle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_plans_agree_where_choices_have_a_margin(name: str, dtype: torch.dtype):
    # Random keys: no two similarities lie within float32's rounding of each other in these examples.
    for tokens in (*awkward_lengths(small(name)), 150):
        case = make_case(small(name), tokens, seed=7)
        assert_same_plan(case.to(dtype).plan(), case.oracle_plan())


@pytest.mark.parametrize("name", NAMES)
def test_plans_of_rows_at_unequal_positions_agree(name: str):
    case = make_case(small(name), 60, rows=3)
    lengths = np.array([60, 7, 33])
    assert_same_plan(case.plan(lengths=torch.from_numpy(lengths)), case.oracle_plan(lengths=lengths))
    _, memory = case.part(0, 20).attend(lengths=[20, 0, 3])
    rest = case.part(20, 60)
    lengths = np.array([1, 40, 33])
    expected = rest.oracle_plan(memory=memory, lengths=lengths)
    assert_same_plan(rest.plan(memory=memory, lengths=torch.from_numpy(lengths)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_reads_the_memory_and_leaves_it_alone(name: str):
    case = make_case(small(name), 70)
    whole = case.plan()
    with torch.no_grad():
        _, memory = case.part(0, 41).attend()
    kept = memory.fork()
    plan = case.part(41, 70).plan(memory=memory)
    assert not memory.taken
    assert not memory.written
    for name_, tensor in kept._saved().items():
        assert torch.equal(memory._saved()[name_], tensor), name_
    begin, length = int(plan.begin[0]), int(plan.length[0])
    assert torch.equal(plan.slot, whole.slot[:, :, begin : begin + length])
    assert torch.equal(plan.founded, whole.founded[:, :, begin : begin + length])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_loops", [True, False])
def test_attend_follows_the_plan_it_would_make(name: str, by_loops: bool, monkeypatch: pytest.MonkeyPatch):
    """To the last bit, but where loops fold, which sum in another order."""
    monkeypatch.setattr(lanes, "ENABLED", by_loops)
    case = make_case(small(name), 70)
    (own, memory), (given, other) = case.attend(), case.attend(plan=case.plan())
    assert torch.equal(memory.counts, other.counts)
    assert_close(own, given, tolerance(own.dtype, 64) if by_loops else 0, "outputs")
    assert_close(memory.sums, other.sums, tolerance(own.dtype, 64) if by_loops else 0, "sums")


def test_attend_follows_any_plan():
    case = make_case(small("untrained-kvm-sqrt"), 70)
    plan = case.plan()
    newest = torch.from_numpy(np.repeat(plan.slots[0], 8))[: plan.slot.shape[2]] - 1
    other = dataclasses.replace(plan, slot=torch.where(plan.founded, plan.slot, newest))
    assert not torch.equal(other.slot, plan.slot)
    output, memory = case.attend(plan=other)
    expected, expected_memory = case.attend(plan=other, backend="reference")
    assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(memory.counts, expected_memory.counts)


# Exact ties


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("admission", ["novelty", "recency", "stride"])
@pytest.mark.parametrize("similarity", ["dot", "l2", "cosine"])
def test_ties_go_to_the_lowest_slot_and_the_earliest_token(similarity: str, admission: str, dtype: torch.dtype):
    spec = memkit.PolicySpec(
        chunker={"kind": "fixed", "size": 8},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "sqrt", "factor": 2.0, "first_chunk": "whole", "floor": 8},
        admission={"kind": admission},
        routing={"kind": "nearest", "similarity": similarity},
    )
    for seed in range(6):
        random = torch.Generator().manual_seed(seed)
        # Six keys of whole numbers and one length, all founded in the first chunk: every slot then holds copies of one
        # key, and the copies of a key in many slots tie exactly.
        pool = torch.stack(
            [torch.tensor([1, 2, -1, 3, 2, 1, 1, 2])[torch.randperm(8, generator=random)] for _ in range(6)]
        )
        which = torch.cat((torch.arange(8) % 6, torch.randint(6, (300,), generator=random)))
        case = Case(spec, {"keys": pool[which].to(dtype)[None, None]}, {})
        plan = case.plan()
        assert_same_plan(plan, case.oracle_plan())
        if admission == "novelty":  # all tokens are as redundant as can be: the earliest found
            for begin in range(8, plan.slot.shape[2], 8):
                founded = plan.founded[0, 0, begin : begin + 8].int().tolist()
                assert founded == sorted(founded, reverse=True)


def test_token_ids_that_repeat_make_slots_of_one_key():
    case = make_case(small("kvm-sqrt-16"), 400, rows=1, heads=1, kv_heads=1)
    pool = case.tensors["keys"][:, :, :12].clone()
    which = torch.cat((torch.arange(8), torch.randint(12, (392,), generator=torch.Generator().manual_seed(0))))
    case.tensors["keys"] = pool[:, :, which]
    assert_same_plan(case.plan(), case.oracle_plan())


# Budgets


GROWTHS = [
    *[memkit.load_policy(name).growth.model_dump() for name in NAMES],
    {"kind": "sqrt", "factor": 0.1, "floor": 1},
    {"kind": "power", "factor": 1.0, "exponent": 0.5, "round_down": 16},
    {"kind": "power", "factor": 3.0, "exponent": 1.0, "cap": 700},
    {"kind": "log", "per_doubling": 3.0, "start": 8.0, "counts": "absorbed"},
    {"kind": "saturating", "limit": 7, "floor": 3, "round_down": 2},
    {"kind": "linear", "fraction": 0.1, "counts": "absorbed"},
    {"kind": "linear", "fraction": 0.29, "floor": 2},
    {"kind": "linear", "fraction": 1.0},
]


@pytest.mark.parametrize("growth", GROWTHS, ids=lambda growth: growth["kind"])
@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_budgets_agree(growth: dict[str, Any], chunk: int):
    spec = memkit.PolicySpec(
        chunker={"kind": "fixed", "size": chunk},
        window={"kind": "block", "chunks": 2},
        sinks=1,
        growth=growth,
        merging={"kind": "drop"},
    )
    keys: Tensor = torch.zeros(1, 1, 1, WIDTH)
    rules = Rules(checked_plan_call(spec.build(), keys))
    for left in range(0, 400 * chunk, chunk):
        slots = rules.slots(left)
        assert spec.build().slots_after(left + chunk + 1) == slots, f"after {left} tokens have left"
        assert slots <= left


def test_a_plan_is_bitwise_the_same_twice():
    case = make_case(small("kvm-sqrt-16"), 150)
    assert_same_plan(case.plan(), case.plan())


def test_repr_names_rows_heads_and_tokens():
    assert repr(make_case(small("block-mean-8"), 41).plan()) == (
        "Plan(2 rows × 2 heads, 16 tokens leave, slots after each chunk [[1, 2], [1, 2]])"
    )
    assert isinstance(make_case(small("full"), 5).attend()[1], Memory)


def test_calls_that_are_alike_share_nothing_that_can_be_written() -> None:
    """Their schedule is worked out once; what they return is each one's own."""
    policy = memkit.load_policy("ovq-1024", {"chunker.size": 8}).build()
    keys = torch.randn(2, 2, 60, 8, generator=torch.Generator().manual_seed(0))
    plan = memkit.plan(policy, keys)
    begin = plan.begin.copy()
    _, memory = memkit.attend(policy, keys, keys, keys)
    plan.begin[:] = 8
    memory.seen_rows[:] = 7

    assert (memkit.plan(policy, keys).begin == begin).all()
    _, again = memkit.attend(policy, keys, keys, keys)
    assert (again.seen_rows == 60).all()
