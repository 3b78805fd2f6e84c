"""READ: queries attend to several sets of keys apart, and the results merge into one exact softmax.

With o_i, l_i the output and log-sum-exp of set i alone:  l = log Σ exp l_i,  o = Σ exp(l_i − l) · o_i.
Each set has its own queries, so temperatures, un-rotated memory and grouped queries cost nothing extra.
The gradient of each set's attention, taken with the *merged* o and l, is that set's share of the exact gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Part", "attend_parts", "hidden"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass
class Part:
    """One set of keys and the queries that meet it.

    queries [b, h, s, d], keys [b, g, n, d], values [b, g, n, v], n ≥ 1; bias [b|1, g|1, s|1, n]: added to the scores,
    no gradient; causal: query i sees keys 0 … i (then n = s).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    causal: bool = False


def hidden(dtype: torch.dtype) -> float:
    """The bias of a key that is not to be seen: as good as −∞, but finite, so that a set may be hidden as a whole."""
    return torch.finfo(dtype).min / 2


def attend_parts(parts: list[Part], scale: float) -> Tensor:
    """One softmax over all parts' keys: [b, h, s, v]. Every query must see a key of at least one part."""
    heads, value_width = parts[0].queries.shape[1], parts[0].values.shape[-1]
    tensors: list[Tensor] = []
    shapes: list[tuple[Tensor | None, bool]] = []
    for part in parts:
        queries, keys, values, bias = part.queries, part.keys, part.values, part.bias
        group = heads // keys.shape[1]
        if group > 1 and part.causal:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        elif group > 1:
            queries = rearrange(queries, "b (g r) s d -> b g (r s) d", r=group)
            if bias is not None and bias.shape[2] > 1:
                bias = bias.repeat(1, 1, group, 1)
        tensors += [*_equal_widths(queries, keys, values)]
        shapes.append((bias, part.causal))
    if tensors[0].device.type == "cpu":
        output = _Merged.apply(scale, heads, shapes, *tensors)
    else:
        output = _merge([_plain(*tensors[3 * i : 3 * i + 3], *shape, scale) for i, shape in enumerate(shapes)], heads)[
            0
        ]
    return output[..., :value_width]


class _Merged(torch.autograd.Function):
    """Attention over all parts with PyTorch's fused CPU kernels, which give and take the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, scale: float, heads: int, shapes: list[tuple[Tensor | None, bool]], *tensors: Tensor
    ) -> Tensor:
        results = []
        for index, (bias, causal) in enumerate(shapes):
            queries, keys, values = tensors[3 * index : 3 * index + 3]
            results.append(_flash(queries, keys, values, 0.0, causal, attn_mask=bias, scale=scale))
        output, lse = _merge(results, heads)
        ctx.scale, ctx.shapes = scale, shapes
        ctx.save_for_backward(output, lse, *tensors)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        output, lse, *tensors = ctx.saved_tensors
        found: list[Tensor] = []
        for index, (bias, causal) in enumerate(ctx.shapes):
            queries, keys, values = tensors[3 * index : 3 * index + 3]
            grad, out, sums = (_grouped(tensor, queries) for tensor in (grads[0], output, lse))
            found += _flash_backward(
                grad, queries, keys, values, out, sums, 0.0, causal, attn_mask=bias, scale=ctx.scale
            )
        return None, None, None, *found


def _merge(results: list[tuple[Tensor, Tensor]], heads: int) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of all parts → those of their union, [b, h, s, v] and [b, h, s]."""
    results = [(_ungrouped(output, heads), _ungrouped(lse, heads)) for output, lse in results]
    if len(results) == 1:
        return results[0]
    total = torch.logsumexp(torch.stack([lse for _, lse in results]), dim=0)
    merged = None
    for output, lse in results:
        share = (lse - total).exp().unsqueeze(-1)
        merged = output * share if merged is None else torch.addcmul(merged, output.to(merged.dtype), share)
    assert merged is not None
    return merged.to(results[0][0].dtype), total


def _plain(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp without a fused kernel, for devices that have none with both."""
    scores = (queries * scale) @ keys.mT
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, hidden(scores.dtype))
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def _grouped(tensor: Tensor, queries: Tensor) -> Tensor:
    """Per query head [b, h, s, …] → as the part's queries are laid out."""
    if tensor.shape[1] == queries.shape[1]:
        return tensor
    return rearrange(tensor, "b (g r) s ... -> b g (r s) ...", g=queries.shape[1])


def _ungrouped(tensor: Tensor, heads: int) -> Tensor:
    """As a part's queries are laid out → per query head [b, h, s, …]."""
    if tensor.shape[1] == heads:
        return tensor
    return rearrange(tensor, "b g (r s) ... -> b (g r) s ...", r=heads // tensor.shape[1])


def _equal_widths(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernels want one width for all: pad with zeros, which changes no score and no value."""
    missing = values.shape[-1] - keys.shape[-1]
    if missing > 0:
        return pad(queries, (0, missing)), pad(keys, (0, missing)), values
    return (queries, keys, pad(values, (0, -missing))) if missing < 0 else (queries, keys, values)


def default_scale(width: int) -> float:
    """1/√d."""
    return 1 / math.sqrt(width)
