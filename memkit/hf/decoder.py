"""Where a stock model's decoder is, what its config says of it, and which models no memory can stand in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from memkit.errors import ModelError

__all__ = ["NAME", "Decoder", "facts_of", "find_decoder", "kv_heads_of", "layer_kinds", "windows_of"]

NAME = "memkit"
"""Of our attention function in transformers' registry."""

FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
WHOLE = ("full_attention", "attention")
"""Kinds of layers that attend to all tokens, as configs name them."""


@dataclass(frozen=True)
class Decoder:
    """The module that owns the layers, the model around it, and all that is called on the way to it, outermost first.

    given: what the caller has, be it a wrapper (as peft's); owner: the Hugging Face model in it; module: the decoder.
    """

    given: Any
    owner: PreTrainedModel
    module: PreTrainedModel

    @property
    def config(self) -> Any:
        """Of the text alone."""
        return self.module.config.get_text_config(decoder=True)

    @property
    def outer(self) -> list[Any]:
        """The modules around the decoder."""
        around = [self.given, self.owner, self.owner.base_model]
        return [each for each in dict.fromkeys(around) if each is not self.module]


def find_decoder(model: Any) -> Decoder:
    """The decoder in a model. Raises `ModelError` where there is none that could run on a memory."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(owner, PreTrainedModel):
        raise ModelError(f"model must be a Hugging Face model, got {type(model).__name__}; see memkit.hf.load")
    if owner.config.model_type == NAME:
        raise ModelError("a memkit model has a policy in each of its layers already; attach is for stock models")
    if owner.config.is_encoder_decoder:
        raise ModelError(
            f"a memory is of one text, read from left to right, got {type(owner).__name__}, an encoder and a decoder; "
            "use a decoder-only model"
        )
    module = owner.get_decoder()
    if not isinstance(module, PreTrainedModel):
        raise ModelError(f"{type(owner).__name__} must have a decoder of its own, got {type(module).__name__}")
    return Decoder(model, owner, module)


def kv_heads_of(config: Any) -> int:
    """Key/value heads of each layer."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def facts_of(config: Any) -> dict[str, int | str]:
    """By what a head profile, and a cache in a file, know their model."""
    return {name: getattr(config, name) for name in FACTS} | {"num_key_value_heads": kv_heads_of(config)}


def layer_kinds(config: Any) -> list[str]:
    """What each layer is, as its config says."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    return list(kinds)


def windows_of(config: Any, attending: dict[int, Any] | None = None) -> list[int | None]:
    """Tokens that each layer of a stock model sees, the query's own included; None: all.

    attending: the layers that are asked about, by number; None: all. Raises `ModelError` for layers of other kinds.
    """
    windows: list[int | None] = []
    for layer, kind in enumerate(layer_kinds(config)):
        asked = attending is None or layer in attending
        if asked and kind not in (*WHOLE, "sliding_attention"):
            raise ModelError(
                f"layers must attend to all tokens or to the newest ones, got layer {layer} of kind {kind} in "
                f"{config.model_type}; no policy does that"
            )
        windows.append(config.sliding_window if kind == "sliding_attention" else None)
    return windows
