"""A text read again: the engine and the oracle agree about what its readers told, and about what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit import reference
from memkit.engine.checks import check
from memkit.engine.heads import by_heads
from memkit.engine.inputs import AttendInputs
from memkit.memory import HeadsMemory
from memkit.pieces.evidence import AGAIN, ERROR, Evidence
from tests.engine.cases import CHUNK, Case, assert_close, make_case, small, tolerance


def read_again(changes: dict[str, Any] | None = None) -> memkit.PolicySpec:
    return memkit.load_policy(small("untrained-reread"), {"observe.again": 2, "heads": {}} | (changes or {}))


POLICIES = {
    "as shipped": read_again(),
    "a chunk at a time": read_again({"observe.again": 1}),
    "dropped": read_again({"merging": {"kind": "drop"}, "readout.bias": "none", "admission.pool": 1}),
    "on average": read_again({"observe.decay": 0.9, "observe.aggregate": "mean", "observe.apart": 0}),
    "fading": read_again({"observe.decay": 0.5}),
    "never evicted": read_again({"eviction": "never", "growth": {"kind": "linear", "fraction": 0.5}}),
    "sums": read_again({"storage.dtype": "float32"}),
}


def readers_of(case: Case, seed: int) -> Tensor:
    shape = list(case.tensors["queries"].shape)
    shape[2] = 3
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(case.tensors["queries"].dtype)


def call_of_nothing(case: Case, memory: memkit.Memory) -> AttendInputs:
    none = {name: tensor[:, :, :0] for name, tensor in case.tensors.items()}
    return AttendInputs(
        case.spec.build(), **none, weights=None, parameters=None, rotation=case.rotation, scale=None, memory=memory,
        lengths=None, plan=None,
    )  # fmt: skip


def asked_of_the_oracle(case: Case, memory: memkit.Memory, readers: Tensor) -> memkit.Memory:
    given = call_of_nothing(case, memory)
    if isinstance(memory, HeadsMemory):
        each = [reference.ask_again(check(part), readers[:, heads]) for heads, part in by_heads(given)]
        return HeadsMemory(given.policy, each)
    return reference.ask_again(check(given), readers)


def evidence(memory: memkit.Memory) -> list[Tensor]:
    """What is known of every row: slots, then window; of each run of heads that are alike."""
    if isinstance(memory, HeadsMemory):
        return [each for part in memory.parts for each in evidence(part)]
    assert memory.store.evidence is not None
    slots, held = int(memory.live_rows.max()), int(memory.held_rows.max())
    return [memory.store.evidence[:, :, :slots], memory.window.last(held)["evidence"]]


def run(case: Case, again: int, split: int, backend: str) -> tuple[Tensor, memkit.Memory]:
    """The text in pieces, read again whenever `again` more tokens are there."""
    outputs, memory, at = [], None, 0
    while at < case.tokens:
        end = min(case.tokens, at + split, at - at % again + again)
        output, memory = case.part(at, end).attend(memory=memory, backend=backend)
        outputs.append(output)
        if end % again == 0:
            if backend == "reference":
                memory = asked_of_the_oracle(case, memory, readers_of(case, end))
            else:
                memkit.ask_again(memory, readers_of(case, end), rotation=case.rotation)
        at = end
    assert memory is not None
    return torch.cat(outputs, dim=2), memory


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ratios", [None, (1.5, 0.5)], ids=["alike", "heads differ"])
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_engine_and_oracle_agree_in_every_split(name: str, ratios: tuple[float, ...] | None, dtype: torch.dtype):
    spec = POLICIES[name] if ratios is None else POLICIES[name].with_ratios(*ratios)
    case = make_case(spec, 9 * CHUNK + 3, rows=2, seed=3)
    again = spec.build().observation.again
    output, told = run(case, again, 10_000, "reference")
    for split in (10_000, 5, 1):
        found, memory = run(case.to(dtype), again, split, "torch")
        assert_close(found, output, tolerance(dtype, 512), f"output, {split} at a time")
        for actual, expected in zip(evidence(memory), evidence(told), strict=True):
            assert_close(actual, expected, tolerance(dtype, 512), f"evidence, {split} at a time")


@torch.no_grad()
def test_the_most_that_they_say_counts_beside_what_the_first_reading_said():
    case = make_case(read_again(), 5 * CHUNK, seed=1)
    _, memory = case.attend()
    before = [each.clone() for each in evidence(memory)]
    assert all((each[..., AGAIN] == 0).all() for each in before)
    said: list[list[Tensor]] = []
    for seed in (0, 1):
        _, fresh = case.attend()
        memkit.ask_again(fresh, readers_of(case, seed), rotation=case.rotation)
        memkit.ask_again(memory, readers_of(case, seed), rotation=case.rotation)
        said.append([each[..., AGAIN] for each in evidence(fresh)])
    for old, one, other, after in zip(before, *said, evidence(memory), strict=True):
        assert torch.equal(after[..., :AGAIN], old[..., :AGAIN])
        assert torch.equal(after[..., AGAIN], torch.maximum(one, other))
        assert (one > other).any()
        assert (other > one).any()
        assert torch.equal(Evidence.of(after).error, Evidence.of(old).error + after[..., AGAIN])
        assert torch.equal(Evidence.of(after).share, Evidence.of(old).share)


@torch.no_grad()
def test_rows_at_unequal_positions_are_asked_as_if_they_were_alone():
    spec = read_again({"observe.again": 1})
    lengths = [5 * CHUNK, 3 * CHUNK + 2]
    case = make_case(spec, max(lengths), rows=2, seed=7)
    _, together = case.attend(lengths=lengths)
    memkit.ask_again(together, readers_of(case, 0), rotation=case.rotation)
    for row, length in enumerate(lengths):
        _, alone = case.row(row, length).attend()
        memkit.ask_again(alone, readers_of(case, 0)[row : row + 1], rotation=case.rotation)
        for whole, own in zip(evidence(together.reorder([row])), evidence(alone), strict=True):
            whole = whole[:, :, : own.shape[2]] if own.shape[2] == int(alone.live_rows.max()) else whole
            assert_close(whole[:, :, -own.shape[2] :], own, tolerance(torch.float64, 512), f"row {row}")


@torch.no_grad()
def test_a_memory_that_was_asked_is_saved_and_goes_on_as_the_original_does(tmp_path):
    case = make_case(read_again(), 6 * CHUNK, seed=5)
    _, memory = case.part(0, 4 * CHUNK).attend()
    memkit.ask_again(memory, readers_of(case, 0), rotation=case.rotation)
    memory.save(tmp_path / "memory.safetensors")
    rest = case.part(4 * CHUNK, 6 * CHUNK)
    for other in (memkit.Memory.load(tmp_path / "memory.safetensors"), memory.fork(), memory.reorder([0, 1])):
        expected, _ = rest.attend(memory=memory.fork())
        assert_close(rest.attend(memory=other)[0], expected, tolerance(torch.float64, 512), "output")


@torch.no_grad()
def test_a_prompt_that_was_read_in_full_was_read_again():
    case = make_case(read_again(), 5 * CHUNK, seed=2)
    given = case.tensors | {"rotation": case.rotation}
    for readers, told, untold in ((None, ERROR, AGAIN), (readers_of(case, 0), AGAIN, ERROR)):
        memory = memkit.compress(case.spec, **given, readers=readers)
        assert all((each[..., untold] == 0).all() for each in evidence(memory))
        assert all((each[..., told] > 0).any() for each in evidence(memory))


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    case = make_case(read_again(), 3 * CHUNK)
    _, memory = case.attend()
    readers = readers_of(case, 0)
    for wrong in (readers[:, :1], readers[..., :1], readers[:, :, :0], readers.to(torch.float32), None):
        with pytest.raises(memkit.InputError, match="readers must be"):
            memkit.ask_again(memory, wrong, rotation=case.rotation)  # pyright: ignore[reportArgumentType]
    plain = make_case(read_again({"observe.again": 0}), 3 * CHUNK)
    with pytest.raises(memkit.InputError, match=r"observe\.again"):
        memkit.ask_again(plain.attend()[1], readers, rotation=plain.rotation)
    later = case.attend(memory=memory)[1]
    with pytest.raises(memkit.MemoryStateError, match="taken over"):
        memkit.ask_again(memory, readers, rotation=case.rotation)
    with torch.inference_mode():
        _, made = case.attend()
    with pytest.raises(memkit.MemoryStateError, match="inference mode"):
        memkit.ask_again(made, readers, rotation=case.rotation)
    memkit.ask_again(later, readers, rotation=case.rotation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observe.again": 3}, "still in the window"),
        ({"chunker": {"kind": "boundaries", "most": CHUNK}}, "still in the window"),
        ({"admission": {"kind": "attention"}}, "output-error"),
        ({"rotary": {"kind": "unrotate"}}, "turns queries"),
    ],
)
def test_policies_that_have_no_use_for_it_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(memkit.PolicyError, match=message):
        read_again(changes)
