"""Slots between calls, held as they are read: what they sum comes back, and nothing is held twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkit
from memkit.engine import decode
from memkit.memory.held import HeldSlots
from memkit.pieces.storage import Storage, StorageSpec
from tests.engine.cases import make_case, small

FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "values alone": {"merging": {"kind": "mean", "of": "values"}},
    "drop": {"merging": {"kind": "drop"}},
    "l2": {"readout": {"key": "l2"}},
    "norms": {"readout": {"key": "mean-norm", "value": "mean-norm"}},
    "norms of values alone": {
        "merging": {"kind": "mean", "of": "values"},
        "readout": {"key": "mean-norm", "value": "mean-norm"},
    },
    "count": {"merging": {"kind": "weighted-mean", "weight": "key-norm"}, "readout": {"value": "count-mean"}},
    "radius": {"readout": {"key": "layer-norm", "value": "birth-radius"}},
    "turned back": {"rotary": {"kind": "rerotate"}},
    "turned back, values alone": {"rotary": {"kind": "rerotate"}, "merging": {"kind": "mean", "of": "values"}},
    "never turned": {"rotary": {"kind": "unrotate"}},
    "query scales": {"readout": {"temperatures": True}},
}


def made(form: str, storage: str = "model") -> memkit.PolicySpec:
    return memkit.PolicySpec.model_validate(
        {
            "chunker": {"kind": "fixed", "size": 8},
            "window": {"kind": "block", "chunks": 2},
            "sinks": 2,
            "growth": {"kind": "sqrt", "factor": 2.0, "floor": 6},
            "storage": {"dtype": storage},
            **FORMS[form],
        }
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_slots_sum_comes_back(form: str, dtype: torch.dtype) -> None:
    """Decoded one token at a time, so that slots are held and opened at every chunk, against exact sums in float32."""
    memories: list[memkit.Memory] = []
    for storage in ("model", "float32"):
        case = make_case(made(form, storage), 60, rows=1, heads=2, kv_heads=2).to(dtype)
        _, memory = case.part(0, 21).attend()
        for position in range(21, 60):
            _, memory = case.part(position, position + 1).attend(memory=memory)
        memories.append(memory)
    held, exact = memories
    # Where window and slots meet other queries, single tokens go the way of all calls, and sums are what is read.
    assert isinstance(held.store, HeldSlots) or (form == "never turned" and dtype.itemsize > 2)
    assert not isinstance(exact.store, HeldSlots)
    scale = exact.sums.abs().amax().clamp_min(1)
    # In half precision four bits more than the dtype has; each of four folds rounds once, by a fourteenth at most.
    eps = torch.finfo(dtype).eps
    allowed = 4 * eps / 14 if dtype.itemsize == 2 else 16 * eps
    assert (held.sums - exact.sums[:, :, : held.sums.shape[2]]).abs().max() <= allowed * scale
    assert torch.equal(held.counts, exact.counts)


@torch.no_grad()
@pytest.mark.parametrize("name", memkit.policy_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(2, 2, 3000), (9, 3, 3000), (32, 8, 3000), (2, 2, 16384)])
def test_nothing_is_held_twice(name: str, dtype: torch.dtype, heads: int, kv_heads: int, tokens: int) -> None:
    """Bytes over those of the most rows there are, 64 channels wide, while decoding: queries that wait are counted."""
    policy = memkit.load_policy(name).build()
    said = memkit.cost(policy, tokens, heads=heads, kv_heads=kv_heads, head_width=64, dtype=dtype)
    rows = said.slots + (policy.window.capacity or said.window)
    share = said.peak_bytes / (kv_heads * rows * 2 * 64 * dtype.itemsize)
    if policy.readout.layer_norm:  # what it is read from is kept as well
        assert share <= (1.7 if dtype == torch.float32 else 2.3)
    else:
        assert share <= (1.25 if dtype == torch.float32 else 1.35)


@torch.no_grad()
def test_a_row_that_waits_keeps_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that decode the long way: while nothing leaves, slots stay as they are held."""
    monkeypatch.setattr(decode, "ENABLED", False)
    case = make_case(made("turned back"), 40, rows=2, heads=2, kv_heads=2).to(torch.bfloat16)
    _, memory = case.part(0, 21).attend(lengths=torch.tensor([18, 21]))
    before = memory.store
    _, memory = case.part(21, 22).attend(memory=memory)
    assert isinstance(before, HeldSlots)
    assert memory.store is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [7, 8])
def test_four_bits_more(dtype: torch.dtype, width: int) -> None:
    exact = torch.randn(1000, width, generator=torch.Generator().manual_seed(0))
    exact *= 2.0 ** torch.arange(-5, 5).repeat(100).unsqueeze(-1)
    rounded, counts = exact.to(dtype), torch.arange(1000)
    storage, eps = Storage(StorageSpec()), torch.finfo(dtype).eps
    rest = storage.rest(exact, rounded, counts)
    whole = storage.whole(rounded, rest, torch.float32)
    assert rest.dtype == torch.int8
    assert rest.shape == (1000, 4)
    normal = exact.abs() >= 2.0**-10
    assert ((whole - exact).abs() <= 1.01 * eps / 14 * exact.abs())[normal].all()
    assert ((rounded.float() - exact).abs() > eps / 3 * exact.abs()).any()
    again = storage.rest(whole, whole.to(dtype), counts + 1)
    kept = storage.whole(whole.to(dtype), again, torch.float32) == whole
    assert kept.float().mean() >= 0.999  # but for the middle between a power of two and the number below it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_less_than_a_bit_goes_up_or_down_by_turns(dtype: torch.dtype) -> None:
    """A number that grows by a hundredth of its last place at a time grows by ten in a thousand steps."""
    storage, step = Storage(StorageSpec()), torch.finfo(dtype).eps / 100
    held = torch.ones(1, 64)
    for count in range(1, 1001):
        exact = held + step
        held = storage.whole(
            exact.to(dtype), storage.rest(exact, exact.to(dtype), torch.tensor([count])), torch.float32
        )
    assert ((held - 1) / step / 1000 - 1).abs().max() <= 0.1


def test_small_shares_add_up() -> None:
    """A slot of 400 tokens: without the bits that rounding takes, what one more adds would be lost."""
    spec = small("block-mean-8").model_copy(update={"name": None})
    assert spec.storage.dtype == "model"
    changes = {"growth": {"kind": "fixed", "slots": 1}, "merging": {"kind": "mean"}, "readout": {"key": "mean"}}
    policy = memkit.PolicySpec.model_validate(
        {"chunker": {"kind": "fixed", "size": 1}, "window": {"kind": "block", "chunks": 1}, **changes}
    ).build()
    generator, memory, tokens = torch.Generator().manual_seed(0), None, []
    with torch.no_grad():
        for _ in range(400):
            token = (1 + torch.rand(1, 1, 1, 4, generator=generator)).bfloat16()
            tokens.append(token)
            _, memory = memkit.attend(policy, token, token, token, memory=memory)
    assert memory is not None
    mean = torch.cat(tokens[:-1], dim=2).float().mean(2)
    assert (memory.sums[..., 4:] / 399 - mean.unsqueeze(2)).abs().max() <= torch.finfo(torch.bfloat16).eps
