"""A small random Llama and a tokenizer, for tests."""

from typing import TypeVar

import torch
from transformers import LlamaConfig, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)


def tiny_config(kind: type = LlamaConfig, **changes: object):
    """Four query heads on two key/value heads, two layers, 211 words."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return kind(**(sizes | changes))


def randomised(model: Model) -> Model:
    """Weights ten times as large as by default, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


class Letters:
    """A tokenizer: one token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 208 for letter in text]}
