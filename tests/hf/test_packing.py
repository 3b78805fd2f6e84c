"""Texts packed into one row: each is read as it would be alone, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache

import memkit
from memkit import hf
from memkit.errors import InputError
from memkit.hf.names import CACHE, returned_cache
from tests.hf.families import made
from tests.hf.test_families import HYBRIDS
from tests.hf.test_padding import POLICIES, SMALL
from tests.hf.tiny import randomised

UNROTATE = memkit.load_policy("untrained-kvm-sqrt", SMALL | {"rotary.kind": "unrotate"})
LENGTHS = (23, 41, 1, 25)


@pytest.fixture
def texts(ids: Tensor) -> list[Tensor]:
    return list(ids[0].split(LENGTHS))


def packed(texts: list[Tensor], **options: Any) -> dict[str, Any]:
    """What transformers' padding-free collator makes of texts."""
    collator = DataCollatorWithFlattening(return_tensors="pt", **options)
    return dict(collator([{"input_ids": text.tolist()} for text in texts]))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("policy", [*POLICIES, "unrotate"])
def test_texts_are_read_as_they_would_be_alone(tiny: Any, texts: list[Tensor], policy: str):
    batch = packed(texts, return_flash_attn_kwargs=True, return_seq_idx=True)
    assert {"cu_seq_lens_q", "max_length_k", "seq_idx", "position_ids"} <= batch.keys()
    weight = tiny.model.layers[0].self_attn.k_proj.weight
    with hf.attach(tiny, POLICIES.get(policy, UNROTATE)):
        output = tiny(**batch)
        assert returned_cache(output) is None
        (gradient,) = torch.autograd.grad(output.loss, weight)
        alone = [tiny(text[None], labels=text[None], use_cache=False) for text in texts]
        close(output.logits[0], torch.cat([each.logits[0] for each in alone]))
        learned = sum(len(text) - 1 for text in texts)
        loss = sum(each.loss * (len(text) - 1) for each, text in zip(alone, texts, strict=True) if len(text) > 1)
        torch.testing.assert_close(output.loss, loss / learned)
        (expected,) = torch.autograd.grad(loss / learned, weight)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
        with torch.no_grad():  # and it matters where they begin
            assert not torch.allclose(tiny(batch["input_ids"]).logits, output.logits, atol=1e-2)


@torch.no_grad()
def test_full_is_the_stock_model_on_packed_rows(tiny: Any, ids: Tensor):
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    uneven = torch.stack((positions[0], torch.arange(90)))
    for model, attached in ((tiny, "full"), (made("gemma3"), {"default": "full", "sliding": "keep"})):
        expected = model(ids[:1], position_ids=positions, use_cache=False).logits
        with hf.attach(model, attached):
            close(model(ids[:1], position_ids=positions).logits, expected)
            close(model(ids[:1], position_ids=positions, attention_mask=torch.ones(1, 90)).logits, expected)
            both = model(ids, position_ids=positions).logits
            close(both[:1], expected)
            close(both[1:], model(ids[1:], position_ids=positions).logits)
            close(model(ids, position_ids=uneven).logits, torch.cat((both[:1], model(ids[1:]).logits)))


@torch.no_grad()
def test_where_texts_begin_may_be_told_in_either_way(tiny: Any, texts: list[Tensor]):
    batch = packed(texts, return_flash_attn_kwargs=True)
    ids, sums, positions = batch["input_ids"], batch["cu_seq_lens_q"], batch["position_ids"]
    with hf.attach(tiny, POLICIES["merging"]):
        expected = tiny(ids, position_ids=positions).logits
        assert torch.equal(tiny(ids, cu_seq_lens_q=sums).logits, expected)
        assert torch.equal(tiny(ids, cu_seq_lens_k=sums).logits, expected)
        assert torch.equal(tiny(ids, cu_seq_lens_q=torch.tensor([0, 90]), max_length_q=90).logits, tiny(ids).logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_checkpoints_change_nothing(tiny: Any, texts: list[Tensor]):
    batch = packed(texts)
    weight = tiny.model.layers[0].self_attn.k_proj.weight
    with hf.attach(tiny.train(), POLICIES["merging"]):
        (expected,) = torch.autograd.grad(tiny(**batch).loss, weight)
        tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (found,) = torch.autograd.grad(tiny(**batch).loss, weight)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "short": ({"cu_seq_lens_q": torch.tensor([0, 30])}, r"must rise from 0 to the call's 90 tokens, got \[0, 30\]"),
    "no tensor": ({"cu_seq_lens_q": [0, 90]}, "must be a tensor of whole numbers, one more than there are texts"),
    "falling": ({"cu_seq_lens_q": torch.tensor([0, 50, 30, 90])}, "must rise from 0 to the call's 90 tokens"),
    "unequal": (
        {"cu_seq_lens_q": torch.tensor([0, 50, 90]), "cu_seq_lens_k": torch.tensor([0, 40, 90])},
        "cu_seq_lens_q and cu_seq_lens_k must be equal",
    ),
    "contradicted": (
        {"cu_seq_lens_q": torch.tensor([0, 50, 90]), "position_ids": torch.arange(90)[None] % 45},
        "position_ids must start again at 0 where cu_seq_lens_q says",
    ),
    "cached": ({"cu_seq_lens_q": torch.tensor([0, 50, 90]), "use_cache": True}, "leave both out, or give each text"),
    "filled": (
        {"cu_seq_lens_q": torch.tensor([0, 50, 90]), CACHE: DynamicCache()},
        "read from their beginnings to their ends",
    ),
    "padded": (
        {"cu_seq_lens_q": torch.tensor([0, 50, 90]), "attention_mask": torch.arange(90)[None] > 3},
        "packed rows have no padding, got an attention_mask with 0",
    ),
    "odd": ({"position_ids": torch.arange(90)[None] % 45 + 1}, "position_ids must count each row's tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_what_is_no_packed_row_is_refused(tiny: Any, ids: Tensor, case: str):
    options, message = REFUSED[case]
    with hf.attach(tiny, "full"), pytest.raises(InputError, match=message) as caught:
        tiny(ids[:1], **options)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_who_cannot_read_packed_rows(tiny: Any, ids: Tensor):
    begins = {"cu_seq_lens_q": torch.tensor([0, 50, 90])}
    with hf.attach(tiny, "full"):
        with pytest.raises(InputError, match="must begin a text with each of the 2 rows"):
            tiny(ids, cu_seq_lens_q=torch.tensor([0, 50, 180]))
        cache = returned_cache(tiny(ids[:1, :50], use_cache=True))
        with pytest.raises(memkit.ModelError, match="which go on with no cache; leave the cache out"):
            tiny(ids[:1, 50:], cu_seq_lens_q=torch.tensor([0, 20, 40]), **{CACHE: cache})
    with (
        hf.attach(tiny, POLICIES["observed"], prefill="full"),
        pytest.raises(InputError, match="prefill='full' needs a text per row"),
    ):
        tiny(ids[:1], **begins)
    stock = randomised(HYBRIDS["qwen3_next"]())
    with hf.attach(stock, "full"), pytest.raises(InputError, match="1 of 2 layers are no attention"):
        stock(ids[:1], **begins)
