"""What every attention layer of a model is asked while it reads: queries, keys, values, and what goes with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkit.attention import MemoryAttention
from memkit.engine import attend
from memkit.errors import InputError, ModelError
from memkit.evals.reading import own_model
from memkit.parameters import PolicyParameters
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy
from memkit.profiles import per_layer, warn_of_even_shares

__all__ = ["Call", "recorded_calls"]

NAME = "memkit-recording"


@dataclass(frozen=True)
class Call:
    """One layer's whole call of `attend`: the arguments, and the policy.

    queries [1, h, t, d], keys and values [1, g, t, …], weights [1, g, t] or None.
    """

    policy: Policy
    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None = None
    parameters: PolicyParameters | None = None
    rotation: Rotation | None = None
    scale: float | None = None

    def part(self, begin: int, end: int) -> dict[str, Any]:
        """The arguments of `attend` for some of the tokens."""
        return {
            "queries": self.queries[:, :, begin:end],
            "keys": self.keys[:, :, begin:end],
            "values": self.values[:, :, begin:end],
            "weights": None if self.weights is None else self.weights[:, :, begin:end],
            "parameters": self.parameters,
            "rotation": self.rotation,
            "scale": self.scale,
        }

    def by_heads(self) -> Iterator[tuple[int, Call]]:
        """Where shares of the slots differ: the call of each run of equal heads, and its first query head."""
        begin, group = 0, self.queries.shape[1] // self.keys.shape[1]
        for heads, policy in self.policy.head_policies:
            own, asking = slice(begin, begin + heads), slice(begin * group, (begin + heads) * group)
            yield (
                asking.start,
                dataclasses.replace(
                    self,
                    policy=policy,
                    queries=self.queries[:, asking],
                    keys=self.keys[:, own],
                    values=self.values[:, own],
                    weights=None if self.weights is None else self.weights[:, own],
                    parameters=None if self.parameters is None else self.parameters.of_heads(asking),
                ),
            )
            begin += heads


@torch.no_grad()
def recorded_calls(model: Any, ids: Tensor, policy: Policy | None) -> list[tuple[int, Call]]:
    """Each attention layer's number and call while the model reads ids [1, t]; layers of other kinds are left out.

    policy: None for a `MemoryLM`, whose layers have one each; a stock model reads with full attention, and the policy
    is put into its calls, with each layer's ratios where it names a head profile. Raises `InputError` where that is the
    other way round, `ModelError` for other models.
    """
    own = own_model(model)
    if own is not None:
        if policy is not None:
            raise InputError(
                "a memkit model has its own policy; leave policy out, and load it under another one with "
                "memkit.load_model(name, policy=…)"
            )
        calls: list[tuple[int, Call]] = []
        with _listening(own, lambda layer, call: calls.append((layer, call))):
            own.read(ids)
        return calls
    if not hasattr(model, "set_attn_implementation"):
        raise ModelError(f"model must be a MemoryLM or a stock model of the Llama family, got {type(model).__name__}")
    if policy is None:
        raise InputError("a stock model has no policy; give one, as in policy='untrained-kvm-sqrt'")
    return list(enumerate(_calls_of_stock(model, ids, policy)))


@contextmanager
def _listening(model: torch.nn.Module, hear: Callable[[int, Call], None]) -> Generator[None]:
    """In the block, every attention layer tells what it asks `attend`."""
    layers = [
        (number, module)
        for number, block in enumerate(model.blocks)  # type: ignore[arg-type]
        for module in block.modules()
        if isinstance(module, MemoryAttention)
    ]
    for number, attention in layers:
        attention.listener = lambda given, number=number, attention=attention: hear(
            number, Call(attention.policy, **given)
        )
    try:
        yield
    finally:
        for _, attention in layers:
            attention.listener = None


def _calls_of_stock(model: Any, ids: Tensor, policy: Policy) -> list[Call]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from memkit.hf.decoder import facts_of, find_decoder, kv_heads_of
    from memkit.hf.fitting import check_policy, check_rotation
    from memkit.hf.probe import attention_function, probe

    check_policy(policy)
    decoder = find_decoder(model)
    facts, config = probe(decoder), decoder.config
    warn_of_even_shares([policy.spec], facts_of(config))
    policies = per_layer(policy, config.num_hidden_layers, kv_heads_of(config), facts_of(config))
    turns = Need.ROTATION in policy.needs
    if turns:
        for layer, each in facts.items():
            check_rotation(decoder, layer, each)
    calls: list[Call] = []

    def recording(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        fact = facts[module.layer_idx]
        turned = fact.turning_first(query), fact.turning_first(key)
        own = policies[module.layer_idx]
        calls.append(Call(own, *turned, value, rotation=fact.rotation if turns else None, scale=scaling))
        output, _memory = attend("full", query, key, value, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(NAME, recording)
    with attention_function(decoder.module, NAME):
        model.base_model(ids.to(model.device), use_cache=False)
    return calls
