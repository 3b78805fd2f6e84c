"""The tensors a policy learns, as one nn.Module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memkit.catalog import as_policy
from memkit.pieces.needs import Need
from memkit.policy import Policy, PolicySpec
from memkit.processes import is_split, local
from memkit.whole import MOST, whole_number

__all__ = ["PolicyParameters"]

FORMER_NAMES = {"temperature_window": "query_scale_window", "temperature_memory": "query_scale_memory"}
"""Names that tensors had in models saved before, and what they are called now."""


class PolicyParameters(nn.Module):
    """What a policy learns besides its layer's projections; None where the policy has no such part.

    key_norm_weight, key_norm_bias [d]: the memory-key LayerNorm, shared by all heads (1 and 0 at first);
    query_scale_window, query_scale_memory [h]: factors on the queries (1 at first).

    Made with policy: a shipped policy's name, the path of a YAML file, a PolicySpec or a Policy; heads: query heads, h;
    head_width: channels of a key, d.

    A memory that decodes keeps a copy of its slots as these tensors read them, and reads them anew when one has
    changed: by an optimiser, by `load_state_dict`, by any change in place under `torch.no_grad()`. A change through
    `.data` or a NumPy view is one that PyTorch does not count, as is any of a tensor that was made in inference mode,
    and is not seen until the next chunk leaves the window; after such a change go on with `memory.fork()`, which has
    no such copy.
    """

    key_norm_weight: nn.Parameter | None
    key_norm_bias: nn.Parameter | None
    query_scale_window: nn.Parameter | None
    query_scale_memory: nn.Parameter | None

    def __init__(self, policy: str | Path | PolicySpec | Policy, heads: int, head_width: int) -> None:
        super().__init__()
        policy = as_policy(policy)
        heads, head_width = whole_number("heads", heads, 1, MOST), whole_number("head_width", head_width, 1, MOST)
        norm = Need.KEY_NORM in policy.needs
        self.key_norm_weight = nn.Parameter(torch.ones(head_width)) if norm else None
        self.key_norm_bias = nn.Parameter(torch.zeros(head_width)) if norm else None
        scaled = Need.QUERY_SCALES in policy.needs
        self.query_scale_window = nn.Parameter(torch.ones(heads)) if scaled else None
        self.query_scale_memory = nn.Parameter(torch.ones(heads)) if scaled and not policy.sinks_only else None
        self.register_load_state_dict_pre_hook(_rename)

    @property
    def key_norm(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the memory-key LayerNorm."""
        if self.key_norm_weight is None or self.key_norm_bias is None:
            return None
        return self.key_norm_weight, self.key_norm_bias

    def of_heads(self, heads: slice) -> PolicyParameters:
        """The same, for some of the query heads: views, through which gradients flow."""
        scales = (self.query_scale_window, self.query_scale_memory)
        window, memory = (None if scale is None else scale[heads] for scale in scales)
        return self._of(self.key_norm_weight, self.key_norm_bias, window, memory)

    def here(self) -> PolicyParameters:
        """What this process has of them, where they are split or copied over processes; else the same."""
        if not any(is_split(each) for each in self.tensors()):
            return self
        return self._of(
            local(self.key_norm_weight),
            local(self.key_norm_bias),
            local(self.query_scale_window),
            local(self.query_scale_memory),
        )

    @staticmethod
    def _of(
        key_norm_weight: Tensor | None,
        key_norm_bias: Tensor | None,
        query_scale_window: Tensor | None,
        query_scale_memory: Tensor | None,
    ) -> PolicyParameters:
        """The same, of other tensors, which need not be parameters."""
        made = object.__new__(PolicyParameters)
        nn.Module.__init__(made)
        made.__dict__.update(
            key_norm_weight=key_norm_weight,
            key_norm_bias=key_norm_bias,
            query_scale_window=query_scale_window,
            query_scale_memory=query_scale_memory,
        )
        return made

    def tensors(self) -> list[Tensor]:
        """Those there are."""
        every = (self.key_norm_weight, self.key_norm_bias, self.query_scale_window, self.query_scale_memory)
        return [tensor for tensor in every if tensor is not None]


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state is loaded: what it calls by a former name."""
    for name, now in FORMER_NAMES.items():
        if prefix + name in state:
            state[prefix + now] = state.pop(prefix + name)
