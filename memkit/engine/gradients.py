"""The gradients of a pass: one walk back through its steps.

At each step how slots read is restored, and two gradients are carried along: that of how each slot reads, until the
fold that read it anew turns it into its sums' gradient; and that of the sums, which a slot's tokens gather on the way
(it is the suffix sum over all later readings).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkit.engine.keysets import KeySets, Queries, scaled
from memkit.engine.read import attend_key_sets_backward
from memkit.engine.schedule import Schedule
from memkit.memory.rows import Chunk, SlotRules, SlotView, contributions, read_slots
from memkit.memory.slots import Fold, flat_slots
from memkit.memory.window import Columns, columns

__all__ = ["Kept", "Walk"]


@dataclass
class Kept:
    """What a pass leaves for its backward pass besides its inputs and its output.

    read: how slots read at last; started: the sums and numbers they started from, None where there was no memory;
    room: slots there is room for; positions [b, 1, n] of the timeline; frequencies of the rotation.
    """

    read: tuple[Tensor, Tensor, Tensor | None]
    folds: list[Fold]
    lse: Tensor
    started: tuple[Tensor, Tensor] | None
    room: int
    positions: Tensor | None
    frequencies: Tensor | None


@dataclass
class Grads:
    """Gradients of what the pass was given: queries for the window and the slots (one tensor where those are),
    query scales, timeline, LayerNorm, first sums."""

    windowed: Tensor
    remembering: Tensor
    window_scale: Tensor | None
    memory_scale: Tensor | None
    keys: Tensor
    values: Tensor
    weights: Tensor | None
    norm: list[Tensor]
    sums: Tensor
    numbers: Tensor


class Walk:
    """One walk back through the steps of a pass. The graph may be walked again: nothing that was kept is changed."""

    def __init__(
        self,
        rules: SlotRules,
        schedule: Schedule,
        scale: float,
        queries: Queries,
        keys: Tensor,
        values: Tensor,
        weights: Tensor | None,
        kept: Kept,
    ) -> None:
        self.rules, self.schedule, self.scale, self.queries, self.weights = rules, schedule, scale, queries, weights
        self.kept, self.folds = kept, list(kept.folds)
        self.key_sets = KeySets(schedule, keys.detach(), values.detach())
        self.view = self._record(*(None if tensor is None else tensor.clone() for tensor in kept.read))

    def run(self, output: Tensor, grad_output: Tensor, grad_sums: Tensor, grad_numbers: Tensor) -> Grads:
        """Gradients of all inputs from those of the output, the final sums and the final numbers."""
        grads, reading = self._nothing_yet(grad_sums, grad_numbers)
        queries, lse = self.queries, self.kept.lse
        for step in reversed(self.schedule.steps):
            if step.stop > step.start:
                span = slice(step.start, step.stop)
                met = self.key_sets.of(step, queries, self.view if step.most_slots else None)
                found = attend_key_sets_backward(
                    met, self.scale, output[:, :, span], lse[:, :, span], grad_output[:, :, span]
                )
                for key_set, (asked, keys, values) in zip(met, found, strict=True):
                    if key_set.columns is None:
                        _scale_gradient(
                            asked, queries.remembering[:, :, span], queries.memory_scale, grads.memory_scale
                        )
                        grads.remembering[:, :, span] += scaled(asked, queries.memory_scale)
                        reading[0][:, :, : keys.shape[2]] += keys
                        reading[1][:, :, : keys.shape[2]] += values
                    else:
                        _scale_gradient(asked, queries.windowed[:, :, span], queries.window_scale, grads.window_scale)
                        grads.windowed[:, :, span] += scaled(asked, queries.window_scale)
                        grads.keys[:, :, slice(*key_set.columns)] += keys
                        grads.values[:, :, slice(*key_set.columns)] += values
            for _ in step.leaving:
                if self.folds:
                    fold = self.folds.pop()
                    self._unfold(fold, reading, grads)
                    self._restore(fold)
        if self.kept.started is not None:
            sums, numbers, *norm = _through_reading(self.rules, *self.kept.started, reading)
            grads.sums += sums
            grads.numbers += numbers
            _add(grads.norm, norm)
        return grads

    def _nothing_yet(self, grad_sums: Tensor, grad_numbers: Tensor) -> tuple[Grads, list[Tensor]]:
        """The gradients to add to, and those of how slots read."""
        queries, key_sets, wide = self.queries, self.key_sets, grad_sums.dtype
        for_windowed = torch.zeros_like(queries.windowed)
        grads = Grads(
            windowed=for_windowed,
            remembering=for_windowed if queries.alike else torch.zeros_like(queries.remembering),
            window_scale=None if queries.window_scale is None else torch.zeros_like(queries.window_scale),
            memory_scale=None if queries.memory_scale is None else torch.zeros_like(queries.memory_scale),
            keys=torch.zeros_like(key_sets.keys, dtype=wide),
            values=torch.zeros_like(key_sets.values, dtype=wide),
            weights=None if self.weights is None else torch.zeros_like(self.weights),
            norm=[torch.zeros_like(tensor) for tensor in self.rules.key_norm or ()],
            sums=grad_sums.clone(memory_format=torch.contiguous_format),
            numbers=grad_numbers.clone(memory_format=torch.contiguous_format),
        )
        return grads, [torch.zeros_like(tensor, dtype=wide) for tensor in (self.view.keys, self.view.values)]

    def _unfold(self, fold: Fold, reading: list[Tensor], grads: Grads) -> None:
        """Carry gradients back through one fold."""
        target = flat_slots(fold.slot, self.kept.room)
        flat = [tensor.flatten(0, 2) for tensor in reading]
        touched = torch.arange(len(flat[0]), device=target.device) if fold.before is None else target
        # A slot touched by several tokens stands several times in `touched`; its gradient passes through one of them.
        order = torch.arange(len(touched), device=touched.device)
        first = torch.full((flat[0].shape[0],), len(touched), device=touched.device)
        first = first.scatter_reduce(0, touched, order, "amin")[touched] == order
        given = [tensor[touched] * first.unsqueeze(-1) for tensor in flat]
        for tensor in flat:
            tensor.index_fill_(0, touched, 0)
        sums, numbers, *norm = _through_reading(self.rules, fold.sums, fold.numbers, given)
        _add(grads.norm, norm)
        all_sums, all_numbers = grads.sums.flatten(0, 2), grads.numbers.flatten(0, 2)
        all_sums.index_add_(0, touched, sums)
        all_numbers.index_add_(0, touched, numbers)

        stored = (fold.slot >= 0).unsqueeze(-1)
        rows = all_sums[target].view(*stored.shape[:3], -1) * stored
        numbers = all_numbers[target].view(*stored.shape[:3], -1) * stored
        chunk = self._chunk(fold)
        keys, values, weights, *norm = _through_contributions(self.rules, chunk, fold.founders, rows, numbers)
        _add(grads.norm, norm)
        for whole, part in ((grads.keys, keys), (grads.values, values), (grads.weights, weights)):
            if whole is not None and part is not None:
                _add_columns(whole, fold.where, part)

    def _chunk(self, fold: Fold) -> Chunk:
        """The tokens of a fold."""
        positions = self.kept.positions
        return Chunk(
            keys=columns(self.key_sets.keys, fold.where),
            values=columns(self.key_sets.values, fold.where),
            weights=None if self.weights is None else columns(self.weights, fold.where),
            positions=None if positions is None else columns(positions, fold.where),
            first=fold.first,
            where=fold.where,
        )

    def _restore(self, fold: Fold) -> None:
        """Read again what was read before a fold, from the sums of then where the fold does not say."""
        if fold.before is not None:
            target = flat_slots(fold.slot, self.kept.room)
            for whole, part in zip((self.view.keys, self.view.values, self.view.bias), fold.before, strict=True):
                if whole is not None and part is not None:
                    whole.flatten(0, 2).index_copy_(0, target, part)
            return
        started = self.kept.started
        if self.folds:
            last = self.folds[-1]
            if last.before is not None:  # how slots read before that one is noted there, and after it not needed
                return
            started = (last.sums, last.numbers)
        if started is not None:
            rows, heads, room = (*self.key_sets.keys.shape[:2], self.kept.room)
            self.view = read_slots(self.rules, *(tensor.reshape(rows, heads, room, -1) for tensor in started))

    @staticmethod
    def _record(keys: Tensor | None, values: Tensor | None, bias: Tensor | None) -> SlotView:
        assert keys is not None and values is not None
        return SlotView(keys, keys, values, bias)


def _scale_gradient(grad: Tensor, queries: Tensor, scale: Tensor | None, into: Tensor | None) -> None:
    """Add a query scale's gradient, [h], from that of the scaled queries [b, h, s, d]."""
    if scale is not None and into is not None:
        into += torch.einsum("bhsd,bhsd->h", grad, queries).to(into.dtype)


def _through_reading(rules: SlotRules, sums: Tensor, numbers: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of sums, numbers and LayerNorm from those of how slots read."""
    with torch.enable_grad():
        sums, numbers, rules = _leaf(sums), _leaf(numbers), _with_norm_as_leaves(rules)
        view = read_slots(rules, sums, numbers)
        return _gradients([view.keys, view.values], [sums, numbers, *(rules.key_norm or ())], grads)


def _through_contributions(
    rules: SlotRules, chunk: Chunk, founded: Tensor | None, rows: Tensor, numbers: Tensor
) -> list[Tensor | Any]:
    """Gradients of a chunk's keys, values, weights (None where it has none) and LayerNorm from those of its rows."""
    with torch.enable_grad():
        rules = _with_norm_as_leaves(rules)
        given = {name: getattr(chunk, name) for name in ("keys", "values", "weights")}
        leaves = {name: None if tensor is None else _leaf(tensor) for name, tensor in given.items()}
        outputs = contributions(rules, dataclasses.replace(chunk, **leaves), founded)
        present = [leaf for leaf in leaves.values() if leaf is not None]
        found = _gradients(list(outputs), [*present, *(rules.key_norm or ())], [rows, numbers])
    if leaves["weights"] is None:
        found.insert(2, None)  # type: ignore[arg-type]
    return found


def _gradients(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the inputs; zeros where an output does not depend on one."""
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]


def _with_norm_as_leaves(rules: SlotRules) -> SlotRules:
    if rules.key_norm is None:
        return rules
    weight, bias = rules.key_norm
    return dataclasses.replace(rules, key_norm=(_leaf(weight), _leaf(bias)))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _add(sums: list[Tensor], parts: list[Tensor]) -> None:
    for whole, part in zip(sums, parts, strict=True):
        whole += part


def _add_columns(timeline: Tensor, where: Columns, part: Tensor) -> None:
    if isinstance(where, slice):
        columns(timeline, where).add_(part)
        return
    index = where.reshape(where.shape[0], 1, where.shape[1], *[1] * (timeline.ndim - 3))
    timeline.scatter_add_(2, index.expand_as(part), part.to(timeline.dtype))
