"""Chunks folded together: once a plan says where their tokens go, the slots after each of k chunks are a running sum.

    S_k = S_0 + Σ_{i ≤ k} A_i,   A_i: the rows of chunk i's tokens, summed by slot

PLAN alone goes chunk by chunk then, and of the slots it needs nothing but keys. A training step takes fewer
operations (30 a chunk under `kvm-fixed-256`, where folding one chunk after the other takes 50), which pays where an
operation costs more than what it computes: on a GPU. The backward pass folds the same tokens again; autograd goes
through how slots are read and what tokens add, and of each sum it takes the suffix sum over all later readings.

    ∂S_i = Σ_{k ≥ i} ∂S_k (as read after chunk k),   ∂row_t = ∂S_{chunk of t}[slot of t]

The price is that all slots are read after each chunk, where `ChunkByChunk` reads those again that a chunk touched: so
not where there are many (`LITTLE`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memkit.engine.fused import Unfold, fold_fused, fuses
from memkit.engine.gradients import (
    Grads,
    Walk,
    add_columns,
    gradients_of,
    leaf,
    through_contributions,
    with_norm_as_leaves,
)
from memkit.engine.inputs import AttendInputs, Plan
from memkit.engine.keysets import Snapshots
from memkit.engine.plan import follow
from memkit.engine.schedule import LeavingChunk, Schedule, Step
from memkit.engine.stretch import Stretch
from memkit.memory.rows import Chunk, SlotRules, SlotView, contributions, read_slots
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline
from memkit.pieces.chunk import Assignment

__all__ = ["FOLDED_TOGETHER", "MOST_BYTES", "FoldsTogether", "KeptTogether", "Together", "foldable_together"]

LITTLE = 2**26
"""Bytes of all slots' sums from which on chunks are folded one after the other again: a device that is busy with them
gains nothing by fewer operations."""

MOST_BYTES = 2**30
"""Of what slots hold after each of the steps that are folded together, at most; of one step at least."""

FOLDED_TOGETHER = {"cuda"}
"""Devices on which chunks are folded together, where they can be. On a CPU operations cost less than what is read in
vain: a training step of the small models of `make bench-train` takes a tenth longer."""


def foldable_together(inputs: AttendInputs, schedule: Schedule, rules: SlotRules, sums: Tensor) -> bool:
    """Whether the chunks of a call are folded together: all rows in step, and plain sums of what a plan places; and so
    few [b, g, m, d + v] that it pays, or by kernels that know them."""
    policy, device = inputs.policy, inputs.keys.device
    in_step = inputs.equal_lengths and bool((schedule.seen == schedule.seen[:1]).all()) and inputs.row_policies is None
    chunks = policy.chunk > 0 and policy.window.band is None and not policy.takes_boundaries
    plain = policy.merging.additive and policy.plans_ahead and not policy.replaces
    several = inputs.differentiable or schedule.most_leaving > policy.chunk  # a pass for the plan costs something, too
    pays = sums.nbytes < LITTLE or (inputs.plan is None and fuses(rules, sums))
    return device.type in FOLDED_TOGETHER and in_step and chunks and plain and several and pays


def slots_after(stretch: Stretch, rows: Sequence[Tensor]) -> list[Tensor]:
    """Sums [b, k, g, m, d + v] and numbers [b, k, g, m, s] as each of k steps reads them, from those before.

    rows: what the stretch's tokens add to each, [b, g, n, …].
    """
    held, target, after = (stretch.sums, stretch.numbers), stretch.places(), list[Tensor]()
    for before, added in zip(held, _stored(stretch, rows), strict=True):
        steps = before.new_zeros(len(before), len(stretch.sizes), *before.shape[1:])
        steps[:, 0] = before
        flat, added = steps.flatten(0, 3), added.flatten(0, 2).to(before.dtype)
        if before.device.type == "cuda":  # sorts, where index_add would add in whatever order its threads arrive
            flat.index_put_((target,), added, accumulate=True)
        else:
            flat.index_add_(0, target, added)
        after.append(running_sums(steps))
    return after


def _stored(stretch: Stretch, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows [b, g, n, …] of the stretch's tokens, 0 for those that go nowhere."""
    if not stretch.drops:
        return rows
    dropped = (stretch.slot < 0).unsqueeze(-1)
    return [each.masked_fill(dropped, 0) for each in rows]


def running_sums(parts: Tensor, back: bool = False) -> Tensor:
    """Of parts [b, k, …] each with all before it; back: with all behind it. The parts' memory is used.

    On the CPU one is added to the next: torch.cumsum takes many times as long along such an axis.
    """
    steps = parts.shape[1]
    if steps == 1:
        return parts
    if parts.device.type != "cpu":
        return parts.flip(1).cumsum(1).flip(1) if back else parts.cumsum_(1)
    for step in range(steps - 2, -1, -1) if back else range(1, steps):
        parts[:, step].add_(parts[:, step + 1 if back else step - 1])
    return parts


def view_of(rules: SlotRules, after: Sequence[Tensor]) -> SlotView:
    """The slots as k steps read them, one batch row per row and step: [b·k, g, m, …]."""
    sums, numbers = (each.flatten(0, 1) for each in after)
    return read_slots(rules, sums, numbers)


class Planner(Protocol):
    """A pass over a call's tokens that makes the plan: the slots that it folds into know nothing but keys."""

    store: SlotStore
    done: list[tuple[LeavingChunk, Assignment]]

    def absorb(self, step: Step) -> None:
        """PLAN and FOLD the chunks that leave before a step."""


class FoldsTogether:
    """The folds of a pass, those of some steps at a time.

    plan: where tokens go, if that is given; else planner makes who says it; keep: whether somebody will go back.
    stretches: what going back takes, one for each group of steps, None where these read no slots.
    """

    def __init__(
        self,
        rules: SlotRules,
        schedule: Schedule,
        timeline: Timeline,
        plan: Plan | None,
        planner: Callable[[], Planner] | None,
        keep: bool,
    ) -> None:
        self.rules, self.schedule, self.timeline, self.plan, self.keep = rules, schedule, timeline, plan, keep
        self.make_planner, self.planner = planner, None
        self.stretches: list[Stretch | None] = []

    def snapshots(self, steps: list[Step], store: SlotStore) -> Snapshots:
        """PLAN and FOLD what leaves before some steps; the slots as each of them reads them."""
        most, rules = steps[-1].most_slots, self.rules
        if not most:
            self.stretches.append(None)
            return Snapshots(len(steps), 0)
        stretch = Stretch.of(steps, int(self.schedule.shift[0]), (store.sums[:, :, :most], store.numbers[:, :, :most]))
        stretch = stretch.apart() if self.keep else stretch
        chunk, fused = stretch.chunk(self.timeline.streams), None
        if self.plan is None and fuses(rules, store.sums):
            fused = fold_fused(rules, steps, chunk, stretch)
        if fused is not None:
            stretch, view, *last = fused
        else:
            stretch = stretch.placed(self._placed(steps, store))
            after = slots_after(stretch, contributions(rules, chunk, stretch.founders))
            view, last = view_of(rules, after), [each[:, -1] for each in after]
        self.stretches.append(stretch)
        store.hold(*last)
        return Snapshots.of(view, len(steps))

    def _placed(self, steps: list[Step], store: SlotStore) -> list[Assignment]:
        """PLAN alone: where the tokens go that leave before some steps."""
        leaving = [each for step in steps for each in step.leaving]
        if self.plan is not None:
            return [follow(each, self.plan, store.sums.device) for each in leaving]
        if self.planner is None:
            assert self.make_planner is not None
            self.planner = self.make_planner()
        room = self.planner.store.room  # decoding makes room for some more slots in the store, and not there
        self.planner.store.hold(store.sums[:, :, :room, : self.rules.width], store.numbers[:, :, :room])
        for step in steps:
            self.planner.absorb(step)
        return [assignment for _, assignment in self.planner.done[len(self.planner.done) - len(leaving) :]]


@dataclass
class KeptTogether:
    """What such a pass leaves for its backward pass besides its inputs and its output.

    stretches: one per group of steps, None where these read no slots; lse [b, h, t]; positions [b, 1, n] of the
    timeline; frequencies of the rotation.
    """

    stretches: list[Stretch | None]
    lse: Tensor
    positions: Tensor | None
    frequencies: Tensor | None


class Together(Walk):
    """The walk back through a pass whose chunks were folded together."""

    kept: KeptTogether

    def run(self, output: Tensor, grad_output: Tensor, grad_sums: Tensor, grad_numbers: Tensor) -> Grads:
        grads = self.nothing_yet(grad_sums, grad_numbers)
        for steps, stretch in zip(reversed(self.groups), reversed(self.kept.stretches), strict=True):
            span = slice(steps[0].start, steps[-1].stop)
            if span.start == span.stop:
                continue
            read = [tensor[:, :, span] for tensor in (output, self.kept.lse, grad_output)]
            if stretch is None:
                self.through_attention(self.key_sets.of_many(steps, self.queries, None), steps, read, grads)
            else:
                self._through(steps, stretch, read, grads)
        return self.through_scales(grads)

    def _through(self, steps: list[Step], stretch: Stretch, read: list[Tensor], grads: Grads) -> None:
        """Back through READ and FOLD of a group of steps; `grads.sums` and `.numbers` go from after to before it."""
        timeline = {"keys": self.key_sets.keys, "values": self.key_sets.values}
        more = {"weights": self.weights, "positions": self.kept.positions}
        chunk = stretch.chunk(timeline | {name: each for name, each in more.items() if each is not None})
        unfold = Unfold.of(self.rules, stretch, chunk)
        if unfold is not None:
            self._through_fused(steps, stretch, chunk, unfold, read, grads)
            return
        rows = contributions(self.rules, chunk, stretch.founders)
        after = slots_after(stretch, rows)
        with torch.enable_grad():
            rules, held = with_norm_as_leaves(self.rules), [leaf(each) for each in after]
            view = view_of(rules, held)
        snapshots = Snapshots.of(view, len(steps))
        of_slots = self.through_attention(self.key_sets.of_many(steps, self.queries, snapshots), steps, read, grads)
        norm = list(rules.key_norm or ())
        of_held, most = gradients_of([view.keys, view.values], [*held, *norm], of_slots), stretch.sums.shape[2]
        of_rows, where = list[Tensor](), stretch.places()
        for whole, part in zip((grads.sums, grads.numbers), of_held[:2], strict=True):
            part[:, -1].add_(whole[:, :, :most])
            part = running_sums(part, back=True)
            whole[:, :, :most] = part[:, 0]
            of_rows.append(part.flatten(0, 3)[where].view(*stretch.slot.shape, part.shape[-1]))
        self._through_rows(stretch, chunk, _stored(stretch, of_rows), of_held[2:], grads)

    def _through_fused(
        self, steps: list[Step], stretch: Stretch, chunk: Chunk, unfold: Unfold, read: list[Tensor], grads: Grads
    ) -> None:
        """The same by kernels."""
        met = self.key_sets.of_many(steps, self.queries, Snapshots.of(unfold.fold.view(), len(steps)))
        of_slots, most = self.through_attention(met, steps, read, grads), stretch.sums.shape[2]
        rows, numbers, norm = unfold.back(of_slots, (grads.sums[:, :, :most], grads.numbers[:, :, :most]))
        self._through_rows(stretch, chunk, (rows, numbers), norm, grads)

    def _through_rows(
        self, stretch: Stretch, chunk: Chunk, rows: Sequence[Tensor], norm: list[Tensor], grads: Grads
    ) -> None:
        """From the gradients of what tokens add to those of the tokens; norm: those of the LayerNorm, from reading."""
        of_chunk = through_contributions(self.rules, chunk, stretch.founders, *rows)
        for whole, part in zip((grads.keys, grads.values, grads.weights), of_chunk, strict=False):
            if whole is not None and part is not None:
                add_columns(whole, stretch.where, part)
        for whole, *parts in zip(grads.norm, norm, of_chunk[3:], strict=True):
            whole += sum(parts)
