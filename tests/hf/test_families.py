"""Families of models: each is the stock model under `full`, un-rotates its keys right or not at all, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import memkit
from memkit import hf
from memkit.hf.decoder import find_decoder
from memkit.hf.names import CACHE, returned_cache
from memkit.hf.probe import POSITIONS, probe
from tests.hf.families import FAMILIES, UNTURNED, made
from tests.hf.tiny import randomised, tiny_config

FULL = {"default": "full", "sliding": "keep"}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
IMAGE = 210
UNROTATE = memkit.load_policy("untrained-kvm-sqrt", {"chunker.size": 8, "rotary.kind": "unrotate"})


def split(model: Any, ids: torch.Tensor, at: int, **options: Any) -> torch.Tensor:
    first = model(ids[:, :at], use_cache=True, **options)
    rest = model(ids[:, at:], **{CACHE: returned_cache(first)})
    return torch.cat((first.logits, rest.logits), dim=1)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_family_is_the_stock_model_under_full(name: str, ids: torch.Tensor):
    stock = made(name)
    expected = stock(ids).logits
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = stock(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    with hf.attach(stock, FULL):
        close(split(stock, ids, 50), expected)
        close(stock(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
    assert torch.equal(stock(ids).logits, expected)
    if FAMILIES[name][1].get("sliding_window") == 16:  # and it matters that they slide
        with hf.attach(stock, lambda _: "full"):
            assert not torch.allclose(stock(ids).logits, expected, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in UNTURNED])
@torch.no_grad()
def test_keys_turn_as_the_probe_says(name: str):
    """To other positions than those that were probed, in keys as stock attention is given them."""
    stock, here, there = made(name), 23, 401
    assert not {here, there} & set(POSITIONS)
    words = torch.tensor([[17], [101], [160]])

    def keys(position: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}

        def record(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
            found[module.layer_idx] = key
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)

        ALL_ATTENTION_FUNCTIONS.register("memkit-test-keys", record)
        stock.set_attn_implementation("memkit-test-keys")
        stock(words, position_ids=torch.full_like(words, position), use_cache=False)
        stock.set_attn_implementation("sdpa")
        return found

    for layer, facts in probe(find_decoder(stock)).items():
        assert facts.rotation is not None
        one, other = (facts.turning_first(keys(position)[layer]) for position in (here, there))
        moved = facts.rotation.apply(one, torch.tensor(there - here))
        torch.testing.assert_close(moved, other, atol=2e-4, rtol=2e-4)
        turns = bool(facts.rotation.frequencies.any())
        assert turns != torch.equal(one, other)
        assert turns != (name in ("smollm3", "cohere2") and layer == 1)


@pytest.mark.parametrize("name", ["cohere", "deepseek_v3", "gemma3", "glm4", "smollm3"])
@torch.no_grad()
def test_a_family_splits_under_a_policy_that_unrotates(name: str, ids: torch.Tensor):
    stock = made(name)
    with hf.attach(stock, UNROTATE):
        close(split(stock, ids, 50), stock(ids).logits)
    with hf.attach(stock, memkit.load_policy("untrained-observed", {"chunker.size": 8}), prefill="full"):
        stock(ids)


def test_what_positions_do_otherwise_is_not_unrotated(ids: torch.Tensor):
    (name,) = UNTURNED
    stock = made(name)
    with pytest.raises(memkit.ModelError, match="of layer 0 of gpt2 are not turned by the model's rotary frequencies"):
        hf.attach(stock, UNROTATE)
    with hf.attach(stock, memkit.load_policy("streaming-4-512", {"window.size": 20})):
        close(split(stock, ids, 50), stock(ids).logits)


TOWERS = ("llava", "gemma3")


def tower(family: str) -> PreTrainedModel:
    if family == "llava":
        vision = transformers.CLIPVisionConfig(**VISION, projection_dim=32)
        text = tiny_config()
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        return randomised(transformers.LlavaForConditionalGeneration(config))
    text = tiny_config(
        transformers.Gemma3TextConfig,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION), text_config=text.to_dict(),
        image_token_index=IMAGE, mm_tokens_per_image=4,
    )  # fmt: skip
    return randomised(transformers.Gemma3ForConditionalGeneration(config))


@pytest.mark.parametrize("family", TOWERS)
@torch.no_grad()
def test_the_text_of_a_model_of_text_and_images(family: str, ids: torch.Tensor):
    stock = tower(family)
    ids = ids.clamp(max=IMAGE - 1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected, padded = stock(ids).logits, stock(ids, attention_mask=mask).logits
    generated = stock.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    implementation = stock.config.vision_config._attn_implementation
    with hf.attach(stock, FULL):
        assert stock.config.vision_config._attn_implementation == implementation
        close(split(stock, ids, 50), expected)
        close(stock(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
        close(stock(ids, attention_mask=mask, labels=ids).logits[mask.bool()], padded[mask.bool()])
        assert torch.equal(stock.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), generated)


@torch.no_grad()
def test_images_that_are_read_from_left_to_right(ids: torch.Tensor):
    stock = tower("llava")
    ids = ids.clamp(max=IMAGE - 1)
    ids[:, 5:9] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = stock(ids, pixel_values=pixels).logits
    with hf.attach(stock, "full"):
        close(split(stock, ids, 50, pixel_values=pixels), expected)


@torch.no_grad()
def test_images_that_see_each_other_both_ways_are_refused(ids: torch.Tensor):
    stock = tower("gemma3")
    with hf.attach(stock, FULL), pytest.raises(memkit.InputError, match="tokens of images that see each other both"):
        stock(ids.clamp(max=IMAGE - 1), token_type_ids=torch.ones_like(ids))


HYBRIDS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3_next": lambda: transformers.Qwen3NextForCausalLM(
        tiny_config(
            transformers.Qwen3NextConfig, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
        )
    ),
    "bamba": lambda: transformers.BambaForCausalLM(
        tiny_config(
            transformers.BambaConfig, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, attn_layer_indices=[1]
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3_next", pytest.param("bamba", marks=pytest.mark.slow)])
@torch.no_grad()
def test_hybrids_keep_their_other_layers(family: str, ids: torch.Tensor):
    stock = randomised(HYBRIDS[family]())
    expected = stock(ids).logits
    generated = stock.generate(ids, max_new_tokens=6, do_sample=False)
    with hf.attach(stock, "full"):
        close(split(stock, ids, 50), expected)
        assert len(hf.memories(returned_cache(stock(ids, use_cache=True)))) == 1
        assert torch.equal(stock.generate(ids, max_new_tokens=6, do_sample=False), generated)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0
        with pytest.raises(memkit.InputError, match="1 of 2 layers are no attention and would read padding"):
            stock(ids, attention_mask=mask)
    with hf.attach(stock, memkit.load_policy("window-512", {"window.size": 20})):
        assert not torch.allclose(stock(ids).logits, expected, atol=1e-3)
    repeat = memkit.load_policy("caote-512", {"observe.readers": "repeat"})
    with pytest.raises(memkit.ModelError, match="1 of 2 layers carry a state that would remember the second reading"):
        hf.attach(stock, repeat, prefill="full")


def sizes(family: str, **changes: Any) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        config = tiny_config(getattr(transformers, f"{family}Config"), **changes)
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return make


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "gemma2": (sizes("Gemma2", head_dim=16), r"got softcap 50\.0 \(a soft cap on scores\) from Gemma2Attention"),
    "gpt_oss": (
        sizes("GptOss", head_dim=16, num_local_experts=4),
        r"got s_aux a tensor \(4,\) \(sinks in the softmax\) from GptOssAttention",
    ),
    "diffllama": (sizes("DiffLlama"), r"DiffLlamaAttention calls its attention function several times in layer 0"),
    "stablelm": (sizes("StableLm"), r"StableLmAttention must hand its attention function the keyword arguments"),
    "bloom": (sizes("Bloom"), r"BloomModel \(bloom\) has its own"),
    "minimax": (
        sizes("MiniMax", num_local_experts=2, layer_types=["linear_attention", "full_attention"]),
        "MiniMaxModel must read .* got ValueError: MiniMax uses cache of its own",
    ),
    "mamba": (sizes("Mamba"), r"no layer of MambaModel \(mamba\) calls one"),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=211, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "got T5ForConditionalGeneration, an encoder and a decoder",
    ),
    "bert": (
        lambda: transformers.BertModel(
            transformers.BertConfig(vocab_size=211, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
        ),
        "got is_causal False from BertSelfAttention",
    ),
    "memkit": (
        lambda: hf.MemkitForCausalLM.wrap(memkit.load_model("tiny-kvm-sqrt")),
        "a memkit model has a policy in each of its layers already",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_memory_can_do_is_refused_by_name(name: str):
    make, message = REFUSED[name]
    stock = make()
    before = stock.config._attn_implementation
    with pytest.raises(memkit.ModelError, match=message) as caught:
        hf.attach(stock, "full")
    assert "\n" not in str(caught.value)
    assert stock.config._attn_implementation == before


def test_a_keyword_that_is_not_known_is_refused_in_a_call(tiny: Any, ids: torch.Tensor):
    with hf.attach(tiny, "full"):
        tiny(ids, cu_seq_lens_q=None, num_items_in_batch=torch.tensor(3))
        for keyword, message in (
            ({"softcap": 50.0}, r"got softcap 50\.0 \(a soft cap on scores\) from LlamaAttention"),
            ({"block_indices": 3}, "got block_indices 3 from LlamaAttention"),
        ):
            with pytest.raises(memkit.ModelError, match=message):
                tiny(ids, **keyword)


def test_a_probe_leaves_no_trace(tiny: Any, ids: torch.Tensor):
    tiny.train()
    tiny.model.layers[0].eval()
    modes = [module.training for module in tiny.modules()]
    state = torch.random.get_rng_state()
    hf.attach(tiny, "full").detach()
    assert [module.training for module in tiny.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tiny.parameters())
