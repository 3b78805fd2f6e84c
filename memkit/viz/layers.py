"""What the layers of a stock model give attention while it reads a text under a policy, and what becomes of it.

Forward hooks on each layer's projections take queries, keys and values as the model computes them; nothing in the model
is changed. The model reads as it always does, under the policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine import attend
from memkit.errors import InputError
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy, PolicySpec
from memkit.profiles import per_layer
from memkit.viz.trace import Trace, trace

if TYPE_CHECKING:
    from memkit.hf import LoadedModel

__all__ = ["LayerInputs", "layer_inputs", "output_errors", "trace_head"]


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's attention was given, and under which policy.

    queries [h, t, d], keys [g, t, d], values [g, t, d]: queries and keys are rotated; rotation: how, where the policy
    needs to know; scale: of the scores.
    """

    policy: Policy
    queries: Tensor
    keys: Tensor
    values: Tensor
    rotation: Rotation | None
    scale: float


@torch.no_grad()
def layer_inputs(
    loaded: LoadedModel, policy: str | PolicySpec | Policy, ids: Sequence[int] | Tensor
) -> list[LayerInputs]:
    """Let a model read a text under a policy in one call: what each layer's attention was given, first layer first.

    ids: tokens [t] of the text. Raises `InputError` where they are not one text's, and as `hf.attach` does.
    """
    from memkit import hf
    from memkit.hf.attachment import facts_of, fixed_rotation, kv_heads_of

    model: Any = loaded.model
    tokens = torch.as_tensor(ids, device=model.device)
    if tokens.ndim != 1 or not len(tokens):
        raise InputError(f"ids must be the tokens of one text, [t], got a tensor {list(tokens.shape)}")
    config = model.config
    policies = per_layer(as_policy(policy), config.num_hidden_layers, kv_heads_of(config), facts_of(config))
    rotation = fixed_rotation(model)
    with hf.attach(model, policy), _projections(model) as layers:
        model.base_model(tokens[None], use_cache=False)
    positions = torch.arange(len(tokens), device=model.device)
    found: list[LayerInputs] = []
    for one, parts, module in zip(policies, layers, _attentions(model), strict=True):
        queries, keys, values = (_by_head(part, module.head_dim) for part in parts)
        queries, keys = rotation.apply(queries, positions), rotation.apply(keys, positions)
        needed = rotation if one.needs_rotation else None
        found.append(LayerInputs(one, queries, keys, values, needed, float(module.scaling)))
    return found


def trace_head(inputs: LayerInputs, head: int) -> Trace:
    """Where a text's tokens are in the memory of one key/value head of a layer, step by step."""
    group = len(inputs.queries) // len(inputs.keys)
    return trace(
        _of_head(inputs.policy, head),
        inputs.queries[head * group : (head + 1) * group],
        inputs.keys[head],
        inputs.values[head],
        rotation=inputs.rotation,
        scale=inputs.scale,
    )


@torch.no_grad()
def output_errors(layers: Sequence[LayerInputs]) -> Tensor:
    """How far the policy moves each head's output from full attention's on the same inputs, [layers, h].

    ‖o_policy − o_full‖ / ‖o_full‖ over all tokens: 0 is full attention, 1 as far off as an output of 0 would be.
    """
    rows: list[Tensor] = []
    for inputs in layers:
        given = (inputs.queries[None], inputs.keys[None], inputs.values[None])
        full, _ = attend("full", *given, scale=inputs.scale)
        ours, _ = attend(inputs.policy, *given, rotation=inputs.rotation, scale=inputs.scale)
        rows.append(((ours - full).norm(dim=(2, 3)) / full.norm(dim=(2, 3)))[0])
    return torch.stack(rows)


def _of_head(policy: Policy, head: int) -> Policy:
    """What one key/value head of a policy does."""
    for heads, part in policy.head_policies:
        if head < heads:
            return part
        head -= heads
    return policy


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.base_model.layers]


def _by_head(part: Tensor, width: int) -> Tensor:
    """[1, t, heads · d] or [1, t, heads, d] → [heads, t, d]."""
    return part.reshape(part.shape[1], -1, width).transpose(0, 1).float()


@contextlib.contextmanager
def _projections(model: Any) -> Generator[list[list[Tensor]]]:
    """Inside the `with` block, what each layer's projections to queries, keys and values gave last."""
    found: list[list[Tensor]] = [[] for _ in _attentions(model)]
    with contextlib.ExitStack() as undo:
        for layer, module in zip(found, _attentions(model), strict=True):
            layer.extend([torch.empty(0)] * 3)
            # A family that norms queries and keys of each head does so before they are rotated.
            last = [getattr(module, f"{name}_norm", None) or getattr(module, f"{name}_proj") for name in "qk"]
            for place, projection in enumerate((*last, module.v_proj)):

                def keep(_module: Any, _args: Any, output: Tensor, place: int = place, layer: Any = layer) -> None:
                    layer[place] = output.detach()

                undo.callback(projection.register_forward_hook(keep).remove)
        yield found
