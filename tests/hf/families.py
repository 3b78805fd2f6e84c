"""Tiny random models of many families, of which a memory must make the same as the stock model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.hf.tiny import randomised, tiny_config

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SLIDING = ["sliding_attention", "full_attention"]
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 16,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, sliding": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 16, "layer_types": SLIDING}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2", {"num_key_value_heads": 4}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 16, "layer_types": SLIDING}),
    "granite": ("Granite", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {"sliding_window": 16, "layer_types": SLIDING}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "deepseek_v3": ("DeepseekV3", LATENT),
}
"""What transformers calls a family's classes, and how its tiny model differs from Llama's."""

UNTURNED = ("gpt2",)
"""Those whose keys positions change otherwise than by a rotation."""

CONFIGS = {"Gemma3": "Gemma3TextConfig"}


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of a family."""
    family, fields = FAMILIES[name]
    config: type = getattr(transformers, CONFIGS.get(family, f"{family}Config"))
    model: Callable[[Any], PreTrainedModel] = getattr(
        transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    )
    return randomised(model(tiny_config(config, **(fields | changes))))
