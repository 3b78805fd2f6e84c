"""Heads with unequal numbers of slots: each is as it would be alone, whatever is done with the memory of all."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import memkit
from memkit.costing import cost
from memkit.memory import HeadsMemory
from tests.engine.cases import CHUNK, VALUE_WIDTH, WIDTH, Case, assert_close, cotangent, make_case, small, tolerance

TOKENS = 9 * CHUNK + 3
RATIOS = (0.5, 1.0, 1.0, 2.25)
NAMES = ["kvm-sqrt-16", "ovq-1024", "untrained-observed", "untrained-kvm-log", "block-mean-8"]
LIMIT = tolerance(torch.float64, 2048)


def uneven(name: str, heads: int = 8) -> Case:
    spec = memkit.load_policy(small(name), {"heads": {"ratios": RATIOS}})
    return make_case(spec, TOKENS, rows=2, heads=heads, kv_heads=4)


def alone(case: Case, head: int) -> Case:
    """One key/value head, and its share of the query heads, under the policy of that head."""
    assert case.spec.heads.ratios is not None
    group = case.tensors["queries"].shape[1] // len(RATIOS)
    queries = slice(head * group, (head + 1) * group)
    cut = {"queries": queries, "query_scale_window": queries, "query_scale_memory": queries}
    tensors = {name: tensor[:, cut.get(name, slice(head, head + 1))] for name, tensor in case.tensors.items()}
    learned = {name: tensor[cut[name]] if name in cut else tensor for name, tensor in case.learned.items()}
    spec = case.spec.with_ratios(case.spec.heads.ratios[head])
    return dataclasses.replace(case, spec=spec, tensors=tensors, learned=learned)


def rows(case: Case, which: list[int]) -> Case:
    return dataclasses.replace(case, tensors={name: tensor[which] for name, tensor in case.tensors.items()})


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_each_head_is_as_it_would_be_alone(name: str, backend: str):
    case = uneven(name, heads=4 if backend == "reference" else 8)
    with torch.no_grad():
        output, memory = case.attend(backend=backend)
        group = output.shape[1] // len(RATIOS)
        slots = []
        for head in range(len(RATIOS)):
            expected, own = alone(case, head).attend(backend=backend)
            assert_close(output[:, head * group : (head + 1) * group], expected, LIMIT, f"head {head}")
            assert torch.equal(memory.slots[:, head], own.slots)
            assert torch.equal(memory.counts[:, head : head + 1, : own.counts.shape[2]], own.counts)
            assert not memory.counts[:, head, own.counts.shape[2] :].any()
            slots.append(int(own.slots[0]))
    assert slots[0] < slots[1] == slots[2] < slots[3]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_each_head_alone(name: str):
    case = uneven(name)
    direction = cotangent(case)
    _, _, gradients = case.gradients(direction)
    shared = {which: torch.zeros_like(tensor) for which, tensor in case.learned.items()}
    group = direction.shape[1] // len(RATIOS)
    for head in range(len(RATIOS)):
        queries = slice(head * group, (head + 1) * group)
        _, _, own = alone(case, head).gradients(direction[:, queries])
        for which, gradient in own.items():
            if which in shared:
                part = shared[which][queries] if which.startswith("query_scale") else shared[which]
                part += gradient
                continue
            mine = queries if which == "queries" else slice(head, head + 1)
            assert_close(gradients[which][:, mine], gradient, LIMIT, f"gradient of {which}")
    for which, gradient in shared.items():
        assert_close(gradients[which], gradient, LIMIT, f"gradient of {which}")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [list(range(TOKENS + 1)), [0, TOKENS // 2, TOKENS], [0, 41, *range(42, TOKENS + 1)]])
def test_in_pieces_as_at_once(name: str, cuts: list[int]):
    case = uneven(name)
    expected, whole = case.attend()
    outputs, memory = [], None
    for begin, end in pairwise(cuts):
        output, memory = case.part(begin, end).attend(memory=memory)
        outputs.append(output)
    assert memory is not None
    assert_close(torch.cat(outputs, 2), expected, LIMIT, "output")
    assert torch.equal(memory.counts, whole.counts)
    assert_close(memory.sums[:, :, : whole.sums.shape[2]], whole.sums, LIMIT, "sums")


@torch.no_grad()
@pytest.mark.parametrize("name", ["kvm-sqrt-16", "untrained-observed"])
def test_every_copy_goes_on_alike(name: str, tmp_path: Path):
    case = uneven(name)
    _, memory = case.part(0, 50).attend()
    rest = case.part(50, TOKENS)
    expected, _ = rest.attend(memory=memory.fork())
    memory.save(tmp_path / "memory.safetensors")
    copies = {
        "deepcopy": copy.deepcopy(memory),
        "pickle": pickle.loads(pickle.dumps(memory)),
        "detach": memory.detach(),
        "to": memory.to("cpu"),
        "load": memkit.Memory.load(tmp_path / "memory.safetensors", case.spec),
        "the same rows": memory.reorder([0, 1]),
    }
    for what, each in copies.items():
        output, _ = rest.attend(memory=each)
        assert_close(output, expected, LIMIT, what)
    turned, _ = rows(rest, [1, 0]).attend(memory=memory.reorder([1, 0]))
    assert_close(turned[[1, 0]], expected, LIMIT, "turned")
    again, taken = rest.attend(memory=memory)
    assert_close(again, expected, LIMIT, "the memory itself")
    with pytest.raises(memkit.MemoryStateError, match="taken over"):
        rest.attend(memory=memory)
    assert taken.bytes > 0


@torch.no_grad()
def test_bytes_are_those_of_the_rows_there_are():
    for name in NAMES:
        case = uneven(name)
        _, memory = case.attend()
        kinds = [memkit.load_policy(small(name), {"heads": {"ratios": [ratio]}}) for ratio in RATIOS]
        each = [dataclasses.replace(alone(case, head), spec=kind) for head, kind in enumerate(kinds)]
        _, heads = zip(*(one.attend() for one in each), strict=True)
        assert int(memory.slots[0].sum()) == sum(int(one.slots[0]) for one in heads)
        positions = case.rotation is not None  # heads 1 and 2 are one run, and share their positions
        shared = heads[1].window.streams["positions"].nbytes + heads[1].next_positions.nbytes if positions else 0
        assert memory.bytes == sum(one.bytes for one in heads) - shared, name
        shape = {"heads": 8, "kv_heads": 4, "head_width": WIDTH, "value_width": VALUE_WIDTH, "rows": 2}
        said = cost(case.spec, TOKENS, dtype="float64", **shape)
        assert said.bytes == memory.bytes, name
        assert said.slots == round(int(memory.slots[0].sum()) / 4)
        assert said.prefill.total == sum(
            cost(kind, TOKENS, dtype="float64", **shape | {"heads": 2, "kv_heads": 1}).prefill.total for kind in kinds
        )


@torch.no_grad()
def test_a_refused_call_leaves_all_heads_as_they_were():
    case = uneven("kvm-sqrt-16")
    _, memory = case.part(0, 50).attend()
    rest = case.part(50, 60)
    wrong = dict(rest.tensors)
    wrong["weights"] = wrong["weights"].clone()
    wrong["weights"][:, -1] = -1
    with pytest.raises(memkit.InputError, match="weights"):
        dataclasses.replace(rest, tensors=wrong).attend(memory=memory)
    output, _ = rest.attend(memory=memory.fork())
    expected, _ = rest.attend(memory=memory)
    assert_close(output, expected, LIMIT, "output")


@torch.no_grad()
def test_a_call_that_fails_between_heads_says_that_the_memory_is_lost(monkeypatch: pytest.MonkeyPatch):
    case = uneven("kvm-sqrt-16")
    _, memory = case.part(0, 50).attend()
    rest = case.part(50, 60)
    assert isinstance(memory, HeadsMemory)
    monkeypatch.setattr(memory.parts[1], "taken_over", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rest.attend(memory=memory)
    with pytest.raises(memkit.MemoryStateError, match="lost"):
        rest.attend(memory=memory)


@torch.no_grad()
def test_a_memory_that_was_taken_over_says_so_every_time():
    case = uneven("kvm-sqrt-16")
    _, memory = case.part(0, 50).attend()
    case.part(50, 51).attend(memory=memory)
    assert memory.taken
    for end in (51, 52, 51):
        with pytest.raises(memkit.MemoryStateError, match="taken over"):
            case.part(50, end).attend(memory=memory)
    assert memory.lost is None


def test_what_does_not_fit_is_refused():
    case = uneven("kvm-sqrt-16")
    with pytest.raises(memkit.InputError, match=r"heads\.ratios has 4 numbers"):
        make_case(case.spec, 20, heads=2, kv_heads=2).attend()
    with pytest.raises(memkit.InputError, match="plan"):
        memkit.plan(case.spec, case.tensors["keys"], weights=case.tensors["weights"])
    with pytest.raises(memkit.PolicyError, match="two ways"):
        memkit.load_policy("kvm-sqrt-16", {"heads.ratios": [1.0, 2.0], "heads.profile": "auto"})
    for ratios in ([], [0.0], [-1.0, 1.0], [float("nan")], ["much"]):
        with pytest.raises(memkit.PolicyError, match="ratios"):
            memkit.load_policy("kvm-sqrt-16", {"heads.ratios": ratios})
    with pytest.raises(memkit.PolicyError, match="no slots to share"):
        memkit.load_policy("full", {"heads.ratios": [1.0, 2.0]})


@pytest.mark.parametrize("name", ["kvm-sqrt-16", "untrained-observed"])
def test_equal_ratios_are_a_policy_like_any_other(name: str):
    spec = memkit.load_policy(small(name), {"heads": {"ratios": [1, 1]}})
    case = make_case(spec, TOKENS)
    expected, _ = dataclasses.replace(case, spec=small(name)).attend()
    output, memory = case.attend()
    assert torch.equal(output, expected)
    assert not isinstance(memory, HeadsMemory)
