"""Compiled loops say what PyTorch's operations say, and these do the work where loops cannot."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit import loops
from memkit.engine import contests
from memkit.memory import HeadsMemory, Memory
from memkit.pieces.evidence import softmax_evidence
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance

if not loops.installed():
    pytest.skip("needs Numba: pip install '.[fast]'", allow_module_level=True)

TOKENS = 12 * CHUNK + 3
UNEVEN = {"heads": {"ratios": (0.5, 1.0, 1.0, 1.75)}}
COMPETING: dict[str, tuple[str, dict[str, Any]]] = {
    "observed": ("untrained-observed", {}),
    "uneven heads": ("untrained-observed", UNEVEN),
    "growing, uneven heads": ("untrained-observed-sqrt", UNEVEN),
    "recall": ("untrained-recall", {}),
    "reading again": ("untrained-reread", {}),
    "no pool, no difference": ("untrained-observed", {"admission": {"kind": "output-error"}}),
    "pool alone": ("untrained-observed", {"admission": {"kind": "output-error", "pool": 5}}),
    "by shares": ("untrained-observed", {"admission": {"kind": "attention", "value_norm": True, "pool": 3}}),
    "bias by count": ("untrained-observed", {"readout": {"bias": "count"}}),
    "no bias": ("untrained-observed", {"readout": {"bias": "none"}}),
    "no sinks": ("untrained-observed", {"sinks": 0}),
    "values read by their count": ("untrained-observed", {"readout": {"value": "count-mean", "bias": "mass"}}),
    "three of the queries": ("untrained-observed", {"observe.queries": 3}),
    "dropping": ("caote-512", {}),
    "dropping, by shares": ("snapkv-512", {}),
    "dropping, by expected shares": ("expected-attention-512", {}),
    "not observed": ("knorm-512", {}),
    "not observed, uneven heads": ("keydiff-512", UNEVEN),
}
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "by dot product": ("untrained-observed", {"routing": {"kind": "nearest", "similarity": "dot"}}),
    "only where near enough": ("untrained-observed", {"routing.least": 0.3}),
    "merging keys, too": ("untrained-observed", {"merging.of": "both"}),
    "slots that stay": ("untrained-observed", {"eviction": "never", "admission": {"kind": "novelty"}}),
}


def case_of(name: str) -> Case:
    policy, changes = (COMPETING | OTHERWISE)[name]
    return make_case(memkit.load_policy(small(policy), changes), TOKENS, rows=2, heads=8, kv_heads=4)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many contests were folded by loops, and how many by operations."""
    counted = Counter[str]()
    for name in ("_contend_by_loops", "replace"):
        monkeypatch.setattr(contests, name, _noting(counted, name, getattr(contests, name)))
    return counted


def _noting(counted: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        counted[name] += 1
        return function(*args)

    return noted


def read(
    case: Case, monkeypatch: pytest.MonkeyPatch, by_loops: bool, cuts: tuple[int, ...] = ()
) -> tuple[Tensor, Memory]:
    """Outputs and memory of a text read in pieces."""
    monkeypatch.setattr(loops, "ENABLED", by_loops)
    outputs, memory = list[Tensor](), None
    with torch.no_grad():
        for begin, end in zip((0, *cuts), (*cuts, TOKENS), strict=True):
            output, memory = case.part(begin, end).attend(memory=memory)
            outputs.append(output)
    assert memory is not None
    return torch.cat(outputs, 2), memory


def parts_of(memory: Memory) -> tuple[Memory, ...]:
    return tuple(memory.parts) if isinstance(memory, HeadsMemory) else (memory,)


def assert_same(one: Memory, other: Memory, limit: float) -> None:
    assert torch.equal(one.slots, other.slots)
    assert torch.equal(one.counts, other.counts)
    assert one.bytes == other.bytes
    for mine, theirs in zip(parts_of(one), parts_of(other), strict=True):
        assert_close(mine.sums, theirs.sums, limit, "sums")
        assert (mine.store.evidence is None) == (theirs.store.evidence is None)
        if mine.store.evidence is not None and theirs.store.evidence is not None:
            assert_close(mine.store.evidence, theirs.store.evidence, limit, "evidence")


@pytest.mark.parametrize("cuts", [(), (CHUNK + 2, 5 * CHUNK, 5 * CHUNK + 1)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", COMPETING)
def test_loops_are_operations(name: str, dtype: torch.dtype, cuts, folds: Counter[str], monkeypatch):
    case, limit = case_of(name).to(dtype), tolerance(dtype, 2048)
    output, memory = read(case, monkeypatch, by_loops=True, cuts=cuts)
    assert folds["_contend_by_loops"] > 0
    assert not folds["replace"]
    expected, by_operations = read(case, monkeypatch, by_loops=False, cuts=cuts)
    assert folds["replace"] == folds["_contend_by_loops"]
    assert_close(output, expected, limit, "outputs")
    assert_same(memory, by_operations, limit)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_loops_do_not_know_is_left_to_operations(name: str, folds: Counter[str], monkeypatch):
    read(case_of(name), monkeypatch, by_loops=True)
    assert not folds["_contend_by_loops"]


def test_rows_of_unequal_lengths(folds: Counter[str], monkeypatch):
    case, lengths = case_of("observed"), torch.tensor([TOKENS, 7 * CHUNK + 1])
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(loops, "ENABLED", enabled)
        with torch.no_grad():
            results.append(case.attend(lengths=lengths))
    (output, memory), (expected, by_operations) = results
    assert folds["_contend_by_loops"]
    assert_close(output, expected, tolerance(torch.float64, 2048), "outputs")
    assert_same(memory, by_operations, tolerance(torch.float64, 2048))


def test_half_precision_scores_as_operations_do(folds: Counter[str], monkeypatch):
    """What is in bfloat16 outside is rounded there, so that both decide by the same numbers."""
    case = case_of("uneven heads").to(torch.bfloat16)
    output, memory = read(case, monkeypatch, by_loops=True)
    assert folds["_contend_by_loops"]
    expected, by_operations = read(case, monkeypatch, by_loops=False)
    assert_close(output, expected, tolerance(torch.bfloat16, 4), "outputs")
    assert torch.equal(memory.counts, by_operations.counts)


def test_gradients_are_for_operations(folds: Counter[str], monkeypatch):
    monkeypatch.setattr(loops, "ENABLED", True)
    case = case_of("observed")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    output, _ = Case(case.spec, leaves, case.learned, case.rotation).attend()
    output.sum().backward()
    assert folds["replace"]
    assert not folds["_contend_by_loops"]


@given(
    st.sampled_from([torch.float64, torch.float32]),
    st.integers(0, 2**16),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5)),
    st.booleans(),
    st.data(),
)
def test_evidence(dtype: torch.dtype, seed: int, sizes: tuple[int, ...], some_are_near: bool, data):
    rows, heads, queries, count, width = sizes
    numbers = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(rows, heads, queries, count, generator=numbers, dtype=dtype)
    values = torch.randn(rows, heads, count, width, generator=numbers, dtype=dtype)
    step = data.draw(st.integers(1, queries))
    observed = data.draw(st.sampled_from([slice(step - 1, None, step), torch.arange(step - 1, queries, step)]))
    asked, window = len(torch.arange(queries)[observed]), data.draw(st.integers(1, count))
    near = torch.rand(asked, window, generator=numbers) < 0.5 if some_are_near else None
    told = []
    for enabled in (True, False):
        loops.ENABLED = enabled
        try:
            told.append(softmax_evidence(scores.clone(), values, observed, near))
        finally:
            loops.ENABLED = True
    for mine, theirs, what in zip(*told, ("outputs", "evidence"), strict=True):
        assert_close(mine, theirs, tolerance(dtype), what)


@given(st.lists(st.sampled_from([-np.inf, -2.0, -0.0, 0.0, 1.0, 3.0]), max_size=70), st.integers(0, 70))
def test_the_first_of_the_highest(numbers: list[float], first: int):
    found = loops.compiled()._highest(np.array(numbers), first)
    assert found == (first + int(np.argmax(numbers[first:])) if first < len(numbers) else -1)


def test_what_is_no_number_loses_and_harms_nobody(monkeypatch):
    """All places are taken, also where scores are no numbers."""
    case = case_of("observed")
    case.tensors["values"][0, 0, 3] = torch.nan
    output, memory = read(case, monkeypatch, by_loops=True)
    expected, other = read(case, monkeypatch, by_loops=False)
    assert torch.equal(memory.slots, other.slots)
    assert_close(output[1], expected[1], tolerance(torch.float64, 2048), "outputs of the other row")


def test_without_numba_operations_do_it(folds: Counter[str], monkeypatch):
    loops.compiled.cache_clear()
    monkeypatch.setattr(loops, "installed", lambda: False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read(case_of("observed"), monkeypatch, by_loops=True)
    finally:
        loops.compiled.cache_clear()
    assert folds["replace"]
    assert not folds["_contend_by_loops"]


def test_a_numba_that_does_not_run_is_said_once(folds: Counter[str], monkeypatch):
    loops.compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "memkit.loops.lines", None)
    try:
        with pytest.warns(memkit.errors.SlowPathWarning, match="Numba") as said:
            read(case_of("observed"), monkeypatch, by_loops=True)
    finally:
        loops.compiled.cache_clear()
    assert len(said) == 1
    assert folds["replace"]


def test_without_a_folder_to_keep_them_loops_are_compiled_anew(monkeypatch):
    lines = loops.compiled()
    asked = []

    def njit(cache: bool = False, **options: Any) -> Callable[[Any], Any]:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: SimpleNamespace(function=function, **options)

    monkeypatch.setattr(lines, "njit", njit)
    compiled = lines._loop(len)
    assert asked == [True, False]
    assert compiled.function is len
    assert compiled.nogil
