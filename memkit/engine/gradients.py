"""The gradients of a pass: one walk back through its steps.

At each step how slots read is restored, and two gradients are carried along: that of how each slot reads, until the
fold that read it anew turns it into its sums' gradient; and that of the sums, which a slot's tokens gather on the way
(it is the suffix sum over all later readings). Steps that were read together go through attention together, and what
each fold makes of its gradients, which no other fold changes, is computed for many folds at once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkit.engine.keysets import KeySets, Queries, Snapshots, apart
from memkit.engine.read import KeySet, attend_key_sets_backward
from memkit.engine.schedule import Schedule, Step
from memkit.memory.rows import Chunk, SlotRules, SlotView, contributions, read_slots
from memkit.memory.slots import Fold
from memkit.memory.window import Columns, columns, joined
from memkit.pieces.chunk import as_tensor

__all__ = [
    "ChunkByChunk",
    "Grads",
    "Kept",
    "Walk",
    "add_columns",
    "gradients_of",
    "leaf",
    "through_contributions",
    "with_norm_as_leaves",
]

UNFOLDED_TOGETHER = 2048
"""Tokens whose folds are undone at once: enough that each fold's share of the overhead is small."""


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
    """Gradients of what the pass was given: queries for the window and the slots (one tensor where those meet both
    alike), their scales, timeline, LayerNorm, first sums."""

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


@dataclass(frozen=True)
class _Taken:
    """A fold, and the gradients [n, …] of how the keys and values of the slots that it read anew were read.

    target: each token's slot, flat. The slots read anew are these, or all (`Fold.before`).
    """

    fold: Fold
    target: Tensor
    reading: list[Tensor]


class Walk(ABC):
    """One walk back through the steps of a pass. The graph may be walked again: nothing that was kept is changed."""

    def __init__(
        self,
        rules: SlotRules,
        schedule: Schedule,
        groups: list[list[Step]],
        scale: float,
        queries: Queries,
        keys: Tensor,
        values: Tensor,
        weights: Tensor | None,
        kept: Any,
    ) -> None:
        self.rules, self.scale, self.queries, self.weights = rules, scale, queries, weights
        self.groups, self.kept = groups, kept
        self.key_sets = KeySets(schedule, keys.detach(), values.detach())

    @abstractmethod
    def run(self, output: Tensor, grad_output: Tensor, grad_sums: Tensor, grad_numbers: Tensor) -> Grads:
        """Gradients of all inputs from those of the output, the final sums and the final numbers."""

    def through_attention(self, met: list[KeySet], steps: list[Step], read: list[Tensor], grads: Grads) -> list[Tensor]:
        """Add the gradients of queries and window of k steps; returns those of the keys and values of their slots,
        [b·k, …], nothing where none was read.

        read: the steps' outputs, log-sum-exps and the outputs' gradients.
        """
        if not met:
            return []
        count, size = len(steps), steps[0].stop - steps[0].start
        span = slice(steps[0].start, steps[-1].stop)
        of_slots: list[Tensor] = []
        of_sets = attend_key_sets_backward(met, self.scale, *(apart(tensor, size, size) for tensor in read))
        for key_set, (asked, keys, values) in zip(met, of_sets, strict=True):
            asked = asked.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)
            if key_set.columns is None:
                grads.remembering[:, :, span].add_(asked)
                of_slots = [keys, values]
                continue
            grads.windowed[:, :, span].add_(asked)
            for whole, part in ((grads.keys, keys), (grads.values, values)):
                _add_stretches(whole, part.unflatten(0, (-1, count)), *key_set.columns, size)
        return of_slots

    def nothing_yet(self, grad_sums: Tensor, grad_numbers: Tensor) -> Grads:
        """The gradients to add to."""
        queries, key_sets, wide = self.queries, self.key_sets, grad_sums.dtype
        for_windowed = torch.zeros_like(queries.windowed)
        together = queries.alike and queries.window_scale is queries.memory_scale
        return Grads(
            windowed=for_windowed,
            remembering=for_windowed if together else torch.zeros_like(queries.remembering),
            window_scale=None,
            memory_scale=None,
            keys=torch.zeros_like(key_sets.keys, dtype=wide),
            values=torch.zeros_like(key_sets.values, dtype=wide),
            weights=None if self.weights is None else torch.zeros_like(self.weights),
            norm=[torch.zeros_like(tensor) for tensor in self.rules.key_norm or ()],
            sums=grad_sums.clone(memory_format=torch.contiguous_format),
            numbers=grad_numbers.clone(memory_format=torch.contiguous_format),
        )

    def through_scales(self, grads: Grads) -> Grads:
        """From gradients of scaled queries to those of queries and scales."""
        queries = self.queries
        grads.window_scale = _through_scale(grads.windowed, queries.windowed, queries.window_scale)
        if grads.remembering is not grads.windowed:
            grads.memory_scale = _through_scale(grads.remembering, queries.remembering, queries.memory_scale)
            if queries.alike:
                grads.windowed += grads.remembering
        return grads


class ChunkByChunk(Walk):
    """The walk back through a pass that folded one chunk after the other, and kept what undoing each takes."""

    kept: Kept

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.folds = list(self.kept.folds)
        self.view = self._record(*(None if tensor is None else tensor.clone() for tensor in self.kept.read))

    def run(self, output: Tensor, grad_output: Tensor, grad_sums: Tensor, grad_numbers: Tensor) -> Grads:
        grads = self.nothing_yet(grad_sums, grad_numbers)
        # Those of how slots read, until the fold that read them anew takes them.
        reading = [torch.zeros_like(tensor, dtype=grad_sums.dtype) for tensor in (self.view.keys, self.view.values)]
        taken: list[_Taken] = []
        for steps in reversed(self.groups):
            for of_slots, undone in self._back_through(steps, (output, self.kept.lse, grad_output), grads):
                for whole, part in zip(reading, of_slots, strict=False):
                    whole[:, :, : part.shape[2]].add_(part)
                taken += [self._take(fold, reading) for fold in undone]
            if sum(each.fold.target.shape[2] for each in taken) >= UNFOLDED_TOGETHER:
                self._unfold(taken, grads)
                taken = []
        self._unfold(taken, grads)
        if self.kept.started is not None:
            sums, numbers, *norm = _through_reading(self.rules, *self.kept.started, reading)
            grads.sums += sums
            grads.numbers += numbers
            _add(grads.norm, norm)
        return self.through_scales(grads)

    def _back_through(
        self, steps: list[Step], read: tuple[Tensor, Tensor, Tensor], grads: Grads
    ) -> list[tuple[list[Tensor], list[Fold]]]:
        """Through READ of steps that were read together; their folds are undone.

        read: outputs, log-sum-exps and the outputs' gradients, of the whole call. Returns for each step, the last one
        first, the gradients of how slots' keys and values read (none where none was read), and its folds, the last one
        first.
        """
        first, span = steps[0], slice(steps[0].start, steps[-1].stop)
        some = [tensor[:, :, span] for tensor in read]
        if len(steps) == 1:
            view = self.view if first.most_slots else None
            met = self.key_sets.of(first, self.queries, view) if some[0].numel() else []
            return [(self.through_attention(met, steps, some, grads), self._undo(first))]
        snapshots, undone = Snapshots(len(steps), steps[-1].most_slots), list[list[Fold]]()
        for number, step in reversed(list(enumerate(steps))):
            if step.most_slots:
                snapshots.take(number, self.view)
            undone.append(self._undo(step))
        met = self.key_sets.of_many(steps, self.queries, snapshots)
        of_slots = [each.unflatten(0, (-1, len(steps))) for each in self.through_attention(met, steps, some, grads)]
        of_steps = [[each[:, number] for each in of_slots] for number in range(len(steps))]
        return list(zip(reversed(of_steps), undone, strict=True))

    def _undo(self, step: Step) -> list[Fold]:
        """A step's folds, the last one first; slots read again as they did before."""
        undone: list[Fold] = []
        for _ in step.leaving[: len(self.folds)]:
            undone.append(self.folds.pop())
            self._restore(undone[-1])
        return undone

    def _take(self, fold: Fold, reading: list[Tensor]) -> _Taken:
        """Take from how slots read what a fold is answerable for: the gradients of those that it read anew."""
        target = fold.target.flatten()
        flat = [tensor.flatten(0, 2) for tensor in reading]
        if fold.before is None:
            taken = _Taken(fold, target, [tensor.clone() for tensor in flat])
            for tensor in flat:
                tensor.zero_()
            return taken
        taken = _Taken(fold, target, [tensor.index_select(0, target) for tensor in flat])
        for tensor in flat:
            tensor.index_fill_(0, target, 0)
        return taken

    def _unfold(self, taken: list[_Taken], grads: Grads) -> None:
        """Carry gradients back through folds, the last one first: through all their readings at once, then from fold to
        fold, then through all their tokens' contributions at once."""
        if not taken:
            return
        given = [torch.cat([each.reading[part] for each in taken]) for part in range(2)]
        if taken[0].fold.before is not None:  # as in all others
            first = _first_of_slot([each.target for each in taken], grads.sums.shape[:3].numel())
            given = [each.mul_(first) for each in given]
        sums, numbers = (torch.cat([getattr(each.fold, name) for each in taken]) for name in ("sums", "numbers"))
        of_sums, of_numbers, *norm = _through_reading(self.rules, sums, numbers, given)
        _add(grads.norm, norm)
        sizes = [len(each.fold.sums) for each in taken]
        parts = of_sums.split(sizes), of_numbers.split(sizes)
        of_rows: tuple[list[Tensor], list[Tensor]] = [], []
        for each, *read_anew in zip(taken, *parts, strict=True):
            fold = each.fold
            for whole, part, into in zip((grads.sums, grads.numbers), read_anew, of_rows, strict=True):
                flat = whole.flatten(0, 2)
                if fold.before is None:
                    flat += part
                else:
                    flat.index_add_(0, each.target, part)
                into.append(flat.index_select(0, each.target).view(*fold.target.shape, -1))
                if fold.dropped is not None:
                    into[-1].masked_fill_(fold.dropped.unsqueeze(-1), 0)
        folds = [each.fold for each in reversed(taken)]  # in the order of their tokens
        chunk, founders = self._chunk(folds), _founders(folds)
        of_sums, of_numbers = (torch.cat(each[::-1], dim=2) for each in of_rows)
        keys, values, weights, *norm = through_contributions(self.rules, chunk, founders, of_sums, of_numbers)
        _add(grads.norm, norm)
        for whole, part in ((grads.keys, keys), (grads.values, values), (grads.weights, weights)):
            if whole is not None and part is not None:
                add_columns(whole, chunk.where, part)

    def _chunk(self, folds: list[Fold]) -> Chunk:
        """The tokens of some folds, the first one first."""
        positions, rows = self.kept.positions, self.key_sets.keys.shape[0]
        where = joined([fold.where for fold in folds], rows, self.key_sets.device)
        firsts = [fold.first for fold in folds]
        first = firsts[0]
        if isinstance(first, Tensor) or any(each is not first for each in firsts):
            shapes = [(rows, 1, fold.target.shape[2]) for fold in folds]
            of_folds = [as_tensor(each, self.key_sets.keys) for each in firsts]
            first = torch.cat([each.expand(shape) for each, shape in zip(of_folds, shapes, strict=True)], dim=2)
        return Chunk(
            keys=columns(self.key_sets.keys, where),
            values=columns(self.key_sets.values, where),
            weights=None if self.weights is None else columns(self.weights, where),
            positions=None if positions is None else columns(positions, where),
            first=first,
            where=where,
        )

    def _restore(self, fold: Fold) -> None:
        """Read again what was read before a fold, from the sums of then where the fold does not say."""
        if fold.before is not None:
            target = fold.target.flatten()
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


def _through_scale(grad: Tensor, queries: Tensor, scale: Tensor | None) -> Tensor | None:
    """The gradient of a scale [h] from that of the scaled queries [b, h, t, d], which becomes that of the queries."""
    if scale is None:
        return None
    of_scale = (grad * queries).sum((0, 2, 3)).to(scale.dtype)
    grad *= scale.to(grad.dtype)[:, None, None]
    return of_scale


def _founders(folds: list[Fold]) -> Tensor | None:
    """Which tokens of some folds founded, [b, g, c]; None for nobody."""
    if all(fold.founders is None for fold in folds):
        return None
    nobody = as_tensor(False, folds[0].target)
    return torch.cat([nobody.expand_as(each.target) if each.founders is None else each.founders for each in folds], 2)


def _first_of_slot(targets: list[Tensor], slots: int) -> Tensor:
    """Which rows are the first of their fold that stand for their slot, [n, 1]: a slot that several tokens of a fold
    touched stands there several times, and its gradient passes through one of them.

    targets: each fold's slots, flat, of so many.
    """
    target = torch.cat([each + number * slots for number, each in enumerate(targets)])
    order = torch.arange(len(target), device=target.device)
    first = torch.full((len(targets) * slots,), len(target), device=target.device)
    return (first.scatter_reduce(0, target, order, "amin")[target] == order).unsqueeze(-1)


def _through_reading(rules: SlotRules, sums: Tensor, numbers: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of sums, numbers and LayerNorm from those of how slots read."""
    with torch.enable_grad():
        sums, numbers, rules = leaf(sums), leaf(numbers), with_norm_as_leaves(rules)
        view = read_slots(rules, sums, numbers)
        return gradients_of([view.keys, view.values], [sums, numbers, *(rules.key_norm or ())], grads)


def through_contributions(
    rules: SlotRules, chunk: Chunk, founded: Tensor | None, rows: Tensor, numbers: Tensor
) -> list[Tensor | Any]:
    """Gradients of a chunk's keys, values, weights (None where it has none) and LayerNorm from those of its rows."""
    with torch.enable_grad():
        rules = with_norm_as_leaves(rules)
        given = {name: getattr(chunk, name) for name in ("keys", "values", "weights")}
        leaves = {name: None if tensor is None else leaf(tensor) for name, tensor in given.items()}
        outputs = contributions(rules, dataclasses.replace(chunk, **leaves), founded)
        present = [leaf for leaf in leaves.values() if leaf is not None]
        of_chunk = gradients_of(list(outputs), [*present, *(rules.key_norm or ())], [rows, numbers])
    if leaves["weights"] is None:
        of_chunk.insert(2, None)  # type: ignore[arg-type]
    return of_chunk


def gradients_of(outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the inputs; zeros where an output does not depend on one."""
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    flowed = torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, flowed, strict=True)]


def with_norm_as_leaves(rules: SlotRules) -> SlotRules:
    """The rules with a LayerNorm that a gradient can be asked of."""
    if rules.key_norm is None:
        return rules
    weight, bias = rules.key_norm
    return dataclasses.replace(rules, key_norm=(leaf(weight), leaf(bias)))


def leaf(tensor: Tensor) -> Tensor:
    """The tensor as a leaf of a graph of its own."""
    return tensor.detach().requires_grad_()


def _add_stretches(timeline: Tensor, parts: Tensor, begin: int, end: int, every: int) -> None:
    """Add parts [b, k, g, end − begin, …] to columns begin … end − 1, and each next one's to those `every` further."""
    count = parts.shape[1]
    if count == 1:
        timeline[:, :, begin:end].add_(parts[:, 0])
        return
    for offset in range(0, end - begin, every):  # of that many columns of each at a time no two meet
        some = parts[:, :, :, offset : offset + every].transpose(1, 2)
        if some.shape[3] == every:
            whole = timeline[:, :, begin + offset : begin + offset + count * every]
            whole.unflatten(2, (count, every)).add_(some)
            continue
        for number in range(count):
            columns_of_step = slice(begin + offset + number * every, end + number * every)
            timeline[:, :, columns_of_step].add_(some[:, :, number])


def _add(sums: list[Tensor], parts: list[Tensor]) -> None:
    for whole, part in zip(sums, parts, strict=True):
        whole += part


def add_columns(timeline: Tensor, where: Columns, part: Tensor) -> None:
    """Add [b, g, c, …] to columns of a timeline."""
    if isinstance(where, slice):
        columns(timeline, where).add_(part)
        return
    index = where.reshape(where.shape[0], 1, where.shape[1], *[1] * (timeline.ndim - 3))
    timeline.scatter_add_(2, index.expand_as(part), part.to(timeline.dtype))
