"""Answers that were wrong without an error, and room that was taken for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import memkit
from tests.engine.cases import CHUNK, make_case, small

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = [6 * CHUNK + 1, 2 * CHUNK + 3, 1, 0]


def inputs(size: float, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of four rows. At size 150 scores reach past half of float16's range."""
    random = torch.Generator().manual_seed(0)
    return [(size * torch.randn(4, 2, 6 * CHUNK + 1, 64, generator=random)).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 150.0])
@pytest.mark.parametrize("name", ["window-512", "streaming-4-512", "block-window-3x256"])
def test_what_is_hidden_stays_hidden_whatever_the_dtype_and_size(name: str, size: float, dtype: torch.dtype):
    """Against the softmax as it is written, in float64, over the tokens that the policy lets each query see."""
    spec = small(name)
    policy, tensors = spec.build(), inputs(size, dtype)
    with torch.no_grad():
        output, _ = memkit.attend(spec, *tensors, lengths=torch.tensor(LENGTHS))
    queries, keys, values = (tensor.double() for tensor in tensors)
    scores = queries @ keys.mT / 8
    position = torch.arange(keys.shape[2])
    begin = torch.from_numpy(policy.window.begin(position.numpy()))[:, None]
    seen = (position <= position[:, None]) & ((position >= begin) | (position < spec.sinks))
    right = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    # A score's rounding, times the largest score, is what the softmax magnifies where two keys are near a tie.
    rounding = 8 * torch.finfo(torch.float32).eps * float(scores.abs().max()) + 8 * torch.finfo(dtype).eps
    limit = rounding * float(right.abs().max())
    for row, length in enumerate(LENGTHS):
        off = (output[row, :, :length].double() - right[row, :, :length]).abs()
        assert (off <= limit).all()
        assert not output[row, :, length:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 150.0])
@pytest.mark.parametrize("name", ["block-mean-8", "untrained-kvm-fixed", "untrained-block-mean", "ovq-1024"])
def test_slots_of_other_rows_stay_hidden_whatever_the_dtype_and_size(name: str, size: float, dtype: torch.dtype):
    """Rows with unequal numbers of slots come out as each does alone."""
    spec = memkit.load_policy(small(name), {"rotary.kind": "keep"})
    tensors = inputs(size, dtype)
    with torch.no_grad():
        _, memory = memkit.attend(spec, *tensors, lengths=torch.tensor(LENGTHS))
        output, _ = memkit.attend(spec, *tensors, memory=memory)
        for row, length in enumerate(LENGTHS):
            given = [tensor[row : row + 1] for tensor in tensors]
            _, memory = memkit.attend(spec, *(tensor[:, :, :length] for tensor in given))
            alone, _ = memkit.attend(spec, *given, memory=memory)
            assert output[row].isfinite().all()
            largest = float((given[0].double() @ given[1].double().mT / 8).abs().max())
            limit = 8 * torch.finfo(torch.float32).eps * largest + 4 * torch.finfo(dtype).eps
            assert (output[row].double() - alone[0].double()).abs().max() <= limit * float(alone.double().abs().max())


@pytest.mark.parametrize("name", ["window-512", "streaming-4-512", "kvm-fixed-256", "block-window-3x256"])
def test_a_window_takes_room_as_it_is_needed(name: str):
    kind = memkit.load_policy(name).window.kind
    wide = {"window.size": 131_072} if kind == "sliding" else {"chunker.size": 65_536}
    case = make_case(memkit.load_policy(name, wide), 10)
    with torch.no_grad():
        memory = case.attend()[1]
    assert memory.bytes < 100_000
    # … and goes on right as it grows, one token at a time.
    narrow = make_case(small(name), 6 * CHUNK)
    with torch.no_grad():
        expected = narrow.attend()[0]
        memory = None
        for index in range(narrow.tokens):
            output, memory = narrow.part(index, index + 1).attend(memory=memory)
            torch.testing.assert_close(output, expected[:, :, index : index + 1])


def test_a_long_window_grows_by_quarters():
    spec = memkit.load_policy("window-512", {"window.size": 100_000})
    case = make_case(spec, 3000, rows=1)
    with torch.no_grad():
        memory, rooms = None, set()
        for begin in range(0, 3000, 50):
            memory = case.part(begin, begin + 50).attend(memory=memory)[1]
            rooms.add(memory.keys.shape[2])
    assert len(rooms) < 15
    assert max(rooms) <= 1.25 * 3000 + 64
