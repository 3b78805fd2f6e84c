"""Sliding windows read by compiled loops: what operations say, and only where loops know it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit import loops
from memkit.engine import lanes, sliding
from memkit.loops import of_reading
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance

if not loops.installed() or not loops.with_products():
    pytest.skip("needs Numba, and PyTorch's BLAS under its name", allow_module_level=True)

TOKENS, BAND = 14 * CHUNK + 3, 2 * CHUNK
CUTS = (CHUNK + 2, 5 * CHUNK, 5 * CHUNK + 1, 9 * CHUNK)
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "no sinks": ("window-512", {}),
    "sinks": ("streaming-4-512", {}),
    "more sinks than the band has tokens": ("streaming-4-512", {"sinks": BAND + 3}),
    "a band of one token": ("streaming-4-512", {"window.size": 1}),
    "temperatures": ("streaming-4-512", {"readout.temperatures": True}),
}
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "a window of whole chunks": ("block-window-3x256", {}),
    "all tokens": ("full", {}),
}


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the loops read, of one query on."""
    counted, by_loops = list[int](), sliding.SlidingLanes.read

    def noted(self: sliding.SlidingLanes, steps, *args) -> None:
        counted.append(steps[-1].stop - steps[0].start)
        by_loops(self, steps, *args)

    monkeypatch.setattr(sliding.SlidingLanes, "read", noted)
    monkeypatch.setattr(sliding, "QUERIES", 1)
    return counted


def case_of(name: str, dtype: torch.dtype = torch.float64) -> Case:
    policy, changes = (KNOWN | OTHERWISE)[name]
    return make_case(memkit.load_policy(small(policy), changes), TOKENS, rows=2, heads=6, kv_heads=2).to(dtype)


def read(case: Case, monkeypatch: pytest.MonkeyPatch, by_loops: bool, cuts: tuple[int, ...] = ()) -> Tensor:
    """Outputs of a text read in pieces."""
    monkeypatch.setattr(lanes, "ENABLED", by_loops)
    outputs, memory = list[Tensor](), None
    with torch.no_grad():
        for begin, end in zip((0, *cuts), (*cuts, TOKENS), strict=True):
            output, memory = case.part(begin, end).attend(memory=memory)
            outputs.append(output)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("cuts", [(), CUTS], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KNOWN)
def test_loops_are_operations(name: str, dtype: torch.dtype, cuts, taken: list[int], monkeypatch):
    case = case_of(name, dtype)
    output = read(case, monkeypatch, by_loops=True, cuts=cuts)
    assert sum(taken) >= TOKENS - 6 * CHUNK
    taken.clear()
    assert_close(output, read(case, monkeypatch, by_loops=False, cuts=cuts), tolerance(dtype, 2048), "outputs")
    assert not taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KNOWN)
def test_half_precision_is_read_in_float32(name: str, dtype: torch.dtype, taken: list[int], monkeypatch):
    case = case_of(name, dtype)
    output = read(case, monkeypatch, by_loops=True, cuts=CUTS)
    assert taken
    assert output.dtype == dtype
    assert_close(output, read(case, monkeypatch, by_loops=False, cuts=CUTS), tolerance(torch.bfloat16, 4), "outputs")


@pytest.mark.parametrize("lengths", [(TOKENS, 5 * CHUNK + 3), (3, TOKENS - 5), (4 * CHUNK, 0)])
@pytest.mark.parametrize("name", KNOWN)
def test_rows_that_end_earlier_and_go_on_elsewhere(name: str, lengths: tuple[int, int], taken: list[int], monkeypatch):
    case, both = case_of(name), list[tuple[Tensor, Tensor]]()
    for by_loops in (True, False):
        monkeypatch.setattr(lanes, "ENABLED", by_loops)
        with torch.no_grad():
            output, memory = case.attend(lengths=list(lengths))
            both.append((output, case.part(0, 2 * CHUNK + 1).attend(memory=memory)[0]))
    assert len(taken) >= 2
    for one, other in zip(*both, strict=True):
        assert_close(one, other, tolerance(torch.float64, 2048), "outputs")


@pytest.mark.parametrize(("what", "number"), [("keys", torch.nan), ("values", torch.nan), ("values", torch.inf)])
def test_what_is_no_number_harms_who_sees_it(what: str, number: float, taken: list[int], monkeypatch):
    case, at = case_of("no sinks"), 4 * CHUNK + 2
    expected = read(case, monkeypatch, by_loops=True)
    case.tensors[what][1, 0, at] = number
    output = read(case, monkeypatch, by_loops=True)
    assert len(taken) == 2
    assert not output[1, :3, at : at + BAND].isfinite().all(dim=-1).any()
    assert torch.equal(output[0], expected[0])
    assert torch.equal(output[1, 3:], expected[1, 3:])
    # A share of 0 of what is no number is none, and queries are read some at a time.
    apart = of_reading().QUERIES if what == "values" else 0
    for others in (slice(0, max(0, at - apart)), slice(at + BAND + apart, None)):
        assert torch.equal(output[1, :3, others], expected[1, :3, others])


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_kernels_read_as_fast_is_left_to_them(name: str, taken: list[int], monkeypatch):
    read(case_of(name), monkeypatch, by_loops=True)
    assert not taken


def test_who_has_a_graph_or_few_queries_goes_by_operations(taken: list[int], monkeypatch):
    case = case_of("sinks")
    case.leaves().attend()[0].sum().backward()
    assert not taken
    with torch.no_grad():
        case.part(0, BAND).attend()  # nothing has fallen out of the window yet
        assert not taken
        _, memory = case.part(0, 5 * CHUNK).attend()
        assert taken
        monkeypatch.setattr(sliding, "QUERIES", 4)
        taken.clear()
        case.part(5 * CHUNK, 5 * CHUNK + 3).attend(memory=memory)
        assert not taken


def test_a_call_that_fails_leaves_the_memory_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """Nothing of it is written to while a window that slides is read."""

    def fail(*_: object) -> None:
        raise InterruptedError

    case = case_of("sinks")
    with torch.no_grad():
        _, memory = case.part(0, 5 * CHUNK).attend()
        expected, _ = case.part(5 * CHUNK, TOKENS).attend(memory=memory.fork())
        with monkeypatch.context() as patched:
            patched.setattr(sliding.SlidingLanes, "go_through", fail)
            with pytest.raises(InterruptedError):
                case.part(5 * CHUNK, TOKENS).attend(memory=memory)
        output, _ = case.part(5 * CHUNK, TOKENS).attend(memory=memory)
    assert torch.equal(output, expected)


def test_threads_that_would_have_none_share_a_head(taken: list[int], monkeypatch):
    monkeypatch.setattr(lanes, "FEWEST", 1000)
    read(case_of("sinks"), monkeypatch, by_loops=True)
    assert not taken
