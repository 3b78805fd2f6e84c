"""What a model tells its attention function besides queries, keys and values: none of it is left out silently."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memkit.errors import ModelError, shown

__all__ = ["check_keywords"]

WITHOUT_EFFECT = {
    "cache_position", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""For the rest of the model; attention itself does nothing with them. Attention weights are refused elsewhere."""

MEANINGS = {
    "softcap": "a soft cap on scores",
    "s_aux": "sinks in the softmax",
    "cu_seq_lens_q": "texts packed into one row, which go on with no cache; leave the cache out",
    "cu_seq_lens_k": "texts packed into one row, which go on with no cache; leave the cache out",
}


def check_keywords(module: nn.Module, window: int | None, keywords: dict[str, Any]) -> None:
    """Raise `ModelError` where attention is told something that a memory does not do.

    window: tokens that the layer sees in the stock model, None for all; keywords: by name, None where it is off.
    """
    for name, value in keywords.items():
        if name in WITHOUT_EFFECT or value is None:
            continue
        if name == "sliding_window" and value == window:
            continue
        if name == "is_causal" and value:
            continue
        meaning = f" ({MEANINGS[name]})" if name in MEANINGS else ""
        said = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else shown(value)
        raise ModelError(
            f"attention on a memory knows queries, keys, values and their scale, got {name} {said}{meaning} from "
            f"{type(module).__name__}, which it would leave out; use a model or a call without it"
        )
