"""Split = whole: a call in pieces, one token at a time included, gives what one call gives, with gradients too."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from tests.engine.cases import CHUNK, Case, Tensors, assert_close, cotangent, make_case, slots_of, small, tolerance

NAMES = memkit.policy_names()
TOKENS = 6 * CHUNK + 3
LIMIT = tolerance(torch.float64, 2048)

SPLITS = {
    "one by one": list(range(TOKENS + 1)),
    "halves": [0, TOKENS // 2, TOKENS],
    "around chunks": [0, CHUNK - 1, CHUNK, 2 * CHUNK + 1, 4 * CHUNK, TOKENS],
    "prompt, then one by one": [0, 4 * CHUNK + 1, *range(4 * CHUNK + 2, TOKENS + 1)],
    "nothing at times": [0, 0, CHUNK + 3, CHUNK + 3, TOKENS, TOKENS],
}


def in_pieces(case: Case, cuts: list[int], **options: Any) -> tuple[Tensor, memkit.Memory]:
    memory: memkit.Memory | None = None
    outputs: list[Tensor] = []
    for begin, end in pairwise(cuts):
        output, memory = case.part(begin, end).attend(memory=memory, **options)
        outputs.append(output)
    assert memory is not None
    return torch.cat(outputs, dim=2), memory


def window_of(memory: memkit.Memory) -> Tensors:
    """What the windows hold, without their buffers' spare room."""
    held = memory.window.last(int(memory.held_rows.max()))
    assert (memory.next_positions is not None) == ("positions" in memory.window.streams)
    return held if memory.next_positions is None else held | {"next positions": memory.next_positions}


def assert_same_memory(actual: memkit.Memory, expected: memkit.Memory) -> None:
    assert actual.seen.tolist() == expected.seen.tolist()
    assert actual.slots.tolist() == expected.slots.tolist()
    assert torch.equal(actual.counts, expected.counts)
    for one, other, what in zip(slots_of(actual), slots_of(expected), ("sums", "numbers"), strict=True):
        assert_close(one, other, LIMIT, what)
    held, wanted = window_of(actual), window_of(expected)
    assert held.keys() == wanted.keys()
    for name, stream in held.items():
        # What was given is kept to the bit; evidence is computed, a call's queries at a time.
        if name == "evidence":
            assert_close(stream, wanted[name], LIMIT, name)
        else:
            assert torch.equal(stream, wanted[name]), name


@torch.no_grad()
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_without_gradients(name: str, split: str):
    case = make_case(small(name), TOKENS)
    output, memory = in_pieces(case, SPLITS[split])
    expected, expected_memory = case.attend()
    assert_close(output, expected, LIMIT, "output")
    assert_same_memory(memory, expected_memory)


@pytest.mark.parametrize("split", ["one by one", "around chunks", "nothing at times"])
@pytest.mark.parametrize("name", NAMES)
def test_with_gradients(name: str, split: str):
    case, direction = make_case(small(name), TOKENS), cotangent(make_case(small(name), TOKENS))
    expected, expected_memory, gradients = case.gradients(direction)
    leaves = case.leaves()
    output, memory = in_pieces(leaves, SPLITS[split])
    assert_close(output, expected, LIMIT, "output")
    assert_same_memory(memory.detach(), expected_memory.detach())
    everything = leaves.tensors | leaves.learned
    found = torch.autograd.grad((output * direction).sum(), list(everything.values()))
    for name_, gradient in zip(everything, found, strict=True):
        assert_close(gradient, gradients[name_], LIMIT, f"gradient of {name_}")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_too(name: str):
    case = make_case(small(name), TOKENS, rows=1, heads=2, kv_heads=1)
    output, memory = in_pieces(case, SPLITS["around chunks"], backend="reference")
    expected, expected_memory = case.attend(backend="reference")
    assert_close(output, expected, LIMIT, "output")
    assert_same_memory(memory, expected_memory)


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_either_backend_goes_on_with_the_others_memory(name: str, grad: bool):
    case = make_case(small(name), TOKENS, rows=1, heads=2, kv_heads=1)
    direction = cotangent(case)
    expected, _, gradients = case.gradients(direction)
    leaves = case.leaves()
    memory: memkit.Memory | None = None
    outputs: list[Tensor] = []
    with torch.set_grad_enabled(grad):
        for turn, (begin, end) in enumerate(pairwise([0, 13, 26, 37, 38, TOKENS])):
            backend = ("torch", "reference")[turn % 2]
            output, memory = leaves.part(begin, end).attend(memory=memory, backend=backend)
            outputs.append(output)
    output = torch.cat(outputs, dim=2)
    assert_close(output, expected, LIMIT, "output")
    if grad:
        everything = leaves.tensors | leaves.learned
        found = torch.autograd.grad((output * direction).sum(), list(everything.values()))
        for name_, gradient in zip(everything, found, strict=True):
            assert_close(gradient, gradients[name_], LIMIT, f"gradient of {name_}")


@torch.no_grad()
@pytest.mark.parametrize("name", ["kvm-sqrt-16", "untrained-kvm-log", "streaming-4-512", "full"])
def test_a_thousand_tokens_one_by_one(name: str):
    # Long enough for buffers to fill, move and grow many times.
    case = make_case(small(name), 700, rows=1, heads=2, kv_heads=1)
    output, memory = in_pieces(case, list(range(case.tokens + 1)))
    expected, expected_memory = case.attend()
    assert_close(output, expected, tolerance(torch.float64, 8192), "output")
    assert_same_memory(memory, expected_memory)


def test_gradients_stop_at_detach():
    case = make_case(small("kvm-sqrt-16"), TOKENS).leaves()
    _, memory = case.part(0, 30).attend()
    output, _ = case.part(30, TOKENS).attend(memory=memory.detach())
    (gradient,) = torch.autograd.grad(output.square().sum(), [case.tensors["values"]])
    assert gradient[:, :, :30].abs().max() == 0
    assert gradient[:, :, 30:].abs().max() > 0


def test_gradients_flow_to_a_memory_whose_inputs_are_not_tracked():
    # Only the first call's tokens carry gradients; the second call's must still hand them on.
    case = make_case(small("kvm-sqrt-16"), TOKENS)
    leaves = case.leaves()
    _, memory = leaves.part(0, 30).attend()
    output, _ = case.part(30, TOKENS).attend(memory=memory)
    (gradient,) = torch.autograd.grad(output.square().sum(), [leaves.tensors["values"]])
    expected, _ = leaves.attend()
    (whole,) = torch.autograd.grad(expected[:, :, 30:].square().sum(), [leaves.tensors["values"]])
    assert_close(gradient[:, :, :30], whole[:, :, :30], LIMIT, "gradient")


def test_one_memory_may_be_used_twice_where_gradients_flow():
    case = make_case(small("kvm-sqrt-16"), TOKENS).leaves()
    _, memory = case.part(0, 30).attend()
    one, _ = case.part(30, TOKENS).attend(memory=memory)
    other, _ = case.part(30, TOKENS).attend(memory=memory)
    assert torch.equal(one, other)
    assert not memory.taken


def test_positions_continue_from_those_given():
    case = make_case(small("untrained-kvm-sqrt"), TOKENS)
    given = 100 + 2.5 * torch.arange(TOKENS).expand(2, -1).double()
    rotation = case.rotation
    assert rotation is not None
    placed = memkit.Rotation(rotation.pairing, rotation.width, rotation.frequencies, given)
    continued = given.clone()
    continued[:, 20:] = given[:, 19:20] + 1 + torch.arange(TOKENS - 20)
    whole = memkit.Rotation(rotation.pairing, rotation.width, rotation.frequencies, continued)
    arguments = case.part(0, 20).tensors
    first, memory = memkit.attend(
        case.spec,
        **arguments,
        rotation=memkit.Rotation(placed.pairing, placed.width, placed.frequencies, given[:, :20]),
    )
    second, _ = memkit.attend(case.spec, **case.part(20, TOKENS).tensors, rotation=rotation, memory=memory)
    expected, _ = memkit.attend(case.spec, **case.tensors, rotation=whole)
    assert_close(torch.cat((first, second), dim=2), expected, LIMIT, "output")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_bitwise_equal(name: str):
    case = make_case(small(name), TOKENS).to(torch.float32)
    (one, first), (other, second) = in_pieces(case, SPLITS["halves"]), in_pieces(case, SPLITS["halves"])
    assert torch.equal(one, other)
    assert torch.equal(first.sums, second.sums)


def test_gradients_are_bitwise_equal_in_two_runs():
    case = make_case(small("kvm-sqrt-16"), TOKENS).to(torch.float32)
    direction = cotangent(case).float()
    (_, _, one), (_, _, other) = case.gradients(direction), case.gradients(direction)
    for name in one:
        assert torch.equal(one[name], other[name]), name
