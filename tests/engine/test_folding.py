"""Tokens summed by the nearest slot, by compiled loops: what operations say, and only where loops know it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit import loops
from memkit.engine import folding, lanes
from memkit.memory import Memory
from memkit.pieces import Readout, ReadoutSpec
from memkit.pieces.admission import Novelty, NoveltySpec
from memkit.pieces.statistics import Numbers
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance

if not loops.installed() or not loops.with_products():
    pytest.skip("needs Numba, and PyTorch's BLAS under its name", allow_module_level=True)

TOKENS = 14 * CHUNK + 3
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("kvm-fixed-256", {}),
    "growing": ("kvm-sqrt-16", {}),
    "much growing": ("kvm-power-075", {}),
    "saturating": ("kvm-saturating-1024", {}),
    "quantised vectors": ("ovq-1024", {}),
    "the first chunk as any other": ("kvm-fixed-256", {"growth": {"kind": "fixed", "slots": 12}}),
    "no sinks": ("kvm-sqrt-16", {"sinks": 0}),
    "more sinks": ("kvm-sqrt-16", {"sinks": 3, "growth.first_chunk": "budget"}),
    "no temperatures": ("kvm-fixed-256", {"readout.temperatures": False}),
    "equal weights": ("kvm-fixed-256", {"merging": {"kind": "mean"}}),
    "means, by mass": ("kvm-fixed-256", {"readout": {"bias": "mass"}, "merging": {"kind": "mean"}}),
    "means, by count": ("kvm-fixed-256", {"readout": {"key": "mean", "value": "count-mean", "bias": "count"}}),
    "rotary kept": ("kvm-fixed-256", {"rotary": {"kind": "keep"}}),
    "a window of three": ("kvm-sqrt-16", {"window.chunks": 3}),
}
OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "by cosine": ("kvm-fixed-256", {"routing.similarity": "cosine"}),
    "the newest found": ("kvm-sqrt-16", {"admission": {"kind": "recency"}}),
    "only where near enough": ("kvm-sqrt-16", {"routing.least": 0.1}),
    "re-rotated": ("kvm-fixed-256", {"rotary": {"kind": "rerotate"}}),
    "values alone": ("untrained-kvm-sqrt", {"merging.of": "values"}),
    "keys of length 1": ("ovq-1024", {"readout.key": "l2"}),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks each call of the loops folded."""
    counted, by_loops = list[int](), folding.FoldingLanes.read

    def noted(self: folding.FoldingLanes, steps, *args) -> None:
        counted.append(sum(len(step.leaving) for step in steps))
        by_loops(self, steps, *args)

    monkeypatch.setattr(folding.FoldingLanes, "read", noted)
    return counted


def case_of(name: str, dtype: torch.dtype = torch.float64) -> Case:
    policy, changes = (KNOWN | OTHERWISE)[name]
    return make_case(memkit.load_policy(small(policy), changes), TOKENS, rows=2, heads=4, kv_heads=2).to(dtype)


def read(case: Case, monkeypatch: pytest.MonkeyPatch, by_loops: bool, cuts: tuple[int, ...] = (), **given: Any):
    """Outputs and memory of a text read in pieces."""
    monkeypatch.setattr(lanes, "ENABLED", by_loops)
    outputs, memory = list[Tensor](), None
    with torch.no_grad():
        for begin, end in zip((0, *cuts), (*cuts, TOKENS), strict=True):
            output, memory = case.part(begin, end).attend(memory=memory, **given)
            outputs.append(output)
    assert memory is not None
    return torch.cat(outputs, 2), memory


def assert_same(one: Memory, other: Memory, limit: float) -> None:
    assert torch.equal(one.slots, other.slots)
    assert one.bytes == other.bytes
    assert_close(one.sums, other.sums, limit, "sums")
    assert_close(one.counts, other.counts, limit, "counts")


@pytest.mark.parametrize("cuts", [(), (CHUNK + 2, 5 * CHUNK, 5 * CHUNK + 1, 9 * CHUNK)], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", KNOWN)
def test_loops_are_operations(name: str, dtype: torch.dtype, cuts, taken: list[int], monkeypatch):
    case, limit = case_of(name, dtype), tolerance(dtype, 2048)
    output, memory = read(case, monkeypatch, by_loops=True, cuts=cuts)
    assert sum(taken) >= 11
    chunks = sum(taken)
    expected, by_operations = read(case, monkeypatch, by_loops=False, cuts=cuts)
    assert sum(taken) == chunks
    assert_close(output, expected, limit, "outputs")
    assert_same(memory, by_operations, limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KNOWN)
def test_half_precision_is_read_in_float32(name: str, dtype: torch.dtype, taken: list[int], monkeypatch):
    case = case_of(name, dtype)
    output, memory = read(case, monkeypatch, by_loops=True, cuts=(5 * CHUNK, 9 * CHUNK + 1))
    assert taken
    expected, by_operations = read(case, monkeypatch, by_loops=False, cuts=(5 * CHUNK, 9 * CHUNK + 1))
    assert output.dtype == dtype
    assert_close(output, expected, tolerance(torch.bfloat16, 4), "outputs")
    assert torch.equal(memory.counts, by_operations.counts)


@pytest.mark.parametrize("lengths", [(TOKENS, 5 * CHUNK + 3), (3, TOKENS - 5), (4 * CHUNK, 0)])
@pytest.mark.parametrize("name", KNOWN)
def test_rows_that_end_earlier(name: str, lengths: tuple[int, int], taken: list[int], monkeypatch):
    case, both = case_of(name), list[Any]()
    for by_loops in (True, False):
        monkeypatch.setattr(lanes, "ENABLED", by_loops)
        with torch.no_grad():
            output, memory = case.attend(lengths=list(lengths))
            more, after = case.part(0, 2 * CHUNK + 1).attend(memory=memory.fork())
        both.append((output, memory, more, after))
    (output, memory, more, after), (expected, known, further, later) = both
    most = max(lengths) // CHUNK - memory.policy.window.chunks  # pyright: ignore[reportAttributeAccessIssue]
    assert sum(taken) >= most
    assert_close(output, expected, tolerance(torch.float64, 2048), "outputs")
    assert_close(more, further, tolerance(torch.float64, 2048), "outputs of what comes next")
    assert_same(memory, known, tolerance(torch.float64, 2048))
    assert_same(after, later, tolerance(torch.float64, 2048))


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_loops_do_not_know_is_left_to_operations(name: str, taken: list[int], monkeypatch):
    read(case_of(name), monkeypatch, by_loops=True)
    assert taken == []


class Doubled(Readout):
    def value(self, sums: Tensor, numbers: Numbers) -> Tensor:
        return 2 * super().value(sums, numbers)


class DoubledSpec(ReadoutSpec):
    def build(self) -> Doubled:
        return Doubled(self)


class Shy(Novelty):
    pass


class ShySpec(NoveltySpec):
    def build(self) -> Shy:
        return Shy()


@pytest.mark.parametrize(
    "changes", [{"readout": DoubledSpec()}, {"admission": ShySpec()}], ids=["readout", "admission"]
)
def test_pieces_of_ones_own_are_asked(changes: dict[str, Any], taken: list[int], monkeypatch):
    spec = memkit.load_policy(small("ovq-1024")).model_copy(update=changes)
    read(make_case(spec, TOKENS), monkeypatch, by_loops=True)
    assert taken == []


@given(
    st.fixed_dictionaries(
        {
            "sinks": st.integers(0, 4),
            "window": st.builds(lambda chunks: {"kind": "block", "chunks": chunks}, st.integers(1, 3)),
            "growth": st.one_of(
                st.builds(lambda slots: {"kind": "fixed", "slots": slots}, st.integers(5, 40)),
                st.builds(lambda factor: {"kind": "sqrt", "factor": factor, "floor": 5}, st.floats(0.5, 4)),
                st.builds(lambda part: {"kind": "linear", "fraction": part, "floor": 5}, st.floats(0.1, 1)),
            ),
            "routing": st.builds(lambda new: {"kind": "nearest", "new_slots": new}, st.booleans()),
            "merging": st.sampled_from([{"kind": "mean"}, {"kind": "weighted-mean", "weight": "learned"}]),
            "readout": st.fixed_dictionaries(
                {
                    "key": st.sampled_from(["mean", "layer-norm"]),
                    "value": st.sampled_from(["mean", "count-mean", "birth-radius"]),
                    "bias": st.sampled_from(["none", "count", "mass"]),
                }
            ),
        }
    ),
    st.one_of(st.just([TOKENS, TOKENS]), st.lists(st.integers(1, TOKENS), min_size=2, max_size=2)),
)
@settings(max_examples=60)
def test_random_memories(changes: dict[str, Any], lengths: list[int]):
    changes = {"chunker.size": CHUNK, "admission": {"kind": "novelty"}, "rotary": {"kind": "keep"}, **changes}
    changes["sinks"] *= changes["routing"]["new_slots"]  # with sinks, a first chunk would have no slot to join
    if changes["readout"]["bias"] == "mass":
        changes["merging"] = {"kind": "mean"}
    case = make_case(memkit.load_policy("full", changes), TOKENS, rows=2).to(torch.float32)
    both = []
    for enabled in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(lanes, "ENABLED", enabled)
            both.append(case.attend(lengths=lengths))
    (output, memory), (expected, by_operations) = both
    assert_close(output, expected, tolerance(torch.float32, 2048), "outputs")
    assert_same(memory, by_operations, tolerance(torch.float32, 2048))


def assert_as_finite(output: Tensor, expected: Tensor, spoiled: int) -> None:
    """Outputs are finite where operations' are, and before the token `spoiled` of its chunk maybe more often: of keys
    that are no numbers PyTorch's kernels let queries know that stand before them."""
    assert torch.equal(output[:, :, spoiled:].isfinite(), expected[:, :, spoiled:].isfinite())
    assert (output.isfinite() | ~expected.isfinite()).all()


@pytest.mark.parametrize("what", ["keys", "values", "weights"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(what: str, number: float, monkeypatch):
    case = case_of("growing", torch.float32)
    case.tensors[what] = case.tensors[what].clone()
    case.tensors[what][1, -1, 3 * CHUNK + 2] = number
    output, _ = read(case, monkeypatch, by_loops=True)
    expected, _ = read(case, monkeypatch, by_loops=False)
    assert_as_finite(output, expected, 3 * CHUNK + 2)
    assert not output.isfinite().all()


@pytest.mark.parametrize("spoiled", [slice(1, CHUNK), slice(2, 6)])
def test_a_first_chunk_with_hardly_a_number(spoiled: slice, taken: list[int], monkeypatch):
    """Tokens whose similarity to every founder is no number, and more of them than places."""
    changes = {
        "chunker.size": CHUNK,
        "window": {"kind": "block", "chunks": 1},
        "growth": {"kind": "sqrt", "factor": 2, "floor": 4},
        "admission": {"kind": "novelty"},
        "routing": {"kind": "nearest"},
        "merging": {"kind": "mean"},
        "sinks": 2,
    }
    case = make_case(memkit.load_policy("full", changes), TOKENS)
    case.tensors["keys"][0, 0, spoiled] = torch.nan
    output, memory = read(case, monkeypatch, by_loops=True)
    assert taken
    expected, by_operations = read(case, monkeypatch, by_loops=False)
    assert torch.equal(memory.counts, by_operations.counts)
    assert_close(output[:, 2:], expected[:, 2:], tolerance(torch.float64, 2048), "the other heads' outputs")
    # Of slots none of whose keys is a number PyTorch's kernel says 0, in silence.
    assert output[0, :2, CHUNK : 2 * CHUNK].isnan().all()


def test_threads_change_nothing(taken: list[int], monkeypatch):
    threads, outputs = torch.get_num_threads(), list[Tensor]()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            outputs.append(read(case_of("growing"), monkeypatch, by_loops=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert taken
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("threads", "by_lanes"), [(6, True), (7, False)])
def test_few_heads_are_left_to_operations_which_share_one_between_threads(
    threads: int, by_lanes: bool, taken: list[int], monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    read(case_of("growing"), monkeypatch, by_loops=True)  # two rows of two heads
    assert bool(taken) == by_lanes


def test_gradients_and_given_plans_are_for_operations(taken: list[int], monkeypatch):
    case = case_of("growing")
    plan = case.plan()
    read(case, monkeypatch, by_loops=True, plan=plan)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in case.tensors.items()}
    Case(case.spec, leaves, case.learned, case.rotation).attend()
    assert taken == []
