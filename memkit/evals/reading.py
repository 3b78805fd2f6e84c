"""One way to read for every kind of model: a `MemoryLM`, its wrapper, and stock models, attached or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memkit.errors import ModelError, shown
from memkit.lm import MemoryLM

__all__ = ["Read", "losses", "own_model", "read", "vocabulary_of"]

SLICE = 4096
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Read:
    """Sequences that were read: states [b, t, width], short of the head; the head; bytes that their memories hold."""

    states: Tensor
    head: Callable[[Tensor], Tensor]
    bytes: int


@torch.no_grad()
def read(model: Any, ids: Tensor) -> Read:
    """Read ids [b, t] in one call. Raises `ModelError` where the model is none that predicts tokens."""
    own = own_model(model)
    if own is not None:
        states, memory = own.read(ids.to(own.head.weight.device))
        return Read(states, own.head, memory.bytes)
    if not (hasattr(model, "base_model") and hasattr(model, "get_output_embeddings")):
        raise ModelError(f"model must be a MemoryLM or a causal language model of transformers, got {shown(model)}")
    from memkit.hf.logits import output_head
    from memkit.hf.names import returned_cache

    output = model.base_model(ids.to(model.device), use_cache=True)
    cache = returned_cache(output)
    return Read(output.last_hidden_state, output_head(model), sum(_bytes(layer) for layer in cache.layers))


def losses(found: Read, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each target of a row, in order: its loss in nats, and whether it is the likeliest token; both flat, float64.

    ids [b, t]; targets [b, t] bool, none of them the first of its row.
    """
    rows, columns = targets.nonzero(as_tuple=True)
    states = found.states[rows, columns - 1]
    wanted = ids[rows, columns].to(states.device)
    nats: list[Tensor] = []
    right: list[Tensor] = []
    with torch.no_grad():
        for part, words in zip(states.split(SLICE), wanted.split(SLICE), strict=True):
            logits = found.head(part).float()
            nats.append(nn.functional.cross_entropy(logits, words, reduction="none").double().cpu())
            right.append((logits.argmax(-1) == words).double().cpu())
    return torch.cat(nats), torch.cat(right)


def vocabulary_of(model: Any) -> int:
    """Token ids that the model has."""
    own = own_model(model)
    return own.spec.vocabulary if own is not None else model.config.vocab_size


def own_model(model: Any) -> MemoryLM | None:
    """The `MemoryLM` that a model is, or that is wrapped in it."""
    if isinstance(model, MemoryLM):
        return model
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, MemoryLM) else None


def _bytes(layer: Any) -> int:
    """Bytes of one layer of a cache: memories of an attached model, or keys and values."""
    memories = getattr(layer, "memories", None)
    if memories is not None:
        return sum(memory.bytes for memory in memories)
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))
