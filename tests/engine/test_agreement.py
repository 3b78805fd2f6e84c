"""Same plan, same answer: the fast engine against the oracle, for every shipped policy and awkward lengths.

Both follow one injected plan, so that a flipped choice neither hides nor fakes an error; plans are compared apart, in
`test_plan.py`. The oracle runs once, in float64, on inputs that are exact in float32.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import memkit
from memkit.pieces.admission import ExpectedAttentionSpec
from tests.engine.cases import (
    WIDTH,
    Case,
    assert_close,
    awkward_lengths,
    cotangent,
    make_case,
    scaled,
    slots_of,
    small,
    tolerance,
)

NAMES = memkit.policy_names()


def assert_agrees(case: Case, operations: int = 512) -> None:
    """Outputs, slots and gradients of the engine in float64 and float32 are the oracle's."""
    plan, direction = case.plan_if_any(), cotangent(case)
    output, memory, gradients = case.gradients(direction, plan=plan, backend="reference")
    for dtype in (torch.float64, torch.float32):
        limit, narrow = tolerance(dtype, operations), case.to(dtype)
        found, held, found_gradients = narrow.gradients(direction.to(dtype), plan=plan)
        assert found.dtype == dtype
        assert_close(found, output, limit, f"{dtype} output")
        for actual, expected, what in zip(slots_of(held), slots_of(memory), ("sums", "numbers"), strict=True):
            assert_close(actual, expected, limit, f"{dtype} {what}")
        assert found_gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert_close(found_gradients[name], expected, limit, f"{dtype} gradient of {name}")
        with torch.no_grad():
            inferred, _ = narrow.attend(plan=plan)
        assert_close(inferred, output, limit, f"{dtype} output without gradients")


@pytest.mark.parametrize(
    ("name", "tokens"), [(name, tokens) for name in NAMES for tokens in awkward_lengths(small(name))]
)
def test_awkward_lengths(name: str, tokens: int):
    assert_agrees(make_case(small(name), tokens, rows=2 if tokens < 30 else 1, seed=tokens))


@pytest.mark.parametrize("name", NAMES)
def test_a_few_hundred_tokens(name: str):
    assert_agrees(make_case(small(name), 203, rows=1, heads=2, kv_heads=1), operations=2048)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shipped_sizes(name: str):
    spec = memkit.load_policy(name)
    tokens = (spec.build().window.capacity or 512) + 4 * spec.chunker.build().size + 3
    assert_agrees(make_case(spec, tokens, rows=1, heads=2, kv_heads=1), operations=4096)


@pytest.mark.parametrize("name", NAMES)
def test_a_scaled_policy_differs_in_sizes_alone(name: str):
    spec, shrunk = memkit.load_policy(name), scaled(memkit.load_policy(name))
    if isinstance(spec.admission, ExpectedAttentionSpec):
        assert isinstance(shrunk.admission, ExpectedAttentionSpec)
        assert 1 <= shrunk.admission.future < spec.admission.future
        shrunk = memkit.load_policy(shrunk, {"admission.future": spec.admission.future})
    for family in ("admission", "routing", "merging", "readout", "rotary", "sinks"):
        assert getattr(shrunk, family) == getattr(spec, family)
    assert (shrunk.growth.kind, shrunk.window.kind) == (spec.growth.kind, spec.window.kind)


@pytest.mark.parametrize("pairing", ["adjacent", "half-split"])
@pytest.mark.parametrize("name", ["untrained-kvm-sqrt", "block-mean-8"])
def test_both_ways_to_pair_channels(name: str, pairing: str):
    assert_agrees(make_case(small(name), 50, pairing=pairing))


@pytest.mark.parametrize("value_width", [1, 8, 11])
@pytest.mark.parametrize("name", ["kvm-sqrt-16", "streaming-4-512"])
def test_values_of_any_width(name: str, value_width: int):
    assert_agrees(make_case(small(name), 43, value_width=value_width))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 3)])
def test_any_grouping_of_heads(heads: int, kv_heads: int):
    assert_agrees(make_case(small("kvm-sqrt-16"), 43, heads=heads, kv_heads=kv_heads))


def apart(tensor: Tensor, step: int) -> Tensor:
    """The same numbers, those of a channel `step` numbers apart: as a convolution leaves them, or as every other of
    twice as many channels, between which there is none."""
    if step == 2:
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1).flatten(-2)[..., ::2]
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("step", [2, 43])
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
@pytest.mark.parametrize("name", ["full", "streaming-4-512", "kvm-sqrt-16", "snapkv-512"])
def test_channels_need_not_stand_next_to_each_other(name: str, which: str, step: int):
    case = make_case(small(name), 43, heads=2, kv_heads=2, value_width=WIDTH)
    direction, limit = cotangent(case), tolerance(torch.float64)
    output, _, gradients = case.gradients(direction)

    def moved(leaves: Case) -> Case:
        changed = {**leaves.tensors, which: apart(leaves.tensors[which], step)}
        assert changed[which].stride(-1) == step
        return dataclasses.replace(leaves, tensors=changed)

    leaves = case.leaves()
    actual, _ = moved(leaves).attend()
    assert_close(actual, output, limit, "output")
    found = torch.autograd.grad(actual, list(leaves.tensors.values()), apart(direction, step))
    for of, gradient in zip(leaves.tensors, found, strict=True):
        assert_close(gradient, gradients[of], limit, f"gradient of {of}")
    with torch.no_grad():
        first, memory = moved(case).part(0, 40).attend()
        pieces = [first]
        for index in range(40, 43):
            piece, memory = moved(case).part(index, index + 1).attend(memory=memory)
            pieces.append(piece)
    assert_close(torch.cat(pieces, dim=2), output, limit, "output in pieces")


def test_a_scale_of_ones_own():
    case = make_case(small("kvm-sqrt-16"), 43)
    output, _ = case.attend(scale=0.7)
    expected, _ = case.attend(scale=0.7, backend="reference")
    assert_close(output, expected, tolerance(torch.float64), "output")


def test_the_oracle_is_full_attention_where_the_policy_is():
    case = make_case(small("full"), 37)
    output, _ = case.attend(backend="reference")
    expected = torch.nn.functional.scaled_dot_product_attention(**{
        {"queries": "query", "keys": "key", "values": "value"}[name]: tensor for name, tensor in case.tensors.items()
    }, is_causal=True, enable_gqa=True)  # fmt: skip
    assert_close(output, expected, tolerance(torch.float64), "output")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"routing.similarity": "cosine"}, id="cosine"),
        pytest.param({"routing.similarity": "l2"}, id="l2"),
        pytest.param({"routing.new_slots": False}, id="old slots only"),
        pytest.param({"admission.kind": "recency"}, id="recency"),
        pytest.param({"admission.kind": "stride"}, id="stride"),
        pytest.param({"sinks": 3, "growth.first_chunk": "budget", "growth.floor": 5}, id="sinks before the rest"),
        pytest.param({"sinks": 11, "growth.floor": 14}, id="sinks over two chunks"),
        pytest.param({"growth.first_chunk": "budget", "growth.floor": 0}, id="first chunk by budget"),
        pytest.param({"growth.counts": "absorbed", "growth.round_down": 4}, id="tokens absorbed, by fours"),
        pytest.param({"growth.cap": 11}, id="a cap"),
        pytest.param({"window.chunks": 1}, id="a window of one chunk"),
        pytest.param({"merging": {"kind": "drop"}}, id="drop"),
        pytest.param({"merging": {"kind": "weighted-mean", "weight": "key-norm"}}, id="key norms as weights"),
        pytest.param({"merging.weigh.founders": True}, id="founders weighed"),
        pytest.param({"merging.weigh.first_chunk": True}, id="first chunk weighed"),
        pytest.param({"merging.weigh.keys": False}, id="values weighed alone"),
        pytest.param({"merging.weigh.values": False}, id="keys weighed alone"),
        pytest.param({"readout.key": "mean", "readout.value": "mean"}, id="means"),
        pytest.param({"readout.key": "l2", "readout.value": "count-mean"}, id="unit keys, count means"),
        pytest.param({"readout.key": "mean-norm", "readout.value": "mean-norm"}, id="mean norms"),
        pytest.param({"readout.count_bias": True}, id="count bias"),
        pytest.param({"readout.temperatures": False}, id="no temperatures"),
        pytest.param({"rotary": {"kind": "keep"}}, id="keep"),
        pytest.param({"rotary": {"kind": "unrotate"}}, id="unrotate"),
        pytest.param({"rotary": {"kind": "rerotate"}}, id="rerotate"),
        pytest.param(
            {"rotary": {"kind": "rerotate"}, "readout.key": "mean", "readout.count_bias": True}, id="all at once"
        ),
    ],
)
def test_every_field_of_a_piece(changes: dict):
    assert_agrees(make_case(memkit.load_policy(small("kvm-sqrt-16"), changes), 61, rows=1))


def test_a_memory_that_has_no_slots_yet_drops_everything():
    changes = {"merging": {"kind": "drop"}, "sinks": 0, "growth": {"kind": "log", "per_doubling": 1.0, "start": 40.0}}
    case = make_case(memkit.load_policy(small("kvm-sqrt-16"), changes), 61)
    assert case.plan().slots[0].tolist()[:4] == [0, 0, 0, 1]
    assert_agrees(case)
    assert_agrees(case.part(0, 32))


def test_tokens_without_weight_leave_no_trace():
    case = make_case(memkit.load_policy(small("kvm-sqrt-16"), {"readout": {"key": "mean", "value": "mean"}}), 61)
    case.tensors["weights"][:, :, ::2] = 0
    assert_agrees(case)
