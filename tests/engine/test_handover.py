"""Memory from call to call: taken over, forked, refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

import memkit
from tests.as_on_a_gpu import SETTINGS
from tests.engine.cases import Case, make_case, small

BACKENDS = ["torch", "reference"]


def started(**options: Any) -> tuple[Case, memkit.Memory]:
    """A case, and the memory after its first 30 of 50 tokens."""
    case = make_case(small("kvm-sqrt-16"), 50)
    with torch.no_grad():
        return case.part(30, 50), case.part(0, 30).attend(**options)[1]


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_taken_over_cannot_be_used_again(backend: str):
    rest, memory = started()
    rest.attend(memory=memory, backend=backend)
    assert memory.taken
    assert "taken over" in repr(memory)
    uses = [
        lambda: rest.attend(memory=memory),
        lambda: rest.attend(memory=memory, backend="reference"),
        lambda: rest.plan(memory=memory),
        memory.fork,
        memory.detach,
        lambda: memory.reorder([0, 1]),
    ]
    for use in uses:
        with pytest.raises(memkit.MemoryStateError, match=re.escape("taken over by a later call")):
            use()


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_is_a_memory_of_its_own(backend: str):
    rest, memory = started()
    fork = memory.fork()
    expected, _ = rest.attend(memory=memory, backend=backend)
    output, _ = rest.attend(memory=fork, backend=backend)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("settings", [(), SETTINGS], ids=["", "as on a GPU"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_gradients_a_memory_stays_as_it_is(backend: str, settings: Any, monkeypatch: pytest.MonkeyPatch):
    for setting in settings:
        monkeypatch.setattr(*setting)
    rest, memory = started()
    kept = memory.fork()
    rest.leaves().attend(memory=memory, backend=backend)
    assert not memory.taken
    assert not memory.written
    for name, tensor in kept._saved().items():
        assert torch.equal(memory._saved()[name], tensor), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_with_a_graph_is_left_alone_where_no_gradient_is_wanted(backend: str):
    case = make_case(small("kvm-sqrt-16"), 50).leaves()
    _, memory = case.part(0, 30).attend()
    kept = memory.detach().fork()
    with torch.no_grad():
        output, after = case.part(30, 50).attend(memory=memory, backend=backend)
    assert not memory.taken
    assert not after.requires_grad
    assert not output.requires_grad
    for name, tensor in kept._saved().items():
        assert torch.equal(memory._saved()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"rows": 3}, "memory is for 2 rows × 2 heads, got keys of 3 × 2; reorder() changes rows", id="rows"
        ),
        pytest.param({"heads": 3, "kv_heads": 3}, "memory is for 2 rows × 2 heads, got keys of 2 × 3", id="heads"),
        pytest.param({"value_width": 5}, "memory holds keys and values of widths (8, 6), got (8, 5)", id="widths"),
    ],
)
def test_a_memory_of_other_shapes_is_refused(change: dict[str, int], message: str):
    _, memory = started()
    with pytest.raises(memkit.InputError, match=re.escape(message)):
        make_case(small("kvm-sqrt-16"), 5, **change).attend(memory=memory)
    assert not memory.taken


def test_a_memory_of_another_dtype_is_refused():
    rest, memory = started()
    message = "memory holds torch.float64, got keys of torch.float32; go on with the same dtype"
    with pytest.raises(memkit.InputError, match=re.escape(message)):
        rest.to(torch.float32).attend(memory=memory)


def test_a_memory_of_another_policy_is_refused():
    rest, memory = started()
    other = memkit.load_policy(rest.spec, {"sinks": 2})
    message = "memory belongs to policy 'kvm-sqrt-16', not to policy 'kvm-sqrt-16'"
    with pytest.raises(memkit.MemoryStateError, match=re.escape(message)):
        dataclasses.replace(rest, spec=other).attend(memory=memory)


def test_an_equal_policy_made_anew_is_the_same_policy():
    rest, memory = started()
    again = memkit.PolicySpec(**rest.spec.model_dump())
    assert again is not rest.spec
    dataclasses.replace(rest, spec=again).attend(memory=memory)


def test_what_is_no_memory_is_refused():
    case = make_case(small("kvm-sqrt-16"), 5)
    with pytest.raises(memkit.InputError, match=re.escape("memory must be a memkit.Memory or None, got dict")):
        case.attend(memory={})


@pytest.mark.parametrize("device", [torch.bfloat16, None, "nowhere", 3.0])
def test_a_memory_goes_to_devices_alone(device: Any):
    _, memory = started()
    with pytest.raises(memkit.MemoryStateError, match=re.escape("device must be one of this machine's")):
        memory.to(device)
    assert memory.to("cpu").dtype == memory.to(torch.device("cpu")).dtype == memory.dtype


@torch.no_grad()
@pytest.mark.parametrize("name", memkit.policy_names())
def test_rows_reordered_go_on_as_themselves(name: str):
    case = make_case(small(name), 60)
    _, memory = case.part(0, 37).attend()
    beams = memory.reorder([1, 0, 1])
    expected, _ = case.part(37, 60).attend(memory=memory)
    tensors = {name_: tensor[[1, 0, 1]] for name_, tensor in case.part(37, 60).tensors.items()}
    output, _ = dataclasses.replace(case, tensors=tensors).attend(memory=beams)
    assert torch.allclose(output, expected[[1, 0, 1]], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", memkit.policy_names())
def test_a_memory_from_a_file_goes_on(name: str, tmp_path):
    for tokens in (0, 5, 37):
        case = make_case(small(name), 60)
        _, memory = case.part(0, tokens).attend()
        memory.save(tmp_path / "memory.safetensors")
        again = memkit.Memory.load(tmp_path / "memory.safetensors", case.spec)
        for name_, tensor in memory._saved().items():
            assert torch.equal(again._saved()[name_], tensor), name_
        expected, _ = case.part(tokens, 60).attend(memory=memory)
        output, _ = case.part(tokens, 60).attend(memory=again)
        assert torch.allclose(output, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", memkit.policy_names())
def test_a_call_without_tokens_changes_nothing(name: str, backend: str):
    case = make_case(small(name), 60)
    expected, _ = case.attend()
    _, memory = case.part(0, 37).attend()
    seen, slots = memory.seen.tolist(), memory.slots.tolist()
    output, memory = case.part(37, 37).attend(memory=memory, backend=backend)
    assert output.shape == (2, 4, 0, 6)
    assert (memory.seen.tolist(), memory.slots.tolist()) == (seen, slots)
    _, memory = case.part(37, 40).attend(memory=memory, lengths=[0, 0], backend=backend)
    output, _ = case.part(37, 60).attend(memory=memory)
    assert torch.allclose(output, expected[:, :, 37:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_inputs_are_never_written_to():
    for name in memkit.policy_names():
        case = make_case(small(name), 60)
        kept = {name_: tensor.clone() for name_, tensor in case.tensors.items()}
        memory = None
        for begin, end in ((0, 30), (30, 31), (31, 60)):
            output, memory = case.part(begin, end).attend(memory=memory)
            output.fill_(7)  # an output is the caller's own
        expected, _ = case.attend()
        assert memory is not None
        again, _ = case.part(0, 1).attend(memory=memory)
        assert again.isfinite().all()
        for name_, tensor in case.tensors.items():
            assert torch.equal(tensor, kept[name_]), name_
        assert expected.isfinite().all()
