"""A call of a decoder as its caller asks for it: checked, and set apart from what it goes on from."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memkit.errors import InputError
from memkit.hf.cache import MemoryLayer
from memkit.hf.masks import present_tokens
from memkit.hf.names import CACHE, take_cache
from memkit.hf.packing import KEYWORDS, Packed, find_packed

if TYPE_CHECKING:
    from collections.abc import Callable

    from memkit.hf.attention import Outer

__all__ = ["OUTER", "Asked", "Standing"]

OUTER = "memkit_outer"
"""The keyword by which a call around the decoder's says what it notes."""


@dataclass(frozen=True)
class Standing:
    """Where a call's tokens stand.

    positions [b, t]: of each in its text; now [b, t]: which columns are tokens, None where all are; packed: texts that
    share rows, None where each row is one.
    """

    positions: Tensor
    now: Tensor | None
    packed: Packed | None


@dataclass(frozen=True)
class Asked:
    """A call of a decoder, and what it goes on from.

    arguments: of `forward` by name, to be changed into those that our engine needs; the ones below are taken out of
    them. tokens: ids [b, t], or embeddings [b, t, d]; mask: as given, or as the call around this one has it; cache:
    the one given, None for none; layers: ours in it, None where it has none yet; outer: what the call around this one
    notes.
    """

    arguments: dict[str, Any]
    tokens: Tensor
    mask: Tensor | None
    cache: Any
    layers: list[MemoryLayer] | None
    outer: Outer | None

    @classmethod
    def of(
        cls, bound: inspect.BoundArguments, config: Any, layers_of: Callable[[Any], list[MemoryLayer] | None]
    ) -> Asked:
        """From bound arguments of a decoder's `forward`. layers_of: our layers in a cache, checked.

        Raises `InputError` for what no memory can do, and for rows that are not those of the cache.
        """
        arguments: dict[str, Any] = bound.arguments
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["self"]
        if arguments.get("output_attentions", config.output_attentions):
            raise InputError("attention weights are never computed as a matrix; leave output_attentions out")
        if arguments.get("is_causal") is False:
            raise InputError("a memory is causal, got is_causal False; leave it out")
        ids = arguments.get("input_ids")
        tokens = ids if ids is not None else arguments["inputs_embeds"]
        cache, outer = take_cache(arguments), arguments.pop(OUTER, None)
        layers = None if cache is None else layers_of(cache)
        mask = arguments.pop("attention_mask", None)
        if isinstance(mask, dict):  # masks of each kind of layer, of which transformers makes none for us
            if outer is None or outer.images:
                raise InputError(
                    "a memory is causal, got tokens of images that see each other both ways (token_type_ids); "
                    "read the text alone, or use a model whose images are causal, as llava's"
                )
            mask = outer.mask
        asked = cls(arguments, tokens, mask, cache, layers, outer)
        if len(asked.seen) != len(tokens):
            raise InputError(
                f"a call must have the rows of its {CACHE}, {len(asked.seen)}, got {len(tokens)}; select or repeat the "
                "cache's rows with its batch_select_indices or batch_repeat_interleave"
            )
        return asked

    @property
    def columns(self) -> int:
        """Columns t, padding included."""
        return self.tokens.shape[1]

    @property
    def spare(self) -> int:
        """Its newest tokens that may be taken back, as an assistant's candidates are."""
        return 0 if self.outer is None else self.outer.spare

    @property
    def begun(self) -> bool:
        """Whether something has been read before it."""
        return self.layers is not None and self.layers[0].memory is not None

    @property
    def before(self) -> int:
        """Columns of the calls before it."""
        return self.layers[0].columns if self.layers is not None and self.begun else 0

    @property
    def seen(self) -> Tensor:
        """Tokens of each row that were read before it, [b]."""
        memory = None if self.layers is None else self.layers[0].memory
        if memory is None:
            return torch.zeros(len(self.tokens), dtype=torch.long, device=self.tokens.device)
        return memory.seen.to(self.tokens.device)

    @property
    def ids(self) -> Tensor | None:
        """Its token ids [b, t], as given here or to the call around it."""
        ids = self.arguments.get("input_ids")
        return ids if ids is not None or self.outer is None else self.outer.ids

    def standing(self) -> Standing:
        """Where its tokens stand. Raises `InputError` for positions that are not those."""
        packed, seen = self._packed(), self.seen
        rows, columns = self.tokens.shape[:2]
        now = present_tokens(self.mask, rows, columns, seen, self.before, "; a policy makes its own causal mask")
        places = torch.arange(columns, device=seen.device) if now is None else (now.cumsum(1) - 1).clamp(min=0)
        positions = seen[:, None] + places if packed is None else packed.positions.view(rows, columns)
        _check_positions(self.arguments.get("position_ids"), positions, now)
        return Standing(positions, now, packed)

    def _packed(self) -> Packed | None:
        """The texts packed into its rows, of which it returns no cache; None where each row is one."""
        if self.cache is not None and self.cache.get_seq_length():
            return None
        if self.mask is not None and not bool(self.mask.all()):
            if any(self.arguments.get(name) is not None for name in KEYWORDS):
                raise InputError("packed rows have no padding, got an attention_mask with 0; leave attention_mask out")
            return None
        packed = find_packed(self.arguments, *self.tokens.shape[:2], self.tokens.device)
        if packed is not None and (self.cache is not None or self.arguments.get("use_cache")):
            raise InputError(
                f"texts packed into one row are read from their beginnings to their ends, got {CACHE} or use_cache; "
                "leave both out, or give each text a row"
            )
        return packed


def _check_positions(given: Tensor | None, positions: Tensor, now: Tensor | None) -> None:
    """Positions of one's own would be another text than the memory holds (packed rows, for one)."""
    if given is None:
        return
    if given.ndim > 2:  # a place in time, height and width
        if not (given == given[:1]).all():
            raise InputError(
                "position_ids must count each row's tokens, got places of images, which differ by axis; read the text "
                "alone"
            )
        given = given[0]
    wrong = given.to(positions.device) != positions
    if now is not None:
        wrong &= now
    if wrong.any():
        row, column = (int(each) for each in wrong.nonzero()[0])
        raise InputError(
            f"position_ids must count each row's tokens, got {int(given.expand_as(positions)[row, column])} instead of "
            f"{int(positions[row, column])} in row {row}, column {column}; leave position_ids out, and give packed "
            "texts a row each"
        )
