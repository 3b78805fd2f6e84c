"""Heads of unequal numbers of slots as rows of one pass: the same as a pass for each run of alike heads."""

from __future__ import annotations

import pytest
import torch

import memkit
from memkit import loops
from memkit.engine import heads_as_rows, lanes
from memkit.memory import HeadsMemory, Memory
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance

TOKENS = 12 * CHUNK + 3
RATIOS = (0.5, 1.0, 1.0, 1.75)
POLICIES = {
    "observed": ("untrained-observed", {}),
    "few queries": ("untrained-observed", {"observe.queries": 3}),
    "growing": ("untrained-observed-sqrt", {}),
    "dropping": ("snapkv-512", {}),
    "recency": ("untrained-observed", {"admission": {"kind": "recency"}}),
    "with the value": ("untrained-observed", {"admission": {"kind": "attention", "value_norm": True, "pool": 3}}),
    "differing": ("untrained-observed", {"admission.difference": 2}),
    "no bias": ("untrained-observed", {"readout": {"bias": "none"}}),
    "not observed": ("knorm-512", {}),
}


def uneven(name: str) -> Case:
    policy, changes = POLICIES[name]
    spec = memkit.load_policy(small(policy), {**changes, "heads": {"ratios": RATIOS}})
    return make_case(spec, TOKENS, rows=2, heads=8, kv_heads=4)


def read(case: Case, monkeypatch: pytest.MonkeyPatch, as_rows: bool, **options) -> tuple[torch.Tensor, Memory]:
    monkeypatch.setattr(heads_as_rows, "ENABLED", as_rows)
    with torch.no_grad():
        return case.attend(**options)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of passes in which heads stood as rows."""
    made, whole = [], heads_as_rows._as_rows

    def counted(inputs):
        rows = whole(inputs)
        made.append(len(rows.keys))
        return rows

    monkeypatch.setattr(heads_as_rows, "_as_rows", counted)
    return made


def assert_same(one: Memory, other: Memory, limit: float) -> None:
    assert isinstance(one, HeadsMemory)
    assert isinstance(other, HeadsMemory)
    assert torch.equal(one.slots, other.slots)
    assert torch.equal(one.counts, other.counts)
    assert one.bytes == other.bytes
    for mine, theirs in zip(one.parts, other.parts, strict=True):
        assert [each.shape for each in mine.tensors()] == [each.shape for each in theirs.tensors()]
        assert_close(mine.sums, theirs.sums, limit, "sums")
        for name, stream in theirs.window.last(int(theirs.held_rows.max())).items():
            assert_close(mine.window.last(int(mine.held_rows.max()))[name], stream, limit, name)
        if theirs.store.evidence is not None:
            assert mine.store.evidence is not None
            assert_close(mine.store.evidence, theirs.store.evidence, limit, "evidence")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", POLICIES)
def test_one_pass_is_as_many(name: str, dtype: torch.dtype, passes: list[int], monkeypatch: pytest.MonkeyPatch):
    case, limit = uneven(name).to(dtype), tolerance(dtype, 2048)
    output, memory = read(case, monkeypatch, as_rows=True)
    assert passes == [8]
    expected, by_runs = read(case, monkeypatch, as_rows=False)
    assert passes == [8]
    assert_close(output, expected, limit, "outputs")
    assert_same(memory, by_runs, limit)


@pytest.mark.parametrize("name", ["observed", "growing"])
def test_a_text_may_be_split_and_rows_may_be_short(name: str, passes: list[int], monkeypatch: pytest.MonkeyPatch):
    case, limit = uneven(name), tolerance(torch.float64, 2048)
    cut = 5 * CHUNK + 1
    whole, _ = read(case, monkeypatch, as_rows=False)
    for lengths in (None, [TOKENS - cut, CHUNK + 2]):
        monkeypatch.setattr(heads_as_rows, "ENABLED", True)
        with torch.no_grad():
            first, memory = case.part(0, cut).attend()
            rest, _ = case.part(cut, TOKENS).attend(memory=memory, lengths=lengths)
        assert_close(first, whole[:, :, :cut], limit, "the first part")
        assert_close(rest[:1], whole[:1, :, cut:], limit, "the row that is whole")
        stop = TOKENS if lengths is None else cut + lengths[1]
        assert_close(rest[1:, :, : stop - cut], whole[1:, :, cut:stop], limit, "the other row")
    assert passes == [8] * 4


@pytest.mark.parametrize("by_lanes", [True, False])
def test_where_one_head_has_far_more_slots_lanes_alone_do_it(by_lanes: bool, passes: list[int], monkeypatch):
    monkeypatch.setattr(lanes, "ENABLED", by_lanes)
    spec = memkit.load_policy(small("untrained-observed"), {"heads": {"ratios": (0.5, 0.5, 0.5, 2.5)}})
    read(make_case(spec, TOKENS, rows=2, heads=8, kv_heads=4), monkeypatch, as_rows=True)
    assert passes == [8] * (by_lanes and loops.installed() and loops.with_products())


def test_a_call_that_fails_leaves_the_memory_as_it_was(monkeypatch: pytest.MonkeyPatch):
    case = uneven("observed")
    with torch.no_grad():
        begin, rest = case.part(0, 5 * CHUNK), case.part(5 * CHUNK, TOKENS)
        _, memory = begin.attend()
        expected, _ = rest.attend(memory=memory.fork())
        monkeypatch.setattr(heads_as_rows, "_parts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rest.attend(memory=memory)
        monkeypatch.undo()
        output, _ = rest.attend(memory=memory)
    assert torch.equal(output, expected)
