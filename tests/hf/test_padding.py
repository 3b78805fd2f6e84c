"""Rows of unequal length, padded anywhere: each is as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit import hf
from memkit.hf.names import CACHE, returned_cache

LENGTHS = (90, 61, 8, 33)
SMALL = {"chunker.size": 8}
POLICIES = {
    "full": memkit.load_policy("full"),
    "streaming": memkit.load_policy("streaming-4-512", {"window.size": 20}),
    "merging": memkit.load_policy("untrained-block-mean", SMALL),
    "observed": memkit.load_policy("untrained-observed", SMALL | {"growth.slots": 20, "observe.queries": 8}),
}


def masks() -> dict[str, Tensor]:
    """[4, 90] with LENGTHS tokens in the rows."""
    left = torch.stack([torch.arange(90) >= 90 - length for length in LENGTHS])
    random = torch.Generator().manual_seed(0)
    holes = torch.stack([torch.rand(90, generator=random).argsort() < length for length in LENGTHS])
    return {"left": left, "right": left.flip(1), "holes": holes}


@pytest.fixture
def texts(tiny: Any) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [3 + torch.randperm(208, generator=random)[:length] for length in LENGTHS]


def padded(texts: list[Tensor], mask: Tensor) -> Tensor:
    ids = torch.zeros(mask.shape, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, mask[row]] = text
    return ids


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_is_read_as_it_would_be_alone(tiny: Any, texts: list[Tensor], policy: str, side: str):
    mask = masks()[side]
    ids = padded(texts, mask)
    with hf.attach(tiny, POLICIES[policy]):
        alone = [tiny(text[None]).logits[0] for text in texts]
        together = tiny(ids, attention_mask=mask.long()).logits
        first = tiny(ids[:, :50], attention_mask=mask[:, :50].long())
        cache = returned_cache(first)  # by then a row may have had no token yet
        second = tiny(ids[:, 50:], attention_mask=mask.long(), **{CACHE: cache}).logits
    parts = torch.cat((first.logits, second), dim=1)
    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row, mask[row]], expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(parts[row, mask[row]], expected, atol=2e-4, rtol=2e-4)
    for memory in hf.memories(returned_cache(first)):
        assert memory.seen.tolist() == list(LENGTHS)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_generate_goes_on_with_each_row_as_alone(tiny: Any, texts: list[Tensor], policy: str, beams: int):
    mask = masks()["left"]
    options = {"max_new_tokens": 20, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with hf.attach(tiny, POLICIES[policy]):
        together = tiny.generate(padded(texts, mask), attention_mask=mask.long(), **options)
        alone = [tiny.generate(text[None], **options)[0, len(text) :] for text in texts]
    for row, expected in enumerate(alone):
        assert together[row, 90:].tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "holes"])
def test_gradients_are_those_of_the_rows_alone(tiny: Any, texts: list[Tensor], side: str):
    mask = masks()[side]
    weight = tiny.model.layers[0].self_attn.k_proj.weight
    with hf.attach(tiny, POLICIES["merging"]):
        logits = tiny(padded(texts, mask), attention_mask=mask.long(), use_cache=False).logits
        (together,) = torch.autograd.grad(logits[mask].square().mean(), weight)
        alone = torch.cat([tiny(text[None], use_cache=False).logits[0] for text in texts])
        (expected,) = torch.autograd.grad(alone.square().mean(), weight)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_row_without_a_token_changes_nothing(tiny: Any, texts: list[Tensor]):
    mask = masks()["left"]
    mask[2] = False
    ids = padded([text if row != 2 else text[:0] for row, text in enumerate(texts)], mask)
    with hf.attach(tiny, POLICIES["observed"]):
        output = tiny(ids, attention_mask=mask.long())
        alone = tiny(texts[1][None]).logits[0]
    assert output.logits.isfinite().all()
    torch.testing.assert_close(output.logits[1, mask[1]], alone, atol=2e-4, rtol=2e-4)
    assert hf.memories(returned_cache(output))[0].seen.tolist() == [90, 61, 0, 33]


@torch.no_grad()
def test_a_pipeline_reads_four_prompts_at_once(smollm: hf.LoadedModel):
    from transformers import pipeline

    prompts = [
        "The capital of France is",
        "Once upon a time, in a village by the sea, there lived a fisherman who",
        "2 + 2 =",
        "Water boils at",
    ]
    tokenizer = smollm.tokenizer
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side, tokenizer.pad_token = "left", pad or tokenizer.eos_token
    policy = memkit.load_policy("untrained-kvm-sqrt", {"chunker.size": 4, "window.chunks": 2, "sinks": 1})
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    try:
        with hf.attach(smollm.model, policy):
            pipe = pipeline("text-generation", model=smollm.model, tokenizer=tokenizer)
            together = pipe(prompts, batch_size=4, **options)
            alone = [pipe(prompt, **options) for prompt in prompts]
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
    assert together == alone
