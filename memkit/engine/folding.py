"""Lanes whose slots are sums of the tokens nearest to them: PLAN, FOLD and READ by `memkit/loops/folding.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from memkit import loops
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries
from memkit.engine.lanes import Lane, Lanes, Part, askable, of_lanes
from memkit.engine.leaving import LeavingTokens
from memkit.engine.schedule import LeavingChunk, Schedule, Step
from memkit.memory.rows import SlotRules, SlotView
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline
from memkit.pieces.admission import Novelty
from memkit.pieces.readout import LAYER_NORM_EPS, SHORTEST, TINY, Readout
from memkit.pieces.routing import Nearest
from memkit.pieces.statistics import COUNT, FOUNDER_MASS, MASS, RADIUS
from memkit.policy import Policy

__all__ = ["FoldingLanes"]


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


class FoldingLanes(Lanes):
    """The lanes of one call whose slots are sums."""

    def __init__(
        self, inputs: AttendInputs, schedule: Schedule, rules: SlotRules, timeline: Timeline, leaving: LeavingTokens
    ) -> None:
        super().__init__(inputs, schedule, rules, timeline, leaving)
        asked = askable(inputs.keys) and inputs.plan is None and rules.valued and schedule.most_leaving > 0
        self.known = asked and self.enough and known(rules.policy)

    def knows(self, step: Step) -> bool:
        """Whether there is a slot to join for each token of the chunk that leaves, in all rows that it leaves."""
        return all(map(self._all_have_targets, step.leaving))

    def _all_have_targets(self, leaving: LeavingChunk) -> bool:
        routing, before, new = self.policy.routing, leaving.slots_before, leaving.new_slots
        assert isinstance(routing, Nearest)
        founded = (new > leaving.sink_tokens) & (routing.new_slots | ((before == 0) & (leaving.sink_tokens == 0)))
        return bool(((before > self.policy.sinks) | founded | (new == leaving.size))[leaving.leaves].all())

    def go_through(self, part: Part, queries: Queries, store: SlotStore) -> None:
        """PLAN, FOLD and READ."""
        store.about_to_write()
        run, view = loops.of_folding(), self._standing_alone(store)
        slots = of_lanes(store.sums, store.numbers, view.keys, view.values, view.bias)
        plans = [self._plan(part, row) for row in range(len(part.outputs))]
        lanes = [
            Lane(plans[row], (run.Slots(*of_slots), run.Tokens(*of_tokens), asked, heads))
            for (row, _, asked, heads), of_slots, of_tokens in zip(
                self._asked(part, queries), slots, self._tokens(part, store), strict=True
            )
        ]
        self._go_through(lanes, run.steps, self._reading)
        if self.rules.dtype != store.sums.dtype:
            store.view = None

    def _standing_alone(self, store: SlotStore) -> SlotView:
        """How the store's slots are read, in its own dtype and in tensors that may be written into, as its sums and
        numbers may."""
        store.sums, store.numbers = store.sums.contiguous(), store.numbers.contiguous()
        if self.rules.dtype != store.sums.dtype:
            store.view = None
        view = store.read(dataclasses.replace(self.rules, dtype=store.sums.dtype))
        keys, values = view.keys.contiguous(), view.values.contiguous()
        bias = None if view.bias is None else view.bias.contiguous()
        store.view = SlotView(keys, keys, values, bias, view.made_with)
        return store.view

    def _tokens(self, part: Part, store: SlotStore) -> Iterator[tuple[Any, ...]]:
        """What each lane's tokens that leave before these steps, and others around them, add to slots."""
        columns = self._leaving(part.steps)
        if columns is None:
            nothing = store.sums[:, :, :0], store.numbers[:, :, :0]
            (keys, alone, joining), begin = (store.sums[:, :, :0, : self.rules.width], nothing, nothing), 0
        else:
            (keys, alone, joining), begin = self.leaving.made(columns)
        for each in of_lanes(keys, *alone, *joining):
            yield (*each, begin - part.columns.start)

    @functools.cached_property
    def _reading(self) -> Any:
        """How tokens are placed and slots read, as the loop wants to know it."""
        rules, policy = self.rules, self.policy
        spec, routing = policy.readout.spec, policy.routing
        assert isinstance(routing, Nearest)
        at = {each: place for place, each in enumerate(policy.statistics)}
        mass = at.get(MASS, at[COUNT])
        weight, shift = rules.key_norm or (torch.ones(rules.width), torch.zeros(rules.width))
        dtype = torch.promote_types(rules.dtype, torch.float32)
        norm = (each.detach().to(dtype).contiguous().numpy() for each in (weight, shift))
        value_mass = at[COUNT] if spec.value == "count-mean" else mass
        biases = {"none": (-1, -1), "count": (at[COUNT], -1), "mass": (mass, at.get(FOUNDER_MASS, mass))}
        return loops.of_folding().Reading(
            *(self.chunk, policy.sinks, routing.new_slots, spec.key == "layer-norm", *norm, LAYER_NORM_EPS, mass),
            *(at.get(RADIUS, -1), value_mass, SHORTEST, *biases[spec.bias], TINY),
        )
