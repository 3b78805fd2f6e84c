"""Compiled loops say what PyTorch's operations say, and these do the work where loops cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit import loops
from memkit.engine import competing, contests, lanes
from memkit.engine.schedule import Step
from memkit.memory import HeadsMemory, Memory
from memkit.pieces import Admission, AdmissionSpec, ChunkContext, MergingSpec, Readout, ReadoutSpec
from memkit.pieces.evidence import softmax_evidence
from memkit.pieces.merging import Drop
from memkit.pieces.statistics import Numbers
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance
from tests.engine.test_agreement import assert_agrees

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
    "three of the queries": ("untrained-observed", {"observe.queries": 3}),
    "dropping": ("caote-512", {}),
    "dropping, by shares": ("snapkv-512", {}),
    "dropping, by expected shares": ("expected-attention-512", {}),
    "by expected shares of mean readers": ("expected-attention-512", {"admission.covariance": False, "sinks": 2}),
    "by keys' norms": ("knorm-512", {}),
    "by keys' differences": ("keydiff-512", {}),
    "by recency": ("knorm-512", {"admission": {"kind": "recency"}}),
    "by keys' norms, merging": ("untrained-observed", {"admission": {"kind": "key-norm"}}),
    "by keys' differences, merging": ("untrained-observed", {"admission": {"kind": "key-difference"}}),
    "merging, by expected shares": (
        "untrained-observed",
        {
            "admission": {"kind": "expected-attention", "future": 20, "value_norm": False},
            "observe.queries": 3,
            "sinks": 5,
        },
    ),
}
STEP_BY_STEP = {"bias by count", "by recency"}
"""What loops know of a contest, but not of a whole chunk."""

OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "by dot product": ("untrained-observed", {"routing": {"kind": "nearest", "similarity": "dot"}}),
    "only where near enough": ("untrained-observed", {"routing.least": 0.3}),
    "merging keys, too": ("untrained-observed", {"merging.of": "both"}),
    "values read by their count": ("untrained-observed", {"readout": {"value": "count-mean", "bias": "mass"}}),
}


def case_of(name: str) -> Case:
    policy, changes = (COMPETING | OTHERWISE)[name]
    return make_case(memkit.load_policy(small(policy), changes), TOKENS, rows=2, heads=8, kv_heads=4)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many contests were folded by lanes, how many by loops step by step, and how many by operations."""
    counted = Counter[str]()
    by_lanes = competing.CompetingLanes.read

    def noted(self: competing.CompetingLanes, steps: Sequence[Step], *args: Any) -> None:
        counted["lanes"] += sum(len(step.leaving) for step in steps)
        by_lanes(self, steps, *args)

    monkeypatch.setattr(competing.CompetingLanes, "read", noted)
    for name in ("_contend_by_loops", "replace"):
        monkeypatch.setattr(contests, name, _noting(counted, name, getattr(contests, name)))
    return counted


def _noting(counted: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        counted[name] += 1
        return function(*args)

    return noted


def read(
    case: Case, monkeypatch: pytest.MonkeyPatch, by_loops: bool, cuts: tuple[int, ...] = (), by_lanes: bool = True
) -> tuple[Tensor, Memory]:
    """Outputs and memory of a text read in pieces."""
    monkeypatch.setattr(loops, "ENABLED", by_loops)
    monkeypatch.setattr(lanes, "ENABLED", by_lanes)
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
@pytest.mark.parametrize("by_lanes", [True, False])
@pytest.mark.parametrize("name", COMPETING)
def test_loops_are_operations(
    name: str, by_lanes: bool, dtype: torch.dtype, cuts, folds: Counter[str], monkeypatch: pytest.MonkeyPatch
):
    case, limit = case_of(name).to(dtype), tolerance(dtype, 2048)
    output, memory = read(case, monkeypatch, by_loops=True, cuts=cuts, by_lanes=by_lanes)
    assert bool(folds["lanes"]) == (by_lanes and name not in STEP_BY_STEP and loops.with_products())
    assert bool(folds["_contend_by_loops"]) != bool(folds["lanes"])  # a chunk leaves where another one begins
    assert not folds["replace"]
    expected, by_operations = read(case, monkeypatch, by_loops=False, cuts=cuts)
    assert folds["replace"] == folds["lanes"] + folds["_contend_by_loops"]
    assert_close(output, expected, limit, "outputs")
    assert_same(memory, by_operations, limit)


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_loops_do_not_know_is_left_to_operations(name: str, folds: Counter[str], monkeypatch):
    read(case_of(name), monkeypatch, by_loops=True)
    assert folds["replace"]
    assert not folds["_contend_by_loops"]
    assert not folds["lanes"]


class Heavy(Drop):
    """A founder's sums are multiplied by its weight."""

    def weight(self, keys: Tensor, weights: Tensor | None) -> Tensor:
        return keys.norm(dim=-1)


class HeavySpec(MergingSpec):
    kind: Literal["test-heavy"] = "test-heavy"

    def build(self) -> Heavy:
        return Heavy()


class Twice(Readout):
    """Values are read twice as large."""

    def value(self, sums: Tensor, numbers: Numbers) -> Tensor:
        return 2 * super().value(sums, numbers)


class TwiceSpec(ReadoutSpec):
    def build(self) -> Twice:
        return Twice(self)


class Farthest(Admission):
    """Looks at slots as well."""

    rates_slots = compares = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return -chunk.redundancy


class FarthestSpec(AdmissionSpec):
    kind: Literal["test-farthest"] = "test-farthest"

    def build(self) -> Farthest:
        return Farthest()


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("caote-512", {"merging": {"kind": "test-heavy"}}),
        ("untrained-observed", {"readout": TwiceSpec(bias="mass")}),
    ],
    ids=["merging", "readout"],
)
def test_pieces_of_ones_own_are_asked(policy: str, changes: dict[str, Any], folds: Counter[str], monkeypatch):
    """Those whose class is not known go by operations, whatever they are derived from."""
    memkit.register(HeavySpec)
    spec = memkit.load_policy(small(policy))
    spec = spec.model_copy(update=changes) if "readout" in changes else memkit.load_policy(spec, changes)
    read(make_case(spec, TOKENS, rows=2, heads=8, kv_heads=4), monkeypatch, by_loops=True)
    assert folds["replace"]
    assert not folds["_contend_by_loops"]
    assert not folds["lanes"]


@pytest.mark.parametrize("by_loops", [True, False])
@pytest.mark.parametrize("sinks", [0, 2])
def test_an_admission_that_compares_competes_as_the_oracle_says(sinks: int, by_loops: bool, monkeypatch):
    """Where slots compete, token 0 of an empty memory is a candidate like others."""
    monkeypatch.setattr(loops, "ENABLED", by_loops)
    memkit.register(FarthestSpec)
    changes = {"admission": {"kind": "test-farthest"}, "sinks": sinks}
    assert_agrees(make_case(memkit.load_policy(small("untrained-observed"), changes), TOKENS))


class Remembers(Admission):
    """Keeps the score that it gave."""

    rates_slots = True
    given: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def score(self, chunk: ChunkContext) -> Tensor:
        score = chunk.keys.norm(dim=-1)
        self.given.append((score, score.clone()))
        return score


class RemembersSpec(AdmissionSpec):
    kind: Literal["test-remembers"] = "test-remembers"

    def build(self) -> Remembers:
        return Remembers()


@pytest.mark.parametrize("by_loops", [True, False])
def test_what_an_admission_returns_is_its_own(by_loops: bool, folds: Counter[str], monkeypatch):
    """Nobody writes into it, and it is asked only where some found and some do not."""
    memkit.register(RemembersSpec)
    monkeypatch.setattr(Remembers, "given", [])
    changes = {"admission": {"kind": "test-remembers"}, "sinks": 3}
    case = make_case(memkit.load_policy(small("caote-512"), changes), TOKENS, rows=2)
    read(case, monkeypatch, by_loops)
    assert bool(folds["_contend_by_loops"]) == by_loops
    assert 0 < len(Remembers.given) < folds.total()
    assert all(torch.equal(score, before) for score, before in Remembers.given)


@given(
    st.fixed_dictionaries(
        {
            "sinks": st.integers(0, 4),
            "growth": st.builds(lambda slots: {"kind": "fixed", "slots": slots}, st.integers(6, 40)),
            "observe": st.fixed_dictionaries(
                {
                    "queries": st.integers(1, 8),
                    "decay": st.sampled_from([0.0, 0.5, 1.0]),
                    "apart": st.sampled_from([0, 0, 3]),
                    "aggregate": st.sampled_from(["mean", "max"]),
                    "again": st.sampled_from([0, 2]),
                }
            ),
            "admission": st.fixed_dictionaries(
                {
                    "kind": st.just("output-error"),
                    "pool": st.sampled_from([1, 3, 7]),
                    "difference": st.sampled_from([0.0, 0.5, 2.0]),
                }
            )
            | st.sampled_from([{"kind": "key-norm"}, {"kind": "key-difference"}]),
            "merging": st.sampled_from(
                [
                    {"kind": "drop"},
                    *({"kind": "weighted-mean", "weight": "share", "of": "values", "cap": c} for c in (None, 1.0, 0.2)),
                ]
            ),
            "readout": st.builds(lambda bias: {"bias": bias}, st.sampled_from(["none", "count", "mass"])),
            "heads": st.sampled_from([{}, {"ratios": (0.5, 1.5)}, {"ratios": (1.75, 0.25)}]),
        }
    ),
    st.integers(1, 3),
    st.lists(st.integers(1, TOKENS), min_size=3, max_size=3),
)
@settings(max_examples=60)
def test_random_contests(changes: dict[str, Any], rows: int, lengths: list[int]):
    if changes["admission"]["kind"] != "output-error":  # who reads again tells errors
        changes["observe"] = changes["observe"] | {"again": 0}
    case = make_case(memkit.load_policy(small("untrained-observed"), changes), TOKENS, rows=rows).to(torch.float32)
    both = []
    for enabled in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(loops, "ENABLED", enabled)
            both.append(case.attend(lengths=lengths[:rows]))
    (output, memory), (expected, by_operations) = both
    assert_close(output, expected, tolerance(torch.float32, 2048), "outputs")
    assert_same(memory, by_operations, tolerance(torch.float32, 2048))


def test_rows_of_unequal_lengths(folds: Counter[str], monkeypatch):
    case, lengths = case_of("observed"), torch.tensor([TOKENS, 7 * CHUNK + 1])
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(loops, "ENABLED", enabled)
        with torch.no_grad():
            results.append(case.attend(lengths=lengths))
    (output, memory), (expected, by_operations) = results
    assert folds["_contend_by_loops"] + folds["lanes"]
    assert_close(output, expected, tolerance(torch.float64, 2048), "outputs")
    assert_same(memory, by_operations, tolerance(torch.float64, 2048))


@pytest.mark.parametrize("cuts", [(), (CHUNK, 3 * CHUNK)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COMPETING)
def test_half_precision_decides_as_operations_do(name: str, dtype: torch.dtype, cuts, folds: Counter[str], monkeypatch):
    """Values that are read in bfloat16 are rounded by loops, too, so that both decide by the same numbers."""
    case = case_of(name).to(dtype)
    output, memory = read(case, monkeypatch, by_loops=True, cuts=cuts)
    known = name not in STEP_BY_STEP and dtype == torch.bfloat16 and loops.with_products()
    assert bool(folds["lanes"]) == known
    assert bool(folds["_contend_by_loops"]) != known
    expected, by_operations = read(case, monkeypatch, by_loops=False, cuts=cuts)
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
    assert not folds["lanes"]


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


@pytest.mark.parametrize("stream", ["keys", "values"])
@pytest.mark.parametrize("name", ["dropping", "by keys' norms", "by keys' differences"])
def test_what_is_no_number_harms_nobody_else(name: str, stream: str, monkeypatch):
    """All places are taken where scores are no numbers, too; other rows are as they are."""
    case = case_of(name)
    case.tensors[stream][0, 0, 40] = torch.nan
    output, memory = read(case, monkeypatch, by_loops=True)
    expected, other = read(case, monkeypatch, by_loops=False)
    live = torch.arange(memory.counts.shape[-1]) < memory.slots[:, None, None]
    assert ((memory.counts > 0) | ~live).all()
    assert torch.equal(memory.counts, other.counts)
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
    assert not folds["lanes"]


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
    from memkit.loops import compiling

    asked = []

    def njit(cache: bool = False, **options: Any) -> Callable[[Any], Any]:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: SimpleNamespace(function=function, **options)

    monkeypatch.setattr(compiling, "njit", njit)
    compiled = compiling.loop(len)
    assert asked == [True, False]
    assert compiled.function is len
    assert compiled.nogil


def test_that_loops_are_compiled_is_said_once_and_of_ours_alone(tmp_path: Path):
    code = """
import logging, numba, numpy
from memkit import loops
logging.basicConfig(format="%(name)s: %(message)s")
numba.njit(lambda x: x + 1)(1)
named = {"__builtins__": __builtins__}
exec("def of_no_module(x): return x + 1", named)
loops.compiled()
numba.njit(named["of_no_module"])(1)
for _ in range(2):
    loops.compiled().ranking(numpy.zeros(3, numpy.float32), 1)
    loops.compiled().ranking(numpy.zeros(3), 1)
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        for _ in range(2)
    ]
    assert said[0].startswith("memkit: memkit compiles its loops")
    assert len(said[0].splitlines()) == 1
    assert not said[1]


@pytest.mark.skipif(not loops.with_products(), reason="lanes need PyTorch's BLAS under its name")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(TOKENS, 5 * CHUNK + 3), (3, TOKENS - 5), (4 * CHUNK, 0)])
@pytest.mark.parametrize("name", [name for name in COMPETING if name not in STEP_BY_STEP])
def test_rows_that_end_earlier(
    name: str, lengths: tuple[int, int], dtype: torch.dtype, folds: Counter[str], monkeypatch
):
    """All of them go by lanes, each to its end; what comes next goes on from there."""
    case, both = case_of(name).to(dtype), []
    for by_lanes in (True, False):
        folds.clear()
        monkeypatch.setattr(loops, "ENABLED", by_lanes)
        with torch.no_grad():
            output, memory = case.attend(lengths=list(lengths))
            assert not by_lanes or not folds["_contend_by_loops"]
            assert bool(folds["lanes"]) == by_lanes
            more, after = case.part(0, 2 * CHUNK + 1).attend(memory=memory.fork())
        both.append((output, memory, more, after))
    (output, memory, more, after), (expected, known, further, later) = both
    limit = tolerance(dtype, 2048) if dtype == torch.float64 else tolerance(dtype, 4)
    assert_close(output, expected, limit, "outputs")
    assert_close(more, further, limit, "outputs of what comes next")
    for one, other in ((memory, known), (after, later)):
        if dtype == torch.float64:
            assert_same(one, other, limit)
        assert torch.equal(one.counts, other.counts)
