"""Budgets of an attached model: rows of each head, a share of the prompt, or bytes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit import budgets, hf
from memkit.errors import EvenSharesWarning, InputError, MemoryStateError
from memkit.hf.names import CACHE, returned_cache
from tests.hf.families import made

SMALL = {"chunker.size": 8}
OBSERVED = memkit.load_policy(
    "untrained-observed", SMALL | {"window.chunks": 3, "growth.slots": 20, "observe.queries": 8}
)
SLIDING = memkit.load_policy("streaming-4-512", {"window.size": 20})
SLOTS = memkit.load_policy("untrained-kvm-fixed", SMALL | {"growth.slots": 12})


def rows_of(memory: memkit.Memory) -> int:
    return int(memory.slots.max()) + int(memory.held_rows.max())


@pytest.mark.parametrize(
    ("name", "rows", "chunk", "chunks", "queries"),
    [
        ("untrained-observed", 2048, 32, 4, 16),
        ("untrained-observed", 512, 32, 4, 16),
        ("untrained-observed", 511, 32, 2, 16),
        ("untrained-recall", 256, 32, 2, 32),
        ("untrained-observed", 255, 16, 2, 8),
        ("untrained-observed", 37, 16, 2, 8),
        ("caote-512", 256, 32, 3, 32),
        ("keydiff-512", 256, 32, 6, 0),  # observes nobody
        ("untrained-reread", 256, 32, 4, 32),  # reads again
    ],
)
def test_few_rows_are_not_most_of_them_window(name: str, rows: int, chunk: int, chunks: int, queries: int):
    whole = memkit.load_policy(name)
    if whole.observe.decay < 1:
        whole = memkit.load_policy(whole, {"observe.decay": 0.93})
    spec, size = budgets.with_rows(whole, rows), whole.chunker.build().size
    assert spec.observe.decay == pytest.approx(whole.observe.decay ** (chunk / size))  # as much per token
    assert (spec.chunker.build().size, spec.observe.queries) == (chunk, queries)
    window = spec.build().window.capacity
    assert window == chunk * chunks
    assert spec.growth.slots + window == rows  # pyright: ignore[reportAttributeAccessIssue]
    assert budgets.alike(spec, whole)
    with pytest.raises(InputError, match="rows must be at least"):
        budgets.with_rows(spec, budgets.least_rows([spec]) - 1)


@torch.no_grad()
def test_rows_are_those_of_the_policy_made_so(tiny: Any, ids: Tensor):
    with hf.attach(tiny, memkit.load_policy(OBSERVED, {"growth.slots": 36})):
        expected = tiny(ids).logits
    with hf.attach(tiny, OBSERVED, rows=60) as model:
        assert torch.equal(model(ids).logits, expected)
    handle = hf.attach(tiny, {"default": OBSERVED, "at": {"1": "full"}}, rows=50)
    assert handle.rows == 50
    memories = hf.memories(returned_cache(tiny(ids, use_cache=True)))
    assert [int(memory.slots[0].max()) for memory in memories] == [26, 0]
    handle.detach()
    with hf.attach(tiny, lambda layer: (SLIDING, "full")[layer], rows=30):
        memories = hf.memories(returned_cache(tiny(ids, use_cache=True)))
    assert [rows_of(memory) for memory in memories] == [30, 90]


@pytest.mark.parametrize("policy", [OBSERVED, SLIDING, SLOTS], ids=["observed", "sliding", "slots"])
@torch.no_grad()
def test_a_share_is_of_each_prompt(tiny: Any, ids: Tensor, policy: memkit.PolicySpec):
    generated = {"max_new_tokens": 12, "do_sample": False}
    for tokens, rows in ((90, 45), (81, 40)):
        with hf.attach(tiny, policy, prefill="full", rows=rows):
            expected = tiny(ids[:, :tokens], use_cache=True)
            cache = returned_cache(expected)
            held = [rows_of(memory) for memory in hf.memories(cache)]
            following = tiny(ids[:, :3], **{CACHE: cache}).logits
            text = tiny.generate(ids[:, :tokens], **generated)
        with hf.attach(tiny, policy, prefill="full", share=0.5) as model:
            output = model(ids[:, :tokens], use_cache=True)
            assert torch.equal(output.logits, expected.logits)
            cache = returned_cache(output)
            assert [rows_of(memory) for memory in hf.memories(cache)] == held
            assert rows - 8 < held[0] <= rows  # the window's newest chunk may be incomplete
            assert torch.equal(model(ids[:, :3], **{CACHE: cache}).logits, following)
            assert torch.equal(model.generate(ids[:, :tokens], **generated), text)


@torch.no_grad()
def test_a_cache_of_another_policy_is_refused_under_a_share(tiny: Any, ids: Tensor):
    with hf.attach(tiny, SLIDING, prefill="full", share=0.5):
        cache = returned_cache(tiny(ids, use_cache=True))
    with (
        hf.attach(tiny, SLOTS, prefill="full", share=0.5),
        pytest.raises(MemoryStateError, match="must be of the attached policy, untrained-kvm-fixed"),
    ):
        tiny(ids[:, :3], **{CACHE: cache})


@pytest.mark.parametrize(
    "policy", [SLIDING, SLOTS, pytest.param(OBSERVED, marks=pytest.mark.slow)], ids=["sliding", "slots", "observed"]
)
@torch.no_grad()
def test_bytes_are_never_exceeded_and_made_use_of(tiny: Any, ids: Tensor, policy: memkit.PolicySpec):
    budget = 40_000

    def most(**options: Any) -> tuple[int, int]:
        handle = hf.attach(tiny, policy, **options)
        cache = returned_cache(tiny(long[:, :150], use_cache=True))
        most = 0
        for i in range(150, 190):
            tiny(long[:, i : i + 1], **{CACHE: cache})
            most = max(most, sum(memory.bytes for memory in hf.memories(cache)))
        handle.detach()
        assert handle.rows is not None
        return handle.rows, most

    long = ids[:1].repeat(1, 3)
    rows, held = most(bytes=budget)
    assert 0.9 * budget < held <= budget
    assert most(rows=rows + 9)[1] > budget


def test_bytes_are_of_all_layers(tiny: Any):
    several = {"default": SLIDING, "at": {"1": memkit.load_policy("window-512", {"window.size": 9})}}
    rows = []
    for policy in (SLIDING, several):
        handle = hf.attach(tiny, policy, bytes=60_000)
        handle.detach()
        rows.append(handle.rows)
    assert abs(rows[0] - rows[1]) <= 8  # sinks apart, both are windows
    with pytest.raises(InputError, match="bytes are for policies that stop growing, got full"):
        hf.attach(made("gemma3"), {"default": "full", "sliding": SLIDING}, bytes=60_000)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (OBSERVED, {"rows": 60, "bytes": 9}, "rows, share or bytes, got rows=60 and bytes=9; give one of them"),
        (OBSERVED, {"rows": 0}, "rows must be"),
        (OBSERVED, {"rows": 24}, "rows must be at least 29 for untrained-observed, got 24"),
        (OBSERVED, {"share": 0.5}, "read in full, got prefill 'policy'; set prefill to full, or give rows"),
        (OBSERVED, {"share": 1.5, "prefill": "full"}, r"share must be a number above 0 and at most 1, got 1\.5"),
        (OBSERVED, {"share": True, "prefill": "full"}, "share must be a number above 0"),
        (SLIDING, {"bytes": 999}, r"bytes must be at least [\d,]+ for these policies \(5 rows a head\), got 999"),
        ("full", {"rows": 60}, "with a number of slots or a sliding window, got full; leave them out, or use another"),
        ({"default": SLIDING, "at": {"0": "full"}}, {"bytes": 10**6}, "stop growing, got full; give rows, or another"),
    ],
)
def test_budgets_that_are_refused(tiny: Any, policy: Any, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as caught:
        hf.attach(tiny, policy, **options)
    assert "\n" not in str(caught.value)
    hf.attach(tiny, "full").detach()


@torch.no_grad()
def test_a_prompt_too_short_for_its_share_is_refused_before_anything_is_read(tiny: Any, ids: Tensor):
    with hf.attach(tiny, OBSERVED, prefill="full", share=0.25):
        message = r"share 0\.25 of a prompt of 90 tokens is 22 rows, and these policies have 29 at least; raise it"
        with pytest.raises(InputError, match=message):
            tiny(ids)
        tiny(ids.repeat(1, 2))


@pytest.mark.parametrize("budget", [{}, {"rows": 50}, {"bytes": 200_000}, {"prefill": "full", "share": 0.5}])
@torch.no_grad()
def test_even_shares_are_said_where_a_model_is_attached_and_not_again(tiny: Any, ids: Tensor, budget: dict[str, Any]):
    with pytest.warns(EvenSharesWarning, match="no head profile is shipped") as said:
        handle = hf.attach(tiny, OBSERVED, **budget)
    assert [warning.filename for warning in said] == [__file__]
    with warnings.catch_warnings(), handle as model:
        warnings.simplefilter("error", EvenSharesWarning)
        for tokens in (60, 80):
            model(ids[:, :tokens])
