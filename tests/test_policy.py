"""Policies: rules that span pieces, what follows from the spec alone, and that every field says what it means."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memkit
from memkit.pieces import Need
from memkit.pieces.merging import Weigh
from memkit.pieces.readout import ReadoutSpec
from memkit.policy import PolicySpec
from memkit.rendering import render

BLOCK = {"kind": "block", "chunks": 2}
FIXED = {"kind": "fixed", "slots": 8}
GROWS = {"chunker": {"kind": "fixed", "size": 4}, "window": BLOCK, "growth": FIXED}


def spec(**families: Any) -> PolicySpec:
    """A policy that grows, changed."""
    return PolicySpec(**(GROWS | families))


@pytest.mark.parametrize(
    ("families", "message"),
    [
        (
            {"window": {"kind": "sliding", "size": 8}},
            "window: sliding needs growth none, got growth fixed; use window: {kind: block, chunks: 2}",
        ),
        (
            {"window": {"kind": "all"}},
            "window: nothing ever leaves a window of all tokens, so growth must be none, got fixed; use window:",
        ),
        (
            {"admission": {"kind": "none"}},
            "admission: none lets nobody found a slot under routing nearest; use routing: {kind: segment}, or",
        ),
        (
            {"sinks": 8},
            "growth: a budget that can equal its sinks needs merging drop, for a token would have no slot to join; "
            "got 8 slots with 8 sinks when the first token that is no sink leaves the window; "
            "raise growth.floor above 8, or write merging: {kind: drop}",
        ),
        (
            {"growth": {"kind": "fixed", "slots": 0}},
            "got 0 slots with 0 sinks",
        ),
        (
            {"growth": {"kind": "sqrt", "factor": 0.1, "counts": "absorbed"}},
            "got 0 slots with 0 sinks",
        ),
        (
            {"routing": {"kind": "nearest", "new_slots": False}, "sinks": 1},
            "routing.new_slots: false leaves the first chunk without a slot to join unless it founds whole "
            "(and is longer than the sinks), or sinks are 0 and admission is novelty; "
            "got sinks 1, admission novelty, first_chunk budget; set growth.first_chunk: whole",
        ),
        (
            {"routing": {"kind": "nearest", "new_slots": False}, "admission": {"kind": "recency"}},
            "got sinks 0, admission recency, first_chunk budget; set growth.first_chunk: whole",
        ),
        (
            {"merging": {"kind": "weighted-mean", "weight": "learned", "weigh": {"keys": False}}},
            "merging.weigh.keys and merging.weigh.values must be equal where a readout divides by the mass, "
            "got keys false and values true; set both, or use readout: {key: layer-norm, value: birth-radius}",
        ),
        (
            {
                "routing": {"kind": "segment"},
                "admission": {"kind": "none"},
                "readout": {"key": "layer-norm", "value": "birth-radius"},
            },
            "readout.value: birth-radius needs slots founded by one token, and with admission none routing segment "
            "founds them by runs; use value: mean-norm, or admission: {kind: novelty}",
        ),
    ],
)
def test_rules_that_span_pieces(families: dict[str, Any], message: str):
    with pytest.raises(memkit.PolicyError, match=re.escape(message)):
        spec(**families)


@pytest.mark.parametrize(
    "families",
    [
        {"sinks": 8, "merging": {"kind": "drop"}},
        {"sinks": 7},
        {"growth": {"kind": "fixed", "slots": 0}, "merging": {"kind": "drop"}},
        {"growth": {"kind": "fixed", "slots": 0, "first_chunk": "whole"}},
        {"routing": {"kind": "nearest", "new_slots": False}},
        {"routing": {"kind": "nearest", "new_slots": False}, "sinks": 1, "growth": FIXED | {"first_chunk": "whole"}},
        {"routing": {"kind": "segment"}, "admission": {"kind": "none"}},
        {"routing": {"kind": "segment"}, "admission": {"kind": "novelty"}},
        {
            "routing": {"kind": "segment"},
            "admission": {"kind": "recency"},
            "readout": {"key": "layer-norm", "value": "birth-radius"},
        },
        {
            "merging": {"kind": "weighted-mean", "weight": "learned", "weigh": {"keys": False}},
            "readout": {"key": "layer-norm", "value": "birth-radius"},
        },
        {"growth": {"kind": "none"}, "window": {"kind": "sliding", "size": 8}, "sinks": 20},
        {"growth": {"kind": "none"}, "admission": {"kind": "none"}},
    ],
)
def test_what_lies_just_inside_the_rules(families: dict[str, Any]):
    assert spec(**families).build()


@pytest.mark.parametrize(
    ("families", "message"),
    [
        ({"window": BLOCK | {"chunks": 0}}, "window.chunks: must be greater than or equal to 1, got 0"),
        ({"window": BLOCK | {"chunk": 2}}, "window.chunk: unknown field; did you mean 'chunks'?"),
        ({"windw": BLOCK}, "windw: unknown field; did you mean 'window'?"),
        ({"sinks": 1.5}, "sinks: must be a valid integer, got 1.5"),
        ({"sinks": "4"}, "sinks: must be a valid integer, got '4'"),
        ({"sinks": True}, "sinks: must be a valid integer, got True"),
        ({"readout": {"key": "layernorm"}}, "readout.key: must be 'mean', 'layer-norm', 'l2' or 'mean-norm'"),
        ({"readout": {"keys": "mean"}}, "readout.keys: unknown field; did you mean 'key'?"),
        ({"growth": {"kind": "fixed"}}, "growth.slots: is required and missing"),
        (
            {"growth": {"kind": "sqroot", "factor": 1}},
            "growth.kind: unknown growth kind 'sqroot'; did you mean 'sqrt'?",
        ),
        ({"growth": "sqrt"}, "growth:"),
    ],
)
def test_errors_say_where_what_and_what_is_allowed(families: dict[str, Any], message: str):
    with pytest.raises(memkit.PolicyError, match=re.escape(message)) as caught:
        spec(**families)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_mistyped_field_is_one_problem_and_two_mistakes_are_two():
    known = "floor, cap, round_down, counts, first_chunk, factor"
    typo = f"growth.fctor: unknown field; did you mean 'factor'? known: {known}"
    with pytest.raises(memkit.PolicyError, match=f"^{re.escape(typo)}$"):
        spec(growth={"kind": "sqrt", "fctor": 16})
    with pytest.raises(
        memkit.PolicyError, match=r"^sinks: must .*; growth.factor: is .* missing; growth.flor: unknown "
    ):
        spec(growth={"kind": "sqrt", "flor": 16}, sinks=-1)


def test_left_out_families_mean_full_attention():
    assert PolicySpec() == memkit.load_policy("full")
    policy = PolicySpec().build()
    assert [policy.slots_after(tokens) for tokens in (0, 1, 10**6)] == [0, 0, 0]
    assert policy.learned == ()


def test_specs_are_frozen_and_compare_by_what_they_declare():
    one, other = memkit.load_policy("full"), PolicySpec()
    assert one == other
    assert hash(one) == hash(other)
    assert one.named("mine") == one
    assert one.named("mine").name == "mine"
    assert one != spec()
    with pytest.raises(ValueError, match="frozen"):
        one.sinks = 3


def test_every_field_says_what_it_means():
    for model in (PolicySpec, ReadoutSpec, Weigh):
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_a_policy_knows_what_must_be_learned():
    learned = {name: memkit.load_policy(name).build().learned for name in memkit.policy_names()}
    assert learned["kvm-sqrt-16"] == (Need.MERGE_WEIGHTS, Need.KEY_NORM, Need.QUERY_SCALES)
    assert [name for name, parts in learned.items() if parts and not name.startswith("kvm-")] == []


def test_budget_of_the_paper_schedule():
    """b + W·C tokens are seen when the chunk at b leaves: ⌊16·√(256·(c + 2))⌋, at least 256, C at once at most."""
    policy = memkit.load_policy("kvm-sqrt-16").build()
    assert [policy.budget(begin) for begin in (0, 256, 512, 62 * 256)] == [256, 443, 512, 2048]
    assert [policy.slots_after_chunk(index) for index in (-1, 0, 1, 2, 62)] == [0, 256, 443, 512, 2048]
    assert [policy.slots_after(tokens) for tokens in (512, 513, 768, 769, 16385)] == [0, 256, 256, 443, 2048]


@pytest.mark.parametrize("name", memkit.policy_names())
@given(chunks=st.lists(st.integers(0, 60), min_size=1, max_size=10))
def test_slots_keep_to_the_budget_and_never_shrink(name: str, chunks: list[int]):
    policy = memkit.load_policy(name).build()
    if not policy.chunk:
        return
    whole = policy.chunk if policy.growth is not None and policy.growth.spec.first_chunk == "whole" else 0
    for chunk in chunks:
        before, after = policy.slots_after_chunk(chunk - 1), policy.slots_after_chunk(chunk)
        assert 0 <= after - before <= policy.chunk
        assert after <= max(policy.budget(chunk * policy.chunk), whole)
        assert min(policy.sinks, (chunk + 1) * policy.chunk) <= after <= (chunk + 1) * policy.chunk


def test_slots_do_not_depend_on_the_order_of_asking():
    late, early = (memkit.load_policy("untrained-kvm-sqrt").named(None).build() for _ in range(2))
    expected = [early.slots_after_chunk(index) for index in range(50)]
    assert [late.slots_after_chunk(index) for index in reversed(range(50))] == expected[::-1]


def test_html_shows_the_declaration():
    html = render(memkit.load_policy("kvm-sqrt-16"), "html")
    assert "kvm-sqrt-16</p>" in html
    assert "factor: 16" in html
