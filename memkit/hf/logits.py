"""What a model makes of its last hidden states: its head, and what it does to the head's outputs.

Losses of long texts are taken a slice at a time, short of the model's own logits of all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memkit.errors import ModelError

__all__ = ["output_head"]

ASKED = 4
"""Tokens for which the model's own logits are compared with ours."""
ALIKE = 0.02
"""By how much of their length they may differ: half precision rounds, another scale or a cap does more."""


def output_head(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from last hidden states [..., width] to logits [..., words], of a causal language model.

    Scales and soft caps are those that configs name, and a few tokens are asked of the model itself. Raises
    `ModelError` where it does anything else to its logits, or to the states before its head.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    divided, times, cap = (
        getattr(config, name, None) for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
    )

    def logits(states: Tensor) -> Tensor:
        found = head(states)
        if divided is not None:
            found = found / divided
        if times is not None:
            found = found * times
        return found if cap is None else cap * torch.tanh(found / cap)

    ids = torch.arange(ASKED, device=model.device)[None] % config.vocab_size
    with torch.no_grad():
        own = model(ids, use_cache=False).logits.float()
        ours = logits(model.base_model(ids, use_cache=False).last_hidden_state).float()
    if not (own - ours).norm() <= ALIKE * own.norm():
        raise ModelError(
            f"{type(model).__name__} changes its logits in a way that is not known, so its losses would be wrong: they "
            f"are {float(own.norm()):.3g} long for its first {ASKED} words, and its head gives {float(ours.norm()):.3g}"
        )
    return logits
