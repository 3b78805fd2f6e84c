"""transformers' attention interface on memkit's engine: the function `memkit` in its registry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkit.engine import ask_again, attend, compress, next_readers, repeat_readers
from memkit.engine.autocast import autocasts
from memkit.errors import ModelError
from memkit.hf.decoder import NAME
from memkit.hf.keywords import check_keywords
from memkit.hf.packing import Packed
from memkit.hf.probe import LayerFacts
from memkit.hf.rereading import Rereading, asks_again
from memkit.pieces.window import SlidingWindowSpec
from memkit.policy import PolicySpec

if TYPE_CHECKING:
    from memkit.memory import Memory
    from memkit.pieces.rotary import Rotation
    from memkit.policy import Policy

__all__ = ["Call", "Outer", "Prefill", "Present", "Reader", "Tokens", "as_in_stock", "asks_next"]

Prefill = Literal["policy", "full"]


class Present:
    """Which tokens of a call are there, `now` [b, t]: those of a row are moved to the left for us, and back again.

    lengths [b]: how many; order [b, t]: the columns, those with a token first; None where they already stand so.
    """

    def __init__(self, now: Tensor) -> None:
        self.now, self.lengths = now, now.sum(1)
        beyond = torch.arange(now.shape[1], device=now.device) >= self.lengths[:, None]
        self.order = None if torch.equal(now, ~beyond) else (~now).long().argsort(dim=1, stable=True)

    def to_the_left(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] with each row's tokens first."""
        return tensor if self.order is None else self._at(tensor, self.order)

    def back(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] with each row's tokens where they stood."""
        return tensor if self.order is None else self._at(tensor, self.order.argsort(dim=1))

    @staticmethod
    def _at(tensor: Tensor, columns: Tensor) -> Tensor:
        return tensor.gather(
            2, columns.to(tensor.device)[:, None, :, None].expand(-1, *tensor.shape[1:2], -1, tensor.shape[3])
        )


@dataclass(frozen=True)
class Tokens:
    """What a layer reads: queries [b, h, t, d], keys [b, g, t, d], values [b, g, t, v]; present: None where all are;
    boundaries: which are the last of their chunk, [b, t] bool on the CPU, None: none is."""

    query: Tensor
    key: Tensor
    value: Tensor
    present: Present | Packed | None
    boundaries: Tensor | None = None

    @property
    def columns(self) -> int:
        """Columns t, padding included."""
        return self.query.shape[2]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return change(self.query), change(self.key), change(self.value)

    def part(self, begin: int, end: int) -> Tokens:
        """Some columns of them."""
        present = None if self._there is None else Present(self._there[:, begin:end])
        boundaries = None if self.boundaries is None else self.boundaries[:, begin:end]
        return Tokens(*self._mapped(lambda tensor: tensor[:, :, begin:end]), present, boundaries)

    def then(self, after: Tokens) -> Tokens:
        """These and the ones after them, as one."""
        present = None
        if self._there is not None or after._there is not None:
            present = Present(torch.cat([each._filled for each in (self, after)], dim=1))
        pairs = zip((self.query, self.key, self.value), (after.query, after.key, after.value), strict=True)
        query, key, value = (torch.cat(pair, dim=2) for pair in pairs)
        boundaries = None
        if self.boundaries is not None or after.boundaries is not None:
            boundaries = torch.cat([each._ends for each in (self, after)], dim=1)
        return Tokens(query, key, value, present, boundaries)

    @property
    def _there(self) -> Tensor | None:
        """Which are there, [b, t]; None where all are."""
        assert not isinstance(self.present, Packed)  # texts that are packed are read once, and kept in no cache
        return None if self.present is None else self.present.now

    @property
    def _filled(self) -> Tensor:
        there, shape = self._there, (len(self.query), self.columns)
        return torch.ones(shape, dtype=torch.bool, device=self.query.device) if there is None else there

    @property
    def _ends(self) -> Tensor:
        shape = (len(self.query), self.columns)
        return torch.zeros(shape, dtype=torch.bool) if self.boundaries is None else self.boundaries

    def rows(self, rows: Tensor) -> Tokens:
        """Some rows of them, by number."""
        present = None if self._there is None else Present(self._there[rows.to(self._there.device)])
        boundaries = None if self.boundaries is None else self.boundaries[rows.cpu()]
        return Tokens(*self._mapped(lambda tensor: tensor.index_select(0, rows.to(tensor.device))), present, boundaries)

    def detach(self) -> Tokens:
        """The same without their history."""
        return Tokens(*self._mapped(Tensor.detach), self.present, self.boundaries)


@dataclass(frozen=True)
class Reader:
    """How a layer reads.

    prefill: `full`: where there is no memory yet, the tokens are read exactly and then compressed at once;
    scale: of the scores, None for 1/√d; reading: where the tokens are read twice, of which the memory takes the first
    reading alone.
    """

    policy: Policy
    facts: LayerFacts
    prefill: Prefill
    scale: float | None
    reading: Rereading | None = None

    def read(self, memory: Memory | None, tokens: Tokens) -> tuple[Tensor, Memory]:
        """Outputs [b, h, t, v] of tokens that follow those in the memory, and the memory after them."""
        present, policy, scale = tokens.present, self.policy, self.scale
        query, key, value = tokens.query, tokens.key, tokens.value
        boundaries = tokens.boundaries if policy.takes_boundaries else None
        if present is not None:
            query, key, value = (present.to_the_left(each) for each in (query, key, value))
            if boundaries is not None:
                boundaries = present.to_the_left(boundaries[:, None, :, None])[:, 0, :, 0]
        rotation = self.facts.rotation if policy.needs_rotation else None
        if self.prefill == "full" and memory is None:
            readers: list[Tensor] = []
            if (reading := self.reading) is None:
                output, _ = attend(as_in_stock(self.facts.window), query, key, value, scale=scale)
            else:
                output, _ = self._both(as_in_stock(self.facts.window), reading, tokens, {"scale": scale})
                if asks_again(policy):
                    readers.append(repeat_readers(reading.second(query)))
                query, key, value = (reading.first(each) for each in (query, key, value))
            if asks_next(policy):
                assert self.facts.rotation is not None  # checked when the model was attached
                readers.append(next_readers(query, self.facts.rotation))
            given = {"rotation": rotation, "scale": scale, "readers": readers or None}
            return output, compress(policy, query, key, value, **given)
        if self.reading is not None:
            return self._read_again(self.reading, memory, tokens, rotation)
        lengths = None if present is None else present.lengths
        rest = {"rotation": rotation, "scale": scale, "memory": memory, "lengths": lengths, "boundaries": boundaries}
        output, after = attend(policy, query, key, value, **rest)
        return output if present is None else present.back(output), after

    def _read_again(
        self, reading: Rereading, memory: Memory | None, tokens: Tokens, rotation: Rotation | None
    ) -> tuple[Tensor, Memory]:
        """The same for the end of a portion, and the portion once more."""
        rest: dict[str, Any] = {"rotation": rotation, "scale": self.scale}
        output, after = self._both(self.policy, reading, tokens, rest, memory)
        if self.policy.observation.again:
            ask_again(after, reading.second(tokens.query).detach(), **rest)
        return output, after

    @staticmethod
    def _both(
        policy: Policy | PolicySpec,
        reading: Rereading,
        tokens: Tokens,
        rest: dict[str, Any],
        memory: Memory | None = None,
    ) -> tuple[Tensor, Memory]:
        """Outputs of both readings, and the memory after the first. Portions are read by copies that are forgotten."""
        given = (tokens.query, tokens.key, tokens.value)
        output, after = attend(policy, *map(reading.first, given), memory=memory, **rest)
        behind = zip(*map(reading.behind, given), strict=True)
        others = (attend(policy, *each, memory=after.fork(), **rest)[0] for each in behind)
        return torch.cat((output, *others), dim=2), after


@dataclass
class Outer:
    """What is noted of a call around the decoder's.

    mask: its attention mask, which a model of text and images may not hand on as it is;
    images: whether some of its tokens are marked as an image's;
    spare: how many of its newest tokens may be taken back: all but one of those whose logits are kept;
    ids: its token ids, which a model of text and images hands on as embeddings;
    caches: those of the decoder's calls in it, whole once it has run to its end.
    """

    mask: Tensor | None
    images: bool
    spare: int
    ids: Tensor | None = None
    caches: list[Cache] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """What one forward call of the decoder tells its attention layers."""

    policies: Mapping[int, Policy]
    facts: Mapping[int, LayerFacts]
    prefill: Prefill
    cache: Any
    present: Present | Packed | None
    outer: Outer | None
    reading: Rereading | None = None
    unasked: bool = False
    """Whether the caller wants no cache, and this one is for a text that is read again alone."""
    piece: bool = False
    """Whether more pieces of the caller's call follow."""
    earlier: tuple[Any, ...] = ()
    """The decoder's outputs for the pieces that came before this one."""
    waiting: Tensor | None = None
    """The tokens [b, n] of a portion that goes on once the call has been read; None where nothing is read again."""
    boundaries: Tensor | None = None
    """[b, t] bool on the CPU: which tokens are the last of their chunk; None: none is."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    memkit_call: Call | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """[b, h, t, d] in, [b, t, h, d] out."""
    if memkit_call is None:
        raise ModelError(
            "this model shares its config with an attached model, but is not attached itself; give it a copy.deepcopy"
        )
    if dropout:
        raise ModelError(f"attention dropout must be 0 on a memory, got {dropout}; set config.attention_dropout to 0")
    call, number = memkit_call, module.layer_idx
    facts, policy = call.facts[number], call.policies[number]
    check_keywords(module, facts.window, keywords | {"attention_mask": attention_mask})
    if autocasts(query.device):
        # As PyTorch's own attention does: rotation made queries and keys float32, while values are of autocast's dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each if each.dtype == torch.float64 else each.to(dtype) for each in (query, key, value))
    query, key = facts.turning_first(query), facts.turning_first(key)
    reader = Reader(policy, facts, call.prefill, scaling, call.reading)
    tokens = Tokens(query, key, value, call.present, call.boundaries)
    if call.cache is None:
        output, _ = reader.read(None, tokens)
    else:
        output = call.cache.layers[number].read(reader, tokens, 0 if call.outer is None else call.outer.spare)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def asks_next(policy: Policy) -> bool:
    """Whether a prompt that was read in full is judged by those who go on with it."""
    return policy.observes and policy.expects is None and policy.spec.observe.readers in ("next", "mixed")


@functools.lru_cache(maxsize=64)
def as_in_stock(window: int | None) -> PolicySpec:
    """How the stock model's layer reads: all tokens, or the newest `window`."""
    return PolicySpec() if window is None else PolicySpec(window=SlidingWindowSpec(size=window))
