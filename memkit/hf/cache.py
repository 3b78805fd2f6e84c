"""A layer of a transformers cache that holds what memkit carries on, instead of keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from memkit.errors import InputError, MemoryStateError
from memkit.hf.attention import run
from memkit.hf.names import CACHE

if TYPE_CHECKING:
    from memkit.hf.attention import Prefill
    from memkit.hf.probe import LayerFacts
    from memkit.lm import ModelMemory
    from memkit.memory import Memory
    from memkit.policy import Policy

Layer = TypeVar("Layer", bound="CarryingLayer")

__all__ = ["CarryingLayer", "MemoryLayer", "check_whole", "layers_of", "mark_complete", "memories", "named"]


class CarryingLayer(CacheLayerMixin):
    """Carries a memory of rows from one call to the next; transformers may reorder, repeat and reset the rows.

    columns: tokens that this layer has read, padding included; transformers calls this the sequence length.
    complete: as many of them as were read by calls of the model that ran to their end.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | ModelMemory | None = None
        self.columns = 0
        self.complete = 0

    @property
    @abstractmethod
    def memories(self) -> list[Memory]:
        """The policies' memories in it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.memory})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the engine makes the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Nothing is read here: should what follows refuse the call, the layer is as it was.
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise MemoryStateError(f"{CACHE} of memkit hold no keys that stock attention could read")

    def reset(self) -> None:
        self.memory, self.columns, self.complete = None, 0, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.memory is not None:
            self.memory = self.memory.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memory is not None:
            rows = torch.arange(len(self.memory.seen), device=self.memory.seen.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise MemoryStateError(
                f"a memory cannot forget its newest tokens, asked to remove {abs(tokens_to_remove)}; "
                f"generate without assisted decoding, or copy.deepcopy {CACHE} beforehand"
            )


class MemoryLayer(CarryingLayer):
    """A decoder layer's `Memory`; new keys and values pass on to the attention function, which reads by it.

    model: what the config of the model says that it belongs to.
    """

    memory: Memory | None

    def __init__(self, policy: Policy, model: dict[str, int | str]) -> None:
        super().__init__()
        self.policy, self.model = policy, model

    @property
    def memories(self) -> list[Memory]:
        return [] if self.memory is None else [self.memory]

    def __repr__(self) -> str:
        return f"MemoryLayer({self.memory if self.memory is not None else self.policy})"

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Only attention functions that want a mask ask, and ours does not: the model is not attached.
        raise MemoryStateError(
            f"{CACHE} made under policy {named(self.policy)} hold no keys that stock attention could read; "
            f"pass them on inside memkit.hf.attach only, or start without {CACHE}"
        )

    def read(
        self,
        facts: LayerFacts,
        prefill: Prefill,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        lengths: Tensor | None,
        boundaries: Tensor | None,
    ) -> Tensor:
        """Outputs [b, h, t, v] of tokens that follow those it has read; arguments as for `attention.run`."""
        given = (query, key, value, scale, lengths, boundaries)
        output, self.memory = run(self.policy, facts, prefill, self.memory, *given)
        self.columns += query.shape[2]
        return output


def named(policy: Policy) -> str:
    """A policy as messages name it."""
    return policy.name or "without a name"


def memories(past_key_values: Any) -> list[Memory]:
    """Each attention layer's memory, first layer first, out of the cache that an attached model returned."""
    layers = [layer for layer in getattr(past_key_values, "layers", None) or () if isinstance(layer, MemoryLayer)]
    found = [memory for layer in layers for memory in layer.memories]
    if not found or len(found) != len(layers):
        raise MemoryStateError(
            f"{CACHE} must be what an attached model returned, got {past_key_values}; "
            "call the model inside memkit.hf.attach(model, policy) first"
        )
    return found


def layers_of(cache: Any, kind: type[Layer], source: str) -> list[Layer] | None:
    """The layers of a cache that holds ours, of one `kind`; None for an empty one of transformers', ours to fill.

    `generate` makes an empty DynamicCache before the first call, and a user may keep one. Whatever else is given raises
    `InputError`; source: who returns caches of this kind.
    """
    if not isinstance(cache, Cache):
        raise InputError(
            f"{CACHE} must be a transformers Cache, got a {type(cache).__name__}; leave it out to start, and pass "
            f"on what {source} returned"
        )
    layers: list[Any] | None = getattr(cache, "layers", None)  # a cache of encoder and decoder has none of its own
    ours = [layer for layer in layers or () if isinstance(layer, kind)]
    if ours:
        return ours
    fresh = type(cache) is DynamicCache or (type(cache) is Cache and not layers)
    if not fresh or cache.offloading or cache.get_seq_length():
        kind_of = f"{'offloaded ' if getattr(cache, 'offloading', False) else ''}{type(cache).__name__}"
        raise InputError(
            f"{CACHE} must be empty or from {source}, got a {kind_of} of {cache.get_seq_length()} tokens; "
            f"leave {CACHE} and cache_implementation out"
        )
    return None


def mark_complete(layers: Sequence[CarryingLayer]) -> None:
    """A call of the model ran to its end: all that its layers have read counts."""
    for layer in layers:
        layer.complete = layer.columns


def check_whole(layers: Sequence[CarryingLayer]) -> None:
    """Raise where a call was interrupted: some layers have read its tokens, others not, or its caller got no result."""
    complete = layers[0].complete
    if any(layer.columns != complete or layer.complete != complete for layer in layers):
        read = [layer.columns for layer in layers]
        what = f"whose layers have read {min(read)} to {max(read)} tokens, {complete} of them before that call"
    elif any(memory.taken for layer in layers for memory in layer.memories):
        what = f"whose memory of {complete} tokens that call, or one of your own, took over"
    else:
        return
    raise MemoryStateError(
        f"{CACHE} must come out of a call that ran to its end, got one whose last call was interrupted, {what}; "
        f"read the text anew, or keep a copy.deepcopy of {CACHE} before a call that may fail"
    )
