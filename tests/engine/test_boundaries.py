"""Chunks that end where the caller says: as chunks of one length where these are said, by the oracle elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit.engine import decode, lanes
from memkit.pieces.chunking import BoundariesChunkerSpec
from memkit.testing import Case
from memkit.testing.cases import Inputs
from tests.engine.cases import assert_close, small, tolerance

MOST = 8
OBSERVED: dict[str, Any] = {
    "chunker": {"kind": "boundaries", "most": MOST},
    "window": {"kind": "block", "chunks": 2},
    "sinks": 2,
    "growth": {"kind": "sqrt", "factor": 2.0, "floor": 4},
    "observe": {"queries": 3, "decay": 0.9},
    "admission": {"kind": "output-error"},
    "rotary": {"kind": "rerotate"},
}
COMPETING = OBSERVED | {
    "eviction": "weakest",
    "growth": {"kind": "fixed", "slots": 6},
    "observe": {"queries": 20},
    "routing": {"kind": "nearest", "similarity": "cosine"},
    "merging": {"kind": "weighted-mean", "weight": "share", "of": "values"},
    "readout": {"bias": "mass"},
}
SEEING = {"observed": OBSERVED, "competing": COMPETING}
RAGGED = Case(
    lengths=(61, 44, 61), kv_heads=2, group=2, width=4, value_width=3, keys="normal", values="normal", dtype="float64",
    ends=(5, 1, 7, 20, 2), pieces=(7, 1, 13),
)  # fmt: skip


def given(spec: memkit.PolicySpec, most: int) -> memkit.PolicySpec:
    """The policy with chunks that end where the caller says."""
    return spec.model_copy(update={"chunker": BoundariesChunkerSpec(most=most)})


def everything(memory: memkit.Memory) -> dict[str, Tensor]:
    """What a memory holds of rows that are alike."""
    slots, held = int(memory.slots.max()), int(memory.held_rows.max())
    found = {"sums": memory.sums[:, :, :slots], "numbers": memory.store.numbers[:, :, :slots]}
    return found | {f"window {name}": stream for name, stream in memory.window.last(held).items()}


def in_pieces(policy: memkit.Policy, inputs: Inputs, case: Case, **options: Any) -> tuple[Tensor, memkit.Memory]:
    """Outputs and memory of a case read in its pieces, each row at its own."""
    outputs: list[list[Tensor]] = [[] for _ in case.lengths]
    memory = None
    for spans in case.pieces_of_rows():
        output, memory = inputs.parts(spans).attend(policy, memory=memory, **options)
        for row, (start, stop) in enumerate(spans):
            outputs[row].append(output[row, :, : stop - start])
    assert memory is not None
    padded = torch.nn.utils.rnn.pad_sequence([torch.cat(row, dim=1).transpose(0, 1) for row in outputs], True)
    return padded.transpose(1, 2), memory


@pytest.mark.parametrize(("most", "ends"), [(8, ()), (8, (8,)), (30, (8,))], ids=["never", "every", "before-most"])
@pytest.mark.parametrize(
    "name", ["kvm-sqrt-16", "kvm-log-256", "ovq-1024", "block-mean-8", "untrained-observed", "h2o-512"]
)
def test_boundaries_at_every_chunk_equal_chunks_of_one_length(
    name: str, most: int, ends: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lanes, "ENABLED", False)  # which do not take boundaries, and sum in another order
    fixed = small(name)
    if fixed.heads.profile is not None:
        fixed = fixed.model_copy(update={"heads": memkit.PolicySpec().heads})
    ours = given(fixed, most).build()
    for pieces in ((100,), (1,)):
        case = Case(lengths=(45, 45), kv_heads=2, width=8, value_width=6, keys="normal", ends=ends, pieces=pieces)
        with torch.no_grad():
            output, memory = in_pieces(ours, case.inputs(ours), case)
            expected, known = in_pieces(fixed.build(), case.inputs(fixed.build()), case)
        if pieces == (1,):  # decoding reads buffers of other lengths, whose sums may round otherwise
            assert_close(output, expected, tolerance(torch.float32), "output")
        else:
            assert torch.equal(output, expected)
        assert memory.slots.tolist() == known.slots.tolist()
        assert memory.held_rows.tolist() == known.held_rows.tolist()
        for name_of, tensor in everything(memory).items():
            assert torch.equal(tensor, everything(known)[name_of]), name_of


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_memory_that_sees_its_readers_is_as_the_oracle_says(name: str):
    policy = memkit.PolicySpec(**SEEING[name]).build()
    inputs = RAGGED.inputs(policy)
    expected, known = inputs.attend(policy, backend="reference")
    for way in ("whole", "pieces", "pieces of the oracle"):
        options = {"backend": "reference"} if way.endswith("oracle") else {}
        output, memory = inputs.attend(policy) if way == "whole" else in_pieces(policy, inputs, RAGGED, **options)
        assert_close(output, expected, tolerance(torch.float64), "output")
        assert memory.cuts == known.cuts
        assert torch.equal(memory.counts, known.counts)
        observed, theirs = memory.observed, known.observed
        assert known.cuts is not None
        assert observed is not None
        assert theirs is not None
        for row, (begins, tokens) in enumerate(zip(known.cuts.begins, RAGGED.lengths, strict=True)):
            going = 0 if known.cuts.opens(known.seen_rows, MOST)[row] else tokens - begins[-1]
            assert_close(
                observed[row, :, :going], theirs[row, :, :going], tolerance(torch.float64), "queries that wait"
            )


@pytest.mark.parametrize("name", SEEING)
def test_gradients_of_pieces_are_those_of_the_whole(name: str):
    policy = memkit.PolicySpec(**SEEING[name]).build()
    whole, pieces = (RAGGED.inputs(policy).differentiable() for _ in range(2))
    outputs = whole.attend(policy)[0], in_pieces(policy, pieces, RAGGED)[0]
    weighing = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [
        torch.autograd.grad(output, list(each.leaves.values()), weighing)
        for output, each in zip(outputs, (whole, pieces), strict=True)
    ]
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        assert_close(one, other, 100 * tolerance(torch.float64), "gradient")


@torch.no_grad()
@pytest.mark.parametrize("spec", [OBSERVED, COMPETING, None], ids=["observed", "competing", "kvm"])
def test_decoding_ends_chunks_too(spec: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch):
    policy = (given(small("kvm-sqrt-16"), MOST) if spec is None else memkit.PolicySpec(**spec)).build()
    case = Case(lengths=(50, 50), kv_heads=2, width=8, value_width=8, keys="normal", dtype="float64", ends=(3, 6))
    case = Case(**(vars(case) | {"pieces": (1,)}))
    inputs, served = case.inputs(policy), 0
    assert inputs.boundaries is not None
    inputs.boundaries[1] = inputs.boundaries[0]
    expected, known = inputs.attend(policy)
    one_more = decode._one_more

    def counting(*arguments: Any) -> Any:
        nonlocal served
        served += 1
        return one_more(*arguments)

    monkeypatch.setattr(decode, "_one_more", counting)
    output, memory = in_pieces(policy, inputs, case)
    assert_close(output, expected, tolerance(torch.float64), "output")
    assert memory.cuts == known.cuts
    assert torch.equal(memory.counts, known.counts)
    assert served > 15, "tokens in the middle of a chunk take the short cut"


@torch.no_grad()
def test_a_memory_carries_its_chunks_wherever_it_goes(tmp_path: Path):
    policy = memkit.PolicySpec(**OBSERVED).build()
    inputs = RAGGED.inputs(policy)
    memory, rest = inputs.part(0, 33).attend(policy)[1], inputs.part(33, 61)
    expected = rest.attend(policy, memory=memory.fork())[0]
    memory.save(tmp_path / "memory.safetensors")
    copies = {
        "loaded": memkit.Memory.load(tmp_path / "memory.safetensors", policy),
        "pickled": pickle.loads(pickle.dumps(memory)),
        "copied": copy.deepcopy(memory),
        "moved": memory.to("cpu"),
    }
    for way, each in copies.items():
        assert each.cuts == memory.cuts, way
        assert torch.equal(rest.attend(policy, memory=each)[0], expected), way
    turned = memory.reorder([2, 0])
    assert turned.cuts is not None
    assert memory.cuts is not None
    assert turned.cuts.begins == (memory.cuts.begins[2], memory.cuts.begins[0])
    assert turned.slots.tolist() == memory.slots[[2, 0]].tolist()


def test_slots_are_granted_by_what_has_left_and_by_who_arrives():
    tokens = torch.randn(1, 1, 12, 4)
    boundaries = torch.zeros(1, 12, dtype=torch.bool)
    boundaries[0, [1, 4, 5]] = True  # chunks of 2, 3, 1 and up to 8 tokens
    slots: dict[str, list[int]] = {}
    for counts in ("seen", "absorbed"):
        policy = memkit.PolicySpec(
            chunker={"kind": "boundaries", "most": 8},
            window={"kind": "block", "chunks": 1},
            growth={"kind": "linear", "fraction": 0.5, "floor": 1, "counts": counts, "first_chunk": "budget"},
        ).build()
        memory, slots[counts] = None, []
        for token in range(12):
            here = tokens[:, :, token : token + 1]
            _, memory = memkit.attend(
                policy, here, here, here, memory=memory, boundaries=boundaries[:, token : token + 1]
            )
            slots[counts].append(int(memory.slots))
    # Window 1: what has left and who arrives are the same number of tokens; ⌊2/2⌋, ⌊5/2⌋, ⌊6/2⌋.
    assert slots["seen"] == slots["absorbed"] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    two = memkit.PolicySpec(
        chunker={"kind": "boundaries", "most": 8},
        window={"kind": "block", "chunks": 2},
        growth={"kind": "linear", "fraction": 0.5, "floor": 1, "counts": "seen", "first_chunk": "budget"},
    ).build()
    memory = memkit.attend(two, tokens, tokens, tokens, boundaries=boundaries)[1]
    assert memory.slots.tolist() == [3], "tokens 0-4 have left; ⌊5/2⌋ when token 5 came, ⌊6/2⌋ when token 6 did"
    assert memory.held_rows.tolist() == [7]


def test_the_first_chunk_founds_whole_whatever_its_length():
    policy = memkit.PolicySpec(
        chunker={"kind": "boundaries", "most": 8},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": 1, "first_chunk": "whole"},
    ).build()
    tokens, boundaries = torch.randn(2, 1, 9, 4), torch.zeros(2, 9, dtype=torch.bool)
    boundaries[0, 2] = True
    memory = memkit.attend(policy, tokens, tokens, tokens, boundaries=boundaries)[1]
    assert memory.slots.tolist() == [3, 8]
    assert memory.held_rows.tolist() == [6, 1]


@pytest.mark.parametrize(
    ("boundaries", "said"),
    [
        (torch.zeros(1, 4), "boundaries must be a tensor of bool"),
        (torch.zeros(1, 3, dtype=torch.bool), r"boundaries must be a tensor of bool \[b, t\] = \(1, 4\)"),
        ([[True]], "boundaries must be a tensor of bool"),
        (torch.zeros(1, 4, dtype=torch.bool, device="meta"), "give a CPU tensor"),
    ],
)
def test_other_boundaries_are_refused(boundaries: Any, said: str):
    tokens = torch.randn(1, 1, 4, 4)
    with pytest.raises(memkit.InputError, match=said):
        memkit.attend(memkit.PolicySpec(**OBSERVED | {"rotary": {"kind": "keep"}}), tokens, tokens, tokens,
                      boundaries=boundaries)  # fmt: skip


def test_a_policy_that_cuts_by_itself_takes_no_boundaries():
    tokens, boundaries = torch.randn(1, 1, 4, 4), torch.ones(1, 4, dtype=torch.bool)
    for call in (
        lambda: memkit.attend("ovq-1024", tokens, tokens, tokens, boundaries=boundaries),
        lambda: memkit.plan("ovq-1024", tokens, boundaries=boundaries),
    ):
        with pytest.raises(memkit.InputError, match=r"chunker fixed cuts by itself; leave them out, or use chunker"):
            call()


@pytest.mark.parametrize("window", [{"kind": "all"}, {"kind": "sliding", "size": 8}])
def test_a_window_without_chunks_is_refused(window: dict[str, Any]):
    with pytest.raises(memkit.PolicyError, match=r"has no chunks; use window: \{kind: block, chunks: 2\}"):
        memkit.PolicySpec(chunker={"kind": "boundaries"}, window=window)


def test_a_budget_must_do_for_the_shortest_chunks():
    fields: dict[str, Any] = {
        "window": {"kind": "block", "chunks": 1}, "sinks": 2, "growth": {"kind": "linear", "fraction": 0.5},
    }  # fmt: skip
    memkit.PolicySpec(chunker={"kind": "fixed", "size": 8}, **fields)
    with pytest.raises(memkit.PolicyError, match=r"raise growth\.floor above 2"):
        memkit.PolicySpec(chunker={"kind": "boundaries", "most": 8}, **fields)


@torch.no_grad()
def test_heads_with_unequal_numbers_of_slots_have_the_same_chunks(tmp_path: Path):
    fields = COMPETING | {"heads": {"ratios": [0.5, 1.5]}}
    policy = memkit.PolicySpec(**fields).build()
    inputs = RAGGED.inputs(policy)
    output, memory = inputs.attend(policy)
    for head, (_, part) in enumerate(policy.head_policies):
        alone, own = inputs.head(head).attend(part)
        assert_close(output[:, 2 * head : 2 * head + 2], alone, tolerance(torch.float64), f"head {head}")
        assert memory.parts[head].cuts == own.cuts  # type: ignore[attr-defined]
    pieces, after = in_pieces(policy, inputs, RAGGED)
    assert_close(pieces, output, tolerance(torch.float64), "pieces")
    assert after.held_rows.tolist() == memory.held_rows.tolist()
    memory.save(tmp_path / "memory.safetensors")
    assert memkit.Memory.load(tmp_path / "memory.safetensors", policy).cuts == memory.cuts


@torch.no_grad()
@pytest.mark.parametrize(
    ("cuts", "said"),
    [
        ({"begins": ((7, 7), (0, 2))}, "chunk_begins must be chunks of 1 to 8 tokens in order, up to the 12 seen"),
        ({"begins": ((0, 3), (2, 8))}, "chunk_begins must be chunks of 1 to 8 tokens"),
        ({"begins": ((), (2, 8))}, "chunk_begins must be chunks"),
        ({"begins": ((8,), (2, 8))}, "chunk_begins must be chunks"),
        ({"slots": (9, 2)}, "chunk_slots must lie between 2 and 3 after 3 tokens have left, got 9 in row 0"),
        ({"slots": (0, 2)}, "chunk_slots must lie between 2 and"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, cuts: dict[str, Any], said: str):
    policy = memkit.PolicySpec(**OBSERVED | {"rotary": {"kind": "keep"}}).build()
    tokens, boundaries = torch.randn(2, 1, 12, 4), torch.zeros(2, 12, dtype=torch.bool)
    boundaries[0, [2, 7]] = boundaries[1, [1, 7]] = True
    memory = memkit.attend(policy, tokens, tokens, tokens, boundaries=boundaries)[1]
    assert memory.cuts is not None
    assert memory.cuts.begins == ((3, 8), (2, 8))
    memory.cuts = dataclasses.replace(memory.cuts, **cuts)
    memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(memkit.MemoryStateError, match=said):
        memkit.Memory.load(tmp_path / "memory.safetensors", policy)


@torch.no_grad()
@pytest.mark.parametrize("name", SEEING)
def test_costs_are_those_of_chunks_of_most_tokens(name: str):
    policy = memkit.PolicySpec(**SEEING[name]).build()
    tokens = 61
    entry = memkit.cost(policy, tokens, heads=2, kv_heads=1, head_width=8)
    shapes = [(1, heads, tokens, 8) for heads in (2, 1, 1)]
    rotation = memkit.Rotation("adjacent", 8, torch.ones(4))
    memory = memkit.attend(policy, *[torch.randn(shape) for shape in shapes], rotation=rotation)[1]
    assert entry.bytes == memory.bytes
    assert entry.slots == int(memory.slots)


@torch.no_grad()
def test_a_text_compressed_at_once_goes_on_with_boundaries():
    policy = memkit.PolicySpec(**COMPETING | {"rotary": {"kind": "keep"}}).build()
    tokens = torch.randn(1, 1, 41, 4)
    part, rest = tokens[:, :, :30], tokens[:, :, 30:]
    memory = memkit.compress(policy, part, part, part)
    assert memory.cuts is not None
    assert memory.cuts.begins == ((16, 24),)
    ends = torch.zeros(1, 11, dtype=torch.bool)
    ends[0, 3] = True
    memory = memkit.attend(policy, rest, rest, rest, memory=memory, boundaries=ends)[1]
    assert memory.cuts is not None
    assert memory.cuts.begins == ((32, 34),), "24-31 are 8 tokens; 32 and 33 end with a boundary"
