"""Slots that are sums of the tokens nearest to them, folded on the CPU by lanes: a head of a row of the batch each.

PLAN and FOLD of some steps are one call of a compiled loop for each lane (`memkit/loops/folding.py`), and threads take
lanes. READ is `forward`'s. What loops do not know goes through `forward` chunk by chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit import loops
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Snapshots
from memkit.engine.lanes import strided
from memkit.engine.leaving import LeavingTokens
from memkit.engine.schedule import LeavingChunk, Schedule, Step, common
from memkit.engine.threads import in_threads
from memkit.memory.rows import SlotRules, SlotView
from memkit.memory.slots import SlotStore
from memkit.pieces.admission import Novelty
from memkit.pieces.readout import LAYER_NORM_EPS, SHORTEST, TINY, Readout
from memkit.pieces.routing import Nearest
from memkit.pieces.statistics import COUNT, FOUNDER_MASS, MASS, RADIUS
from memkit.policy import Policy

__all__ = ["FoldsByLanes"]

ENABLED = True
"""Whether there are such folds. Off, chunks are folded by operations: for who wonders what is wrong."""


@functools.lru_cache(maxsize=64)
def known(policy: Policy) -> bool:
    """Whether loops know how tokens are placed and summed, and how slots are read, under this policy."""
    routing, merging, readout = policy.routing, policy.merging, policy.readout
    if not policy.plans_ahead or policy.replaces or policy.takes_boundaries or policy.window.band is not None:
        return False
    places = type(policy.admission) is Novelty and type(routing) is Nearest and routing.least is None
    places = places and routing.similarity == "dot" and merging.joins and merging.additive and merging.of == "both"
    reads = (
        type(readout) is Readout and readout.spec.key in ("layer-norm", "mean") and readout.spec.value != "mean-norm"
    )
    return places and reads and not policy.rotary.rotates_slots and loops.with_products()


class FoldsByLanes:
    """The folds of one call."""

    def __init__(
        self, inputs: AttendInputs, schedule: Schedule, rules: SlotRules, leaving: LeavingTokens, store: SlotStore
    ) -> None:
        self.schedule, self.rules, self.leaving, self.chunk = schedule, rules, leaving, rules.policy.chunk
        asked = ENABLED and inputs.plan is None and rules.valued and store.in_place and store.undo is None
        asked = asked and rules.dtype == store.sums.dtype and store.sums.device.type == "cpu"
        self.known = asked and not torch.is_grad_enabled() and known(rules.policy) and loops.usable(store.sums)

    def takes(self, steps: Sequence[Step]) -> bool:
        """Whether loops fold the chunks that leave before these steps: some, each of all rows."""
        return self.known and any(step.leaving for step in steps) and all(map(self._takes, steps))

    def _takes(self, step: Step) -> bool:
        return all(
            each.leaves.all() and each.size == self.chunk and self._column(each) >= 0 and self._all_have_targets(each)
            for each in step.leaving
        )

    def _all_have_targets(self, leaving: LeavingChunk) -> bool:
        """Whether there is a slot to join for each token of the chunk, in all rows."""
        routing, before, new = self.rules.policy.routing, leaving.slots_before, leaving.new_slots
        assert isinstance(routing, Nearest)
        founded = (new > leaving.sink_tokens) & (routing.new_slots | ((before == 0) & (leaving.sink_tokens == 0)))
        return bool(((before > self.rules.policy.sinks) | founded | (new == leaving.size)).all())

    def _column(self, leaving: LeavingChunk) -> int:
        """The column at which the chunk begins in all rows; −1 where they differ."""
        column = common(leaving.begin + self.schedule.shift, leaving.leaves)
        return -1 if column is None else column

    def snapshots(self, steps: Sequence[Step], store: SlotStore) -> Snapshots | SlotView | None:
        """PLAN and FOLD; the slots as these steps read them."""
        store.about_to_write()
        run, heads, view = loops.of_folding(), store.sums.shape[1], _standing_alone(store, self.rules)
        columns = [self._column(each) for step in steps for each in step.leaving]
        plans = [self._plan(steps, row) for row in range(len(store.sums))]
        slots = [run.Slots(*each) for each in _of_lanes(store.sums, store.numbers, view.keys, view.values, view.bias)]
        tokens = [run.Tokens(*each) for each in self._tokens(slice(columns[0], columns[-1] + self.chunk))]
        noted = Snapshots.empty(view, len(steps), steps[-1].most_slots) if len(steps) > 1 else None
        notes = [run.Notes(*each) for each in _notes(noted, view, len(slots))]
        lanes, reading = SimpleQueue[int](), self._reading
        for lane in range(len(slots)):
            lanes.put(lane)

        def fold() -> None:
            while True:
                try:
                    lane = lanes.get_nowait()
                except Empty:
                    return
                run.fold(plans[lane // heads], slots[lane], tokens[lane], notes[lane], reading)

        in_threads(fold, min(torch.get_num_threads(), len(slots)))
        return noted if noted is not None else view if steps[0].most_slots else None

    def _plan(self, steps: Sequence[Step], row: int) -> np.ndarray:
        """What leaves before each step in a row of the batch, as the loop wants to know it, [steps, 5]."""
        plan = np.full((len(steps), 5), -1, dtype=np.int64)
        for step, numbers in zip(steps, plan, strict=True):
            for each in step.leaving:
                before, sure = int(each.slots_before[row]), int(each.sink_tokens[row])
                numbers[:4] = self._column(each), before, before + int(each.new_slots[row]), sure
            numbers[4] = step.most_slots
        return plan

    def _tokens(self, where: slice) -> Iterator[tuple[Any, ...]]:
        """What each lane's tokens at these columns, and at others around them, add to slots."""
        (keys, alone, joining), begin = self.leaving.made(where)
        for each in _of_lanes(keys, *alone, *joining):
            yield (*each, begin)

    @functools.cached_property
    def _reading(self) -> Any:
        """How tokens are placed and slots read, as the loop wants to know it."""
        rules, policy = self.rules, self.rules.policy
        spec, routing = policy.readout.spec, policy.routing
        assert isinstance(routing, Nearest)
        at = {each: place for place, each in enumerate(policy.statistics)}
        mass = at.get(MASS, at[COUNT])
        weight, shift = rules.key_norm or (torch.ones(rules.width), torch.zeros(rules.width))
        norm = (each.detach().to(rules.dtype).contiguous().numpy() for each in (weight, shift))
        value_mass = at[COUNT] if spec.value == "count-mean" else mass
        biases = {"none": (-1, -1), "count": (at[COUNT], -1), "mass": (mass, at.get(FOUNDER_MASS, mass))}
        return loops.of_folding().Reading(
            *(self.chunk, policy.sinks, routing.new_slots, spec.key == "layer-norm", *norm, LAYER_NORM_EPS, mass),
            *(at.get(RADIUS, -1), value_mass, SHORTEST, *biases[spec.bias], TINY),
        )


def _standing_alone(store: SlotStore, rules: SlotRules) -> SlotView:
    """How the store's slots are read, in tensors that may be written into, as its sums and numbers may."""
    store.sums, store.numbers = store.sums.contiguous(), store.numbers.contiguous()
    view = store.read(rules)
    keys, values = view.keys.contiguous(), view.values.contiguous()
    bias = None if view.bias is None else view.bias.contiguous()
    store.view = SlotView(keys, keys, values, bias, view.made_with)
    return store.view


def _of_lanes(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """What each lane has of tensors [b, g, …], as arrays; none of what is not there."""
    arrays = [None if each is None else each.detach().contiguous().flatten(0, 1).numpy() for each in tensors]
    some = next(each for each in arrays if each is not None)
    for lane in range(len(some)):
        yield tuple(some[lane, :0, 0] if each is None else each[lane] for each in arrays)


def _notes(noted: Snapshots | None, view: SlotView, lanes: int) -> Iterator[tuple[Any, ...]]:
    """Where each lane notes how its slots are read, and how far apart one step's stand from the next one's."""
    if noted is None:
        yield from [(view.keys.new_zeros(0).numpy(), 0) * 3] * lanes
        return
    for row in range(lanes // view.keys.shape[1]):
        for head in range(view.keys.shape[1]):
            places = [view.keys.new_zeros(0, 0) if each is None else each[row, :, head] for each in noted.notes]
            yield tuple(part for each in places for part in strided(each)[:2])
