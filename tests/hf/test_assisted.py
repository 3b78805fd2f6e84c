"""Assisted decoding: candidates are read ahead, and those that the model did not choose are taken back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit import hf
from memkit.errors import InputError, MemoryStateError
from memkit.hf.cache import MemoryLayer
from memkit.hf.names import CACHE, returned_cache
from memkit.hf.rewinding import KEEP, STEP
from tests.hf.families import made

CHUNKS = {"chunker.size": 8}
POLICIES = {
    "full": memkit.load_policy("full"),
    "sliding": memkit.load_policy("window-512", {"window.size": 20}),
    "streaming": memkit.load_policy("streaming-4-512", {"window.size": 20}),
    "merging": memkit.load_policy("untrained-block-mean", CHUNKS),
    "slots": memkit.load_policy("untrained-kvm-fixed", CHUNKS | {"growth.slots": 12}),
    "observed": memkit.load_policy("untrained-observed", CHUNKS | {"growth.slots": 20, "observe.queries": 8}),
}
PLAIN = {"max_new_tokens": 20, "do_sample": False}
LOOKUP = PLAIN | {"prompt_lookup_num_tokens": 5}


@pytest.fixture
def again(ids: Tensor) -> Tensor:
    """A row of tokens of which some come twice, so that there is something to look up: [1, 60]."""
    return torch.cat((ids[:1, :25], ids[:1, 5:40]), dim=1)


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was taken back of the layers, call for call."""
    numbers: list[int] = []
    crop = MemoryLayer.crop

    def noted(layer: MemoryLayer, tokens: int) -> None:
        before = layer.columns
        crop(layer, tokens)
        numbers.append(before - layer.columns)

    monkeypatch.setattr(MemoryLayer, "crop", noted)
    return numbers


@pytest.mark.parametrize("prefill", ["policy", "full"])
@pytest.mark.parametrize("policy", POLICIES)
def test_looking_up_in_the_prompt_gives_what_greedy_decoding_gives(
    tiny: Any, again: Tensor, removed: list[int], policy: str, prefill: Any
):
    stock = tiny.generate(again, **LOOKUP)
    with hf.attach(tiny, POLICIES[policy], prefill=prefill):
        expected = tiny.generate(again, **PLAIN)
        assert not removed
        assert torch.equal(tiny.generate(again, **LOOKUP), expected)
    assert max(removed) > 1
    if policy == "full":
        assert torch.equal(expected, stock)


@pytest.mark.parametrize("policy", ["full", "streaming", "observed"])
def test_an_assistant_under_a_policy_of_its_own(tiny: Any, again: Tensor, removed: list[int], policy: str):
    assistant = copy.deepcopy(tiny)
    with hf.attach(tiny, "full"), hf.attach(assistant, POLICIES[policy], croppable=True):
        expected = tiny.generate(again, **PLAIN)
        assert torch.equal(tiny.generate(again, **PLAIN, assistant_model=assistant), expected)
    assert max(removed) > 0 or policy == "full"


def test_early_exit_is_refused_and_the_model_stays_whole(tiny: Any, again: Tensor):
    expected = tiny(again).logits
    with hf.attach(tiny, "full", croppable=True):
        with pytest.raises(InputError, match="reads all of its 2 layers, got num_hidden_layers 1 in its config"):
            tiny.generate(again, **PLAIN, assistant_early_exit=1)
        assert tiny.config.num_hidden_layers == 2
        torch.testing.assert_close(tiny(again).logits, expected, atol=1e-4, rtol=0)
    assert torch.equal(tiny(again).logits, expected)


@pytest.mark.parametrize("policy", ["sliding", "observed"])
def test_a_stock_assistant(tiny: Any, again: Tensor, removed: list[int], policy: str):
    assistant = copy.deepcopy(tiny)
    with hf.attach(tiny, POLICIES[policy]):
        expected = tiny.generate(again, **PLAIN)
        assert torch.equal(tiny.generate(again, **PLAIN, assistant_model=assistant), expected)
    assert removed


def go_on(model: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    return model(ids, **{CACHE: cache}, **options).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("calls", [1, 12])
@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_what_was_taken_back_was_never_read(tiny: Any, ids: Tensor, policy: str, calls: int):
    """Across edges of chunks, into the prompt, and to a length (as older releases say it)."""
    with hf.attach(tiny, POLICIES[policy], croppable=True):
        whole = tiny(ids).logits
        cache = returned_cache(tiny(ids[:, :48], use_cache=True))

        def read_others(columns: int) -> None:
            for part in ids.flip(1)[:, :columns].tensor_split(calls, dim=1):
                go_on(tiny, part, cache)

        read_others(36)
        cache.crop(-37)
        close(go_on(tiny, ids[:, 47:60], cache), whole[:, 47:60])
        read_others(20)
        cache.crop(60)
        cache.crop(100)
        cache.crop(0)
        cache.crop(-27)
        assert cache.get_seq_length() == 33
        assert [memory.seen.tolist() for memory in hf.memories(cache)] == [[33, 33]] * 2
        close(go_on(tiny, ids[:, 33:], cache), whole[:, 33:])


@torch.no_grad()
def test_columns_of_padding_are_taken_back_too(tiny: Any, ids: Tensor):
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 50:55] = 0
    with hf.attach(tiny, POLICIES["merging"], croppable=True):
        cache = returned_cache(tiny(ids[:, :40], attention_mask=mask[:, :40]))
        expected = go_on(tiny, ids[:, 40:60], copy.deepcopy(cache), attention_mask=mask)
        for begin, end in ((40, 48), (48, 53), (53, 60)):
            go_on(tiny, ids[:, begin:end].flip(0), cache, attention_mask=mask[:, :end])
        assert hf.memories(cache)[0].seen.tolist() == [51, 55]
        cache.crop(-20)
        assert hf.memories(cache)[0].seen.tolist() == [31, 40]
        found = go_on(tiny, ids[:, 40:60], cache, attention_mask=mask)
        close(found[mask[:, 40:].bool()], expected[mask[:, 40:].bool()])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_rows_chosen_and_copies_go_back_as_well(tiny: Any, ids: Tensor, copied: Any):
    with hf.attach(tiny, POLICIES["slots"], croppable=True):
        whole = tiny(ids).logits
        cache = returned_cache(tiny(ids[:, :40], use_cache=True))
        go_on(tiny, ids[:, 50:63], cache)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        other = copied(cache)
        for each in (cache, other):
            each.crop(-13)
            close(go_on(tiny, ids[[1, 0, 1], 40:], each), whole[[1, 0, 1], 40:])


@torch.no_grad()
def test_what_is_kept_for_it_stays_small(tiny: Any, ids: Tensor):
    long = ids[:1].repeat(1, 4)
    with hf.attach(tiny, POLICIES["slots"], croppable=True):
        cache = returned_cache(tiny(long[:, :100], use_cache=True))
        layer = cache.layers[0]
        assert (layer.past.columns, layer.past.behind) == (100 - KEEP, KEEP)
        for i in range(100, 230):
            go_on(tiny, long[:, i : i + 1], cache)
            assert KEEP <= layer.past.behind < KEEP + STEP
            assert layer.past.columns + layer.past.behind == i + 1
        before = go_on(tiny, long[:, 230:240], copy.deepcopy(cache))
        with pytest.raises(InputError, match=r"goes back by \d+ columns at most by now, asked for 150; crop") as caught:
            cache.crop(-150)
        assert "\n" not in str(caught.value)
        close(go_on(tiny, long[:, 230:240], cache), before)


@torch.no_grad()
def test_a_cache_is_told_beforehand(tiny: Any, ids: Tensor):
    with hf.attach(tiny, POLICIES["slots"]):
        whole = tiny(ids).logits
        cache = returned_cache(tiny(ids[:, :40], use_cache=True))
        assert cache.layers[0].past is None
        with pytest.raises(InputError, match=r"once this was announced, asked to remove 3; attach\(…, croppable=True"):
            cache.crop(-3)
        cache.activate_past_recording()
        go_on(tiny, ids[:, 50:55], cache)
        cache.crop(-5)
        close(go_on(tiny, ids[:, 40:], cache), whole[:, 40:])
        # A call that keeps the logits of its newest tokens says so, too, but for the next call alone.
        cache = returned_cache(tiny(ids[:, :50], use_cache=True, logits_to_keep=11))
        cache.crop(-10)
        close(go_on(tiny, ids[:, 40:], cache), whole[:, 40:])
        cache = returned_cache(tiny(ids[:, :50], use_cache=True, logits_to_keep=11))
        go_on(tiny, ids[:, 50:60], cache)
        assert cache.layers[0].past is None
        go_on(tiny, ids[:, 70:80], cache, logits_to_keep=11)
        cache.crop(-10)
        close(go_on(tiny, ids[:, 60:], cache), whole[:, 60:])


@torch.no_grad()
def test_after_an_interrupted_call_nothing_is_taken_back(tiny: Any, ids: Tensor):
    def interrupt(*_: Any) -> None:
        raise RuntimeError("interrupted")

    with hf.attach(tiny, POLICIES["slots"], croppable=True):
        cache = returned_cache(tiny(ids[:, :40], use_cache=True))
        hook = tiny.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(RuntimeError, match="interrupted"):
            go_on(tiny, ids[:, 40:50], cache)
        hook.remove()
        with pytest.raises(MemoryStateError, match=r"ran to its end to be cropped.*read the text anew"):
            cache.crop(-10)


def test_gradients_end_at_a_crop(tiny: Any, ids: Tensor):
    with hf.attach(tiny, POLICIES["slots"], croppable=True):
        cache = returned_cache(tiny(ids[:, :40], use_cache=True))
        go_on(tiny, ids[:, 50:55], cache)
        assert hf.memories(cache)[0].requires_grad
        cache.crop(-5)
        assert not hf.memories(cache)[0].requires_grad
        with torch.no_grad():
            expected = tiny(ids).logits[:, 40:]
        close(go_on(tiny, ids[:, 40:], cache), expected)


def test_a_model_of_which_some_layers_slide(tiny: Any, again: Tensor, removed: list[int]):
    stock = made("gemma3")
    expected = stock.generate(again, **PLAIN)
    with hf.attach(stock, {"default": "full", "sliding": "keep"}):
        assert torch.equal(stock.generate(again, **PLAIN, assistant_model=tiny), expected)
    assert max(removed) > 0
