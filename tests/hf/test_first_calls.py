"""The first call of a cache: what of it is read exactly, by which policies, and what is refused before anything is."""

from __future__ import annotations

import io

import pytest
import torch
from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM

import memkit
from memkit import hf
from memkit.errors import InputError, ModelError
from memkit.hf.cache import MemoryLayer
from memkit.hf.names import CACHE, returned_cache
from memkit.hf.rereading import FEWEST, LEAD
from memkit.hf.rewinding import KEEP
from tests.hf.tiny import randomised, tiny_config

SMALL = {"chunker.size": 8, "growth.slots": 20, "observe.queries": 8, "heads": {}}
OBSERVED = memkit.load_policy("untrained-observed", SMALL)
RECALL = memkit.load_policy("untrained-recall", SMALL)
STREAMING = memkit.load_policy("streaming-4-512", {"window.size": 20})


def test_how_many_logits_are_kept_changes_none(tiny, ids):
    kept = KEEP // 2
    with torch.no_grad(), hf.attach(tiny, OBSERVED, prefill="full"):
        whole = tiny(ids[:1]).logits[:, -kept:]
        assert torch.equal(tiny(ids[:1], logits_to_keep=kept).logits, whole)
        assert torch.equal(tiny(ids[:1], logits_to_keep=kept, use_cache=False).logits, whole)


def test_a_share_is_of_all_the_prompt_however_many_logits_are_kept(tiny, ids):
    columns = ids.shape[1]
    with torch.no_grad(), hf.attach(tiny, STREAMING, prefill="full", share=0.5):
        caches = [returned_cache(tiny(ids[:1], logits_to_keep=keep, use_cache=True)) for keep in (1, columns)]
    held = [[memory.window.end for memory in hf.memories(cache)] for cache in caches]
    assert held[0] == held[1]


@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("name", ["tova-512", "untrained-observed"])
def test_a_prompt_shorter_than_the_first_observed_offset_has_evidence(tiny, ids, name, tokens):
    policy = memkit.load_policy(name, {"observe.queries": 2, "observe.readers": "window", "heads": {}})
    assert policy.build().observation.offsets[0] > 12
    with torch.no_grad(), hf.attach(tiny, policy, prefill="full"):
        cache = returned_cache(tiny(ids[:1, :tokens], use_cache=True))
    for memory in hf.memories(cache):
        evidence = memory.window.last(tokens)["evidence"]
        assert evidence.isfinite().all()
        assert (evidence.sum(-1) > 0).all()


def test_nothing_read_in_full_is_an_empty_memory():
    queries, keys = torch.zeros(1, 4, 0, 16), torch.zeros(1, 2, 0, 16)
    memory = memkit.compress("tova-512", queries, keys, keys)
    assert memory.seen.tolist() == [0]
    assert memory.slots.tolist() == [0]


def test_a_cache_that_was_emptied_takes_the_share_of_its_next_prompt(tiny, ids):
    cache = DynamicCache()
    with torch.no_grad(), hf.attach(tiny, STREAMING, prefill="full", share=0.5):
        tiny(ids[:1], **{CACHE: cache})
        cache.reset()
        tiny(ids[:1, :40], **{CACHE: cache})
        fresh = returned_cache(tiny(ids[:1, :40], use_cache=True))
    for mine, theirs in zip(hf.memories(cache), hf.memories(fresh), strict=True):
        assert mine.policy.spec == theirs.policy.spec
        assert mine.bytes == theirs.bytes


def test_a_call_refused_for_its_second_reading_leaves_no_policies_behind(tiny, ids):
    longest = tiny.config.max_position_embeddings
    long = ids[:1].repeat(1, 1 + longest // ids.shape[1])[:, : longest - FEWEST - LEAD + 1]
    cache = DynamicCache()
    with torch.no_grad(), hf.attach(tiny, RECALL, prefill="full", share=0.5):
        with pytest.raises(InputError, match="positions"):
            tiny(long, **{CACHE: cache})
        assert not any(isinstance(layer, MemoryLayer) for layer in cache.layers)
        tiny(long[:, 1:], **{CACHE: cache})


def test_a_prompt_that_is_read_twice_comes_without_an_assistants_candidates(tiny, ids):
    again = torch.cat((ids[:1, :25], ids[:1, 5:15]), dim=1)  # its end stood before: the first call has candidates
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad(), hf.attach(tiny, RECALL, prefill="full", connecting=[5]):
        with pytest.raises(InputError, match="tokens that an assistant proposes"):
            tiny.generate(again, prompt_lookup_num_tokens=5, **greedy)
        assert tiny.generate(again, **greedy).shape == (1, again.shape[1] + 8)


def test_padding_on_the_left_may_be_longer_than_a_chunk_of_the_prefill(tiny, ids):
    padded = torch.cat((torch.zeros(1, 30, dtype=torch.long), ids[1:, : ids.shape[1] - 30]), dim=1)
    both, mask = torch.cat((ids[:1], padded)), torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, :30] = 0
    greedy = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    with torch.no_grad(), hf.attach(tiny, STREAMING):
        whole = tiny.generate(both, **greedy)
        assert torch.equal(tiny.generate(both, prefill_chunk_size=16, **greedy), whole)


def test_attention_that_was_set_otherwise_meanwhile_is_refused(tiny, ids):
    with torch.no_grad(), hf.attach(tiny, STREAMING):
        tiny.set_attn_implementation("sdpa")
        with pytest.raises(ModelError, match="detach the model first"):
            tiny(ids, use_cache=False)


def test_an_attached_model_read_from_a_file_is_a_stock_model(tiny, ids):
    file = io.BytesIO()
    with torch.no_grad():
        stock = tiny(ids).logits
        with hf.attach(tiny, STREAMING):
            torch.save(tiny, file)
        file.seek(0)
        copy = torch.load(file, weights_only=False)
        assert torch.equal(copy(ids).logits, stock)
        with hf.attach(copy, "full"):
            assert copy(ids).logits.isfinite().all()


def test_a_model_may_be_detached_without_its_handle(tiny, ids):
    with torch.no_grad():
        stock = tiny(ids).logits
        hf.attach(tiny, STREAMING)
        assert not torch.equal(tiny(ids).logits, stock)
        hf.detach(tiny)
        assert torch.equal(tiny(ids).logits, stock)
        hf.detach(tiny)  # twice is no error


def test_router_logits_of_a_prompt_that_is_read_twice_are_refused(ids):
    config = tiny_config(MixtralConfig, num_local_experts=4, num_experts_per_tok=2)
    model = randomised(MixtralForCausalLM(config))
    with torch.no_grad(), hf.attach(model, RECALL, prefill="full"):
        with pytest.raises(InputError, match="leave output_router_logits out"):
            model(ids[:1], output_router_logits=True)
        assert model(ids[:1], use_cache=False, output_router_logits=True).router_logits[0].shape[0] == ids.shape[1]
