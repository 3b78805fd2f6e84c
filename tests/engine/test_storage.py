"""What a call allocates: nothing of [tokens, tokens], and slots within their bound."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import memkit
from tests.counting import NumbersMade
from tests.engine.cases import CHUNK, VALUE_WIDTH, WIDTH, make_case, small

TOKENS = 2048


def is_bounded(name: str) -> bool:
    """Whether no token makes the memory larger any more."""
    policy = small(name).build()
    return policy.window.capacity is not None and policy.slots_after(10_000) == policy.slots_after(500)


class Largest(TorchDispatchMode):
    """Records the most elements that any operation's result has."""

    most = 0
    shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A view of a small tensor may be expanded to any shape: what counts is its storage.
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                if size > self.most:
                    self.most, self.shape = size, tuple(tensor.shape)
        return result


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("name", memkit.policy_names())
def test_no_tensor_of_tokens_by_tokens(name: str, grad: bool):
    case = make_case(memkit.load_policy(name), TOKENS, rows=1, heads=2, kv_heads=1).to(torch.float32)
    case = case.leaves() if grad else case
    with Largest() as seen, torch.set_grad_enabled(grad):
        output, _ = case.attend()
        if grad:
            output.sum().backward()
    # A chunk's similarities to the slots: 256 · 2,048 at most, an eighth of 2,048².
    assert seen.most <= TOKENS**2 // 8, f"a tensor of {seen.shape}"


@pytest.mark.parametrize("lengths", [False, True], ids=["equal rows", "unequal rows"])
@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("name", [name for name in memkit.policy_names() if is_bounded(name)])
def test_bounded_memory_takes_as_much_for_each_further_token(name: str, grad: bool, lengths: bool):
    """As a slice's gradient, which is as large as what it is a slice of, would not."""

    def made(tokens: int) -> int:
        case = make_case(small(name), tokens, heads=2, kv_heads=1).to(torch.float32)
        case = case.leaves() if grad else case
        with NumbersMade() as numbers, torch.set_grad_enabled(grad):
            output, _ = case.attend(lengths=[tokens, tokens - 5] if lengths else None)
            if grad:
                output.sum().backward()
        return numbers.count

    first, second, third = (made(tokens) for tokens in (768, 1024, 1280))
    assert third - second <= 1.1 * (second - first)


@pytest.mark.parametrize("name", ["keydiff-512", "untrained-observed"])
def test_what_is_kept_for_the_way_back_is_no_copy_of_the_window_for_each_step(name: str):
    rows, kv_heads, tokens, chunks = 2, 4, 512, 16

    def kept(window: int) -> int:
        spec = memkit.load_policy(small(name), {"window.chunks": window})
        case, storages = make_case(spec, tokens, rows=rows, heads=4, kv_heads=kv_heads).leaves(), dict[int, int]()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            case.attend()
        return sum(storages.values())

    copies = tokens // CHUNK * rows * kv_heads * chunks * CHUNK * (WIDTH + VALUE_WIDTH) * 8
    assert kept(chunks) - kept(2) < copies / 4


@torch.no_grad()
@pytest.mark.parametrize("name", memkit.policy_names())
def test_a_decoded_token_costs_what_memory_holds(name: str):
    case = make_case(small(name), 600, rows=1, heads=2, kv_heads=1)
    _, memory = case.part(0, 590).attend()
    held = memory.slots.max().item() + memory.keys.shape[2]
    most = 0
    for position in range(590, 600):
        token = case.part(position, position + 1)
        token = dataclasses.replace(token, tensors={name_: tensor.clone() for name_, tensor in token.tensors.items()})
        with Largest() as seen:
            _, memory = token.attend(memory=memory)
        most = max(most, seen.most)
    # Slots and window side by side, as wide as the widest tensor, with room to grow by half.
    assert most <= 3 * (held + 64) * 16


@torch.no_grad()
@pytest.mark.parametrize("name", memkit.policy_names())
def test_slots_stay_within_their_bound(name: str):
    spec = small(name)
    policy, chunk = spec.build(), spec.chunker.build().size
    case = make_case(spec, 400, rows=1, heads=2, kv_heads=1)
    _, memory = case.part(0, 300).attend()
    for position in range(300, 400):
        _, memory = case.part(position, position + 1).attend(memory=memory)
        slots = int(memory.slots[0])
        assert slots == policy.slots_after(position + 1)
        assert memory.sums.shape[2] <= 2 * slots + chunk


@torch.no_grad()
@pytest.mark.parametrize("name", ["kvm-fixed-256", "streaming-4-512", "window-512", "block-window-3x256"])
def test_a_bounded_policy_holds_the_same_bytes_for_ever(name: str):
    case = make_case(small(name), 700, rows=1, heads=2, kv_heads=1)
    _, memory = case.part(0, 300).attend()
    held = list[int]()
    for position in range(300, 700):
        _, memory = case.part(position, position + 1).attend(memory=memory)
        held.append(memory.bytes)
    # Between two turns of its buffer a sliding window holds its sinks once more or once less: the same at every turn.
    assert set(held[150:275]) == set(held[275:])
    assert len(set(held)) <= 2
