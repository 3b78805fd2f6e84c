"""Chunks folded together: once a plan says where their tokens go, the slots after each of k chunks are a running sum.

    S_k = S_0 + Σ_{i ≤ k} A_i,   A_i: the rows of chunk i's tokens, summed by slot

PLAN alone goes chunk by chunk then, and of the slots it needs nothing but keys: a handful of operations a chunk, where
folding, reading anew and noting what undoes it take some hundred. It pays where operations cost more than what they
compute: on a GPU, and in small models. The backward pass folds the same tokens again, and leaves the rest to autograd:
of each sum it needs the suffix sum over all later readings.

    ∂S_i = Σ_{k ≥ i} ∂S_k (as read after chunk k),   ∂row_t = ∂S_{chunk of t}[slot of t]

The price is that all slots are read after each chunk, where `ChunkByChunk` reads those again that a chunk touched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit.engine.gradients import Grads, Walk, add_columns, gradients_of, leaf, with_norm_as_leaves
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Snapshots
from memkit.engine.schedule import LeavingChunk, Schedule, Step
from memkit.memory.rows import Chunk, SlotRules, SlotView, contributions, on_device, read_slots
from memkit.memory.window import Columns, Streams, joined
from memkit.pieces.chunk import Assignment

__all__ = ["FOLDED_TOGETHER", "KeptTogether", "Stretch", "Together", "foldable_together", "slots_after", "view_of"]

FOLDED_TOGETHER = {"cuda"}
"""Devices on which chunks are folded together, where they can be. On a CPU operations cost less than what is read in
vain: a training step of the small models of `make bench-train` takes a tenth longer."""


def foldable_together(inputs: AttendInputs, schedule: Schedule) -> bool:
    """Whether the chunks of a call may be folded together: all rows in step, and plain sums of what a plan places."""
    policy, device = inputs.policy, inputs.keys.device
    in_step = inputs.equal_lengths and bool((schedule.seen == schedule.seen[:1]).all()) and inputs.row_policies is None
    chunks = policy.chunk > 0 and policy.window.band is None and not policy.takes_boundaries
    plain = policy.merging.additive and policy.plans_ahead and not policy.replaces
    return device.type in FOLDED_TOGETHER and in_step and chunks and plain


@dataclass(frozen=True)
class Stretch:
    """Steps whose chunks are folded together, and all that folding them takes.

    where: columns of their leaving tokens, the first chunk's first; sizes: how many of them leave before each step;
    slot [b, g, n]: where they go, −1 for nowhere; founders [b, g, n]: which of them found, None for nobody; drops:
    whether any may go nowhere; first [1, 1, n]: which are of the memory's first chunk, False for none; sums, numbers
    [b, g, m, …]: what slots hold before all of this, of as many slots as the last step reads.
    """

    where: Columns
    sizes: tuple[int, ...]
    slot: Tensor
    founders: Tensor | None
    drops: bool
    first: bool | Tensor
    sums: Tensor
    numbers: Tensor

    @classmethod
    def of(
        cls,
        steps: Sequence[Step],
        placed: Sequence[tuple[LeavingChunk, Assignment]],
        shift: int,
        held: tuple[Tensor, Tensor],
        keep: bool,
    ) -> Stretch | None:
        """The stretch of some steps, whose leaving chunks are `placed`; None where none of them reads a slot.

        shift: from positions to columns; held: sums and numbers of all slots there is room for; keep: whether in
        tensors of their own, so that these may be written into.
        """
        most = max(step.most_slots for step in steps)
        if not most:
            return None
        sums, numbers = (each[:, :, :most].clone() if keep else each[:, :, :most] for each in held)
        begins = [int(leaving.begin[0]) for leaving, _ in placed]
        ends = [begin + leaving.size for begin, (leaving, _) in zip(begins, placed, strict=True)]
        slices = [slice(begin + shift, end + shift) for begin, end in zip(begins, ends, strict=True)]
        slots = [assignment.slot for _, assignment in placed]
        first: bool | Tensor = False
        if 0 in begins:
            whose = np.repeat(np.array(begins) == 0, [leaving.size for leaving, _ in placed])
            first = on_device(whose, sums.device)[None, None]
        return cls(
            where=joined(slices, len(sums), sums.device) if slices else slice(0, 0),
            sizes=tuple(sum(leaving.size for leaving in step.leaving) for step in steps),
            slot=torch.cat(slots, 2) if slots else sums.new_empty((*sums.shape[:2], 0), dtype=torch.long),
            founders=_founders([assignment for _, assignment in placed]),
            drops=any(assignment.drops for _, assignment in placed),
            first=first,
            sums=sums,
            numbers=numbers,
        )

    def chunk(self, streams: Streams) -> Chunk:
        """The tokens that leave."""
        return Chunk.of(streams, self.where, self.first)


def _founders(assignments: Sequence[Assignment]) -> Tensor | None:
    """Which tokens found, [b, g, n]; None for nobody."""
    if not any(assignment.founds for assignment in assignments):
        return None
    return torch.cat([assignment.founded for assignment in assignments], dim=2)


def slots_after(rules: SlotRules, stretch: Stretch, chunk: Chunk, sums: Tensor, numbers: Tensor) -> list[Tensor]:
    """Sums [b, k, g, m, d + v] and numbers [b, k, g, m, s] as each of k steps reads them, from those before."""
    steps, (batch, heads, room) = len(stretch.sizes), sums.shape[:3]
    rows = contributions(rules, chunk, stretch.founders)
    if stretch.drops:
        dropped = (stretch.slot < 0).unsqueeze(-1)
        rows = tuple(each.masked_fill(dropped, 0) for each in rows)
    begins = _begins(batch, heads, stretch.sizes, room, sums.device)
    target = (stretch.slot.clamp(min=0) + begins).flatten()
    return [_running(held, steps, target, each) for held, each in zip((sums, numbers), rows, strict=True)]


def _running(held: Tensor, steps: int, target: Tensor, rows: Tensor) -> Tensor:
    """What slots hold [b, g, m, w] before k steps, and rows [b, g, n, w] that are added to them: [b, k, g, m, w].

    target [b·g·n]: where each row goes, in [b·k·g·m].
    """
    start = held.unsqueeze(1)
    if steps > 1:
        start = torch.cat((start, held.new_zeros(1).expand(len(held), steps - 1, *held.shape[1:])), dim=1)
    flat, rows = start.flatten(0, 3), rows.flatten(0, 2).to(held.dtype)
    if held.device.type == "cuda":  # sorts, where index_add would add in whatever order its threads arrive
        flat = flat.index_put((target,), rows, accumulate=True)
    else:
        flat = flat.index_add(0, target, rows)
    added = flat.view(len(held), steps, *held.shape[1:])
    return added.cumsum(1) if steps > 1 else added


@functools.lru_cache(maxsize=256)
def _begins(batch: int, heads: int, sizes: tuple[int, ...], room: int, device: torch.device) -> Tensor:
    """Where each token's slots begin among those of all rows, steps and heads, [b, g, n]."""
    with torch.inference_mode(False):
        step = on_device(np.repeat(np.arange(len(sizes)), sizes), device)
        row, head = (torch.arange(count, device=device) for count in (batch, heads))
        return ((row[:, None, None] * len(sizes) + step) * heads + head[:, None]) * room


def view_of(rules: SlotRules, after: Sequence[Tensor]) -> SlotView:
    """The slots as k steps read them, one batch row per row and step: [b·k, g, m, …]."""
    sums, numbers = (each.flatten(0, 1) for each in after)
    return read_slots(rules, sums, numbers)


@dataclass
class KeptTogether:
    """What such a pass leaves for its backward pass besides its inputs and its output.

    stretches: one per group of steps, None where these read no slots; streams: names and tensors of the timeline other
    than keys, values and weights.
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
        with torch.enable_grad():
            rules = with_norm_as_leaves(self.rules)
            tokens = {name: getattr(chunk, name) for name in ("keys", "values", "weights")}
            tokens = {name: leaf(tensor) for name, tensor in tokens.items() if tensor is not None}
            for name, tensor in tokens.items():
                setattr(chunk, name, tensor)
            held = leaf(stretch.sums), leaf(stretch.numbers)
            after = slots_after(rules, stretch, chunk, *held)
            view = view_of(rules, after)
            outputs = [view.keys, view.values, *(each[:, -1] for each in after)]
        snapshots = Snapshots.of(view, len(steps))
        of_slots = self.through_attention(self.key_sets.of_many(steps, self.queries, snapshots), steps, read, grads)
        most = stretch.sums.shape[2]
        given = [*of_slots, *(each[:, :, :most] for each in (grads.sums, grads.numbers))]
        inputs = [*held, *tokens.values(), *(rules.key_norm or ())]
        found = iter(gradients_of(outputs, inputs, given))
        for whole in (grads.sums, grads.numbers):
            whole[:, :, :most] = next(found)
        for name in tokens:
            add_columns(getattr(grads, name), stretch.where, next(found))
        for whole in grads.norm:
            whole += next(found)
