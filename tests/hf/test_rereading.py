"""A prompt read twice: the second reading judges the first, and nothing else of it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import memkit
from memkit import hf
from memkit.engine import next_readers
from memkit.hf import calls, rereading
from memkit.hf.names import CACHE, returned_cache
from memkit.hf.probe import attention_function
from memkit.pieces.evidence import SHARE
from tests.hf.tiny import randomised, tiny_config

WORDS = [5, 7, 11]
CHANGES = {"chunker.size": 8, "growth.slots": 24, "observe.queries": 8}


def observed(readers: str, **changes: Any) -> memkit.PolicySpec:
    return memkit.load_policy("untrained-observed", CHANGES | {"observe.readers": readers} | changes)


def queries_and_more(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each layer's attention of the stock model is given, first layer first."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        seen.append((query, key, value))
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("memkit-test-rereading", look)
    with attention_function(model.base_model, "memkit-test-rereading"):
        model.base_model(ids, use_cache=False)
    return seen


def rotation_of(model: Any) -> memkit.Rotation:
    frequencies = model.base_model.rotary_emb.inv_freq
    return memkit.Rotation("half-split", 2 * len(frequencies), frequencies)


@torch.no_grad()
@pytest.mark.parametrize("words", [WORDS, []], ids=["words", "no-words"])
@pytest.mark.parametrize("readers", ["repeat", "mixed"])
def test_the_second_readings_queries_judge_the_first(readers: str, words: list[int], tiny: Any, ids: Tensor):
    ids = ids[:, :60]
    spec = observed(readers)
    between = torch.tensor(words, dtype=torch.long).expand(2, -1)
    given = queries_and_more(tiny, torch.cat((ids, between, ids), 1))
    with hf.attach(tiny, "full"):
        exact = tiny(ids).logits
    with hf.attach(tiny, spec, prefill="full", connecting=words or None):
        output = tiny(ids, output_hidden_states=True)
    assert [each.shape[1] for each in output.hidden_states] == [60, 60, 60]
    torch.testing.assert_close(output.logits, exact, atol=1e-4, rtol=1e-4)
    rotation = rotation_of(tiny)
    for memory, (query, key, value) in zip(hf.memories(returned_cache(output)), given, strict=True):
        first, again = query[:, :, :60], query[:, :, -60:]
        groups = [again] if readers == "repeat" else [again, next_readers(first, rotation)]
        wanted = memkit.compress(
            spec, first, key[:, :, :60], value[:, :, :60], rotation=rotation, scale=8**-0.5, readers=groups
        )
        assert memory.seen.tolist() == [60, 60]
        assert torch.equal(memory.counts, wanted.counts)
        held = int(memory.held_rows[0])
        for got, right in (
            (memory.sums, wanted.sums),
            (memory.window.last(held)["evidence"], wanted.window.last(held)["evidence"]),
        ):
            torch.testing.assert_close(got, right, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_second_reading_for_which_there_are_too_few_positions_goes_in_portions(ids: Tensor):
    """Of 90 tokens 64, and the others, after the 8 before them: each right behind the text."""
    model: Any = randomised(LlamaForCausalLM(tiny_config(max_position_embeddings=165)))
    spec, between = observed("repeat", heads={}), torch.tensor(WORDS).expand(2, -1)
    portions = [
        queries_and_more(model, torch.cat((ids, between, again), 1)) for again in (ids[:, :64], ids[:, 64 - 8 :])
    ]
    with hf.attach(model, "full"):
        exact = model(ids).logits
    with hf.attach(model, spec, prefill="full", connecting=WORDS):
        output = model(ids, output_hidden_states=True)
        as_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert {each.shape[1] for each in output.hidden_states} == {90}
    torch.testing.assert_close(output.logits, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(as_embeddings.logits, exact, atol=1e-4, rtol=1e-4)
    for memory, one, other in zip(hf.memories(returned_cache(output)), *portions, strict=True):
        query, key, value = (each[:, :, :90] for each in one)
        readers = torch.cat((one[0][:, :, -64:], other[0][:, :, -26:]), dim=2)
        wanted = memkit.compress(spec, query, key, value, rotation=rotation_of(model), scale=8**-0.5, readers=readers)
        assert torch.equal(memory.counts, wanted.counts)
        torch.testing.assert_close(memory.sums, wanted.sums, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_long_prompt_is_read_again_in_portions(tiny: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch):
    seen, twice = list[rereading.Rereading](), rereading.twice

    def noted(*given: Any) -> rereading.Rereading:
        seen.append(twice(*given))
        return seen[-1]

    monkeypatch.setattr(calls, "twice", noted)
    monkeypatch.setattr(rereading, "AT_ONCE", 38)
    monkeypatch.setattr(rereading, "FEWEST", 30)
    with hf.attach(tiny, observed("repeat"), prefill="full", connecting=WORDS):
        for tokens in (38, 90):
            tiny(ids[:, :tokens])
    whole, parts = seen
    assert whole.portions == (rereading.Portion(38, 41, 79),)
    assert [each.end - each.reads for each in parts.portions] == [30, 30, 30]
    assert [each.reads - each.begin for each in parts.portions] == [3, 11, 11]
    assert parts.columns == 90 + 3 * 3 + 2 * 8 + 90


@torch.no_grad()
def test_mixed_is_the_mean_of_both(tiny: Any, ids: Tensor):
    evidence: dict[str, Tensor] = {}
    for readers in ("next", "repeat", "mixed"):
        spec = observed(readers, heads={})
        with hf.attach(tiny, spec, prefill="full", connecting=WORDS):
            memory = hf.memories(returned_cache(tiny(ids[:, :16])))[0]  # all of it is still in the window
        evidence[readers] = memory.window.last(16)["evidence"]
    assert (evidence["next"] - evidence["repeat"])[..., SHARE].abs().max() > 1e-3
    torch.testing.assert_close(evidence["mixed"], (evidence["next"] + evidence["repeat"]) / 2)


@torch.no_grad()
def test_the_model_goes_on_behind_the_first_reading(tiny: Any, ids: Tensor):
    spec = observed("repeat")
    with hf.attach(tiny, spec, prefill="full", connecting=WORDS):
        first = tiny(ids[:, :60])
        cache = returned_cache(first)
        copies = [cache.fork() for _ in range(2)]
        whole = tiny(ids[:, 60:], **{CACHE: copies[0]}).logits
        parts = [tiny(ids[:, at : at + 1], **{CACHE: copies[1]}).logits for at in range(60, 90)]
        as_embeddings = tiny(inputs_embeds=tiny.get_input_embeddings()(ids[:, :60]))
        alone = tiny(ids[:, :60], use_cache=False).logits
        as_tuple = tiny.base_model(ids[:, :60], return_dict=False)
        generated = tiny.generate(ids[:, :60], max_new_tokens=4, do_sample=False)
    assert as_tuple[0].shape[1] == 60
    assert generated.shape == (2, 64)
    assert generated[:, 60].tolist() == first.logits[:, -1].argmax(-1).tolist()
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(as_embeddings.logits, first.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, first.logits, atol=1e-4, rtol=1e-4)
    for one, other in zip(hf.memories(cache), hf.memories(returned_cache(as_embeddings)), strict=True):
        assert torch.equal(one.counts, other.counts)
    for memory in hf.memories(copies[0]):
        assert memory.seen.tolist() == [90, 90]


@torch.no_grad()
def test_bounded_reading_reads_once(tiny: Any, ids: Tensor):
    with hf.attach(tiny, observed("repeat")):
        repeat = tiny(ids).logits
    with hf.attach(tiny, observed("next")):
        following = tiny(ids).logits
    assert torch.equal(repeat, following)


@torch.no_grad()
def test_layers_that_slide_read_as_the_stock_model(ids: Tensor):
    model: Any = randomised(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=16)))
    stock = model(ids).logits
    for spec in (memkit.load_policy("full"), observed("repeat")):
        layers = {"default": spec, "at": {"0": spec}, "sliding": "keep"}
        with hf.attach(model, layers, prefill="full", connecting=WORDS):
            torch.testing.assert_close(model(ids).logits, stock, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_read_twice_is_refused(tiny: Any, ids: Tensor):
    for given in ([211], [-1], [1.5], ["a"]):
        with pytest.raises(memkit.InputError, match="connecting"):
            hf.attach(tiny, observed("repeat"), prefill="full", connecting=given)  # type: ignore[arg-type]
    short = randomised(LlamaForCausalLM(tiny_config(max_position_embeddings=164)))
    with hf.attach(short, observed("mixed"), prefill="full", connecting=WORDS):
        with pytest.raises(memkit.InputError, match=r"behind its 90 tokens, 64 at a time.* knows 164 positions"):
            short(ids)
        short(ids[:, :60])


def test_a_tokenizer_says_the_connecting_words():
    class Letters:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    assert hf.connecting_ids(Letters()) == [ord(letter) for letter in "\n\nRepeat the previous text:\n\n"]
    assert hf.connecting_ids(Letters(), "ab") == [97, 98]
