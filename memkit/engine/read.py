"""READ: queries attend to several sets of keys apart, and the results merge into one exact softmax.

With o_i, l_i the output and log-sum-exp of set i alone:  l = log Σ exp l_i,  o = Σ exp(l_i − l) · o_i.
Each set has its own queries, so query scales, un-rotated memory and grouped queries cost nothing extra.
The gradient of each set's attention, taken with the *merged* o and l, is that set's share of the exact gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from memkit.errors import InputError
from memkit.memory.window import side_by_side

__all__ = [
    "KeySet",
    "attend_key_sets",
    "attend_key_sets_backward",
    "default_scale",
    "differentiable_key_sets",
    "once_only",
]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_gpu_flash = torch.ops.aten._scaled_dot_product_flash_attention.default
_gpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
_efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default

EFFICIENT_QUERIES, EFFICIENT_KEYS = 32, 16
"""Numbers of which that kernel wants a multiple: log-sum-exps of a head, and columns between two rows of a bias."""

FLASH_WIDTH, FLASH_WIDEST = 8, 256
"""Channels of a head that the GPU's flash kernel wants a multiple of, and the most that it takes."""


@dataclass
class KeySet:
    """One set of keys and the queries that meet it.

    queries [b, h, s, d], keys [b, g, n, d], values [b, g, n, v], n ≥ 1; bias [b|1, g|1, s|1, n]: added to the scores,
    no gradient, −∞ hides a key; causal: query i sees keys 0 … i (then n = s); columns: where on the timeline the keys
    stand, None for slots; hides: whether the bias may hide all of this set's keys from a query; counts: where
    batch rows are those of k steps, [b·k, …], how many of the keys each step sees, the others being nobody's; parts:
    what keys and values were put together of, where a graph is recorded and they have none.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    causal: bool = False
    columns: tuple[int, int] | None = None
    hides: bool = False
    counts: tuple[int, ...] | None = None
    parts: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None

    def by_step(self) -> list[KeySet]:
        """The set of each step, with the keys that it sees: no mask, and no kernel that takes one, is needed."""
        assert self.counts is not None
        bias = self.bias.unflatten(0, (-1, len(self.counts))) if self.bias is not None else None
        queries, keys, values = (
            tensor.unflatten(0, (-1, len(self.counts))) for tensor in (self.queries, self.keys, self.values)
        )
        return [
            KeySet(
                queries[:, step],
                keys[:, step, :, :count],
                values[:, step, :, :count],
                None if bias is None else bias[:, step, ..., :count],
            )
            for step, count in enumerate(self.counts)
        ]

    def sees_nothing(self) -> Tensor | None:
        """Queries from which the whole set is hidden, bool, broadcastable to [b, h, s]; None where there are none."""
        return (self.bias == -torch.inf).all(-1)[:, :1] if self.hides and self.bias is not None else None


def attend_key_sets(key_sets: list[KeySet], scale: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One softmax over all sets' keys: outputs [b, h, s, v], in `out` if given, and log-sum-exp [b, h, s]; no graph.

    Every query must see a key of at least one key_set.
    """
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    for key_set in key_sets:
        output, lse = _attended(key_set, scale)
        if (nothing := key_set.sees_nothing()) is not None:  # of which kernels say what they like
            output, lse = output.masked_fill(nothing.unsqueeze(-1), 0), lse.masked_fill(nothing, -torch.inf)
        outputs.append(output)
        sums.append(lse)
    total, merged = sums[0], outputs[0]
    if len(key_sets) > 1:
        for lse in sums[1:]:
            total = torch.logaddexp(total, lse)
        shares = [(lse - total).exp_().unsqueeze(-1) for lse in sums]
        # In the wider dtype of the sums; where that is the outputs' own, nothing is copied afterwards.
        into = out if out is not None and out.dtype == total.dtype else None
        merged = torch.mul(outputs[0], shares[0], out=into)
        for output, share in zip(outputs[1:], shares[1:], strict=True):
            merged.addcmul_(output, share)
    if out is None:
        return merged.to(outputs[0].dtype), total
    return out if merged is out else out.copy_(merged), total


def attend_key_sets_backward(
    key_sets: list[KeySet], scale: float, output: Tensor, lse: Tensor, grad: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gradients of queries, keys and values of each key_set, from the merged output, log-sum-exp and its gradient."""
    return [_attended_backward(key_set, scale, output, lse, grad) for key_set in key_sets]


def _attended(key_set: KeySet, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one set alone."""
    if key_set.counts is not None:
        of_steps = zip(*(_attended(each, scale) for each in key_set.by_step()), strict=True)
        output, lse = (torch.stack(each, dim=1).flatten(0, 1) for each in of_steps)
        return output, lse
    layout, heads = _Layout(key_set), key_set.queries.shape[1]
    output, lse = _forward(layout, key_set.causal, scale)
    return layout.ungroup(output, heads)[..., : key_set.values.shape[-1]], layout.ungroup(lse, heads)


def _attended_backward(
    key_set: KeySet, scale: float, output: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one set's queries, keys and values, from the merged output, log-sum-exp and its gradient."""
    if key_set.counts is not None:
        queries, keys, values = (torch.zeros_like(each) for each in (key_set.queries, key_set.keys, key_set.values))
        steps = len(key_set.counts)
        whole = [each.unflatten(0, (-1, steps)) for each in (queries, keys, values)]
        given = [each.unflatten(0, (-1, steps)) for each in (output, lse, grad)]
        for step, part in enumerate(key_set.by_step()):
            of_part = _attended_backward(part, scale, *(each[:, step] for each in given))
            whole[0][:, step] = of_part[0]
            for into, each in zip(whole[1:], of_part[1:], strict=True):
                into[:, step, :, : each.shape[2]] = each
        return queries, keys, values
    layout = _Layout(key_set)
    grads = _backward(layout, key_set.causal, scale, layout.group(output), layout.group(lse), layout.group(grad))
    return layout.restore(*grads)


def differentiable_key_sets(key_sets: list[KeySet], scale: float) -> Tensor:
    """`attend_key_sets` with a graph: [b, h, s, v]."""
    given = [
        ((each.queries,), *(((each.keys,), (each.values,)) if each.parts is None else each.parts)) for each in key_sets
    ]
    sizes = [tuple(map(len, each)) for each in given]
    return _Merged.apply(key_sets, scale, sizes, *(tensor for each in given for parts in each for tensor in parts))


class _Merged(torch.autograd.Function):
    """Kept for the way back are the parts that keys and values were put together of: they are views, and a copy for
    each step would be as many copies of the window as there are steps."""

    @staticmethod
    def forward(
        ctx: Any, key_sets: list[KeySet], scale: float, sizes: list[tuple[int, ...]], *tensors: Tensor
    ) -> Tensor:
        output, lse = attend_key_sets(key_sets, scale)
        ctx.scale, ctx.sizes, ctx.causal = scale, sizes, [key_set.causal for key_set in key_sets]
        ctx.save_for_backward(output, lse, *tensors, *(key_set.bias for key_set in key_sets))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        output, lse, *saved = ctx.saved_tensors
        tensors, biases = saved[: -len(ctx.sizes)], saved[-len(ctx.sizes) :]
        with torch.no_grad():
            left, parts = iter(tensors), list[list[Tensor]]()
            key_sets = list[KeySet]()
            for sizes, bias, causal in zip(ctx.sizes, biases, ctx.causal, strict=True):
                of_set = [list(itertools.islice(left, size)) for size in sizes]
                parts += of_set
                queries, keys, values = map(side_by_side, of_set)
                key_sets.append(KeySet(queries, keys, values, bias, causal))
            triples = attend_key_sets_backward(key_sets, ctx.scale, output, lse, grads[0])
            wholes = [grad for triple in triples for grad in triple]
            flat = [
                grad
                for whole, of_it in zip(wholes, parts, strict=True)
                for grad in whole.split([each.shape[2] for each in of_it], dim=2)
            ]
        return None, None, None, *once_only(flat, [*grads, *tensors])


def once_only(grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Gradients that a backward pass of ours returns; differentiating them again is an error, not silently zero.

    sources: what the gradients were computed from. Without `create_graph` nothing happens.
    """
    live = [source for source in sources if source is not None and source.requires_grad]
    present = [index for index, grad in enumerate(grads) if grad is not None]
    if not torch.is_grad_enabled() or not live:
        return grads
    marked = _OnceOnly.apply(len(present), *(grads[index] for index in present), *live)
    returned = list(grads)
    for index, grad in zip(present, marked, strict=True):
        returned[index] = grad
    return returned


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise InputError(
            "memkit.attend has no second derivative, and a gradient of it was differentiated again; "
            "leave create_graph out, or detach() the gradient where it enters another loss"
        )


def default_scale(width: int) -> float:
    """1/√d."""
    return 1 / math.sqrt(width)


class _Layout:
    """A key_set as the kernels take it: one head count and one width for queries, keys and values.

    Grouped queries: a group's queries stand in a row before their one key/value head; where the causal mask forbids
    that, the set's keys and values (a chunk's at most) are repeated. Unequal widths: zeros fill the narrower tensors,
    which changes no score and no value. Channels that do not stand next to each other: a copy in which they do, for the
    kernels take that for granted, and the CPU's reads what stands there instead without a word.
    """

    def __init__(self, key_set: KeySet) -> None:
        queries, keys, values, bias = key_set.queries, key_set.keys, key_set.values, key_set.bias
        self.heads, self.kv_heads = queries.shape[1], keys.shape[1]
        self.ratio = self.heads // self.kv_heads
        self.repeats = self.ratio > 1 and key_set.causal
        self.folds = self.ratio > 1 and not key_set.causal
        if self.repeats:
            keys, values = keys.repeat_interleave(self.ratio, 1), values.repeat_interleave(self.ratio, 1)
        queries = self.group(queries)
        if self.folds and bias is not None and bias.shape[2] > 1:
            bias = bias.repeat(1, 1, self.ratio, 1)
        self.key_width, self.value_width = keys.shape[-1], values.shape[-1]
        missing = self.value_width - self.key_width
        if missing > 0:
            queries, keys = pad(queries, (0, missing)), pad(keys, (0, missing))
        elif missing < 0:
            values = pad(values, (0, -missing))
        self.queries, self.keys, self.values = _dense(queries), _dense(keys), _dense(values)
        self.bias = bias

    def group(self, tensor: Tensor) -> Tensor:
        """Per query head [b, h, s, …] → as the kernel's queries are laid out."""
        return rearrange(tensor, "b (g r) s ... -> b g (r s) ...", r=self.ratio) if self.folds else tensor

    def ungroup(self, tensor: Tensor, heads: int) -> Tensor:
        """As the kernel's queries are laid out → per query head [b, h, s, …]."""
        return rearrange(tensor, "b g (r s) ... -> b (g r) s ...", r=self.ratio) if self.folds else tensor

    def restore(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's gradients → the set's."""
        queries = self.ungroup(queries, self.heads)[..., : self.key_width]
        keys, values = keys[..., : self.key_width], values[..., : self.value_width]
        if self.repeats:
            keys, values = (rearrange(t, "b (g r) n d -> b g r n d", r=self.ratio).sum(2) for t in (keys, values))
        return queries, keys, values


def _forward(layout: _Layout, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [b, h, s, v] and log-sum-exp [b, h, s] (natural, of scores as scaled and biased), for queries as they are
    laid out; by PyTorch's fused kernel where there is one that gives both. What queries get that see none of the set's
    keys is anybody's guess: the caller knows them (`sees_nothing`)."""
    match _kernel(layout):
        case "flash":
            return _flash(layout.queries, layout.keys, layout.values, 0.0, causal, attn_mask=layout.bias, scale=scale)
        case "gpu flash":
            return _gpu_flash(layout.queries, layout.keys, layout.values, 0.0, causal, scale=scale)[:2]
        case "efficient":
            tensors = (layout.queries, layout.keys, layout.values, _aligned(layout))
            output, lse, _, _ = _efficient(*tensors, True, 0.0, causal, scale=scale)
            return output, lse[..., : layout.queries.shape[2]]
        case "plain":
            scores = _scores(layout, causal, scale)
            return scores.softmax(-1).to(layout.values.dtype) @ layout.values, scores.logsumexp(-1)


def _backward(
    layout: _Layout, causal: bool, scale: float, output: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values of one set, from the output and log-sum-exp of *all* sets together, and the
    gradient of that output."""
    missing = layout.values.shape[-1] - grad.shape[-1]
    if missing:
        output, grad = pad(output, (0, missing)), pad(grad, (0, missing))
    output, grad = _dense(output), _dense(grad)
    match _kernel(layout):
        case "flash":
            tensors = (grad, layout.queries, layout.keys, layout.values, output, lse)
            return _flash_backward(*tensors, 0.0, causal, attn_mask=layout.bias, scale=scale)
        case "gpu flash":
            lengths = (layout.queries.shape[2], layout.keys.shape[2])
            seed = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # of a dropout that there is not
            # The kernel takes log-sum-exps for granted one after the other, and asks for nothing.
            tensors = (grad, layout.queries, layout.keys, layout.values, output, lse.contiguous(), None, None)
            return _gpu_flash_backward(*tensors, *lengths, 0.0, causal, seed, seed[0], scale=scale)
        case "efficient":
            # In half precision this kernel's gradients of sets with a bias are wrong, and others each time (seen with
            # PyTorch 2.11 on an H200); in float32 they are right.
            narrow = (grad, layout.queries, layout.keys, layout.values)
            tensors = (*(tensor.float() for tensor in narrow), _aligned(layout, torch.float32), output.float())
            lse = pad(lse, (0, -lse.shape[-1] % EFFICIENT_QUERIES), value=torch.inf)
            seed = torch.zeros((), dtype=torch.long, device=grad.device)  # of a dropout that there is not
            options = (seed, seed, 0.0, (True, True, True, False), causal)
            in_float32 = _efficient_backward(*tensors, lse, *options, scale=scale)[:3]
            return tuple(tensor.to(grad.dtype) for tensor in in_float32)  # type: ignore[return-value]
        case "plain":
            shares = (_scores(layout, causal, scale) - lse.unsqueeze(-1)).exp()
            wide = grad.to(shares.dtype)
            per_score = wide @ layout.values.to(shares.dtype).mT - (wide * output).sum(-1, keepdim=True)
            per_score = shares * per_score * scale
            queries, keys = layout.queries.to(shares.dtype), layout.keys.to(shares.dtype)
            grads = (per_score @ keys, per_score.mT @ queries, shares.mT @ wide)
            return tuple(tensor.to(grad.dtype) for tensor in grads)  # type: ignore[return-value]


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with the numbers of its last axis next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _kernel(layout: _Layout) -> Literal["flash", "gpu flash", "efficient", "plain"]:
    """What computes attention: one of PyTorch's fused kernels that give the log-sum-exp, or products and a softmax."""
    queries, device = layout.queries, layout.queries.device.type
    if device == "cpu":
        return "flash"
    if device != "cuda" or queries.dtype == torch.float64:
        return "plain"
    width = queries.shape[-1]
    fits = layout.bias is None and width % FLASH_WIDTH == 0 and width <= FLASH_WIDEST
    return "gpu flash" if fits and queries.dtype != torch.float32 else "efficient"


def _aligned(layout: _Layout, dtype: torch.dtype | None = None) -> Tensor | None:
    """The set's bias for every query head and query, its rows as far apart as the kernel's loads want them."""
    if layout.bias is None:
        return None
    size = layout.bias.shape[-1]
    padded = pad(layout.bias.to(dtype or layout.bias.dtype), (0, -size % EFFICIENT_KEYS))
    return padded.expand(*layout.queries.shape[:3], -1)[..., :size]


def _scores(layout: _Layout, causal: bool, scale: float) -> Tensor:
    scores = (layout.queries @ layout.keys.mT).to(torch.promote_types(layout.queries.dtype, torch.float32)) * scale
    if layout.bias is not None:
        scores = scores + layout.bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores
