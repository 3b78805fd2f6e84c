"""State found shared, lost or never freed by use: each as it was met, and its kind."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit.pieces import Merging, MergingSpec
from memkit.pieces.growth import NoGrowthSpec
from tests.engine.cases import CHUNK, Case, make_case, scaled, small

NAMES = memkit.policy_names()
STAGES = [0, 1, 2, CHUNK - 1, CHUNK, 3 * CHUNK + 2]
"""Tokens decoded one by one before a memory is copied."""


# Memory that is never freed


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


SPECS = {name: small(name) for name in NAMES}
SPECS.update(
    (f"{name}-{sinks}-sinks", memkit.load_policy(small(name), {"sinks": sinks}))
    for name in NAMES
    for sinks in (0, 1, 4)
    if isinstance(small(name).growth, NoGrowthSpec)  # sinks alone are kept where they stand
)


@pytest.fixture
def _old_objects_apart() -> Generator[None]:
    """What is there already cannot be freed by a step, and need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_old_objects_apart")
@pytest.mark.parametrize("carried", [False, True], ids=["alone", "carried"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_training_step_is_freed(spec: memkit.PolicySpec, carried: bool):
    layer = memkit.MemoryAttention(spec, width=16, heads=2)
    x = torch.randn(2, 5 * CHUNK, 16)

    def step() -> None:
        y, memory = layer(x)
        if carried:
            y, memory = layer(x[:, : CHUNK + 3], memory)
        y.sum().backward()

    step()
    before = live_tensors()
    for _ in range(3):
        step()
    assert live_tensors() == before


def test_a_training_step_of_a_rule_that_is_not_additive_is_freed(moving_average: memkit.PolicySpec):
    layer = memkit.MemoryAttention(moving_average, width=16, heads=2)
    x = torch.randn(2, 5 * CHUNK, 16)
    layer(x)[0].sum().backward()
    before = live_tensors()
    for _ in range(3):
        layer(x)[0].sum().backward()
    assert live_tensors() == before


def test_a_graph_dies_with_its_output_without_the_garbage_collector():
    layer = memkit.MemoryAttention(SPECS["full"], width=16, heads=2)
    before = live_tensors()
    gc.disable()
    try:
        y, memory = layer(torch.randn(2, 5 * CHUNK, 16))
        del y, memory
        assert sum(issubclass(type(each), Tensor) for each in gc.get_objects()) == before
    finally:
        gc.enable()


# Threads


@pytest.fixture
def hurried_threads() -> Any:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any], count: int = 4) -> list[Any]:
    """Each thread's result; the first error of any is raised."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    together = threading.Barrier(count)

    def run(index: int) -> None:
        together.wait()
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_threads_leave_a_policys_schedule_as_one_thread_does(hurried_threads: None):
    spec = memkit.load_policy("kvm-sqrt-16", {"chunker.size": 16})
    alone, shared = spec.build(), memkit.PolicySpec(**spec.model_dump()).build()
    assert alone is not shared
    expected = [alone.slots_after_chunk(index) for index in range(12_500)]
    in_threads(lambda _: shared.slots_after(200_000))
    assert [shared.slots_after_chunk(index) for index in range(12_500)] == expected


def test_threads_build_one_policy(hurried_threads: None):
    for _ in range(20):
        spec = memkit.PolicySpec(**memkit.load_policy("kvm-sqrt-16").model_dump())
        assert len({id(policy) for policy in in_threads(lambda _, spec=spec: spec.build())}) == 1


def test_threads_attend_on_memories_of_their_own(hurried_threads: None):
    spec = scaled(memkit.load_policy("ovq-1024", {"growth.limit": 256}), chunk=4)
    cases = [make_case(spec, 1500 + 100 * index, seed=index) for index in range(4)]
    with torch.no_grad():
        expected = [case.attend()[0] for case in cases]
    spec = memkit.PolicySpec(**spec.model_dump())  # whose schedule nobody has asked for yet

    def read(index: int) -> Tensor:
        with torch.no_grad():
            return Case(spec, cases[index].tensors, cases[index].learned, cases[index].rotation).attend()[0]

    for output, right in zip(in_threads(read), expected, strict=True):
        assert torch.equal(output, right)


# Copies: pickle, copy, torch.save, another process


def saved_by_torch(memory: memkit.Memory) -> memkit.Memory:
    buffer = io.BytesIO()
    torch.save(memory, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[memkit.Memory], memkit.Memory]] = {
    "pickle": lambda memory: pickle.loads(pickle.dumps(memory)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": saved_by_torch,
    "fork": memkit.Memory.fork,
    "detach": memkit.Memory.detach,
    "to": lambda memory: memory.to("cpu"),
    "reorder": lambda memory: memory.reorder([0, 1]),
}


@torch.no_grad()
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_on_as_the_original_does_at_every_stage(name: str, way: str):
    case = make_case(small(name), 8 * CHUNK + 5)
    begin = 3 * CHUNK + 1
    memory = case.part(0, begin).attend()[1]
    for stage in range(begin, begin + max(STAGES) + 1):
        if stage - begin in STAGES:
            copied, original = COPIES[way](memory), memory.fork()
            for other in range(3):  # the copy decodes on first; the original must not notice
                token = case.part(stage + other, stage + other + 1)
                ahead, copied = token.attend(memory=copied)
                right, original = token.attend(memory=original)
                assert torch.equal(ahead, right)
        token, expected = case.part(stage, stage + 1), memory.fork()
        output, memory = token.attend(memory=memory)
        right, _ = token.attend(memory=expected)
        torch.testing.assert_close(output, right)


def answer(questions: Any, results: Any) -> None:
    case, memory = questions.get(timeout=120)
    with torch.no_grad():
        results.put(case.attend(memory=memory)[0].numpy())


@torch.no_grad()
def test_a_memory_goes_on_in_another_process():
    case = make_case(small("untrained-kvm-fixed"), 6 * CHUNK)
    memory = case.part(0, 5 * CHUNK).attend()[1]
    memory = case.part(5 * CHUNK, 5 * CHUNK + 1).attend(memory=memory)[1]
    rest = case.part(5 * CHUNK + 1, 6 * CHUNK)
    context = multiprocessing.get_context("spawn")
    questions, results = context.Queue(), context.Queue()
    process = context.Process(target=answer, args=(questions, results))
    process.start()
    questions.put((rest, memory))
    output = torch.from_numpy(results.get(timeout=120))
    process.join()
    torch.testing.assert_close(output, rest.attend(memory=memory)[0])


def test_a_policy_is_its_own_copy_and_survives_pickle():
    policy = memkit.load_policy("kvm-sqrt-16").build()
    assert copy.deepcopy(policy) is copy.copy(policy) is policy
    again = pickle.loads(pickle.dumps(policy))
    assert again.spec == policy.spec
    assert again.name == "kvm-sqrt-16"
    assert pickle.loads(pickle.dumps(policy.spec)).build().slots_after(5000) == policy.slots_after(5000)


@pytest.mark.parametrize("copied", [memkit.Memory.detach, lambda memory: memory.to("cpu"), copy.copy])
@pytest.mark.parametrize("name", ["streaming-4-512", "kvm-sqrt-16", "full"])
def test_looking_ahead_changes_nothing(name: str, copied: Callable[[memkit.Memory], memkit.Memory]):
    torch.manual_seed(0)
    layer = memkit.MemoryAttention(small(name), width=16, heads=2)
    x = [torch.randn(2, 3 * CHUNK, 16) for _ in range(3)]
    with torch.no_grad():
        memory = layer(x[0])[1]

    def after(look: Callable[[memkit.Memory], memkit.Memory] | None) -> tuple[Tensor, Tensor]:
        held = memory.fork()
        if look is not None:
            with torch.no_grad():
                layer(x[1], look(held))
                layer(x[1][:, :1], look(held))
        layer.zero_grad()
        output = layer(x[2], held)[0]
        output.square().sum().backward()
        assert layer.key.weight.grad is not None
        return output.detach(), layer.key.weight.grad.clone()

    for got, right in zip(after(copied), after(None), strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("additive", [True, False], ids=["additive", "in-turn"])
def test_a_call_with_gradients_returns_a_memory_that_shares_nothing(additive: bool, moving_average: memkit.PolicySpec):
    case = make_case(small("kvm-sqrt-16") if additive else moving_average, 40)
    with torch.no_grad():
        memory = case.part(0, 30).attend()[1]
    _, later = case.part(30, 32).leaves().attend(memory=memory)  # no chunk leaves
    storages = {tensor.untyped_storage().data_ptr() for tensor in memory.tensors() if tensor.numel()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in later.tensors() if tensor.numel()}


# Inference mode, and calls that fail half-way


@pytest.mark.parametrize("tokens", [1, CHUNK + 1])
@pytest.mark.parametrize("decoded", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_memory_made_in_inference_mode_goes_on_outside(name: str, decoded: int, tokens: int):
    case = make_case(small(name), 7 * CHUNK)
    begin = 4 * CHUNK + 2

    def started() -> memkit.Memory:
        memory = case.part(0, begin - decoded).attend()[1]
        for index in range(begin - decoded, begin):
            memory = case.part(index, index + 1).attend(memory=memory)[1]
        return memory

    with torch.inference_mode():
        made_inside = started()
    rest = case.part(begin, begin + tokens)
    with torch.no_grad():
        expected = rest.attend(memory=started())[0]
        assert torch.equal(rest.attend(memory=made_inside)[0], expected)
        made_outside = started()
    with torch.inference_mode():
        assert torch.equal(rest.attend(memory=made_outside)[0], expected)
        made_inside = started()
    output = rest.leaves().attend(memory=made_inside)[0]  # and with gradients
    torch.testing.assert_close(output.detach(), expected)
    output.sum().backward()


class Interrupted(RuntimeError):
    pass


class MovingAverageSpec(MergingSpec):
    kind: str = "moving-average-that-may-fail"

    def build(self) -> MovingAverage:
        return MovingAverage()


class MovingAverage(Merging):
    additive = False
    fails = False

    def combine(self, slot: Tensor, token: Tensor) -> Tensor:
        if MovingAverage.fails:
            raise Interrupted("in the middle")
        return 0.9 * slot + 0.1 * token


@pytest.fixture
def moving_average() -> memkit.PolicySpec:
    memkit.register(MovingAverageSpec)
    return memkit.load_policy(small("untrained-kvm-fixed"), {"merging.kind": "moving-average-that-may-fail"})


@torch.no_grad()
def test_a_call_that_fails_before_it_wrote_leaves_the_memory_usable(
    moving_average: memkit.PolicySpec, monkeypatch: pytest.MonkeyPatch
):
    case = make_case(moving_average, 6 * CHUNK)
    memory = case.part(0, 4 * CHUNK).attend()[1]
    rest = case.part(4 * CHUNK, 6 * CHUNK)
    expected = rest.attend(memory=memory.fork())[0]
    with monkeypatch.context() as patch:
        patch.setattr(MovingAverage, "fails", True)
        with pytest.raises(Interrupted):
            rest.attend(memory=memory)
    assert torch.equal(rest.attend(memory=memory)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2 * CHUNK])
def test_a_call_that_fails_leaves_the_memory_as_it_was_or_says_that_it_is_lost(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
):
    """Whatever step fails: the memory then gives what it would have given, or refuses."""
    case = make_case(small(name), 7 * CHUNK)
    started = case.part(0, 5 * CHUNK - 1).attend()[1]
    for decoded in (0, 1):
        begin = 5 * CHUNK - 1 + decoded
        rest = case.part(begin, begin + tokens)
        expected = rest.attend(memory=started.fork())[0]
        failed = 0
        for nth in range(1, 200):
            memory = pickle.loads(pickle.dumps(started))
            with monkeypatch.context() as patch:
                fail_at(patch, nth)
                try:
                    output = rest.attend(memory=memory)[0]
                except Interrupted:
                    failed += 1
                else:
                    assert torch.equal(output, expected)
                    break
            if memory.lost is None:
                assert torch.equal(rest.attend(memory=memory)[0], expected)
                continue
            assert "lost" in repr(memory)
            with pytest.raises(memkit.MemoryStateError, match="is lost: a call failed"):
                rest.attend(memory=memory)
        assert failed
        if decoded == 0:
            started = case.part(begin, begin + 1).attend(memory=started)[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["untrained-observed", "untrained-kvm-fixed", "kvm-sqrt-16"])
def test_a_call_inside_a_chunk_that_fails_at_its_very_end_leaves_the_memory_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """Nothing leaves and nothing is judged: only the window is written behind, which takes nothing back."""
    case = make_case(small(name), 7 * CHUNK)
    begin = 5 * CHUNK + 2
    started = case.part(0, begin).attend()[1]
    rest = case.part(begin, begin + 3)
    expected = rest.attend(memory=started.fork())[0]
    failed = 0
    for nth in range(1, 100):
        memory = pickle.loads(pickle.dumps(started))
        with monkeypatch.context() as patch:
            fail_at(patch, nth)
            try:
                rest.attend(memory=memory)
            except Interrupted:
                failed += 1
            else:
                break
        assert memory.lost is None
        assert torch.equal(rest.attend(memory=memory)[0], expected)
    assert failed


def fail_at(patch: pytest.MonkeyPatch, nth: int) -> None:
    """Let the nth operation of PyTorch's that a call uses fail."""
    count = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                raise Interrupted
            return original(*args, **kwargs)

        return call

    from memkit.engine import decode, read

    for owner, name in (
        (Tensor, "copy_"),
        (Tensor, "index_add_"),
        (Tensor, "index_copy_"),
        (Tensor, "clone"),
        (torch, "cat"),
        (read, "_flash"),
        (decode, "scaled_dot_product_attention"),
    ):
        patch.setattr(owner, name, counted(getattr(owner, name)))


# Parameters changed behind PyTorch's back


@torch.no_grad()
def test_a_fork_reads_slots_as_parameters_are_now_however_they_were_changed():
    case = make_case(small("kvm-sqrt-16"), 6 * CHUNK)
    parameters = case.parameters()
    assert parameters is not None
    assert parameters.key_norm_weight is not None
    memory = case.part(0, 5 * CHUNK).attend()[1]
    first, second, third = (case.part(5 * CHUNK + i, 5 * CHUNK + i + 1) for i in range(3))

    def attend(token: Case, memory: memkit.Memory) -> tuple[Tensor, memkit.Memory]:
        return memkit.attend(case.spec, **token.tensors, parameters=parameters, memory=memory)

    memory = attend(first, memory)[1]
    before = memory.fork()
    stale = attend(second, memory.fork())[0]
    parameters.key_norm_weight.data.mul_(3)  # not counted by PyTorch
    changed = attend(second, before.fork())[0]
    assert not torch.allclose(changed, stale)
    parameters.key_norm_weight.mul_(2)  # counted, and seen by a memory that decodes
    memory = attend(second, memory)[1]
    torch.testing.assert_close(attend(third, memory)[0], attend(third, memory_after(attend, second, before))[0])


def memory_after(attend: Callable[..., Any], token: Case, memory: memkit.Memory) -> memkit.Memory:
    return attend(token, memory.fork())[1].fork()
