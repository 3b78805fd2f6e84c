"""A layer of a transformers cache that holds what memkit carries on, instead of keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from memkit.errors import InputError, MemoryStateError
from memkit.hf.names import CACHE

if TYPE_CHECKING:
    from memkit.lm import ModelMemory
    from memkit.memory import Memory

Layer = TypeVar("Layer", bound="CarryingLayer")

__all__ = ["CarryingLayer", "check_whole", "layers_of", "mark_complete"]


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
    if layers and all(isinstance(layer, kind) for layer in layers):
        return layers
    fresh = type(cache) is DynamicCache or (type(cache) is Cache and not layers)
    if not fresh or cache.offloading or cache.get_seq_length():
        raise InputError(
            f"{CACHE} must be empty or from {source}, got a {type(cache).__name__} of {cache.get_seq_length()} tokens; "
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
