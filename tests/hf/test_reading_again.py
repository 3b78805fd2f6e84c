"""A text read again as it is read (`observe.again`): what the second reading of a portion is, and says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit import hf
from memkit.errors import InputError, MemoryStateError
from memkit.hf import attention
from memkit.hf.names import returned_cache, with_cache
from memkit.pieces.evidence import AGAIN
from tests.hf.test_rereading import queries_and_more

WORDS = [5, 7, 11]
AGAIN_AT_A_TIME = 16
CHANGES = {
    "chunker.size": 8,
    "growth.slots": 24,
    "observe.queries": 8,
    "observe.again": 2,
    "heads": {},
}


def spec(**changes: Any) -> memkit.PolicySpec:
    return memkit.load_policy("untrained-reread", CHANGES | changes)


def told(cache: Any) -> list[Tensor]:
    """What is known of every row, layer by layer."""
    found: list[Tensor] = []
    each = [part for memory in hf.memories(cache) for part in getattr(memory, "parts", (memory,))]
    for memory in each:
        slots, held = int(memory.live_rows.max()), int(memory.held_rows.max())
        assert memory.store.evidence is not None
        found += [memory.store.evidence[:, :, :slots], memory.window.last(held)["evidence"]]
    return found


@torch.no_grad()
def test_a_portion_is_read_once_more_behind_the_words(tiny: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch):
    met: list[attention.Tokens] = []
    read = attention.Reader.read

    def look(self: Any, memory: Any, tokens: attention.Tokens) -> Any:
        met.append(tokens)
        return read(self, memory, tokens)

    monkeypatch.setattr(attention.Reader, "read", look)
    text = ids[:, :AGAIN_AT_A_TIME]
    between = torch.tensor(WORDS).expand(2, -1)
    query, key, value = queries_and_more(tiny, torch.cat((text, between, text), 1))[0]
    with hf.attach(tiny, spec(), connecting=WORDS):
        output = tiny(text, output_hidden_states=True)
    assert output.logits.shape[1] == AGAIN_AT_A_TIME
    assert {each.shape[1] for each in output.hidden_states} == {AGAIN_AT_A_TIME}
    for found, wanted in zip((met[0].query, met[0].key, met[0].value), (query, key, value), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # the first layer's, which no memory touches
    for memory in hf.memories(returned_cache(output)):
        assert memory.seen.tolist() == [AGAIN_AT_A_TIME] * 2
        assert (memory.window.last(AGAIN_AT_A_TIME)["evidence"][..., AGAIN] > 0).all()


@torch.no_grad()
def test_what_was_told_is_what_the_second_readings_queries_say(tiny: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[memkit.Memory, Tensor]] = []
    monkeypatch.setattr(attention, "ask_again", lambda memory, readers, **_: asked.append((memory, readers)))
    with hf.attach(tiny, spec(), connecting=WORDS):
        before = returned_cache(tiny(ids[:, :AGAIN_AT_A_TIME], use_cache=True))
    monkeypatch.undo()
    with hf.attach(tiny, spec(), connecting=WORDS):
        after = returned_cache(tiny(ids[:, :AGAIN_AT_A_TIME], use_cache=True))
    assert len(asked) == len(hf.memories(after))
    for memory, readers in asked:
        assert readers.shape[2] == AGAIN_AT_A_TIME
        rotation = None
        for layer, each in zip(before.layers, hf.memories(before), strict=True):
            if each is memory:
                rotation = layer.reader.facts.rotation
        memkit.ask_again(memory, readers, rotation=rotation)
    for found, wanted in zip(told(after), told(before), strict=True):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"heads": {"ratios": [1.5, 0.5]}}], ids=["alike", "heads differ"])
@pytest.mark.parametrize("cuts", [[16, 32], [1, 5, 33], [40], [*range(1, 80)]], ids=["portions", "some", "two", "one"])
def test_split_equals_whole(cuts: list[int], changes: dict[str, Any], tiny: Any, ids: Tensor):
    ids = ids[:, :80]
    # Without `difference`: in the first layer a token and its second reading have one key, turned back, and one value,
    # so that which of them differs more from the rest is decided by rounding, and by it what the second reading says.
    with hf.attach(tiny, spec(**changes, **{"admission.difference": 0}), connecting=WORDS):
        whole = tiny(ids, use_cache=True)
        logits, cache = [], None
        for begin, end in zip((0, *cuts), (*cuts, 80), strict=True):
            given = {} if cache is None else with_cache(tiny, cache)
            output = tiny(ids[:, begin:end], use_cache=True, **given)
            cache = returned_cache(output)
            logits.append(output.logits)
        without = tiny(ids, use_cache=False)
    assert returned_cache(without) is None
    torch.testing.assert_close(without.logits, whole.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(told(cache), told(returned_cache(whole)), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_reading_again_changes_what_stays(tiny: Any, ids: Tensor):
    logits = []
    for again in (0, 2):
        with hf.attach(tiny, spec(**{"observe.again": again}), connecting=WORDS):
            logits.append(tiny(ids).logits)
    assert torch.equal(logits[0][:, :AGAIN_AT_A_TIME], logits[1][:, :AGAIN_AT_A_TIME])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_nothing_is_lost_where_all_rows_stay(tiny: Any, ids: Tensor):
    stock = tiny(ids).logits
    with hf.attach(tiny, spec(**{"growth.slots": 200}), connecting=WORDS):
        torch.testing.assert_close(tiny(ids).logits, stock, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_with_beams_goes_on_as_greedy_calls_do(tiny: Any, ids: Tensor):
    prompt = ids[:1, :27]
    with hf.attach(tiny, spec()):
        once = tiny.generate(prompt, max_new_tokens=12, do_sample=False)
        pieces = tiny.generate(prompt, max_new_tokens=12, do_sample=False, prefill_chunk_size=10)
        by_hand, cache = prompt, None
        for _ in range(12):
            given = {} if cache is None else with_cache(tiny, cache)
            output = tiny(by_hand if cache is None else by_hand[:, -1:], use_cache=True, **given)
            cache = returned_cache(output)
            by_hand = torch.cat((by_hand, output.logits[:, -1:].argmax(-1)), 1)
        beams = tiny.generate(prompt, max_new_tokens=12, do_sample=False, num_beams=3)
    assert torch.equal(once, by_hand)
    assert torch.equal(once, pieces)
    assert beams.shape == once.shape


@torch.no_grad()
def test_a_cache_is_kept_and_forked_with_the_tokens_that_wait(tiny: Any, ids: Tensor, tmp_path: Any):
    with hf.attach(tiny, spec(), connecting=WORDS):
        cache = returned_cache(tiny(ids[:, :21], use_cache=True))
        assert cache.layers[0].waiting.tolist() == ids[:, 16:21].tolist()
        cache.save(tmp_path / "kept")
        others = [hf.MemoryCache.load(tmp_path / "kept"), cache.fork(), copy.deepcopy(cache)]
        wanted = tiny(ids[:, 21:60], use_cache=True, **with_cache(tiny, cache)).logits
        for other in others:
            torch.testing.assert_close(tiny(ids[:, 21:60], use_cache=True, **with_cache(tiny, other)).logits, wanted)
        note = tmp_path / "kept" / "cache.json"
        note.write_text(note.read_text().replace('"waiting": [', '"waiting": [[], '))
        with pytest.raises(MemoryStateError, match="waiting must be token ids"):
            hf.MemoryCache.load(tmp_path / "kept")


@torch.no_grad()
def test_a_prompt_read_in_full_is_read_again_as_a_whole_and_then_in_portions(tiny: Any, ids: Tensor):
    with hf.attach(tiny, spec(), prefill="full", connecting=WORDS):
        first = tiny(ids[:, :40], use_cache=True)
        cache = returned_cache(first)
        assert all((each[..., AGAIN] > 0).any() for each in told(cache))
        assert cache.layers[0].waiting.tolist() == ids[:, 32:40].tolist()
        once = tiny(ids[:, 40:70], use_cache=True, **with_cache(tiny, cache.fork())).logits
        parts = []
        for begin, end in ((40, 47), (47, 48), (48, 70)):
            output = tiny(ids[:, begin:end], use_cache=True, **with_cache(tiny, cache))
            cache = returned_cache(output)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), once, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_a_call_without_a_cache_in_either_form(tiny: Any, ids: Tensor):
    found = []
    for use_cache in (False, True):
        tiny.zero_grad()
        with hf.attach(tiny, spec(**{"growth.slots": 200}), connecting=WORDS):
            tiny(ids[:, :40], labels=ids[:, :40], use_cache=use_cache).loss.backward()
        found.append([parameter.grad.clone() for parameter in tiny.parameters() if parameter.grad is not None])
    tiny.zero_grad()
    tiny(ids[:, :40], labels=ids[:, :40]).loss.backward()
    stock = [parameter.grad for parameter in tiny.parameters() if parameter.grad is not None]
    for one, other, exact in zip(*found, stock, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one, exact, atol=1e-4, rtol=1e-3)
    tiny.zero_grad()


@torch.no_grad()
def test_a_call_that_is_interrupted_is_not_gone_on_from(tiny: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch):
    with hf.attach(tiny, spec(), connecting=WORDS):
        cache = returned_cache(tiny(ids[:, :8], use_cache=True))
        calls, read = [0], attention.Reader.read

        def fail(self: Any, memory: Any, tokens: Any) -> Any:
            calls[0] += 1
            if calls[0] > 2 * len(cache.layers):  # in the third piece
                raise KeyboardInterrupt
            return read(self, memory, tokens)

        monkeypatch.setattr(attention.Reader, "read", fail)
        with pytest.raises(KeyboardInterrupt):
            tiny(ids[:, 8:60], use_cache=True, **with_cache(tiny, cache))
        monkeypatch.undo()
        with pytest.raises(MemoryStateError, match="interrupted"):
            tiny(ids[:, 8:60], use_cache=True, **with_cache(tiny, cache))


@torch.no_grad()
def test_what_cannot_be_read_again_is_refused(tiny: Any, ids: Tensor):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with hf.attach(tiny, spec(), connecting=WORDS):
        with pytest.raises(InputError, match="got padding"):
            tiny(ids, attention_mask=mask)
        with pytest.raises(InputError, match="inputs_embeds"):
            tiny(inputs_embeds=tiny.get_input_embeddings()(ids))
        with pytest.raises(InputError, match="assistant"):
            tiny.generate(ids[:1, :20], max_new_tokens=4, prompt_lookup_num_tokens=2, do_sample=False)
    with pytest.raises(InputError, match="croppable"):
        hf.attach(tiny, spec(), croppable=True)
    mixed = {"default": spec(), "at": {0: spec(**{"observe.again": 1})}}
    with pytest.raises(InputError, match="8 and 16"):
        hf.attach(tiny, mixed)
    tiny.gradient_checkpointing_enable()
    try:
        with torch.enable_grad(), hf.attach(tiny.train(), spec()), pytest.raises(InputError, match="checkpointing"):
            tiny(ids)
    finally:
        tiny.gradient_checkpointing_disable()
        tiny.eval()


@torch.no_grad()
def test_layers_of_other_policies_read_along(tiny: Any, ids: Tensor):
    with hf.attach(tiny, {"default": spec(), "at": {0: "full"}}, connecting=WORDS):
        whole = tiny(ids[:, :60], use_cache=True)
        first = returned_cache(tiny(ids[:, :30], use_cache=True))
        rest = tiny(ids[:, 30:60], use_cache=True, **with_cache(tiny, first))
    torch.testing.assert_close(rest.logits, whole.logits[:, 30:], atol=1e-4, rtol=1e-4)
