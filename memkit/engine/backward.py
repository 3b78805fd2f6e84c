"""One call as one node of autograd's graph, for additive policies: no graph per chunk.

Forward keeps what going back through its folds takes: per chunk, how the slots it touched read before and what they
summed after, as many numbers as the chunk has (`gradients.py`); or, where chunks are folded together, where their
tokens went (`together.py`). Backward walks the steps in reverse.

Every tensor that backward needs goes through `save_for_backward`: autograd then notices what was changed in place
since, saved-tensor hooks see them, and they are freed with the graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkit.engine.autocast import autocasts, without_autocast
from memkit.engine.gradients import ChunkByChunk, Kept
from memkit.engine.keysets import Queries
from memkit.engine.read import once_only
from memkit.engine.schedule import Schedule, Step
from memkit.engine.stretch import Stretch
from memkit.engine.together import KeptTogether, Together
from memkit.memory.rows import SlotRules, SlotView
from memkit.memory.slots import Fold
from memkit.pieces.rotary import Rotation

__all__ = ["Inputs", "Passed", "attend_as_one_node"]


@dataclass(frozen=True)
class Inputs:
    """What a pass is given that gradients may flow to.

    queries; keys [b, g, n, d], values [b, g, n, v], weights [b, g, n]: the timeline; sums [b, g, m, d + v], numbers
    [b, g, m, s]: what slots hold at first. The LayerNorm is in the rules.
    """

    queries: Queries
    keys: Tensor
    values: Tensor
    weights: Tensor | None
    sums: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class Passed:
    """What a pass leaves. output [b, h, t, v]; lse [b, h, t]; sums, numbers: what slots hold at last; view: how they
    read then; folds: what undoing each fold takes, the first one first; or stretches alone, where chunks were folded
    together."""

    output: Tensor
    lse: Tensor
    sums: Tensor
    numbers: Tensor
    view: SlotView | None
    folds: list[Fold]
    stretches: list[Stretch | None] | None = None


def attend_as_one_node(
    forward: Callable[[Inputs], Passed],
    inputs: Inputs,
    rules: SlotRules,
    schedule: Schedule,
    scale: float,
    positions: Tensor | None,
    fresh: bool,
    groups: list[list[Step]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, sums and numbers of a pass, with a gradient.

    positions [b, 1, n]: those of the timeline; fresh: whether there was no memory, so that nothing was read at first;
    groups: the schedule's steps, those together that are read together.
    """
    queries = inputs.queries
    facts = (rules, schedule, groups, scale, positions, fresh)
    return _Pass.apply(
        forward,
        facts,
        queries.windowed,
        None if queries.alike else queries.remembering,
        queries.window_scale,
        queries.memory_scale,
        inputs.keys,
        inputs.values,
        inputs.weights,
        *(rules.key_norm or (None, None)),
        inputs.sums,
        inputs.numbers,
    )


class _Pass(torch.autograd.Function):
    """The pass as one node."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[[Inputs], Passed],
        facts: tuple[SlotRules, Schedule, list[list[Step]], float, Tensor | None, bool],
        windowed: Tensor,
        remembering: Tensor | None,
        window_scale: Tensor | None,
        memory_scale: Tensor | None,
        keys: Tensor,
        values: Tensor,
        weights: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        sums: Tensor,
        numbers: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rules, schedule, groups, scale, positions, fresh = facts
        queries = Queries(windowed, windowed if remembering is None else remembering, window_scale, memory_scale)
        passed = forward(Inputs(queries, keys, values, weights, sums, numbers))
        rotation = rules.rotation
        turned = (positions, None if rotation is None else rotation.frequencies)
        if passed.stretches is not None:
            kept = KeptTogether(passed.stretches, passed.lse, *turned)
        else:
            assert passed.view is not None
            read = (_apart(passed.view.keys, passed.sums), _apart(passed.view.values, passed.sums), passed.view.bias)
            started = None if fresh else (sums, numbers)
            kept = Kept(read, passed.folds, passed.lse, started, passed.sums.shape[2], *turned)
        inputs = (windowed, remembering, window_scale, memory_scale, keys, values, weights, norm_weight, norm_bias)
        saved: list[Tensor | None] = [*inputs, passed.output]
        # Rules and schedule stay, but for their tensors.
        ctx.rules, ctx.schedule, ctx.scale = dataclasses.replace(rules, key_norm=None, rotation=None), schedule, scale
        ctx.groups = groups
        ctx.rotation = None if rotation is None else (rotation.pairing, rotation.width)
        ctx.kept = _without_tensors(kept, saved)
        ctx.save_for_backward(*saved)
        return passed.output, passed.sums, passed.numbers

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        windowed, remembering, window_scale, memory_scale, keys, values, weights, *norms, output = saved[:10]
        kept: Kept | KeptTogether = _with_tensors(ctx.kept, saved)
        rotation = None
        if ctx.rotation is not None and kept.frequencies is not None:
            rotation = Rotation(ctx.rotation[0], ctx.rotation[1], kept.frequencies)
        norm = None if norms[0] is None else (norms[0].detach(), norms[1].detach())
        rules = dataclasses.replace(ctx.rules, key_norm=norm, rotation=rotation)
        queries = Queries(windowed, windowed if remembering is None else remembering, window_scale, memory_scale)
        with torch.no_grad(), without_autocast(keys.device) if autocasts(keys.device) else nullcontext():
            walk = Together if isinstance(kept, KeptTogether) else ChunkByChunk
            back = walk(rules, ctx.schedule, ctx.groups, ctx.scale, queries, keys, values, weights, kept)
            grads = back.run(output, *given)
        given_back = [
            grads.windowed,
            None if remembering is None else grads.remembering,
            grads.window_scale,
            grads.memory_scale,
            grads.keys.to(keys.dtype),
            grads.values.to(values.dtype),
            grads.weights,
            *(grads.norm or (None, None)),
            grads.sums,
            grads.numbers,
        ]
        return None, None, *once_only(given_back, [*given, *saved])


def _apart(tensor: Tensor, returned: Tensor) -> Tensor:
    """The tensor, or a copy of a view of one that the node returns: that one holds the node, which would hold it."""
    same = tensor.untyped_storage().data_ptr() == returned.untyped_storage().data_ptr()
    return tensor.clone() if same else tensor


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands among the saved ones."""

    index: int


_RECORDS = (Kept, KeptTogether, Fold, Stretch)
_HAVE_TENSORS = (Tensor, _Place, list, tuple, *_RECORDS)


def _without_tensors(part: Any, saved: list[Tensor | None]) -> Any:
    """A copy of nested records with a `_Place` for each tensor, which goes to the end of `saved`."""
    if isinstance(part, Tensor):
        saved.append(part)
        return _Place(len(saved) - 1)
    return _mapped(part, lambda each: _without_tensors(each, saved))


def _with_tensors(part: Any, saved: tuple[Tensor, ...]) -> Any:
    """The records again."""
    if isinstance(part, _Place):
        return saved[part.index]
    return _mapped(part, lambda each: _with_tensors(each, saved))


def _mapped(part: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(part, (list, tuple)):
        return type(part)(change(each) for each in part)
    if isinstance(part, _RECORDS):
        changed = copy.copy(part)
        for name, each in vars(part).items():
            if isinstance(each, _HAVE_TENSORS):
                object.__setattr__(changed, name, change(each))
        return changed
    return part
