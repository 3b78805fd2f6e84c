"""What a model's memory takes after so many tokens, from its declaration alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkit.lm.spec import ModelSpec

__all__ = ["memory_bytes"]


def memory_bytes(
    model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype = torch.float32, rows: int = 1
) -> list[list[int]]:
    """Bytes that every layer carries on after one prefill of each length: one list per length, layer by layer.

    They are those of `ModelMemory.bytes`: what each layer's mixer says it carries, and the last tokens that the MLPs'
    token shifts want.
    """
    mixers = model.mixers
    carried = {mixer: mixer.memory_bytes(model, lengths, dtype, rows) for mixer in set(mixers)}
    shift = rows * dtype.itemsize * model.width if model.mlp.token_shift else 0
    totals = [[carried[mixer][index] + shift for mixer in mixers] for index in range(len(lengths))]
    for layer in set(model.value_layers):
        for total in totals:
            total[layer] += mixers[layer].first_memory_bytes(model, dtype, rows)
    return totals
