"""Dtypes: what comes in goes out, sums are kept in float32 or better, and results are near the oracle's."""

from __future__ import annotations

import pytest
import torch

import memkit
from memkit.pieces import Need
from tests.engine.cases import cotangent, error, make_case, small

NAMES = [name for name in memkit.policy_names() if memkit.load_policy(name).build().plans_ahead]
NARROW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes_are_near_the_oracle(name: str, dtype: torch.dtype):
    case = make_case(small(name), 60, rows=1, heads=2, kv_heads=1).to(dtype)
    plan, direction = case.plan(), cotangent(case).to(dtype)
    expected, _, gradients = case.gradients(direction, plan=plan, backend="reference")
    output, memory, found = case.gradients(direction, plan=plan)
    assert output.dtype == expected.dtype == dtype
    # Reading rounds keys, values and outputs once each; four of them may go one way.
    assert error(output, expected) <= 8 * torch.finfo(dtype).eps
    for name_, gradient in gradients.items():
        assert found[name_].dtype == dtype
        assert error(found[name_], gradient) <= 16 * torch.finfo(dtype).eps, name_
    assert memory.keys.dtype == dtype
    assert memory.sums.dtype == torch.float32
    assert memory.store.numbers.dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_in_narrow_dtypes_follows_the_same_plan(name: str, dtype: torch.dtype):
    case = make_case(small(name), 60).to(dtype)
    expected, whole = case.attend()
    outputs, memory = [], None
    for position in range(60):
        output, memory = case.part(position, position + 1).attend(memory=memory)
        outputs.append(output)
    assert memory is not None
    assert torch.equal(memory.counts, whole.counts)
    assert error(torch.cat(outputs, dim=2), expected) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["kvm-sqrt-16", "block-mean-8"])
def test_many_small_tokens_are_not_lost_in_a_bfloat16_sum(name: str):
    # 3,000 values of 1 in few slots: a bfloat16 sum would stop at 256.
    spec = memkit.load_policy(small(name), {"growth": {"kind": "fixed", "slots": 8}})
    keys = torch.zeros(1, 1, 3000, 8, dtype=torch.bfloat16)
    values = torch.ones(1, 1, 3000, 8, dtype=torch.bfloat16)
    rotation = memkit.Rotation("adjacent", 8, torch.ones(4)) if Need.ROTATION in spec.build().needs else None
    with torch.no_grad():
        output, memory = memkit.attend(spec, keys, keys, values, rotation=rotation)
    sums = memory.sums[..., 8:].sum()
    assert sums == memory.counts.sum() * 8
    assert output[0, 0, -1].tolist() == [1.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_have_the_inputs_dtype(dtype: torch.dtype):
    for backend in ("torch", "reference"):
        _, memory = make_case(small("kvm-sqrt-16"), 43).to(dtype).attend(backend=backend)
        assert (memory.sums.dtype, memory.store.numbers.dtype) == (dtype, torch.float64)


def test_parameters_may_be_wider_than_the_inputs():
    case = make_case(small("kvm-sqrt-16"), 60)
    expected, _ = case.attend()
    narrow = case.to(torch.bfloat16)
    parameters = case.parameters()
    output, _ = memkit.attend(case.spec, **narrow.tensors, parameters=parameters, plan=case.plan())
    assert output.dtype == torch.bfloat16
    assert error(output, expected) <= 16 * torch.finfo(torch.bfloat16).eps


def test_weights_may_be_wider_than_the_keys():
    case = make_case(small("kvm-sqrt-16"), 60)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in case.tensors.items()}
    narrow["weights"] = case.tensors["weights"].float()
    whole, _ = memkit.attend(case.spec, **narrow, parameters=case.parameters())
    first = {name: tensor[:, :, :35] for name, tensor in narrow.items()}
    second = {name: tensor[:, :, 35:] for name, tensor in narrow.items()}
    with torch.no_grad():
        _, memory = memkit.attend(case.spec, **first, parameters=case.parameters())
        output, _ = memkit.attend(case.spec, **second, parameters=case.parameters(), memory=memory)
    assert error(output, whole[:, :, 35:]) <= 8 * torch.finfo(torch.bfloat16).eps


def test_large_scores_do_not_overflow():
    case = make_case(small("kvm-sqrt-16"), 60).to(torch.float32)
    case.tensors["queries"] *= 1e4
    output, _, gradients = case.gradients(cotangent(case).float())
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_of_zero_give_zero(name: str):
    case = make_case(small(name), 60)
    case.tensors["keys"].zero_()
    case.tensors["values"].zero_()
    output, _, gradients = case.gradients(cotangent(case))
    assert (output == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
