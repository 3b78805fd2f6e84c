"""Gradients against finite differences, in float64, along a frozen plan."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit.engine import forward, gradients
from tests.engine.cases import Case, cotangent, make_case, small

LEARNED = {"weight": "learned", "kind": "weighted-mean"}

POLICIES: list[Any] = [
    pytest.param("kvm-sqrt-16", {}, id="the paper's"),
    pytest.param("kvm-sqrt-16", {"merging.weigh": {"founders": True, "first_chunk": True}}, id="founders weighed"),
    pytest.param("kvm-sqrt-16", {"readout": {"key": "mean", "value": "mean", "count_bias": True}}, id="weighted means"),
    pytest.param("kvm-sqrt-16", {"readout": {"key": "mean-norm", "value": "mean-norm"}}, id="weighted mean norms"),
    pytest.param("kvm-sqrt-16", {"readout.key": "l2", "readout.value": "count-mean"}, id="unit keys, count means"),
    pytest.param(
        "kvm-sqrt-16",
        {"readout": {"key": "mean", "value": "mean", "temperatures": True}, "rotary": {"kind": "rerotate"}},
        id="rerotate, where weights move positions",
    ),
    pytest.param(
        "kvm-sqrt-16", {"rotary": {"kind": "unrotate"}, "readout.count_bias": True}, id="unrotate, count bias"
    ),
    pytest.param(
        "kvm-sqrt-16", {"merging": {"kind": "weighted-mean", "weight": "key-norm"}}, id="key norms as weights"
    ),
    pytest.param("untrained-kvm-sqrt", {}, id="cosine, mean norms, rerotate"),
    pytest.param("block-mean-8", {}, id="pooled blocks"),
    pytest.param("ovq-1024", {}, id="vector quantisation"),
    pytest.param("streaming-4-512", {"readout.temperatures": True}, id="sinks and a sliding window"),
]


def check(case: Case, cuts: list[int]) -> None:
    """gradcheck of outputs and of the last memory's slots, over calls that end at `cuts`."""
    plan = case.plan()
    names = [*case.tensors, *case.learned]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, given, strict=True))
        made = dataclasses.replace(
            case,
            tensors={name: named[name] for name in case.tensors},
            learned={name: named[name] for name in case.learned},
        )
        memory, outputs = None, []
        for begin, end in pairwise(cuts):
            output, memory = made.part(begin, end).attend(memory=memory, plan=plan)
            outputs.append(output)
        assert memory is not None
        return (*outputs, memory.sums, memory.store.numbers, memory.keys)

    leaves = case.leaves()
    torch.autograd.gradcheck(run, tuple((leaves.tensors | leaves.learned).values()), fast_mode=True)


@pytest.mark.parametrize(("name", "changes"), POLICIES)
def test_one_call(name: str, changes: dict[str, Any]):
    spec = memkit.load_policy(small(name), changes)
    check(make_case(spec, 41, rows=1, heads=2, kv_heads=1), [0, 41])


@pytest.mark.parametrize(("name", "changes"), POLICIES)
def test_through_a_memory(name: str, changes: dict[str, Any]):
    spec = memkit.load_policy(small(name), changes)
    check(make_case(spec, 41, rows=1, heads=2, kv_heads=1), [0, 13, 27, 28, 41])


@pytest.mark.parametrize(("heads", "kv_heads", "value_width"), [(4, 2, 3), (3, 3, 11), (6, 2, 8)])
def test_grouped_heads_and_values_of_any_width(heads: int, kv_heads: int, value_width: int):
    spec = small("kvm-sqrt-16")
    check(make_case(spec, 35, rows=2, heads=heads, kv_heads=kv_heads, value_width=value_width), [0, 20, 35])


def test_entry_by_entry():
    # Not along one random direction, as above, but every input's every entry.
    spec = memkit.PolicySpec(
        chunker={"kind": "fixed", "size": 2},
        window={"kind": "block", "chunks": 1},
        sinks=1,
        growth={"kind": "fixed", "slots": 3},
        merging={"kind": "weighted-mean", "weight": "learned"},
        readout={"key": "layer-norm", "value": "birth-radius", "temperatures": True},
        rotary={"kind": "zero", "width": 2},
    )
    case = make_case(spec, 7, rows=1, heads=1, kv_heads=1, value_width=2).leaves()
    plan = case.plan()
    names = [*case.tensors, *case.learned]

    def run(*given: Tensor) -> Tensor:
        named = dict(zip(names, given, strict=True))
        made = dataclasses.replace(
            case,
            tensors={name: named[name] for name in case.tensors},
            learned={name: named[name] for name in case.learned},
        )
        return made.attend(plan=plan)[0]

    torch.autograd.gradcheck(run, tuple((case.tensors | case.learned).values()))


@pytest.mark.parametrize("name", memkit.policy_names())
def test_gradients_of_some_inputs_alone(name: str):
    case = make_case(small(name), 43)
    direction = cotangent(case)
    _, _, gradients = case.gradients(direction)
    for wanted in case.tensors:
        one = {name_: tensor.clone() for name_, tensor in case.tensors.items()}
        one[wanted].requires_grad_()
        output, _ = dataclasses.replace(case, tensors=one).attend()
        (gradient,) = torch.autograd.grad((output * direction).sum(), [one[wanted]])
        assert torch.allclose(gradient, gradients[wanted], rtol=1e-12, atol=1e-13), wanted


def test_no_gradient_flows_through_the_plan():
    # Moving every key a little changes no choice; the derivative is that of the frozen plan.
    case = make_case(small("untrained-kvm-sqrt"), 61)
    frozen, own = case.gradients(cotangent(case), plan=case.plan()), case.gradients(cotangent(case))
    for name, gradient in frozen[2].items():
        assert torch.equal(gradient, own[2][name]), name


@pytest.mark.parametrize(
    "name", ["kvm-sqrt-16", "kvm-fixed-256", "untrained-kvm-sqrt", "block-mean-8", "streaming-4-512"]
)
@pytest.mark.parametrize("rows", ["even", "uneven"])
def test_how_much_is_gone_back_through_at_once_changes_nothing(name: str, rows: str, monkeypatch: pytest.MonkeyPatch):
    case = make_case(small(name), 61)
    lengths = {"lengths": [61, 38]} if rows == "uneven" else {}
    direction = cotangent(case)
    *_, expected = case.gradients(direction, **lengths)
    assert all(bool(each.abs().sum() > 0) for each in expected.values())
    for unfolded, together in ((1, 0), (1, 2048), (20, 2048), (2048, 0), (20, 30)):
        monkeypatch.setattr(gradients, "UNFOLDED_TOGETHER", unfolded)
        monkeypatch.setitem(forward.TOGETHER, "cpu", together)
        *_, found = case.gradients(direction, **lengths)
        for each, gradient in found.items():
            torch.testing.assert_close(gradient, expected[each], rtol=1e-12, atol=1e-12, msg=each)


def test_a_model_may_go_backward_twice_through_separate_graphs():
    case = make_case(small("kvm-sqrt-16"), 43)
    one, other = case.leaves(), case.leaves()
    (one.attend()[0].sum() + other.attend()[0].sum()).backward()
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.grad, other.tensors[name].grad), name


def test_a_graph_may_be_walked_twice():
    case = make_case(small("kvm-sqrt-16"), 43).leaves()
    output, _ = case.attend()
    first = torch.autograd.grad(output.sum(), [case.tensors["keys"]], retain_graph=True)[0]
    again = torch.autograd.grad(output.sum(), [case.tensors["keys"]])[0]
    assert torch.equal(first, again)


def test_what_is_changed_in_place_before_backward_is_noticed():
    case = make_case(small("kvm-sqrt-16"), 43).leaves()
    scaled = case.tensors["queries"] * 1.0
    output, _ = dataclasses.replace(case, tensors=case.tensors | {"queries": scaled}).attend()
    with torch.no_grad():
        scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
