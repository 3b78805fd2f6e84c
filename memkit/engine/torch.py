"""The torch engine: plan → fold → read, step by step, vectorised over rows, heads and the tokens of a chunk."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit.engine.backward import Inputs, Passed, attend_as_one_node
from memkit.engine.call import Call
from memkit.engine.decode import decode
from memkit.engine.fold import SlotRules, Slots, parameter_versions
from memkit.engine.parts import Parts, Queries, Snapshots, readable_together
from memkit.engine.placing import follow, leaving_chunk, place, record
from memkit.engine.read import Part, attend_parts, differentiable_parts
from memkit.engine.schedule import Exit, Schedule, Step
from memkit.engine.timeline import Timeline
from memkit.memory import Memory
from memkit.pieces.routing import Placement
from memkit.plan import Plan

__all__ = ["attend", "plan"]

TOGETHER = {"cpu": 2048, "cuda": 4096}
"""Queries that are read together, per kind of device; elsewhere one chunk's at a time."""

UNEQUAL_SLOTS = {"cuda"}
"""Where chunks with unequal numbers of slots are read together too: the mask costs less than another call."""


def attend(call: Call) -> tuple[Tensor, Memory]:
    """Outputs [b, h, t, v] and the memory after the call.

    Without gradients the memory's tensors are taken over; one made in inference mode is copied first, outside of it.
    With gradients an additive rule's pass is one node of the
    graph with a backward of its own (see `backward`); another rule's pass is recorded operation by operation.
    """
    if call.memory is not None and call.memory.frozen:
        call = dataclasses.replace(call, memory=call.memory.fork())
    if call.differentiable:
        run = _Run(call)
        additive = call.policy.merging.additive or call.policy.exact_slots
        output = run.read_as_one_node() if additive else run.read_with_graph(run.queries())
        return run.padded(output), run.memory()
    memory = call.memory
    if memory is not None and memory.requires_grad:  # another graph may still need these tensors: leave them alone
        memory = memory.detach()
        call = dataclasses.replace(call, memory=memory)
    with torch.no_grad(), nullcontext() if memory is None else memory.taken_over():
        if (decoded := decode(call)) is not None:
            return decoded
        run = _Run(call)
        return run.padded(run.read(run.queries())[0]), run.memory()


@torch.no_grad()
def plan(call: Call) -> Plan:
    """The plan that `attend` would follow."""
    run = _Run(call)
    for step in run.schedule.steps:
        if step.exit is not None:
            run.absorb(step.exit)
    return record(run.timeline, run.schedule, run.placements)


class _Run:
    """One call in progress."""

    def __init__(self, call: Call) -> None:
        self.call = call
        rows, _, tokens, _ = call.keys.shape
        seen = np.zeros(rows, dtype=np.int64) if call.memory is None else call.memory.seen_rows
        self.schedule = Schedule(call.policy, seen, call.lengths, tokens)
        self.timeline = Timeline(call, self.schedule)
        self.slots = self._open_slots()
        self.placements: list[tuple[Exit, Placement]] = []

    def _open_slots(self) -> Slots:
        call, memory = self.call, self.call.memory
        rules = SlotRules.of(call)
        room = int(self.schedule.slots_after.max(initial=0))
        if memory is None:
            rows, heads, _, width = call.keys.shape
            width += 0 if call.values is None else call.values.shape[-1]
            dtype = torch.promote_types(call.keys.dtype, torch.float32)
            sums = call.keys.new_zeros(rows, heads, room, width, dtype=dtype)
            scalars = call.keys.new_zeros(rows, heads, room, len(call.policy.columns), dtype=torch.float64)
            return Slots(rules, sums, scalars, None, in_place=not call.differentiable)
        sums, scalars = memory.sums, memory.scalars
        if call.values is None:  # a plan only reads the memory, and only its keys
            sums, scalars = sums[..., : call.keys.shape[-1]].clone(), scalars.clone()
        elif call.differentiable:  # the memory that is returned shares nothing with this one
            sums, scalars = sums.clone(), scalars.clone()
        ready = memory.ready if self.timeline.in_place else None
        if ready is not None and ready.made_with != parameter_versions(call.parameters):
            ready = None
        slots = Slots(rules, sums, scalars, ready, in_place=not call.differentiable, memory=memory)
        if room > sums.shape[2]:
            # Decoding makes room for half as many again, if the schedule will ever grant so many.
            ahead = min(room * 3 // 2, self._slots_ahead()) if self.timeline.in_place else room
            slots.grow(ahead)
        return slots

    def _slots_ahead(self) -> int:
        return self.call.policy.slots_after(2 * (int(self.schedule.after.max()) + self.call.policy.chunk))

    def absorb(self, exit_: Exit) -> None:
        """PLAN and FOLD: a chunk leaves the window."""
        chunk = leaving_chunk(self.call, self.timeline, self.schedule, exit_)
        if self.call.plan is None:
            placement = place(self.call, self.timeline, exit_, chunk, self.slots)
        else:
            placement = follow(self.timeline, exit_, self.call.plan)
        self.placements.append((exit_, placement))
        self.slots.fold(placement, chunk)

    def read(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """READ every step's queries, absorbing what leaves before it: outputs [b, h, t, v], log-sum-exp [b, h, t]."""
        parts = self.parts()
        rows, heads, tokens, _ = queries.windowed.shape
        # Heads next to each other for each token: so the kernels return them, and so the output projection wants them.
        output = parts.values.new_empty(rows, tokens, heads, parts.values.shape[-1]).transpose(1, 2)
        sums = output.new_empty(output.shape[:3], dtype=torch.promote_types(output.dtype, torch.float32))
        for steps in self._groups():
            span = slice(steps[0].start, steps[-1].stop)
            if len(steps) == 1:
                met = self._meet(parts, queries, steps[0])
                _, sums[:, :, span] = attend_parts(met, self.call.scale, out=output[:, :, span])
                continue
            slots = Snapshots(len(steps), steps[-1].most_slots)
            for number, step in enumerate(steps):
                if step.exit is not None:
                    self.absorb(step.exit)
                if step.most_slots:
                    slots.take(number, self.slots.ready)
            together, lse = attend_parts(parts.of_many(steps, queries, slots), self.call.scale)
            for whole, part in ((output, together), (sums, lse)):
                whole[:, :, span].unflatten(2, (len(steps), -1)).copy_(part.unflatten(0, (rows, -1)).transpose(1, 2))
        output[:, :, int(self.call.lengths.max(initial=0)) :] = 0
        return output, sums

    def read_as_one_node(self) -> Tensor:
        """The outputs of `read`, as one node of autograd's graph."""
        timeline, call = self.timeline, self.call
        assert timeline.values is not None
        inputs = Inputs(
            self.queries(), timeline.keys, timeline.values, timeline.weights, self.slots.sums, self.slots.scalars
        )
        fresh = call.memory is None
        facts = (SlotRules.of(call), self.schedule, call.scale, timeline.positions, fresh)
        output, self.slots.sums, self.slots.scalars = attend_as_one_node(self._pass, inputs, *facts)
        return output

    def _pass(self, inputs: Inputs) -> Passed:
        """The pass itself, without a graph: what undoing each fold takes is kept."""
        slots = Slots(self.slots.rules, inputs.sums.clone(), inputs.scalars.clone(), None, in_place=True)
        slots.keep_undo()
        given, self.slots = self.slots, slots
        output, lse = self.read(inputs.queries)
        self.slots = given
        return Passed(output, lse, slots.sums, slots.scalars, slots.ready, slots.undo or [])

    def read_with_graph(self, queries: Queries) -> Tensor:
        """The outputs of `read`, recorded operation by operation."""
        parts = self.parts()
        steps = self.schedule.steps
        outputs = [differentiable_parts(self._meet(parts, queries, step), self.call.scale) for step in steps]
        missing = self.call.keys.shape[2] - int(self.call.lengths.max(initial=0))
        if missing or not outputs:
            shape = (*queries.windowed.shape[:2], missing, parts.values.shape[-1])
            outputs.append(queries.windowed.new_zeros(shape))
        return torch.cat(outputs, dim=2)

    def _meet(self, parts: Parts, queries: Queries, step: Step) -> list[Part]:
        """The key sets that a step's queries meet, once what leaves before it is absorbed."""
        if step.exit is not None:
            self.absorb(step.exit)
        return parts.of(step, queries, self.slots.ready if step.most_slots else None)

    def _groups(self) -> list[list[Step]]:
        """The steps, those together that are read together: consecutive ones that are alike."""
        steps, device = self.schedule.steps, self.call.keys.device.type
        together, unequal_slots = TOGETHER.get(device, 0), device in UNEQUAL_SLOTS
        if not together or not self.schedule.even or self.call.policy.window.band is not None:
            return [[step] for step in steps]
        groups: list[list[Step]] = []
        for step in steps:
            last = groups[-1] if groups else []
            if last and step.stop - last[0].start <= together and readable_together(last[0], step, unequal_slots):
                last.append(step)
            else:
                groups.append([step])
        return groups

    def queries(self) -> Queries:
        """The call's queries."""
        return Queries.of(self.call, self.timeline)

    def parts(self) -> Parts:
        """The key sets of every step."""
        assert self.timeline.values is not None
        return Parts(self.schedule, self.timeline.keys, self.timeline.values)

    def padded(self, output: Tensor) -> Tensor:
        """The outputs, 0 where a row has no token."""
        if self.schedule.even:
            return output
        return output.masked_fill(~self.timeline.own_columns()[:, None, :, None], 0)

    def memory(self) -> Memory:
        """The memory after the call."""
        carried: dict[str, Any] = self.timeline.carry()
        carried |= {"sums": self.slots.sums, "scalars": self.slots.scalars, "seen_rows": self.schedule.after}
        if self.timeline.in_place:
            assert self.call.memory is not None
            if (ready := self.slots.working_copy) is not None:
                ready.made_with = parameter_versions(self.call.parameters)
            fresh: dict[str, Any] = {"ready": ready, "side_by_side": None, "taken": False, "written": False}
            return dataclasses.replace(self.call.memory, **carried, **fresh)
        return Memory(policy=self.call.policy, **carried)
