"""The stock model's attention, watched: what each layer is given is shown to somebody, who may change what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkit.engine import attend
from memkit.hf.attention import as_in_stock
from memkit.hf.probe import LayerFacts

__all__ = ["NAME", "Look", "watching"]

NAME = "memkit-watched"

Look = Callable[[int, Tensor, Tensor, Tensor, float, Tensor], None]
"""Called with a layer's number, its queries [b, h, t, d] and keys [b, g, t, d], the channels that turn in front, values
[b, g, t, v], the scale, and its outputs [b, h, t, v], which may be written into."""


def watching(look: Look, facts: Mapping[int, LayerFacts]) -> dict[str, Any]:
    """A decoder's keyword arguments by which `look` sees every layer; its attention function is `NAME`."""
    return {"memkit_look": look, "memkit_facts": facts}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    memkit_look: Look,
    memkit_facts: Mapping[int, LayerFacts],
    **_: Any,
) -> tuple[Tensor, None]:
    """[b, h, t, d] in, [b, t, h, d] out."""
    facts = memkit_facts[module.layer_idx]
    query, key = facts.turning_first(query), facts.turning_first(key)
    output, _memory = attend(as_in_stock(facts.window), query, key, value, scale=scaling)
    memkit_look(module.layer_idx, query, key, value, scaling, output)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
