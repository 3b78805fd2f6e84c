"""A layer of a transformers cache that holds what memkit carries on, instead of keys and values."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from memkit.errors import InputError, MemoryStateError
from memkit.hf.names import CACHE
from memkit.hf.rewinding import KEEP, Past

if TYPE_CHECKING:
    from memkit.hf.attention import Reader, Tokens
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

    model: what the config of the model says that it belongs to;
    record_past: whether its newest tokens may be taken back (`crop`); past: what they are taken back to;
    waiting: in the first layer, where texts are read again, the tokens [b, n] of the portion that goes on.
    """

    is_croppable = True
    memory: Memory | None

    def __init__(self, policy: Policy, model: dict[str, int | str], record_past: bool = False) -> None:
        super().__init__()
        self.policy, self.model, self.record_past = policy, model, record_past
        self.past: Past | None = None
        self.reader: Reader | None = None
        self.waiting: Tensor | None = None

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

    def read(self, reader: Reader, tokens: Tokens, spare: int) -> Tensor:
        """Outputs [b, h, t, v] of tokens that follow those it has read.

        spare: so many of this call's newest columns may be taken back by the next `crop`, announced or not.
        """
        self.reader, before = dataclasses.replace(reader, reading=None), self.columns
        if reader.reading is not None:  # read as one: what is older than its end is not to be had back
            output = self._read(reader, tokens)
            kept = self.memory if spare or self.record_past else None
            self.past = None if kept is None else Past(kept.detach(), self.columns)
            return output
        if before and not self.record_past:
            self.past = Past(self.memory.detach(), before) if spare and self.memory is not None else None
        if before or not (spare or self.record_past):
            output = self._read(reader, tokens)
        else:
            output, tokens = self._read_first(reader, tokens, spare)
        if self.past is not None and tokens.columns:
            self.past.add(tokens)
            self.past.follow(reader, spare)
        return output

    def _read(self, reader: Reader, tokens: Tokens) -> Tensor:
        output, self.memory = reader.read(self.memory, tokens)
        self.columns += tokens.columns if reader.reading is None else reader.reading.tokens
        return output

    def _read_first(self, reader: Reader, tokens: Tokens, spare: int) -> tuple[Tensor, Tokens]:
        """The outputs of a first call, and those of its newest tokens that may be taken back.

        A prompt that is read in full is all but the spare tokens, and not to be divided.
        """
        whole = reader.prefill == "full"
        most = max(spare, KEEP if self.record_past and not whole else 0)
        begin = max(int(whole), tokens.columns - most)
        older, newest = tokens.part(0, begin), tokens.part(begin, tokens.columns)
        outputs = [self._read(reader, part) for part in (older,) if part.columns]
        self.past = Past(None if self.memory is None else self.memory.detach(), self.columns)
        outputs += [self._read(reader, part) for part in (newest,) if part.columns]
        return torch.cat(outputs, dim=2), newest

    def reset(self) -> None:
        super().reset()
        self.past = self.waiting = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.waiting is not None:
            self.waiting = self.waiting.index_select(0, beam_idx.to(self.waiting.device))
        if self.past is not None:
            self.past.reorder(beam_idx)

    def activate_past_recording(self) -> None:
        """From now on the newest tokens may be taken back, 64 columns at least, and all of a call that says so."""
        self.record_past = True
        if self.past is None and self.memory is not None:
            self.past = Past(self.memory.detach(), self.columns)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest columns back: −n, or to a length of n, as releases before 5.23 ask for.

        0 takes nothing back, and says that a later call will ask for more. What a cropped cache has read by then has no
        history: gradients end there.
        """
        length = self.columns + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, self.columns)
        if length != self.columns:
            if self.columns != self.complete:
                raise MemoryStateError(
                    f"{CACHE} must come out of a call that ran to its end to be cropped; its last was interrupted, so "
                    "read the text anew"
                )
            if self.past is None or self.reader is None:
                raise InputError(
                    "a memory goes back over tokens that were read once this was announced, asked to remove "
                    f"{self.columns - length}; attach(…, croppable=True), or call activate_past_recording() of "
                    f"{CACHE} before what may be taken back"
                )
            self.memory = self.past.at(self.reader, length)
            self.columns = self.complete = length
        self.activate_past_recording()


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
