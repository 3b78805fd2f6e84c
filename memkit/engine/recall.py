"""The backward pass of an additive policy, without a graph per chunk.

Forward keeps, per chunk, how the slots it touched read before and what they summed after: as many numbers as the chunk
has. Backward then walks the steps in reverse, restores how slots read at each, and carries two gradients along: that of
how each slot reads, until the fold that read it anew turns it into its sums' gradient; and that of the sums, which a
slot's tokens gather on the way (it is the suffix sum over all later readings).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from memkit.engine.call import Call
from memkit.engine.fold import Chunk, Fold, Slots, contributions, read_slots
from memkit.engine.parts import Parts, Queries, heated
from memkit.engine.read import attend_parts_backward
from memkit.engine.schedule import Step
from memkit.engine.timeline import columns
from memkit.memory import Ready

__all__ = ["Recorded", "backward"]


@dataclasses.dataclass
class Recorded:
    """What a forward pass leaves for the backward pass, besides the tensors it was given and its outputs.

    slots: as they read at the end, their undo list, and (not used here) their sums; sums, scalars: what they started
    from, None where there was no memory.
    """

    call: Call
    steps: list[Step]
    parts: Parts
    slots: Slots
    sums: Tensor | None
    scalars: Tensor | None


@dataclasses.dataclass
class Grads:
    """Gradients of what the pass was given: queries for the window and the slots (one tensor where those are),
    temperatures, timeline, LayerNorm, first sums."""

    windowed: Tensor
    remembering: Tensor
    window_heat: Tensor | None
    memory_heat: Tensor | None
    keys: Tensor
    values: Tensor
    weights: Tensor | None
    norm: list[Tensor]
    sums: Tensor
    scalars: Tensor


def backward(
    recorded: Recorded,
    queries: Queries,
    weights: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_sums: Tensor,
    grad_scalars: Tensor,
) -> Grads:
    """Gradients of all inputs from those of the output, the final sums and the final scalars."""
    parts, slots, undo = recorded.parts, _copied(recorded.slots), list(recorded.slots.undo or [])
    wide = grad_sums.dtype
    call = recorded.call
    if call.key_norm is not None:
        call = dataclasses.replace(call, key_norm=tuple(_leaf(tensor) for tensor in call.key_norm))
    for_windowed = torch.zeros_like(queries.windowed)
    grads = Grads(
        windowed=for_windowed,
        remembering=for_windowed if queries.alike else torch.zeros_like(queries.remembering),
        window_heat=None if queries.window_heat is None else torch.zeros_like(queries.window_heat),
        memory_heat=None if queries.memory_heat is None else torch.zeros_like(queries.memory_heat),
        keys=torch.zeros_like(parts.keys, dtype=wide),
        values=torch.zeros_like(parts.values, dtype=wide),
        weights=None if weights is None else torch.zeros_like(weights, dtype=wide),
        norm=[torch.zeros_like(tensor) for tensor in call.key_norm or ()],
        sums=grad_sums.clone(memory_format=torch.contiguous_format),
        scalars=grad_scalars.clone(memory_format=torch.contiguous_format),
    )
    reading = [torch.zeros_like(tensor, dtype=wide) for tensor in (slots.ready.keys, slots.ready.values)]
    for step in reversed(recorded.steps):
        if step.stop > step.start:
            span = slice(step.start, step.stop)
            met = parts.of(step, queries, slots.ready if step.most_slots else None)
            found = attend_parts_backward(met, call.scale, output[:, :, span], lse[:, :, span], grad_output[:, :, span])
            for part, (asked, keys, values) in zip(met, found, strict=True):
                if part.columns is None:
                    _cool(asked, queries.remembering[:, :, span], queries.memory_heat, grads.memory_heat)
                    grads.remembering[:, :, span] += heated(asked, queries.memory_heat)
                    reading[0][:, :, : keys.shape[2]] += keys
                    reading[1][:, :, : keys.shape[2]] += values
                else:
                    _cool(asked, queries.windowed[:, :, span], queries.window_heat, grads.window_heat)
                    grads.windowed[:, :, span] += heated(asked, queries.window_heat)
                    grads.keys[:, :, slice(*part.columns)] += keys
                    grads.values[:, :, slice(*part.columns)] += values
        if step.exit is not None and undo:
            fold = undo.pop()
            _unfold(call, fold, reading, grads)
            slots.restore(fold, *_sums_before(recorded, undo, grads))
    if recorded.sums is not None and recorded.scalars is not None:
        sums, scalars, *norm = _through_reading(call, recorded.sums, recorded.scalars, reading)
        grads.sums += sums
        grads.scalars += scalars
        _add(grads.norm, norm)
    return grads


def _cool(grad: Tensor, queries: Tensor, heat: Tensor | None, into: Tensor | None) -> None:
    """Add a temperature's gradient, [h], from that of the heated queries [b, h, s, d]."""
    if heat is not None and into is not None:
        into += torch.einsum("bhsd,bhsd->h", grad, queries).to(into.dtype)


def _copied(slots: Slots) -> Slots:
    """Slots that may be restored without a trace: the graph may be walked again."""
    end = slots.ready
    bias = None if end.bias is None else end.bias.clone()
    ready = Ready(end.route, end.keys.clone(), end.values.clone(), bias)
    return Slots(slots.call, slots.sums, slots.scalars, ready, in_place=True)


def _sums_before(recorded: Recorded, undo: list[Fold], grads: Grads) -> tuple[Tensor | None, Tensor | None]:
    """All sums and scalars as the last fold of `undo` left them, if it says; what the pass started from if none."""
    if not undo:
        return recorded.sums, recorded.scalars
    last = undo[-1]
    if last.before is not None:
        return None, None
    return last.sums.view_as(grads.sums), last.scalars.view_as(grads.scalars)


def _unfold(call: Call, fold: Fold, reading: list[Tensor], grads: Grads) -> None:
    """Carry gradients back through one fold."""
    touched, flat = fold.touched, [tensor.flatten(0, 2) for tensor in reading]
    # A slot touched by several tokens stands several times in `touched`; its gradient passes through one of them.
    order = torch.arange(len(touched), device=touched.device)
    first = torch.full((flat[0].shape[0],), len(touched), device=touched.device)
    first = first.scatter_reduce(0, touched, order, "amin")[touched] == order
    given = [tensor[touched] * first.unsqueeze(-1) for tensor in flat]
    for tensor in flat:
        tensor.index_fill_(0, touched, 0)
    sums, scalars, *norm = _through_reading(call, fold.sums, fold.scalars, given)
    _add(grads.norm, norm)
    all_sums, all_scalars = grads.sums.flatten(0, 2), grads.scalars.flatten(0, 2)
    all_sums.index_add_(0, touched, sums)
    all_scalars.index_add_(0, touched, scalars)

    stored = (fold.placement.slot >= 0).unsqueeze(-1)
    rows = all_sums[fold.target].view(*stored.shape[:3], -1) * stored
    numbers = all_scalars[fold.target].view(*stored.shape[:3], -1) * stored
    keys, values, weights, *norm = _through_contributions(call, fold.chunk, fold.placement.founders, rows, numbers)
    _add(grads.norm, norm)
    for whole, part in ((grads.keys, keys), (grads.values, values), (grads.weights, weights)):
        if whole is not None and part is not None:
            _add_columns(whole, fold.chunk.where, part)


def _through_reading(call: Call, sums: Tensor, scalars: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of sums, scalars and LayerNorm from those of how slots read."""
    with torch.enable_grad():
        sums, scalars = _leaf(sums), _leaf(scalars)
        ready = read_slots(call, sums, scalars)
        return _gradients([ready.keys, ready.values], [sums, scalars, *(call.key_norm or ())], grads)


def _through_contributions(
    call: Call, chunk: Chunk, founded: Tensor | None, rows: Tensor, scalars: Tensor
) -> list[Tensor | Any]:
    """Gradients of a chunk's keys, values, weights (None where it has none) and LayerNorm from those of its rows."""
    with torch.enable_grad():
        given = {name: getattr(chunk, name) for name in ("keys", "values", "weights")}
        leaves = {name: None if tensor is None else _leaf(tensor) for name, tensor in given.items()}
        outputs = contributions(call, dataclasses.replace(chunk, **leaves), founded)
        present = [leaf for leaf in leaves.values() if leaf is not None]
        found = _gradients(list(outputs), [*present, *(call.key_norm or ())], [rows, scalars])
    if leaves["weights"] is None:
        found.insert(2, None)  # type: ignore[arg-type]
    return found


def _gradients(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the inputs; zeros where an output does not depend on one."""
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _add(sums: list[Tensor], parts: list[Tensor]) -> None:
    for whole, part in zip(sums, parts, strict=True):
        whole += part


def _add_columns(timeline: Tensor, where: slice | Tensor, part: Tensor) -> None:
    if isinstance(where, slice):
        columns(timeline, where).add_(part)
        return
    index = where.reshape(where.shape[0], 1, where.shape[1], *[1] * (timeline.ndim - 3))
    timeline.scatter_add_(2, index.expand_as(part), part.to(timeline.dtype))
