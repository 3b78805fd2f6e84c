"""Lanes: whole chunks on the CPU, a head at a time. That they say what operations say, `test_loops` has."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import memkit
from memkit import loops
from memkit.engine import competing, lanes, threads
from memkit.engine.threads import in_threads
from memkit.memory import Memory
from memkit.pieces.observation import Observation, ObservationSpec
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance

if not loops.installed() or not loops.with_products():
    pytest.skip("needs Numba, and PyTorch's BLAS under its name", allow_module_level=True)

TOKENS = 9 * CHUNK


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks each stretch had that went by lanes."""
    taken, read = list[int](), competing.CompetingLanes.read

    def noted(self: competing.CompetingLanes, steps, *args) -> None:
        taken.append(len(steps))
        read(self, steps, *args)

    monkeypatch.setattr(competing.CompetingLanes, "read", noted)
    return taken


def case_of(**changes: object) -> Case:
    spec = memkit.load_policy(small("untrained-observed"), changes)
    return make_case(spec, TOKENS, rows=2, heads=8, kv_heads=4).to(torch.float32)


def read(case: Case, **given: object) -> tuple[Tensor, Memory]:
    with torch.no_grad():
        return case.attend(**given)


def with_tensors(case: Case, change) -> Case:
    return dataclasses.replace(case, tensors={name: change(name, tensor) for name, tensor in case.tensors.items()})


def test_all_chunks_of_a_text_go_by_lanes(chunks: list[int]):
    read(case_of())
    assert chunks == [TOKENS // CHUNK]


def test_stretches_end_where_tokens_are_taken_ahead(chunks: list[int], monkeypatch: pytest.MonkeyPatch):
    case = case_of()
    expected, _ = read(case)
    monkeypatch.setattr(lanes, "AHEAD", 4 * CHUNK)
    output, _ = read(case)
    assert chunks == [9, 4, 4, 1]
    assert_close(output, expected, tolerance(torch.float32, 64), "outputs")


@pytest.mark.parametrize("heads", [{}, {"ratios": (0.5, 1.0, 1.0, 1.5)}], ids=["even", "uneven"])
def test_threads_change_nothing(heads: dict[str, object], chunks: list[int]):
    case, before, outputs = case_of(heads=heads), torch.get_num_threads(), list[Tensor]()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs.append(read(case)[0])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert len(chunks) == 2
    assert torch.equal(*outputs)


def test_tensors_may_lie_as_projections_leave_them(chunks: list[int]):
    """[b, t, h, d] turned, and values that every row of the batch shares."""

    def turned(name: str, tensor: Tensor) -> Tensor:
        if name == "values":
            return tensor[:1].expand_as(tensor)
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    lying = with_tensors(case_of(), turned)
    expected, _ = read(with_tensors(lying, lambda _, tensor: tensor.contiguous()))
    output, _ = read(lying)
    assert len(chunks) == 2
    assert torch.equal(output, expected)


def test_tokens_that_share_their_numbers(chunks: list[int]):
    """Tensors whose tokens, or channels, stand at one place."""
    case = with_tensors(case_of(), lambda _, tensor: tensor[:, :, :1].expand_as(tensor))
    expected, _ = read(with_tensors(case, lambda _, tensor: tensor.contiguous()))
    assert torch.equal(read(case)[0], expected)
    flipped = with_tensors(case, lambda _, tensor: tensor.mT.contiguous().mT)
    assert torch.equal(read(flipped)[0], expected)


def test_a_token_alone_whose_stride_says_nothing(chunks: list[int], monkeypatch: pytest.MonkeyPatch):
    """[b, g, 1, d] cut out of what does not stand behind each other: contiguous to PyTorch, whatever its stride."""
    case = case_of(**{"chunker.size": 1, "window.chunks": 1}).part(0, 1)
    case = with_tensors(case, lambda _, tensor: tensor.mT.contiguous().mT)
    assert case.tensors["keys"].stride(-2) < case.tensors["keys"].shape[-1]
    by_lanes, _ = read(case)
    assert chunks
    monkeypatch.setattr(lanes, "ENABLED", False)
    assert_close(by_lanes, read(case)[0], tolerance(torch.float32, 64), "outputs")


@pytest.mark.parametrize("what", ["queries", "keys", "values"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(what: str, number: float, monkeypatch: pytest.MonkeyPatch):
    at = 3 * CHUNK + 2

    def spoiled(name: str, tensor: Tensor) -> Tensor:
        if name == what:
            tensor = tensor.clone()
            tensor[1, -1, at, 0] = number
        return tensor

    case = with_tensors(case_of(), spoiled)
    by_lanes, _ = read(case)
    monkeypatch.setattr(loops, "ENABLED", False)
    expected, _ = read(case)
    assert torch.equal(by_lanes[:, :, : at - 1].isfinite(), expected[:, :, : at - 1].isfinite())
    assert not by_lanes[1, -1, at].isfinite().all()
    assert by_lanes[:1].isfinite().all()
    assert torch.equal(by_lanes[1, :, at].isnan(), expected[1, :, at].isnan())


@pytest.mark.parametrize("name", ["h2o-512", "snapkv-512"])
def test_shares_that_are_next_to_nothing_still_have_an_order(name: str, monkeypatch: pytest.MonkeyPatch):
    """Scores a hundred apart: shares below what is a normal number in float32."""
    case = make_case(memkit.load_policy(small(name)), TOKENS).to(torch.float32)
    case = with_tensors(case, lambda name, tensor: 1000 * tensor if name == "keys" else tensor)
    by_lanes, _ = read(case)
    monkeypatch.setattr(loops, "ENABLED", False)
    assert_close(by_lanes, read(case)[0], tolerance(torch.float32, 2**13), "outputs")


def test_more_sinks_than_a_chunk_has_tokens(chunks: list[int], monkeypatch: pytest.MonkeyPatch):
    changes = {"chunker.size": 2, "window.chunks": 3, "sinks": 3, "growth.slots": 6}
    changes |= {"admission.future": 5, "observe.queries": 2}
    case = make_case(memkit.load_policy("expected-attention-512", changes), 20)
    by_lanes, _ = read(case)
    assert chunks
    monkeypatch.setattr(loops, "ENABLED", False)
    assert_close(by_lanes, read(case)[0], tolerance(torch.float64, 2048), "outputs")


class Asked(Observation):
    def added(self, evidence: Tensor, told: Tensor) -> Tensor:
        raise InterruptedError

    def add_(self, evidence: Tensor, told: Tensor) -> None:
        raise InterruptedError


class AskedSpec(ObservationSpec):
    def build(self, chunk: int, given: bool = False) -> Asked:
        return Asked(self, chunk, given)


def test_an_observation_of_ones_own_is_asked():
    spec = memkit.load_policy(small("caote-512")).model_copy(update={"observe": AskedSpec(queries=8)})
    with pytest.raises(InterruptedError):
        read(make_case(spec, TOKENS))


def test_where_no_thread_can_be_had_one_does_all(monkeypatch: pytest.MonkeyPatch):
    """As in a thread that outlives the interpreter's main one."""
    pool, done = ThreadPoolExecutor(1), list[int]()
    pool.shutdown()
    monkeypatch.setattr(threads, "_helpers", lambda count: pool)
    in_threads(lambda: done.append(1), 3)
    assert done == [1]


@pytest.mark.parametrize(("policy", "imports"), [("full", False), ("block-window-3x256", False), ("h2o-512", True)])
def test_who_has_no_use_for_numba_does_not_import_it(policy: str, imports: bool):
    code = f"""
import sys, torch, memkit
with torch.no_grad():
    memkit.attend({policy!r}, *(torch.randn(1, 2, 600, 8) for _ in range(3)))
print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(imports)


def test_an_error_in_a_thread_is_raised():
    def work() -> None:
        raise ZeroDivisionError

    before = torch.get_num_threads()
    for count in (1, 2):
        with pytest.raises(ZeroDivisionError):
            in_threads(work, count)
    assert torch.get_num_threads() == before


def test_a_memory_goes_on_from_lanes_to_steps_and_back(chunks: list[int], monkeypatch: pytest.MonkeyPatch):
    """Forked, so that the same memory is read on by both; whatever was read before."""
    case = case_of(heads={"ratios": (0.25, 0.75, 1.0, 2.0)})
    _, memory = read(case.part(0, 5 * CHUNK + 3))
    expected, _ = read(case.part(5 * CHUNK + 3, TOKENS), memory=memory.fork())
    assert chunks == [6, 3]
    monkeypatch.setattr(lanes, "ENABLED", False)
    output, _ = read(case.part(5 * CHUNK + 3, TOKENS), memory=memory)
    assert len(chunks) == 2
    assert_close(output, expected, tolerance(torch.float32, 2048), "outputs")
