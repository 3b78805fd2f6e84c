"""A layer of a transformers cache that holds what memkit carries on, instead of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from memkit.errors import MemoryStateError
from memkit.hf.names import CACHE

if TYPE_CHECKING:
    from memkit.lm import ModelMemory
    from memkit.memory import Memory

__all__ = ["CarryingLayer"]


class CarryingLayer(CacheLayerMixin):
    """Carries a memory of rows from one call to the next; transformers may reorder, repeat and reset the rows.

    columns: tokens given so far, padding included; transformers calls this the sequence length.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | ModelMemory | None = None
        self.columns = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.memory})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the engine makes the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise MemoryStateError(f"{CACHE} of memkit hold no keys that stock attention could read")

    def reset(self) -> None:
        self.memory, self.columns = None, 0

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
