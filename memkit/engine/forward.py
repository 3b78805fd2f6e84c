"""The pass: for each step, plan, fold, observe, read; over all rows, heads and tokens of a chunk at once."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from memkit.engine.backward import Inputs, Passed, attend_as_one_node
from memkit.engine.carry import close, open_store, open_timeline, without_padding
from memkit.engine.competing import CompetingLanes
from memkit.engine.contests import contend
from memkit.engine.decode import decode
from memkit.engine.folding import FoldingLanes
from memkit.engine.inputs import AttendInputs, Plan
from memkit.engine.keysets import KeySets, Queries, Snapshots, readable_together
from memkit.engine.leaving import LeavingTokens
from memkit.engine.observe import Observer, alike_rows
from memkit.engine.plan import follow, place, record
from memkit.engine.read import KeySet, attend_key_sets, differentiable_key_sets
from memkit.engine.schedule import LeavingChunk, Schedule, Step
from memkit.engine.sliding import SlidingLanes
from memkit.engine.threads import one_thread
from memkit.engine.together import MOST_BYTES, FoldsTogether, foldable_together
from memkit.memory import Memory
from memkit.memory.contest import Contest
from memkit.memory.rows import Chunk, SlotRules, SlotView, on_device
from memkit.memory.slots import SlotStore
from memkit.pieces.chunk import Assignment

__all__ = ["attend", "plan"]

TOGETHER = {"cpu": 2048, "cuda": 4096}
"""Queries that are read together, per kind of device; elsewhere one chunk's at a time."""

UNEQUAL_SLOTS = {"cuda"}
"""Where chunks with unequal numbers of slots are read together too: the window at once, and slots step by step."""

AsRead = Snapshots | SlotView | None
"""The slots as each of several steps, or the only one, reads them; None where that one reads none."""


def attend(inputs: AttendInputs) -> tuple[Tensor, Memory]:
    """Outputs [b, h, t, v] and the memory after the call.

    Without gradients the memory's tensors are taken over; one made in inference mode is copied first, outside of it.
    With gradients an additive rule's pass is one node of the graph with a backward of its own (see `backward`); another
    rule's pass is recorded operation by operation.
    """
    memory = inputs.memory
    if memory is not None and memory.frozen:
        memory = memory.fork()
        inputs = inputs.with_memory(memory)
    if inputs.differentiable:
        run = Pass(inputs)
        output = run.with_graph() if inputs.policy.sequential else run.as_one_node()
        return without_padding(inputs, output), run.memory()
    if memory is not None and memory.requires_grad:  # another graph may still need these tensors: leave them alone
        memory = memory.detach()
        inputs = inputs.with_memory(memory)
    with torch.no_grad(), nullcontext() if memory is None else memory.taken_over():
        if (decoded := decode(inputs)) is not None:
            return decoded
        run = Pass(inputs)
        return without_padding(inputs, run.read(run.queries())[0]), run.memory()


@torch.no_grad()
def plan(inputs: AttendInputs) -> Plan:
    """The plan that `attend` would follow."""
    run = Pass(inputs)
    for step in run.schedule.steps:
        run.absorb(step)
    return record(run.schedule, inputs.keys.shape[1], inputs.keys.device, run.done)


class Pass:
    """One call in progress: when chunks leave (schedule), the tokens there are (timeline), and the slots (store).

    timeline: the window's columns, and this call's tokens behind them; leaving: slices of it that leave, with their
    memory keys, which is what slots sum of keys (`rows.memory_keys`); done: what has been assigned so far.
    """

    def __init__(self, inputs: AttendInputs) -> None:
        self.inputs, self.policy, self.device = inputs, inputs.policy, inputs.keys.device
        self.schedule = Schedule.of(inputs)
        width, dtype, valued = inputs.keys.shape[-1], inputs.keys.dtype, inputs.values is not None
        self.rules = SlotRules(inputs.policy, width, dtype, inputs.key_norm, inputs.rotation, valued)
        self.timeline, self.next_positions = open_timeline(inputs, self.schedule)
        self.store = open_store(inputs, self.schedule, self.timeline)
        self.observer = Observer(inputs, self.schedule) if inputs.policy.observes else None
        self.given_plan = None if inputs.plan is None else inputs.plan.to(self.device)
        founds = inputs.plan is not None or inputs.policy.replaces
        self.leaving = LeavingTokens(self.rules, self.timeline, self.schedule, founds)
        facts = (inputs, self.schedule, self.rules, self.timeline, self.leaving)
        lanes = (kind(*facts) for kind in (CompetingLanes, FoldingLanes, SlidingLanes))
        self.lanes = next((each for each in lanes if each.known), None)
        self.done: list[tuple[LeavingChunk, Assignment]] = []
        self.together: FoldsTogether | None = None
        if inputs.values is not None and foldable_together(inputs, self.schedule, self.rules, self.store.sums):
            keep, planner = inputs.differentiable, None if inputs.plan is not None else self._planner
            self.together = FoldsTogether(self.rules, self.schedule, self.timeline, self.given_plan, planner, keep)

    # The steps

    def read(self, queries: Queries) -> tuple[Tensor, Tensor]:
        """For each step: plan, fold, observe, read. Outputs [b, h, t, v], log-sum-exp [b, h, t]; no graph.

        Alike steps are read together: each plans and folds, and how slots are read then is noted, and one READ meets
        them all. Where a policy observes, steps go one by one, and READ and OBSERVE meet the same rows: a whole chunk's
        queries do both. Lanes do all of it. Neither tells log-sum-exps, for no backward pass of theirs needs any.
        """
        key_sets = KeySets(self.schedule, self.timeline.keys, self.timeline.values)
        rows, heads, tokens, _ = queries.windowed.shape
        # Heads next to each other for each token: so the kernels return them, and so the output projection wants them.
        output = key_sets.values.new_empty(rows, tokens, heads, key_sets.values.shape[-1]).transpose(1, 2)
        lse = output.new_empty(output.shape[:3], dtype=torch.promote_types(output.dtype, torch.float32))
        for steps in self._groups():
            if self.lanes is not None and self.lanes.takes(steps[0]):
                self.lanes.read(steps, queries, self.store, output)
                continue
            with self._one_thread(steps[-1], heads if self.policy.observes else key_sets.keys.shape[1]):
                slots = self.plan_and_fold(steps)
                observed = self.observe(steps[-1])
            here = slice(steps[0].start, steps[-1].stop)
            if observed is None:
                self._attend(key_sets, steps, queries, slots, output[:, :, here], lse[:, :, here])
            else:
                output[:, :, here] = observed
        output[:, :, int(self.inputs.row_lengths.max(initial=0)) :] = 0
        return output, lse

    def _attend(
        self, sets: KeySets, steps: list[Step], queries: Queries, slots: AsRead, out: Tensor, lse: Tensor
    ) -> None:
        """READ: what the queries of some steps get of all that they meet, into their outputs and log-sum-exps."""
        if not isinstance(slots, Snapshots):
            _, sums = attend_key_sets(sets.of(steps[0], queries, slots), self.inputs.checked_scale, out=out)
            lse.copy_(sums)
            return
        met = sets.of_many(steps, queries, slots)
        for whole, of_steps in zip((out, lse), attend_key_sets(met, self.inputs.checked_scale), strict=True):
            stretches = of_steps.unflatten(0, (-1, len(steps))).transpose(1, 2)
            whole.unflatten(2, (len(steps), -1)).copy_(stretches)

    def plan_and_fold(self, steps: list[Step]) -> AsRead:
        """PLAN and FOLD what leaves before some steps; the slots as they read them."""
        # Where nothing leaves and nobody goes back, slots may be there only as they are read.
        if self.together is not None and (self.inputs.differentiable or any(step.leaving for step in steps)):
            return self.together.snapshots(steps, self.store)
        if len(steps) == 1:
            self.absorb(steps[0])
            return self.slots(steps[0])
        snapshots = Snapshots(len(steps), steps[-1].most_slots)
        for number, step in enumerate(steps):
            self.absorb(step)
            if step.most_slots:
                snapshots.take(number, self.store.read(self.rules))
        return snapshots

    def absorb(self, step: Step) -> None:
        """PLAN and FOLD the chunks that leave before a step, those of one length at a time."""
        for leaving in step.leaving:
            chunk = self.leaving.chunk(leaving)
            if self.policy.replaces:
                self._replace(leaving, chunk)
            else:
                self._fold(self._planned(leaving, chunk), chunk)

    def _planned(self, leaving: LeavingChunk, chunk: Chunk) -> Assignment:
        """PLAN: where the tokens go, as the policy says or the plan that was given."""
        if self.given_plan is None:
            assignment = place(self.rules, leaving, chunk, self.store)
        else:
            assignment = follow(leaving, self.given_plan, self.device)
        self.done.append((leaving, assignment))
        return assignment

    def _fold(self, assignment: Assignment, chunk: Chunk) -> None:
        """FOLD the tokens in; a plan that compares with nothing needs no slots."""
        if self.rules.valued or self.policy.compares:
            self.store.add(self.rules, assignment, chunk)

    def _replace(self, leaving: LeavingChunk, chunk: Chunk) -> None:
        """PLAN and FOLD where slots are made anew, for rows of the batch that have enough in common at a time."""
        policy, before, new = self.policy, leaving.slots_before, leaving.new_slots
        kept = np.minimum(before, policy.sinks) if policy.competes else before
        facts = (kept, leaving.sink_tokens)
        if not policy.fills_up:
            facts = (*facts, before, new)
        for rows in alike_rows(leaving.leaves, *facts):
            first = int(np.flatnonzero(leaving.leaves)[0]) if rows is None else int(rows[0])
            store, some, at = self.store, chunk, None
            if rows is not None:
                before, new = leaving.slots_before[rows], leaving.new_slots[rows]
                at = on_device(rows, self.device)
                store, some = store.of_rows(at), chunk.of_rows(at)
            contest = Contest.of(int(kept[first]), leaving.size, before, new)
            contend(self.rules, some, store, contest, int(leaving.sink_tokens[first]))
            if at is not None:
                self.store.put_rows(at, store)

    def observe(self, step: Step) -> Tensor | None:
        """OBSERVE, where the policy does and a chunk is complete; the step's outputs where these are known by it."""
        if self.observer is None:
            return None
        return self.observer.observe(step, self.rules, self.timeline, self.store)

    def _planner(self) -> Pass:
        """A pass over the same tokens that knows nothing but keys."""
        return Pass(dataclasses.replace(self.inputs, queries=None, values=None, differentiable=False))

    def slots(self, step: Step) -> SlotView | None:
        """The slots as a step reads them; None where none is live."""
        return self.store.read(self.rules) if step.most_slots else None

    def _one_thread(self, step: Step, heads: int) -> AbstractContextManager[None]:
        """One thread for what a step folds and observes, where that is little; heads: those that have scores then."""
        if not step.leaving and self.observer is None:
            return nullcontext()
        met = step.most_slots + (self.policy.window.capacity or 0)
        return one_thread(len(step.first) * heads * self.policy.chunk * met, self.device)

    def _groups(self) -> list[list[Step]]:
        """The steps, those together that are read together: consecutive ones that are alike."""
        if self.lanes is not None:
            return self.lanes.stretches()
        steps, together = self.schedule.steps, TOGETHER.get(self.device.type, 0)
        if not together or self.policy.observes or not self.inputs.equal_lengths or self.policy.window.band is not None:
            return [[step] for step in steps]
        groups, of_one = list[list[Step]](), max(1, self.store.sums[:, :, :1].nbytes)
        for step in steps:
            last = groups[-1] if groups else []
            fits = self.together is None or (len(last) + 1) * step.most_slots <= MOST_BYTES // of_one
            fits = fits and bool(last) and step.stop - last[0].start <= together
            if fits and readable_together(last[0], step, self.device.type in UNEQUAL_SLOTS):
                last.append(step)
            else:
                groups.append([step])
        return groups

    def as_one_node(self) -> Tensor:
        """The outputs of `read`, as one node of autograd's graph."""
        inputs, timeline = self.inputs, self.timeline
        given = Inputs(
            self.queries(), timeline.keys, timeline.values, timeline.get("weights"), self.store.sums, self.store.numbers
        )
        facts = (self.rules, self.schedule, inputs.checked_scale, timeline.get("positions"), inputs.memory is None)
        groups = self._groups()
        output, self.store.sums, self.store.numbers = attend_as_one_node(self._without_graph, given, *facts, groups)
        return output

    def _without_graph(self, given: Inputs) -> Passed:
        """The pass itself; what undoing each fold takes is kept."""
        store = SlotStore(given.sums.clone(), given.numbers.clone(), undo=[] if self.together is None else None)
        outer, self.store = self.store, store
        output, lse = self.read(given.queries)
        self.store = outer
        if self.together is not None:
            return Passed(output, lse, store.sums, store.numbers, None, [], self.together.stretches)
        return Passed(output, lse, store.sums, store.numbers, store.read(self.rules), store.undo or [])

    def with_graph(self) -> Tensor:
        """The outputs of `read`, recorded operation by operation."""
        key_sets = KeySets(self.schedule, self.timeline.keys, self.timeline.values, self.leaving.sections)
        queries, outputs = self.queries(), list[Tensor]()
        for step, asked in zip(self.schedule.steps, queries.of_each(self.schedule.steps), strict=True):
            self.absorb(step)
            met: list[KeySet] = key_sets.of(step, asked, self.slots(step))
            outputs.append(differentiable_key_sets(met, self.inputs.checked_scale))
            self.observe(step)
        missing = self.inputs.keys.shape[2] - int(self.inputs.row_lengths.max(initial=0))
        if missing or not outputs:
            shape = (*queries.windowed.shape[:2], missing, key_sets.values.shape[-1])
            outputs.append(queries.windowed.new_zeros(shape))
        return torch.cat(outputs, dim=2)

    def queries(self) -> Queries:
        """The call's queries."""
        inputs = self.inputs
        assert inputs.queries is not None
        queries = without_padding(inputs, inputs.queries)
        positions = self.timeline.get("positions")
        if positions is not None:
            positions = positions[:, :, positions.shape[2] - queries.shape[2] :]
        return Queries.of(self.policy, queries, inputs.parameters, inputs.rotation, positions)

    def memory(self) -> Memory:
        """The memory after the call."""
        memory = close(self.inputs, self.rules, self.schedule, self.timeline, self.store, self.next_positions)
        if self.observer is not None:
            memory.observed = self.observer.waiting()
        return memory
