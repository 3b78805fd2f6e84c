"""Whole numbers as arguments: a float, a mask or a number out of range is refused wherever one is asked for."""

import re
from typing import Any

import numpy as np
import pytest
import torch

import memkit
from memkit import InputError, MemkitError, MemoryAttention, MemoryStateError, PolicyParameters, Rotation
from memkit.whole import whole_number, whole_numbers


@pytest.mark.parametrize("given", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_one_whole_number_of_any_make(given: Any):
    found = whole_number("n", given, 3, 3)
    assert (found, type(found)) == (3, int)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (2, "n must be a whole number, at least 3, got 2"),
        (10**30, f"n must be a whole number, at most 9, got {10**30}"),
        (3.0, "n must be a whole number, at least 3, got 3.0"),
        (True, "n must be a whole number, at least 3, got True"),
        (np.True_, "n must be a whole number, at least 3, got np.True_"),
        ("3", "n must be a whole number, at least 3, got '3'"),
        (None, "n must be a whole number, at least 3, got None"),
        (torch.tensor(3.0), "n must be a whole number, at least 3, got tensor(3.)"),
        (torch.tensor(True), "n must be a whole number, at least 3, got tensor(True)"),
        (torch.tensor([3]), "n must be a whole number, at least 3, got tensor([3])"),
        pytest.param(
            10**5000,
            "n must be a whole number, at most 9, got int with a number of thousands of digits",
            id="thousands of digits",
        ),
    ],
)
def test_what_is_no_such_number(given: Any, message: str):
    with pytest.raises(InputError) as refusal:
        whole_number("n", given, 3, 9)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "given", [[2, 0], (2, 0), torch.tensor([2, 0]), torch.tensor([2, 0], dtype=torch.uint8), np.array([2, 0]),
              [np.int32(2), torch.tensor(0)], range(2, -1, -2)]
)  # fmt: skip
def test_several_whole_numbers_of_any_make(given: Any):
    found = whole_numbers("rows", given, 0, 2, count=2)
    assert found.tolist() == [2, 0]
    assert (found.dtype, found.device.type) == (torch.int64, "cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 3], "rows must lie between 0 and 2, got [0, 3]"),
        ([-1, 0], "rows must lie between 0 and 2, got [-1, 0]"),
        ([0, 2**70], f"rows must lie between 0 and 2, got [0, {2**70}]"),
        ([0], "rows must be one whole number per row, shape (2,), got [0]"),
        ([0, 1.0], "rows must be one whole number per row, shape (2,), got [0, 1.0]"),
        ([True, False], "rows must be one whole number per row, shape (2,), got [True, False]"),
        (torch.tensor([True, False]), "rows must be one whole number per row, shape (2,), got torch.bool (2,)"),
        (torch.tensor([[0, 1]]), "rows must be one whole number per row, shape (2,), got torch.int64 (1, 2)"),
        (torch.zeros(2, dtype=torch.complex64), "rows must be one whole number per row, shape (2,), got torch.complex"),
        (np.array([0.0, 1.0]), "rows must be one whole number per row, shape (2,), got float64 (2,)"),
        (7, "rows must be one whole number per row, shape (2,), got 7"),
        ("01", "rows must be one whole number per row, shape (2,), got '01'"),
        ({0, 1}, "rows must be one whole number per row, shape (2,), got {0, 1}"),
    ],
)
def test_what_are_no_such_numbers(given: Any, message: str):
    with pytest.raises(InputError) as refusal:
        whole_numbers("rows", given, 0, 2, count=2)
    assert str(refusal.value).startswith(message)


@pytest.fixture(scope="module")
def memories() -> list[Any]:
    keys = torch.arange(54.0).reshape(3, 1, 9, 2) % 7
    tiny = memkit.load_model("tiny-full", {"width": 8, "depth": 1, "heads": 2, "rotary.width": 4})
    with torch.no_grad():
        return [
            memkit.attend("kvm-fixed-256", keys, keys, keys)[1],
            tiny(torch.arange(15).reshape(3, 5))[1],
        ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([True, False, True]), "got torch.bool (3,); a mask's rows are mask.nonzero().flatten()"),
        ([True, False, True], "got [True, False, True]"),
        (torch.tensor([0.9, 1.9]), "got torch.float32 (2,)"),
        ([0, 1.5], "got [0, 1.5]"),
        ([0, 3], "rows must be a list of numbers from 0 to 2, got [0, 3]"),
        ([-1], "rows must be a list of numbers from 0 to 2, got [-1]"),
        (1, "got 1"),
        ([], "rows must name one row at least, got none"),
    ],
)
def test_rows_to_reorder_are_row_numbers(memories: list[Any], rows: Any, message: str):
    for memory in memories:
        with pytest.raises(MemoryStateError, match=re.escape(message)):
            memory.reorder(rows)


def test_rows_by_number(memories: list[Any]):
    for memory in memories:
        for rows in ([2, 0], torch.tensor([2, 0]), np.array([2, 0])):
            assert len(memory.reorder(rows).seen) == 2


KEYS = torch.ones(2, 2, 6, 4)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_lengths_may_be_a_list(backend: Any):
    expected = memkit.attend("full", KEYS, KEYS, KEYS, lengths=torch.tensor([2, 6]), backend=backend)[0]
    for lengths in ([2, 6], (2, 6), np.array([2, 6])):
        assert torch.equal(memkit.attend("full", KEYS, KEYS, KEYS, lengths=lengths, backend=backend)[0], expected)
    layer = MemoryAttention("full", width=8, heads=2)
    assert layer(torch.ones(2, 6, 8), lengths=[2, 6])[1].seen.tolist() == [2, 6]


def test_a_models_lengths_may_be_a_list(memories: list[Any]):
    model = memkit.load_model("tiny-full", {"width": 8, "depth": 1, "heads": 2, "rotary.width": 4})
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        assert torch.equal(model(ids, lengths=[2, 4])[0], model(ids, lengths=torch.tensor([2, 4]))[0])
        assert model.loss(ids, lengths=[2, 4]) == model.loss(ids, lengths=torch.tensor([2, 4]))
    with pytest.raises(InputError, match=r"lengths must be one whole number per row, shape \(2,\), got torch.bool"):
        model(ids, lengths=torch.tensor([True, True]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, lengths=[1.0, 2.0]), "lengths must be one whole number"),
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, rotation=3), "rotation is given, but with growth none"),
        (
            lambda: memkit.attend("untrained-kvm-sqrt", KEYS, KEYS, KEYS, rotation=3),
            "rotation must be a memkit.Rotation",
        ),
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, plan=3), "plan must be what memkit.plan returned, got 3"),
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, scale="1"), "scale must be a finite number, got '1'"),
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, scale=True), "scale must be a finite number, got True"),
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, scale=10**400), "scale must be a finite number, got 1000"),
        (lambda: memkit.attend("kvm-fixed-256", KEYS, KEYS, KEYS, weights=[1]), "weights must be a tensor"),
        (lambda: memkit.attend("full", KEYS, KEYS, KEYS, backend=["torch"]), "backend must be 'auto', 'torch' or"),
        (lambda: memkit.cost("full", 2.0), "tokens must be a whole number, at least 1, got 2.0"),
        (lambda: memkit.cost("full", True), "tokens must be a whole number, at least 1, got True"),
        (lambda: memkit.cost("full", "12"), "tokens must be a whole number, at least 1, got '12'"),
        (lambda: memkit.cost("full", None), "tokens must be a whole number, at least 1, got None"),
        (lambda: memkit.cost("full", 10**12), f"tokens must be a whole number, at most {2**28}, got {10**12}"),
        (lambda: memkit.cost("full", 9, heads=10**200), f"heads must be a whole number, at most {2**40}, got 1000"),
        (lambda: memkit.compare("full", tokens=9.0), "tokens must be a whole number, at least 1, got 9.0"),
        (lambda: memkit.load_model("tiny-full", seed=1.5), "seed must be a whole number"),
        (lambda: memkit.load_policy({"sinks": 1}), "write PolicySpec(**fields) for a mapping"),
        (lambda: memkit.load_policy("full", {1: 2}), "overrides must name fields by dotted paths"),
        (lambda: memkit.load_policy("full", ["sinks"]), "overrides must be a mapping of fields"),
        (lambda: memkit.load_policy("full", {"window": {1: 2}}), "window: a field's name must be text, got 1"),
        (lambda: memkit.PolicySpec(readout={"key": {1: 2}}), "readout.key: a field's name must be text, got 1"),
        (lambda: memkit.load_policy("x" * 300), "unknown policy"),
        (lambda: memkit.load_policy("a/" * 3000), "no such file"),
        (lambda: memkit.load_model(3), "a model is a name, or the path of a YAML file or a folder, got 3"),
        (lambda: MemoryAttention("full", width=8.0, heads=2), "width must be a whole number, at least 1, got 8.0"),
        (lambda: MemoryAttention("full", width=8, heads=0), "heads must be a whole number, at least 1, got 0"),
        (lambda: PolicyParameters("full", 2, -1), "head_width must be a whole number, at least 1, got -1"),
        (lambda: Rotation("adjacent", 2.0, torch.ones(1)), "rotation.width must be a whole number, got 2.0"),
        (lambda: Rotation("adjacent", 2, [1.0]), "rotation.frequencies must be a tensor of floats, got [1.0]"),
        (lambda: Rotation("adjacent", 2, torch.ones(1), [1]), "rotation.positions must be a tensor of numbers"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_said_in_one_line(call: Any, message: str):
    with pytest.raises(MemkitError) as refusal:
        call()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": torch.zeros(1, 1, 8)}, "plan.slot must be a tensor [b, g, n] of int64"),
        ({"founded": torch.zeros(1, 1, 8)}, "plan.founded must be a tensor of bool as plan.slot"),
        ({"begin": [0]}, "plan.begin must be an array (1,) of int64"),
        ({"length": np.array([99])}, "plan.length between 0 and its 8 tokens, got [0] and [99]"),
        ({"slots": np.zeros((1, 2))}, "plan.slots must be an array (1, chunks) of int64"),
        ({"slot": torch.full((1, 1, 8), 99)}, "plan.slot must name one of the slots there are after the call, [4]"),
        ({"slot": torch.full((1, 1, 8), -2)}, "plan.slot must name one of the slots there are after the call, [4]"),
    ],
)
def test_a_plan_that_names_what_is_not_there(change: dict[str, Any], message: str):
    spec = memkit.load_policy(
        "kvm-fixed-256", {"chunker.size": 4, "window.chunks": 1, "growth.slots": 4, "growth.floor": 0}
    )
    keys = torch.arange(24.0).reshape(1, 1, 12, 2) % 5
    plan = memkit.plan(spec, keys)
    memkit.attend(spec, keys, keys, keys, plan=plan)
    parts = {name: getattr(plan, name) for name in ("slot", "founded", "begin", "length", "slots")}
    with pytest.raises(InputError, match=re.escape(message)):
        memkit.attend(spec, keys, keys, keys, plan=memkit.Plan(**{**parts, **change}))


def test_what_padding_weighs_is_nobodys_business():
    weights = torch.ones(2, 2, 6)
    weights[0, :, 4:] = -1
    garbage = memkit.attend("kvm-fixed-256", KEYS, KEYS, KEYS, weights=weights, lengths=[4, 6])[0]
    clean = memkit.attend("kvm-fixed-256", KEYS, KEYS, KEYS, weights=weights.abs(), lengths=[4, 6])[0]
    assert torch.equal(garbage, clean)
    with pytest.raises(InputError, match=r"weights must be at least 0, got -1\.0"):
        memkit.attend("kvm-fixed-256", KEYS, KEYS, KEYS, weights=weights, lengths=[5, 6])
