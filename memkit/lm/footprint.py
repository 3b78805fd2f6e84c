"""What a model's memory takes after so many tokens, from its declaration alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkit.costing import cost
from memkit.errors import InputError
from memkit.lm.mixers import AttentionMixerSpec
from memkit.lm.rwkv7 import RWKV7MixerSpec
from memkit.lm.spec import MixerSpec, ModelSpec

__all__ = ["memory_bytes"]


def memory_bytes(
    model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype = torch.float32, rows: int = 1
) -> list[list[int]]:
    """Bytes that every layer carries on after one prefill of each length: one list per length, layer by layer.

    They are those of `ModelMemory.bytes`: policies' memories as `memkit.cost` counts them, RWKV-7's states, and the
    last tokens that token shifts want.
    """
    mixers = model.mixers
    by_kind = {mixer: _carried(mixer, model, lengths, dtype, rows) for mixer in set(mixers)}
    size = rows * dtype.itemsize * model.width
    shared = size if model.mlp.token_shift else 0
    totals = [[by_kind[mixer][index] + shared for mixer in mixers] for index in range(len(lengths))]
    for mixer in set(mixers):
        if isinstance(mixer, RWKV7MixerSpec) and mixer.token_shift:  # its first layer shifts the embeddings too
            for total in totals:
                total[mixers.index(mixer)] += size
    return totals


def _carried(mixer: MixerSpec, model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype, rows: int) -> list[int]:
    """Bytes that a mixer carries on after each length."""
    if isinstance(mixer, RWKV7MixerSpec):
        state = model.heads * (model.width // model.heads) ** 2 * torch.promote_types(dtype, torch.float32).itemsize
        shift = model.width * dtype.itemsize if mixer.token_shift else 0
        return [rows * (state + shift)] * len(lengths)
    if not isinstance(mixer, AttentionMixerSpec):
        raise InputError(f"what a mixer of kind {mixer.kind} carries is not known; see the model's memory after a call")
    width = model.head_width or model.width // model.heads
    kv_heads = mixer.kv_heads or model.kv_heads or model.heads
    costs = cost(mixer.policy, lengths, heads=model.heads, kv_heads=kv_heads, head_width=width, dtype=dtype, rows=rows)
    shift = rows * dtype.itemsize * width * (model.heads + 2 * kv_heads) if mixer.token_shift else 0
    return [entry.bytes + shift for entry in costs]
