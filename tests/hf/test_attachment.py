import copy
import pickle

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.cache_utils import Cache

import memkit
from memkit import hf
from memkit.errors import InputError, MemoryStateError, ModelError
from memkit.hf.names import CACHE, NAMES, returned_cache
from tests.hf.tiny import randomised, tiny_config

# Shipped policies on chunks of 8, so that 90 tokens are many chunks.
SMALL = {
    "full": {},
    "window-512": {"window.size": 20},
    "block-window-3x256": {"chunker.size": 8},
    "streaming-4-512": {"window.size": 20},
    "block-mean-8": {"chunker.size": 8},
    "untrained-kvm-fixed": {"chunker.size": 8, "growth.slots": 12},
    "untrained-kvm-sqrt": {"chunker.size": 8},
    "untrained-kvm-log": {"chunker.size": 8, "growth.per_doubling": 4, "growth.start": 8},
    "untrained-block-mean": {"chunker.size": 8},
}
UNTRAINED = [name for name in SMALL if name.startswith("untrained-")]


def small(name: str) -> memkit.PolicySpec:
    return memkit.load_policy(name, SMALL[name])


def read(model, ids: torch.Tensor, *cuts: int, **kwargs) -> torch.Tensor:
    """Logits of all tokens, read in one call or cut into several."""
    cache, logits = None, []
    for begin, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        output = model(ids[:, begin:end], **{CACHE: cache}, use_cache=True, **kwargs)
        cache = returned_cache(output)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


# Full attention is the untouched model's


@torch.no_grad()
def test_full_is_the_untouched_model_in_prefill_and_token_by_token(tiny, ids):
    expected = tiny(ids).logits
    with hf.attach(tiny, "full"):
        close(tiny(ids).logits, expected)
        close(tiny(ids, use_cache=False).logits, expected)
        close(read(tiny, ids, *range(1, 90)), expected)


@torch.no_grad()
def test_full_is_the_untouched_smollm_in_prefill_and_token_by_token(smollm):
    text = "Full attention reads every token it has ever seen, and pays for each of them. " * 12
    ids = torch.tensor([smollm.tokenizer(text)["input_ids"][:160]])
    expected = smollm.model(ids).logits
    with hf.attach(smollm.model, "full"):
        close(smollm.model(ids).logits, expected)
        close(read(smollm.model, ids, 140, *range(141, 160)), expected)


@pytest.mark.parametrize(
    ("model", "config", "changes"),
    [
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
        (
            LlamaForCausalLM,
            type(tiny_config()),
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        ),
        (
            LlamaForCausalLM,
            type(tiny_config()),
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        ),
    ],
    ids=["mistral", "qwen2", "qwen3", "linear rope", "yarn"],
)
@torch.no_grad()
def test_families_and_rope_types(model, config, changes, ids):
    stock = randomised(model(tiny_config(config, **changes)))
    expected = stock(ids).logits
    with hf.attach(stock, "full"):
        close(read(stock, ids, 50), expected)
    # Every token founds a slot and stands at its own position: un-rotating and rotating again is the identity.
    spec = memkit.load_policy(
        "untrained-kvm-sqrt", SMALL["untrained-kvm-sqrt"] | {"growth.kind": "linear", "growth.fraction": 1.0}
    )
    with hf.attach(stock, spec):
        close(read(stock, ids, 50), expected, 2e-3)


@torch.no_grad()
def test_bare_decoder(ids):
    decoder = randomised(LlamaModel(tiny_config()))
    expected = decoder(ids).last_hidden_state
    with hf.attach(decoder, "full"):
        close(decoder(ids).last_hidden_state, expected)


@torch.no_grad()
def test_window_is_a_band_of_full_attention(tiny, ids):
    position = torch.arange(90)
    seen = (position <= position[:, None]) & (position > position[:, None] - 20)
    expected = tiny(ids, attention_mask=seen.expand(2, 1, -1, -1)).logits
    with hf.attach(tiny, small("window-512")):
        close(tiny(ids).logits, expected)


# However a text is split, however rows are padded


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_split_equals_whole(tiny, ids, name):
    with hf.attach(tiny, small(name)):
        whole = tiny(ids).logits
        close(read(tiny, ids, 13, 14, 15, 40, 72), whole)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_padded_rows_equal_rows_alone(tiny, ids, name):
    cuts = [(40, 23), (8, 1), (1, 17)]  # tokens per row in each of three calls
    with hf.attach(tiny, small(name)):
        cache, read_so_far, masks = None, [0, 0], []
        rows: list[list[torch.Tensor]] = [[], []]
        for call, lengths in enumerate(cuts):
            part = torch.zeros(2, max(lengths), dtype=torch.long)
            for row, length in enumerate(lengths):
                part[row, :length] = ids[row, read_so_far[row] : read_so_far[row] + length]
                read_so_far[row] += length
            masks.append(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])
            mask = masks[-1] if call == 1 else torch.cat(masks, dim=1)  # of this call, or of all so far
            output = tiny(part, attention_mask=mask.long(), **{CACHE: cache}, use_cache=True)
            cache = returned_cache(output)
            for row, length in enumerate(lengths):
                rows[row].append(output.logits[row, :length])
        for row, length in enumerate(read_so_far):
            close(torch.cat(rows[row]), tiny(ids[row : row + 1, :length]).logits[0])
        assert [memory.seen.tolist() for memory in hf.memories(cache)] == [read_so_far, read_so_far]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_gradients_flow_and_equal_the_untouched_models(tiny, ids):
    def gradient() -> torch.Tensor:
        tiny.zero_grad()
        tiny(ids, labels=ids).loss.backward()
        return tiny.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected = gradient()
    with hf.attach(tiny, "full"):
        close(gradient(), expected)
        tiny.train()
        tiny.gradient_checkpointing_enable()
        close(gradient(), expected)
    tiny.gradient_checkpointing_disable()


# generate


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 7},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generate_as_the_untouched_model(tiny, ids, options):
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    expected = tiny.generate(ids, **options)
    with hf.attach(tiny, "full"):
        assert torch.equal(tiny.generate(ids, **options), expected)


@pytest.mark.parametrize("name", UNTRAINED)
def test_generate_on_a_policy_is_greedy_decoding(tiny, ids, name):
    with hf.attach(tiny, small(name)):
        generated = tiny.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        with torch.no_grad():
            again = tiny(generated.sequences[:, :-1]).logits[:, 89:].argmax(-1)
    assert torch.equal(generated.sequences[:, 90:], again)
    assert [memory.seen.tolist() for memory in hf.memories(returned_cache(generated))] == [[109, 109]] * 2


@torch.no_grad()
def test_generate_continues_a_cache(tiny, ids):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        expected = tiny.generate(ids, max_new_tokens=6, do_sample=False)
        cache = returned_cache(tiny(ids[:, :70], use_cache=True))
        kept = copy.deepcopy(cache)
        for past in (cache, kept):
            assert torch.equal(tiny.generate(ids, max_new_tokens=6, do_sample=False, **{CACHE: past}), expected)


@torch.no_grad()
def test_an_empty_cache_of_ones_own_is_filled(tiny, ids):
    with hf.attach(tiny, "full"):
        cache = DynamicCache()
        parts = [tiny(part, **{CACHE: cache}).logits for part in ids.split(30, dim=1)]
        close(torch.cat(parts, dim=1), tiny(ids).logits)
        assert cache.get_seq_length() == 90


@torch.no_grad()
def test_memory_is_shared_by_a_group_of_query_heads(tiny, ids):
    with hf.attach(tiny, small("untrained-kvm-fixed")):
        memory = hf.memories(returned_cache(tiny(ids, use_cache=True)))[0]
    assert memory.counts.shape == (2, 2, 12)  # two rows, two key/value heads of four query heads, twelve slots


# The model is left as it was


def state(model) -> tuple:
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return copy.deepcopy(model.config.to_dict()), model.config._attn_implementation, hooks, list(vars(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_model_is_restored_after_use_and_after_errors(tiny, ids, implementation):
    tiny.set_attn_implementation(implementation)
    before, expected = state(tiny), tiny(ids).logits
    with hf.attach(tiny, "window-512"):
        tiny(ids)
    assert state(tiny) == before
    for policy, call, error, message in (
        ("window-512", lambda: tiny(ids + 211), IndexError, "out of range"),
        ("window-512", lambda: tiny(ids, output_attentions=True), InputError, "output_attentions"),
        ("kvm-sqrt-16", lambda: tiny(ids), ModelError, "learned"),
        ("no-such-policy", lambda: tiny(ids), memkit.PolicyError, "unknown policy"),
    ):
        with pytest.raises(error, match=message), hf.attach(tiny, policy):
            call()
        assert state(tiny) == before
    assert torch.equal(tiny(ids).logits, expected)


def test_second_attach_is_refused_and_leaves_the_first(tiny, ids):
    with hf.attach(tiny, small("window-512")):
        expected = tiny(ids).logits
        with pytest.raises(ModelError, match=r"one policy at a time.*leave the first"), hf.attach(tiny, "full"):
            pass
        assert torch.equal(tiny(ids).logits, expected)


def test_cache_is_of_no_use_outside_or_under_another_policy(tiny, ids):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        cache = returned_cache(tiny(ids, use_cache=True))
    with pytest.raises(MemoryStateError, match=r"under policy untrained-kvm-sqrt.*inside memkit\.hf\.attach"):
        tiny(ids, **{CACHE: cache})
    with (
        hf.attach(tiny, "full"),
        pytest.raises(MemoryStateError, match="must be of the attached policy, full, got untrained-kvm-sqrt"),
    ):
        tiny(ids, **{CACHE: cache})


def test_a_model_that_shares_the_config_is_refused(tiny, ids):
    other = LlamaForCausalLM(tiny.config)
    with hf.attach(tiny, "full"), pytest.raises(ModelError, match="shares its config"):
        other(ids)


# What is refused: rule, value, remedy in one line


@pytest.mark.parametrize(
    ("model", "config", "changes", "message"),
    [
        (MistralForCausalLM, MistralConfig, {}, "sees its newest 4096 tokens alone, and none would have policy full"),
    ],
)
def test_models_that_are_refused(model, config, changes, message):
    with (
        pytest.raises((ModelError, memkit.PolicyError), match=message),
        hf.attach(model(tiny_config(config, **changes)), "full"),
    ):
        pass


def test_moving_frequencies_are_refused_only_where_keys_are_unrotated(ids):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = LlamaForCausalLM(tiny_config(rope_parameters=rope))
    with pytest.raises(ModelError, match="fixed rotary frequencies, got rope type dynamic"):
        hf.attach(model, "untrained-kvm-sqrt")
    with hf.attach(model, "window-512"):
        model(ids)


def test_learned_parts_are_refused_with_the_reason(tiny):
    with pytest.raises(
        ModelError, match=r"got kvm-sqrt-16, which needs merge weights.*LayerNorm.*use an untrained-\* policy"
    ):
        hf.attach(tiny, "kvm-sqrt-16").__enter__()


def padded_generate(model, ids):
    model.generate(ids, attention_mask=torch.tensor([[1] * 90, [1] * 87 + [0] * 3]), max_new_tokens=2)


def four_dimensional_mask(model, ids):
    model(ids, attention_mask=torch.ones(2, 1, 90, 90))


def mask_of_another_text(model, ids):
    cache = returned_cache(model(ids, use_cache=True))
    model(ids[:, :1], attention_mask=torch.tensor([[0] + [1] * 90] * 2), **{CACHE: cache})


def positions_of_ones_own(model, ids):
    model(ids, position_ids=torch.arange(5, 95)[None])


def stock_cache(model, ids):
    model.generate(ids, max_new_tokens=2, cache_implementation="static")


def weights_wanted(model, ids):
    model(ids, output_attentions=True)


def bidirectional(model, ids):
    model(ids, is_causal=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (padded_generate, r"as generate sets it.*padding in row 1; pad on the left"),
        (four_dimensional_mask, r"attention_mask must cover.*\(2, 90\).*got \(2, 1, 90, 90\)"),
        (mask_of_another_text, r"must mark the tokens already read, \[90, 90\] per row, got \[89, 89\]"),
        (positions_of_ones_own, r"position_ids must count each row's tokens.*leave position_ids out"),
        (stock_cache, rf"got a StaticCache of 0 tokens; leave {CACHE} and cache_implementation out"),
        (weights_wanted, "leave output_attentions out"),
        (bidirectional, "causal, got is_causal False"),
    ],
)
def test_calls_that_are_refused(tiny, ids, call, message):
    with hf.attach(tiny, "full"), pytest.raises((InputError, MemoryStateError), match=message) as caught:
        call(tiny, ids)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_cache_may_be_given_by_either_name(tiny, ids, name):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        expected = tiny(ids).logits[:, 70:]
        for model, head in ((tiny, lambda output: output.logits), (tiny.model, lambda x: tiny.lm_head(x[0]))):
            cache = returned_cache(model(ids[:, :70], use_cache=True))
            output = model(ids[:, 70:], **{name: cache})
            close(head(output), expected)
            assert returned_cache(output) is cache
        with pytest.raises(InputError, match="one cache, got both cache and past_key_values; leave out past_key"):
            tiny.model(ids, cache=cache, past_key_values=cache)


def test_attention_dropout_is_refused_in_training(ids):
    model = LlamaForCausalLM(tiny_config(attention_dropout=0.1)).train()
    with hf.attach(model, "full"), pytest.raises(ModelError, match=r"must be 0 on a memory, got 0\.1"):
        model(ids)


def test_memories_of_a_stock_cache_are_refused(tiny, ids):
    with pytest.raises(MemoryStateError, match="must be what an attached model returned"):
        hf.memories(returned_cache(tiny(ids, use_cache=True)))


# An interrupted call, a wrong cache, a refused call


class Interrupted(Exception):
    pass


def interrupt(*_):
    raise Interrupted


def interrupted_at(module: torch.nn.Module, call) -> None:
    hook = module.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        call()
    hook.remove()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("place", ["model.layers.1", "model.layers.1.mlp", "model.norm", "lm_head"])
@pytest.mark.parametrize("name", ["full", "untrained-kvm-sqrt"])
def test_a_call_that_was_interrupted_is_no_call_to_continue(tiny, ids, name, place, gradients, tokens):
    with torch.set_grad_enabled(gradients), hf.attach(tiny, small(name)):
        cache = returned_cache(tiny(ids[:, :60], use_cache=True))
        part = ids[:, 60 : 60 + tokens]
        interrupted_at(tiny.get_submodule(place), lambda: tiny(part, **{CACHE: cache}))
        for attempt in (tiny, tiny.model):
            with pytest.raises(MemoryStateError, match=r"was interrupted.*60 of them.*copy\.deepcopy") as caught:
                attempt(part, **{CACHE: cache})
            assert "\n" not in str(caught.value)
        cache.reset()
        close(tiny(ids, **{CACHE: cache}).logits, tiny(ids).logits)


@pytest.mark.parametrize("place", ["model", "model.layers.0", "lm_head"])
@torch.no_grad()
def test_a_call_that_was_interrupted_before_anything_was_read_may_be_repeated(tiny, ids, place):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        if place == "lm_head":  # nor is a first call's cache of any harm: it is never returned
            interrupted_at(tiny.lm_head, lambda: tiny(ids))
            return
        expected = tiny(ids).logits[:, 60:]
        for cache in (returned_cache(tiny(ids[:, :60], use_cache=True)), DynamicCache()):
            part = ids[:, 60:] if cache.get_seq_length() else ids
            interrupted_at(tiny.get_submodule(place), lambda part=part, cache=cache: tiny(part, **{CACHE: cache}))
            with pytest.raises(IndexError, match="out of range"):
                tiny(part + 211, **{CACHE: cache})
            close(tiny(part, **{CACHE: cache}).logits[:, -30:], expected)


@torch.no_grad()
def test_a_bare_decoder_inside_a_model_completes_its_call(tiny, ids):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        cache = DynamicCache()
        parts = [tiny.model(part, **{CACHE: cache}).last_hidden_state for part in ids.split(30, dim=1)]
        close(tiny.lm_head(torch.cat(parts, dim=1)), tiny(ids).logits)
        with_labels = tiny(ids[:, :40], labels=ids[:, :40], use_cache=True)
        close(tiny(ids[:, 40:], **{CACHE: returned_cache(with_labels)}).logits, tiny(ids).logits[:, 40:])


@pytest.mark.parametrize(
    ("past", "message"),
    [
        ((), "a transformers Cache, got a tuple; leave it out to start"),
        (((torch.zeros(1), torch.zeros(1)),) * 2, "a transformers Cache, got a tuple"),
        ([], "a transformers Cache, got a list"),
        ("cache", "a transformers Cache, got a str"),
        (
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
            "empty or from .*, got a EncoderDecoderCache of 0 tokens",
        ),
        (StaticCache(tiny_config(), max_cache_len=100), "empty or from .*, got a StaticCache of 0 tokens"),
        (DynamicCache([(torch.zeros(2, 2, 5, 8),) * 2] * 2), "empty or from .*, got a DynamicCache of 5 tokens"),
    ],
)
@torch.no_grad()
def test_what_is_no_cache_of_ours_is_refused_in_one_line(tiny, ids, past, message):
    with hf.attach(tiny, "full"):
        for model in (tiny, tiny.model):
            with pytest.raises(InputError, match=f"{CACHE} must be {message}") as caught:
                model(ids, **{CACHE: past})
            assert "\n" not in str(caught.value)
    with pytest.raises(MemoryStateError, match=f"{CACHE} must be what an attached model returned"):
        hf.memories(past)


@torch.no_grad()
def test_an_empty_cache_is_filled_whatever_it_was_made_for(tiny, ids):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        for cache in (Cache(layers=[]), DynamicCache(config=tiny.config), DynamicCache(config=tiny_config())):
            parts = [tiny(part, **{CACHE: cache}).logits for part in ids.split(50, dim=1)]
            close(torch.cat(parts, dim=1), tiny(ids).logits)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused_and_stays_usable(tiny, ids):
    deeper = randomised(LlamaForCausalLM(tiny_config(num_hidden_layers=3)))
    wider = randomised(LlamaForCausalLM(tiny_config(head_dim=12)))
    spec = small("untrained-kvm-sqrt")
    with hf.attach(tiny, spec), hf.attach(deeper, spec), hf.attach(wider, spec):
        cache = returned_cache(tiny(ids[:, :60], use_cache=True))
        with pytest.raises(MemoryStateError, match="must be of a model of 3 layers, got 2"):
            deeper(ids[:, 60:], **{CACHE: cache})
        with pytest.raises((InputError, MemoryStateError)) as caught:
            wider(ids[:, 60:], **{CACHE: cache})
        assert "\n" not in str(caught.value)
        close(tiny(ids[:, 60:], **{CACHE: cache}).logits, tiny(ids).logits[:, 60:])


def another_number_of_rows(model, ids, cache):
    model(ids[:1], **{CACHE: cache})


def more_rows(model, ids, cache):
    model(ids.repeat(2, 1), **{CACHE: cache})


def mask_of_another_length(model, ids, cache):
    model(ids, attention_mask=torch.ones(2, 40), **{CACHE: cache})


def wrong_positions(model, ids, cache):
    model(ids, position_ids=torch.arange(9)[None], **{CACHE: cache})


def in_training_with_checkpoints(model, ids, cache):
    model.train()
    model.gradient_checkpointing_enable()
    try:
        with torch.enable_grad():
            model(ids, **{CACHE: cache})
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def with_dropout(model, ids, cache):
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    try:
        model(ids, **{CACHE: cache})
    finally:
        model.eval()


def last_column_of_padding(model, ids, cache):
    model(ids, attention_mask=torch.tensor([[1] * 9, [1] * 8 + [0]]), logits_to_keep=1, **{CACHE: cache})


def attention_weights(model, ids, cache):
    model(ids, output_attentions=True, **{CACHE: cache})


def shorter_again(model, ids, cache):
    cache.crop(-1)


REFUSED_OF_EMPTY = [
    mask_of_another_length,
    in_training_with_checkpoints,
    with_dropout,
    last_column_of_padding,
    attention_weights,
]
REFUSED = [*REFUSED_OF_EMPTY, another_number_of_rows, more_rows, wrong_positions, shorter_again]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("call", "filled"), [(call, True) for call in REFUSED] + [(call, False) for call in REFUSED_OF_EMPTY]
)
@torch.no_grad()
def test_what_is_refused_leaves_the_given_cache_usable(tiny, ids, call, filled):
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        read = 60 if filled else 0
        cache = returned_cache(tiny(ids[:, :60], use_cache=True)) if filled else DynamicCache()
        with pytest.raises((InputError, MemoryStateError, ModelError)) as caught:
            call(tiny, ids[:, read : read + 9], cache)
        assert "\n" not in str(caught.value)
        close(tiny(ids[:, read:], **{CACHE: cache}).logits, tiny(ids).logits[:, read:])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_without_gradients_checkpointing_keeps_the_cache(tiny, ids):
    tiny.train()
    tiny.gradient_checkpointing_enable()
    with hf.attach(tiny, small("untrained-kvm-sqrt")):
        expected = tiny.eval()(ids).logits
        tiny.train()
        close(read(tiny, ids, 40, 60), expected)
        generated = tiny.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, tiny.eval().generate(ids, max_new_tokens=5, do_sample=False))


# Copies, in every stage of a cache's life


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


STAGES = [(name, decoded, copied) for name in SMALL for decoded in (0, 1, 5) for copied in (copy.deepcopy, pickled)]


@pytest.mark.parametrize(("name", "decoded", "copied"), STAGES)
@torch.no_grad()
def test_a_copied_cache_goes_on_as_the_original_does(tiny, ids, name, decoded, copied):
    with hf.attach(tiny, small(name)):
        cache = returned_cache(tiny(ids[:, :50], use_cache=True))
        for i in range(50, 50 + decoded):
            tiny(ids[:, i : i + 1], **{CACHE: cache})
        copies = [copied(cache), copied(copied(cache))]
        after = 50 + decoded
        expected = torch.cat([tiny(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(after, 70)])
        for other in copies:  # after the original has gone on: nothing is shared
            found = torch.cat([tiny(ids[:, i : i + 1], **{CACHE: other}).logits for i in range(after, 70)])
            close(found, expected, 32 * torch.finfo(torch.float32).eps * float(expected.abs().max()))


# Autocast


@pytest.mark.parametrize("name", ["full", "untrained-kvm-sqrt"])
def test_autocast_is_as_the_untouched_models(tiny, ids, name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = tiny(ids).logits
        with hf.attach(tiny, small(name)):
            first = tiny(ids[:, :60], use_cache=True)
            cache = returned_cache(first)
            parts = [first.logits] + [tiny(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(60, 90)]
    found = torch.cat(parts, dim=1)
    assert hf.memories(cache)[0].keys.dtype == torch.bfloat16
    assert found.dtype == stock.dtype
    with hf.attach(tiny, small(name)):
        exact = tiny(ids).logits
    # The error of either against float32, typical and relative to the largest logit: both of bfloat16's 8 bits.
    scale = exact.abs().max()
    allowed = 4 * torch.finfo(torch.bfloat16).eps * scale
    assert (found.float() - exact).abs().median() < allowed
    if name == "full":
        assert (found.float() - stock.float()).abs().median() < allowed
    found.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tiny.parameters() if parameter.grad is not None)
