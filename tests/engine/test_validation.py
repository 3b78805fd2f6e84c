"""Every refusal of a call says the rule, the value, and what to do."""

from __future__ import annotations

import dataclasses
import re
from inspect import isfunction
from typing import Any

import pytest
import torch

import memkit
from tests.engine.cases import WIDTH, make_case, small

LEARNED = make_case(small("kvm-sqrt-16"), 10)
ROTATED = make_case(small("block-mean-8"), 10)
PLAIN = make_case(small("full"), 10)


def changed(base: Any, **changes: Any) -> dict[str, Any]:
    """A good call's arguments, some of them changed; a function makes a new one from the old."""
    arguments = {"policy": base.spec, **base.tensors, "parameters": base.parameters(), "rotation": base.rotation}
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if isfunction(change) else change
    return arguments


def without(name: str) -> Any:
    def change(parameters: memkit.PolicyParameters) -> memkit.PolicyParameters:
        setattr(parameters, name, None)
        return parameters

    return change


def cut(name: str) -> Any:
    def change(parameters: memkit.PolicyParameters) -> memkit.PolicyParameters:
        shorter = getattr(parameters, name)[1:]
        delattr(parameters, name)
        setattr(parameters, name, shorter)
        return parameters

    return change


def at(positions: torch.Tensor) -> Any:
    return lambda rotation: dataclasses.replace(rotation, positions=positions)


def learned(rotation: memkit.Rotation) -> memkit.Rotation:
    return dataclasses.replace(rotation, frequencies=rotation.frequencies.clone().requires_grad_())


REFUSALS = [
    # Shapes
    (
        changed(PLAIN, queries=None),
        "queries must be a tensor [batch, heads, tokens, width], got None",
    ),
    (
        changed(PLAIN, values=None),
        "values must be a tensor [batch, heads, tokens, width], got None",
    ),
    (
        changed(PLAIN, keys=None),
        "keys must be a tensor [batch, heads, tokens, width], got NoneType",
    ),
    (
        changed(PLAIN, queries=[1.0]),
        "queries must be a tensor [batch, heads, tokens, width], got list",
    ),
    (
        changed(PLAIN, keys=lambda t: t[0]),
        "keys must be a tensor [batch, heads, tokens, width], got (2, 10, 8)",
    ),
    (
        changed(PLAIN, values=lambda t: t[None]),
        "values must be a tensor [batch, heads, tokens, width], got (1, 2, 2, 10, 6)",
    ),
    (
        changed(PLAIN, queries=lambda t: t[:1]),
        "queries must have the keys' 2 rows and 10 tokens, got 1 and 10",
    ),
    (
        changed(PLAIN, values=lambda t: t[:, :, 1:]),
        "values must have the keys' 2 rows and 10 tokens, got 2 and 9",
    ),
    (
        changed(PLAIN, values=lambda t: t[:, :1]),
        "values must have the keys' 2 heads and at least one channel, got (2, 1, 10, 6)",
    ),
    (
        changed(PLAIN, values=lambda t: t[..., :0]),
        "values must have the keys' 2 heads and at least one channel, got (2, 2, 10, 0)",
    ),
    (
        changed(PLAIN, queries=lambda t: t[..., 1:]),
        "queries must be as wide as keys, 8 channels, got 7",
    ),
    (
        changed(PLAIN, queries=lambda t: t[:, :3]),
        "query heads must be a multiple of the 2 key/value heads, got 3",
    ),
    (
        changed(PLAIN, queries=lambda t: t[:, :0]),
        "query heads must be a multiple of the 2 key/value heads, got 0",
    ),
    (
        changed(PLAIN, queries=lambda t: t[:0], keys=lambda t: t[:0], values=lambda t: t[:0]),
        "keys need at least one row, one head and one channel, got (0, 2, 10, 8)",
    ),
    # Dtypes and devices
    (
        changed(PLAIN, queries=lambda t: t.long()),
        "queries must be floating point (float32, float64, bfloat16, float16), got torch.int64",
    ),
    (
        changed(PLAIN, values=lambda t: t.float()),
        "values must have the keys' dtype torch.float64, got torch.float32; convert one of them",
    ),
    (
        changed(PLAIN, queries=lambda t: t.to("meta")),
        "queries must be on the keys' device cpu, got meta; move one of them",
    ),
    # Merge weights
    (
        changed(PLAIN, weights=torch.ones(2, 2, 10)),
        "weights are given, but this policy weighs nothing with them; leave them out, or use merging: "
        "{kind: weighted-mean, weight: learned} in a memory that grows",
    ),
    (
        changed(LEARNED, weights=lambda t: t[:, :, 1:]),
        "weights must be [b, g, t] = (2, 2, 10), got (2, 2, 9)",
    ),
    (
        changed(LEARNED, weights=lambda t: t[..., None]),
        "weights must be [b, g, t] = (2, 2, 10), got (2, 2, 10, 1)",
    ),
    (
        changed(LEARNED, weights=lambda t: t.long()),
        "weights must be floating point on cpu, got torch.int64 on cpu",
    ),
    (
        changed(LEARNED, weights=lambda t: t.to("meta")),
        "weights must be floating point on cpu, got torch.float64 on meta",
    ),
    (
        changed(LEARNED, weights=lambda t: t * 0 - 0.5),
        "weights must be at least 0, got -0.5; KVM takes 1 + ELU of its gate",
    ),
    # Rotation
    (
        changed(ROTATED, rotation=None),
        "rotary rerotate must un-rotate keys and needs to know how they were rotated; "
        "give rotation=memkit.Rotation(pairing, width, frequencies)",
    ),
    (
        changed(LEARNED, rotation=ROTATED.rotation),
        "rotation is given, but rotary zero does not use it; leave it out",
    ),
    (
        changed(PLAIN, rotation=ROTATED.rotation),
        "rotation is given, but with growth none sinks stay at their own positions; leave it out",
    ),
    (
        changed(ROTATED, rotation=memkit.Rotation("adjacent", 10, torch.ones(5))),
        "rotation.width must be at most the head width 8, got 10",
    ),
    (
        changed(ROTATED, rotation=at(torch.zeros(2, 9))),
        "rotation.positions must be [b, t] = (2, 10), got (2, 9)",
    ),
    # What the policy has learned
    (
        changed(LEARNED, parameters={}),
        "parameters must be memkit.PolicyParameters, got dict",
    ),
    (
        changed(LEARNED, parameters=without("key_norm_bias")),
        "the policy needs parameters.key_norm_bias; make them with PolicyParameters(policy, heads, head_width)",
    ),
    (
        changed(PLAIN, parameters=LEARNED.parameters()),
        "the policy has no use for parameters.key_norm_weight; "
        "make them with PolicyParameters(policy, heads, head_width)",
    ),
    (
        changed(LEARNED, parameters=cut("key_norm_weight")),
        "parameters.key_norm_weight must have shape (8,), got (7,)",
    ),
    (
        changed(LEARNED, parameters=cut("query_scale_memory")),
        "parameters.query_scale_memory must have shape (4,), got (3,)",
    ),
    # Lengths
    (
        changed(PLAIN, lengths=torch.tensor([3])),
        "lengths must be one whole number per row, shape (2,), got torch.int64 (1,)",
    ),
    (
        changed(PLAIN, lengths=torch.tensor([3.0, 4.0])),
        "lengths must be one whole number per row, shape (2,), got torch.float32 (2,)",
    ),
    (
        changed(PLAIN, lengths=torch.tensor([True, True])),
        "lengths must be one whole number per row, shape (2,), got torch.bool (2,)",
    ),
    (
        changed(PLAIN, lengths=[3, 11]),
        "lengths must lie between 0 and the call's 10 tokens, got [3, 11]",
    ),
    (
        changed(PLAIN, lengths=[-1, 4]),
        "lengths must lie between 0 and the call's 10 tokens, got [-1, 4]",
    ),
    # The rest
    (
        changed(PLAIN, scale=float("nan")),
        "scale must be a finite number, got nan",
    ),
    (
        changed(PLAIN, scale=-0.3),
        "scale must be above 0, got -0.3; multiply the queries by it instead",
    ),
    (
        changed(PLAIN, scale=0),
        "scale must be above 0, got 0; multiply the queries by it instead",
    ),
    (
        changed(PLAIN, scale=torch.tensor(0.3, requires_grad=True)),
        "scale has no gradient, got a tensor that asks for one; multiply the queries by it instead",
    ),
    (
        changed(ROTATED, rotation=learned),
        "rotation.frequencies have no gradient, got a tensor that asks for one; detach() it",
    ),
    (
        changed(PLAIN, backend="cuda"),
        "backend must be 'auto', 'torch' or 'reference', got 'cuda'",
    ),
    (
        changed(LEARNED, plan=make_case(LEARNED.spec, 10, rows=3).plan()),
        "plan must be made for the same rows and heads, got (3, 2) for keys of (2, 2); "
        "make it with memkit.plan on these keys",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[message[:60] for _, message in REFUSALS])
def test_refusals(arguments: dict[str, Any], message: str):
    given = dict(arguments)
    with pytest.raises(memkit.InputError) as refusal:
        memkit.attend(given.pop("policy"), given.pop("queries"), given.pop("keys"), given.pop("values"), **given)
    assert str(refusal.value) == message
    assert isinstance(refusal.value, ValueError)
    assert isinstance(refusal.value, memkit.MemkitError)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: memkit.Rotation("pairs", 4, torch.ones(2)),
            "rotation.pairing must be 'adjacent' or 'half-split', got 'pairs'",
        ),
        (
            lambda: memkit.Rotation("adjacent", 5, torch.ones(2)),
            "rotation.width must be an even number of channels, at least 2, got 5",
        ),
        (
            lambda: memkit.Rotation("adjacent", 4, torch.ones(4)),
            "rotation.frequencies needs one number per pair of channels, shape (2,), got (4,)",
        ),
    ],
)
def test_a_rotation_that_makes_no_sense(make: Any, message: str):
    with pytest.raises(memkit.InputError, match=re.escape(message)):
        make()


def test_more_rotated_channels_than_there_are():
    spec = memkit.load_policy(small("kvm-sqrt-16"), {"rotary": {"kind": "zero", "width": 9}})
    keys = torch.zeros(1, 1, 30, WIDTH)
    with pytest.raises(memkit.InputError, match=re.escape("rotary.width must be at most the head width 8, got 9")):
        memkit.attend(spec, keys, keys, keys)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_plan_that_does_not_reach_is_refused(backend: str):
    case = make_case(small("kvm-sqrt-16"), 60)
    message = "plan must cover the tokens that leave during the call, 0 … 47 in row 1, got {}; make it with memkit.plan"
    with pytest.raises(memkit.InputError, match=re.escape(message.format("0 … 15"))):
        case.attend(plan=case.plan(lengths=[60, 30]), backend=backend)
    with pytest.raises(memkit.InputError, match=re.escape(message.format("none"))):
        case.attend(plan=case.plan(lengths=[60, 9]), backend=backend)
    output, _ = case.attend(plan=case.plan(lengths=[60, 30]), lengths=[60, 30], backend=backend)
    assert output[:, :, 0].isfinite().all()


def test_a_good_call_is_not_refused():
    for case in (LEARNED, ROTATED, PLAIN):
        arguments = changed(case)
        output, _ = memkit.attend(arguments.pop("policy"), **arguments)
        assert output.shape == (2, 4, 10, 6)


def test_weights_left_out_are_ones():
    case = make_case(small("kvm-sqrt-16"), 60)
    ones = dataclasses.replace(case, tensors=case.tensors | {"weights": torch.ones(2, 2, 60).double()})
    none = dataclasses.replace(case, tensors={name: t for name, t in case.tensors.items() if name != "weights"})
    assert torch.equal(ones.attend()[0], none.attend()[0])
    assert torch.equal(ones.attend(backend="reference")[0], none.attend(backend="reference")[0])


def test_parameters_left_out_are_ones_and_zeros():
    case = make_case(small("kvm-sqrt-16"), 60)
    neutral = {name: torch.zeros_like(t) if "bias" in name else torch.ones_like(t) for name, t in case.learned.items()}
    expected = dataclasses.replace(case, learned=neutral).attend()[0]
    for backend in ("torch", "reference"):
        output, _ = dataclasses.replace(case, learned={}).attend(backend=backend)
        assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)
