"""Where chunks of a stock model's text end: after certain token ids."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from memkit.errors import InputError
from memkit.whole import whole_numbers

__all__ = ["boundary_ids", "ends_of_chunks"]


def boundary_ids(ids: Collection[int] | None, config: Any, wanted: bool, prefill: str) -> Tensor | None:
    """The token ids that end a chunk, [n] int64, checked; None where none are given.

    wanted: whether any layer's policy takes boundaries. Raises `InputError`.
    """
    if ids is None:
        return None
    if not wanted:
        raise InputError(
            "boundaries are given, but no layer's policy takes them; "
            "leave them out, or use one with chunker: {kind: boundaries, most: 256}"
        )
    if prefill == "full":
        raise InputError(
            "boundaries are given, but prefill='full' compresses the prompt at once, not chunk by chunk; "
            "leave one of them out"
        )
    given = sorted(ids) if isinstance(ids, (set, frozenset)) else ids
    return whole_numbers("boundaries", given, 0, config.vocab_size - 1, remedy="; give token ids of the model")


def ends_of_chunks(boundaries: Tensor, ids: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which of a call's tokens are boundaries, [b, t] bool on the CPU; None where none is.

    ids [b, t]: the call's token ids; tokens: what the decoder is given, ids or embeddings. Raises `InputError` where
    there are no ids to look at.
    """
    if ids is None or ids.shape != tokens.shape[:2]:
        raise InputError(
            "boundaries are token ids, got a call of inputs_embeds alone; give input_ids, or attach without boundaries"
        )
    ends = torch.isin(ids, boundaries.to(ids.device)).cpu()
    return ends if bool(ends.any()) else None
