"""Decoding one token at a time, slots and window side by side in one buffer, equals the whole pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memkit
from memkit.engine import decode
from memkit.pieces import Need, Rotary
from tests.engine.cases import Case, assert_close, make_case, slots_of, small, tolerance

TOKENS, WIDTH, HEADS = 90, 8, 4


@pytest.mark.parametrize("name", memkit.policy_names())
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_one_token_at_a_time_equals_whole(name: str, kv_heads: int) -> None:
    torch.manual_seed(0)
    spec = memkit.load_policy(name)
    spec = memkit.load_policy(name, {"window.size": 20} if spec.window.kind == "sliding" else {"chunker.size": 8})
    policy = spec.build()
    queries, keys = torch.randn(2, HEADS, TOKENS, WIDTH), torch.randn(2, kv_heads, TOKENS, WIDTH)
    values = torch.randn(2, kv_heads, TOKENS, WIDTH + 2)
    weights = torch.rand(2, kv_heads, TOKENS) if Need.MERGE_WEIGHTS in policy.needs else None
    parameters = memkit.PolicyParameters(policy, HEADS, WIDTH)
    rotation = None
    if Need.ROTATION in policy.needs:
        rotation = memkit.Rotation("adjacent", WIDTH, 1 / torch.logspace(0, 2, WIDTH // 2))
    with torch.no_grad():
        for tensor in parameters.parameters():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
        plan = None
        if policy.plans_ahead:
            plan = memkit.plan(spec, keys, weights=weights, parameters=parameters, rotation=rotation)
        fixed = {"parameters": parameters, "rotation": rotation}
        whole, _ = memkit.attend(spec, queries, keys, values, weights=weights, plan=plan, **fixed)
        memory, outputs = None, []
        for t in range(TOKENS):
            one = slice(t, t + 1)
            output, memory = memkit.attend(
                spec,
                queries[:, :, one],
                keys[:, :, one],
                values[:, :, one],
                weights=None if weights is None else weights[:, :, one],
                memory=memory,
                plan=plan if policy.chunk and t % policy.chunk == 0 else None,
                **fixed,
            )
            outputs.append(output)
    # Sums of 90 products of order 1, merged from at most three parts.
    assert (torch.cat(outputs, 2) - whole).abs().max() <= 128 * torch.finfo(torch.float32).eps


def test_a_window_temperature_of_zero_is_only_a_temperature() -> None:
    torch.manual_seed(0)
    spec = memkit.load_policy("kvm-fixed-256", {"chunker.size": 8, "growth.slots": 8})
    parameters = memkit.PolicyParameters(spec.build(), 2, WIDTH)
    keys = torch.randn(1, 2, 41, WIDTH)
    with torch.no_grad():
        assert parameters.query_scale_window is not None
        parameters.query_scale_window[0] = 0
        _, memory = memkit.attend(spec, *[keys[:, :, :40]] * 3, parameters=parameters)
        _, memory = memkit.attend(spec, *[keys[:, :, 40:]] * 3, parameters=parameters, memory=memory)
        output, _ = memkit.attend(spec, *[keys[:, :, 40:]] * 3, parameters=parameters, memory=memory.fork())
        expected, _ = memkit.attend(
            spec, *[keys[:, :, 40:]] * 3, parameters=parameters, memory=memory, backend="reference"
        )
    assert torch.allclose(output, expected, atol=32 * torch.finfo(torch.float32).eps)


def test_decoding_reads_slots_and_window_in_one_buffer() -> None:
    keys = torch.randn(1, 2, 70, WIDTH)
    with torch.no_grad():
        _, memory = memkit.attend("kvm-fixed-256", keys, keys, keys)
        spec = memkit.load_policy("kvm-fixed-256", {"chunker.size": 8, "growth.slots": 8})
        _, memory = memkit.attend(spec, keys, keys, keys)
        one = keys[:, :, :1]
        _, memory = memkit.attend(spec, one, one, one, memory=memory)
    side = memory.buffer
    assert side is not None
    assert side.slots == 8
    assert side.keys.untyped_storage().data_ptr() == memory.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("lengths", [[40, 40], [40, 37]], ids=["rows alike", "rows apart"])
def test_changed_parameters_are_read_anew(lengths: list[int]) -> None:
    torch.manual_seed(0)
    spec = memkit.load_policy("kvm-fixed-256", {"chunker.size": 8, "growth.slots": 8})
    parameters = memkit.PolicyParameters(spec.build(), 2, WIDTH)
    keys = torch.randn(2, 2, 40, WIDTH)
    with torch.no_grad():
        _, memory = memkit.attend(spec, keys, keys, keys, parameters=parameters, lengths=torch.tensor(lengths))
        one = keys[:, :, :1]
        _, memory = memkit.attend(spec, one, one, one, parameters=parameters, memory=memory)
        for tensor in parameters.parameters():
            tensor.mul_(1.5)
        expected, _ = memkit.attend(spec, one, one, one, parameters=parameters, memory=memory.fork())
        output, _ = memkit.attend(spec, one, one, one, parameters=parameters, memory=memory)
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("changed", [False, True])
def test_slots_are_written_over_in_the_buffer_as_its_queries_meet_them(changed: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    spec = memkit.load_policy("kvm-fixed-256", {"chunker.size": 8, "growth.slots": 8})
    keys = torch.randn(2, 2, 50, WIDTH, dtype=torch.float64)
    kept: list[object] = []

    def decoded() -> torch.Tensor:
        outputs, parameters = list[torch.Tensor](), memkit.PolicyParameters(spec.build(), 2, WIDTH).double()
        with torch.no_grad():
            for scale, factor in ((parameters.query_scale_window, 0.7), (parameters.query_scale_memory, 1.3)):
                assert scale is not None
                scale.fill_(factor)
            _, memory = memkit.attend(spec, keys[:, :, :33], keys[:, :, :33], keys[:, :, :33], parameters=parameters)
            for position in range(33, 50):  # chunks leave before 40 and 48
                if changed and position == 40:
                    for tensor in parameters.parameters():
                        tensor.mul_(1.5)
                one, before = keys[:, :, position : position + 1], memory.buffer
                output, memory = memkit.attend(spec, one, one, one, parameters=parameters, memory=memory)
                outputs.append(output)
                if position in (40, 48) and before is not None:
                    kept.append(memory.buffer is not None and memory.buffer.keys is before.keys)
        return torch.cat(outputs, 2)

    output = decoded()
    assert kept == [not changed, True]
    monkeypatch.setattr(decode, "ENABLED", False)
    assert_close(output, decoded(), tolerance(torch.float64), "outputs")


def test_a_call_unlike_the_last_one_is_checked() -> None:
    """A call that looks like the one before it is not checked again; every other one is."""
    torch.manual_seed(0)
    policy = memkit.load_policy("kvm-fixed-256", {"chunker.size": 8, "growth.slots": 8}).build()
    parameters = memkit.PolicyParameters(policy, 2, WIDTH)
    keys = torch.randn(1, 2, 60, WIDTH)

    def after(tokens: int) -> memkit.Memory:
        given = [keys[:, :, :tokens]] * 3
        return memkit.attend(policy, *given, weights=torch.ones(1, 2, tokens), parameters=parameters)[1]

    def one(memory: memkit.Memory, weight: float = 1.0, **changed: Any) -> tuple[torch.Tensor, memkit.Memory]:
        token = keys[:, :, 50:51]
        given: dict[str, Any] = {"queries": token, "keys": token, "values": token, "parameters": parameters}
        weights = torch.full((1, 2, 1), weight)
        return memkit.attend(policy, **{**given, "weights": weights, "memory": memory, **changed})

    with torch.no_grad():
        _, memory = one(after(41))
        assert memory.buffer is not None
        with pytest.raises(memkit.InputError, match="weights must be at least 0"):
            one(memory, -1.0)
        with pytest.raises(memkit.InputError, match="widths"):
            one(memory, values=torch.randn(1, 2, 1, WIDTH + 1))
        with pytest.raises(memkit.InputError, match="rotation is given"):
            one(memory, rotation=memkit.Rotation("adjacent", WIDTH, torch.ones(WIDTH // 2)))
        wanted, _ = one(memory.fork())
        output, later = one(memory)
        assert (output - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps
        with pytest.raises(memkit.MemoryStateError, match="taken over"):
            one(memory)
        assert parameters.query_scale_memory is not None
        parameters.query_scale_memory.mul_(3)
        wanted, _ = one(later.fork())
        output, _ = one(later)
        assert (output - wanted).abs().max() <= 16 * torch.finfo(torch.float32).eps


def decoded(case: Case, lengths: list[int]) -> tuple[torch.Tensor, memkit.Memory, int]:
    """Outputs of single tokens after rows of these lengths, the memory, and after how many there was a buffer."""
    with torch.no_grad():
        _, memory = case.part(0, lengths[0]).attend(lengths=lengths)
        outputs, buffers = list[torch.Tensor](), 0
        for position in range(lengths[0], TOKENS):
            output, memory = case.part(position, position + 1).attend(memory=memory)
            outputs.append(output)
            buffers += memory.buffer is not None
    return torch.cat(outputs, 2), memory, buffers


@pytest.mark.parametrize("name", memkit.policy_names())
def test_without_the_short_cut_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, single tokens take the way of every other call."""
    case = make_case(small(name), TOKENS, kv_heads=HEADS)  # query scales are folded in per key/value head
    output, memory, buffers = decoded(case, [9, 9])
    monkeypatch.setattr(decode, "ENABLED", False)
    plain, plain_memory, without = decoded(case, [9, 9])
    assert without == 0
    assert (buffers > 0) == (type(case.spec.build().rotary).memory_queries is Rotary.memory_queries)
    assert_close(output, plain, tolerance(torch.float64), "output")
    assert torch.equal(memory.counts, plain_memory.counts)
    held = int(memory.held_rows.max())
    for stream, tensor in memory.window.last(held).items():
        wanted = plain_memory.window.last(held)[stream]
        if stream == "evidence":
            assert_close(tensor, wanted, tolerance(torch.float64), stream)
        else:
            assert torch.equal(tensor, wanted), stream
    for one, other, what in zip(slots_of(memory), slots_of(plain_memory), ("sums", "numbers"), strict=True):
        assert_close(one, other, tolerance(torch.float64), what)


@pytest.mark.parametrize("name", memkit.policy_names())
def test_rows_at_unequal_positions_are_decoded_side_by_side(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(small(name), TOKENS, rows=3, kv_heads=HEADS)
    policy = case.spec.build()
    output, memory, buffers = decoded(case, [41, 29, 10])
    monkeypatch.setattr(decode, "ENABLED", False)
    plain, plain_memory, without = decoded(case, [41, 29, 10])
    assert without == 0
    one_query = type(policy.rotary).memory_queries is Rotary.memory_queries
    if policy.window.band is None and one_query and not policy.sinks_only:
        assert buffers > TOKENS // 6  # not where a chunk leaves a row, or its queries tell
    assert_close(output, plain, tolerance(torch.float64), "output")
    assert torch.equal(memory.counts, plain_memory.counts)
    held = memory.held_rows
    for stream, tensor in memory.window.last(int(held.max())).items():
        wanted = plain_memory.window.last(int(held.max()))[stream]
        for row in range(3):
            mine, theirs = tensor[row, :, -held[row] :], wanted[row, :, -held[row] :]
            assert_close(mine, theirs, tolerance(torch.float64), stream)
    for one, other, what in zip(slots_of(memory), slots_of(plain_memory), ("sums", "numbers"), strict=True):
        assert_close(one, other, tolerance(torch.float64), what)


@given(
    st.sampled_from(["full", "kvm-sqrt-16", "untrained-kvm-fixed", "block-mean-8", "untrained-observed", "ovq-1024"]),
    st.lists(st.integers(1, 30), min_size=3, max_size=3),
    st.lists(st.sampled_from([1] * 9 + [2, 5, 17]), min_size=60, max_size=60),
    st.integers(0, 2**16),
)
@settings(max_examples=25)
def test_any_calls_on_rows_at_unequal_positions(name: str, lengths: list[int], sizes: list[int], seed: int) -> None:
    """Whatever else is called in between, and wherever the window is moved by it."""
    case, both = make_case(small(name), TOKENS, rows=3, kv_heads=HEADS, seed=seed), list[torch.Tensor]()
    for enabled in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(decode, "ENABLED", enabled)
            _, memory = case.part(0, 30).attend(lengths=lengths)
            outputs, begin = list[torch.Tensor](), 30
            for size in sizes:
                if begin >= TOKENS:
                    break
                output, memory = case.part(begin, min(begin + size, TOKENS)).attend(memory=memory)
                outputs.append(output)
                begin += size
        both.append(torch.cat(outputs, 2))
    assert_close(*both, tolerance(torch.float64), "outputs")


@pytest.mark.parametrize("rows", [[1], [2, 2], [1, 2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("lengths", [[41, 29, 10], [14, 6, 6]], ids=str)
@pytest.mark.parametrize("name", memkit.policy_names())
def test_rows_may_leave_the_batch_between_two_tokens(
    name: str, lengths: list[int], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that had the most slots, or the longest window, among them."""
    case, both = make_case(small(name), TOKENS, rows=3, kv_heads=HEADS), list[torch.Tensor]()
    for enabled in (True, False):
        monkeypatch.setattr(decode, "ENABLED", enabled)
        with torch.no_grad():
            _, memory = case.part(0, lengths[0]).attend(lengths=lengths)
            outputs, begin = list[torch.Tensor](), lengths[0]
            for size in (1, 1, 1, 3, *[1] * 18):
                if begin == lengths[0] + 2:
                    memory = memory.reorder(torch.tensor(rows))
                part = case.part(begin, begin + size)
                if begin >= lengths[0] + 2:
                    tensors = {key: tensor[rows] for key, tensor in part.tensors.items()}
                    part = dataclasses.replace(part, tensors=tensors)
                output, memory = part.attend(memory=memory)
                outputs.append(output.flatten())
                begin += size
        both.append(torch.cat(outputs))
    assert_close(*both, tolerance(torch.float64), "outputs")


def test_a_token_outside_of_inference_mode_after_one_in_it() -> None:
    case = make_case(small("snapkv-512"), TOKENS, rows=3, kv_heads=2)
    with torch.no_grad():
        output, memory = case.part(0, 30).attend(lengths=[26, 18, 14])
        for position in range(30, TOKENS):
            with torch.inference_mode(position % 3 == 0):
                output, memory = case.part(position, position + 1).attend(memory=memory)
    assert output.isfinite().all()
