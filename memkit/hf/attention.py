"""transformers' attention interface on memkit's engine: the function `memkit` in its registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkit.engine import attend, compress, next_readers
from memkit.engine.autocast import autocasts
from memkit.errors import ModelError
from memkit.hf.decoder import NAME
from memkit.hf.keywords import check_keywords
from memkit.hf.probe import LayerFacts

if TYPE_CHECKING:
    from memkit.memory import Memory
    from memkit.policy import Policy

__all__ = ["Call", "Outer", "Prefill", "Present", "asks_next", "run"]

Prefill = Literal["policy", "full"]


class Present:
    """Which tokens of a call are there, `now` [b, t]: those of a row are moved to the left for us, and back again.

    lengths [b]: how many; order [b, t]: the columns, those with a token first; None where they already stand so.
    """

    def __init__(self, now: Tensor) -> None:
        self.lengths = now.sum(1)
        beyond = torch.arange(now.shape[1], device=now.device) >= self.lengths[:, None]
        self.order = None if torch.equal(now, ~beyond) else (~now).long().argsort(dim=1, stable=True)

    def to_the_left(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] with each row's tokens first."""
        return tensor if self.order is None else self._at(tensor, self.order)

    def back(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] with each row's tokens where they stood."""
        return tensor if self.order is None else self._at(tensor, self.order.argsort(dim=1))

    def flags_to_the_left(self, flags: Tensor) -> Tensor:
        """[b, t] bool with those of each row's tokens first."""
        return flags if self.order is None else flags.gather(1, self.order.to(flags.device))

    @staticmethod
    def _at(tensor: Tensor, columns: Tensor) -> Tensor:
        return tensor.gather(
            2, columns.to(tensor.device)[:, None, :, None].expand(-1, *tensor.shape[1:2], -1, tensor.shape[3])
        )


@dataclass
class Outer:
    """What is noted of a call around the decoder's.

    mask: its attention mask, which a model of text and images may not hand on as it is;
    images: whether some of its tokens are marked as an image's;
    ids: its token ids, which a model of text and images hands on as embeddings;
    caches: those of the decoder's calls in it, whole once it has run to its end.
    """

    mask: Tensor | None
    images: bool
    ids: Tensor | None = None
    caches: list[Cache] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """What one forward call of the decoder tells its attention layers."""

    policies: Mapping[int, Policy]
    facts: Mapping[int, LayerFacts]
    prefill: Prefill
    cache: Cache | None
    present: Present | None
    outer: Outer | None
    boundaries: Tensor | None = None
    """[b, t] bool on the CPU: which tokens are the last of their chunk, each row's moved to the left; None: none is."""


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
    layer: Any = None if call.cache is None else call.cache.layers[number]
    present = call.present
    if present is not None:
        query, key, value = (present.to_the_left(each) for each in (query, key, value))
    lengths = None if present is None else present.lengths
    boundaries = call.boundaries if policy.takes_boundaries else None
    if layer is None:
        output, _ = run(policy, facts, call.prefill, None, query, key, value, scaling, lengths, boundaries)
    else:
        output = layer.read(facts, call.prefill, query, key, value, scaling, lengths, boundaries)
    if present is not None:
        output = present.back(output)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def asks_next(policy: Policy) -> bool:
    """Whether a prompt that was read in full is judged by those who go on with it."""
    return policy.observes and policy.spec.observe.readers == "next"


def run(
    policy: Policy,
    facts: LayerFacts,
    prefill: Prefill,
    memory: Memory | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    lengths: Tensor | None,
    boundaries: Tensor | None,
) -> tuple[Tensor, Memory]:
    """A layer's outputs [b, h, t, v], and its memory after this call. Tensors, lengths, boundaries as for `attend`.

    prefill: `full`: where there is no memory yet, the tokens are read exactly and then compressed at once.
    """
    rotation = facts.rotation if policy.needs_rotation else None
    if prefill == "full" and memory is None:
        output, _ = attend("full", query, key, value, scale=scale)
        readers = None
        if asks_next(policy):
            assert facts.rotation is not None  # checked when the model was attached
            readers = next_readers(query, facts.rotation)
        return output, compress(policy, query, key, value, rotation=rotation, scale=scale, readers=readers)
    rest = {"rotation": rotation, "scale": scale, "memory": memory, "lengths": lengths, "boundaries": boundaries}
    return attend(policy, query, key, value, **rest)
