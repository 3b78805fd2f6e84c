"""Lanes whose slots compete with the tokens that leave: PLAN, FOLD, READ and OBSERVE by `memkit/loops/competing.py`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit import loops
from memkit.engine.contests import Layout, has_loops, layout, merging, scoring
from memkit.engine.expected import mean_rotation
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries
from memkit.engine.lanes import AFTER, BEFORE, Laid, Lane, Lanes, Part, askable
from memkit.engine.leaving import LeavingTokens
from memkit.engine.schedule import Schedule, Step
from memkit.memory.replacing import Line, lines_of_slots
from memkit.memory.rows import Contributions, SlotRules
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline
from memkit.pieces.evidence import output_errors
from memkit.pieces.observation import Observation
from memkit.policy import Policy

__all__ = ["CompetingLanes", "usable"]


@functools.lru_cache(maxsize=64)
def known(policy: Policy, dtype: torch.dtype) -> bool:
    """Whether loops know all that a whole chunk takes under this policy, of queries, keys and values of this dtype."""
    if not has_loops(policy) or not loops.with_products() or policy.takes_boundaries or scoring(policy, dtype) is None:
        return False
    founds_alike = policy.merging.by_share or not policy.weighted
    if type(policy.observation) is not Observation:
        return False
    return policy.missed is output_errors and founds_alike and policy.readout.spec.bias != "count"


def usable(policy: Policy, keys: Tensor) -> bool:
    """Whether there are lanes for such keys under this policy."""
    return askable(keys) and known(policy, keys.dtype)  # in this order: who has no use for Numba does not import it


class CompetingLanes(Lanes):
    """The lanes of one call whose slots compete."""

    def __init__(
        self, inputs: AttendInputs, schedule: Schedule, rules: SlotRules, timeline: Timeline, leaving: LeavingTokens
    ) -> None:
        super().__init__(inputs, schedule, rules, timeline, leaving)
        # Of whom no query scale has been learned, for whom slots and window meet one query.
        plain = inputs.parameters is None and not rules.policy.rotary.turns_queries
        # Where nothing leaves, a memory's slots are there only as they are read.
        folds = schedule.most_leaving > 0 or (schedule.tokens >= self.chunk and inputs.memory is None)
        self.known = plain and folds and usable(rules.policy, inputs.keys)

    def knows(self, step: Step) -> bool:
        """Whether no chunk ends whose first queries, which may be observed, were read before; and where readers are
        expected, all rows begin one."""
        if not self.policy.observes:
            return True
        seen, active = self.schedule.seen, step.active
        begins = (seen + step.start) % self.chunk == 0
        ends = (seen + np.minimum(step.stop, self.schedule.lengths)) % self.chunk == 0
        return bool((begins if self.policy.expects is not None else begins | ~ends)[active].all())

    def go_through(self, part: Part, queries: Queries, store: SlotStore) -> None:
        """PLAN, FOLD, READ and OBSERVE."""
        store.about_to_write()
        of, run = layout(self.policy, self.rules.width, part.outputs.shape[-1]), loops.of_competing()
        lanes, rule = self._lanes(part, queries, store, of), merging(self.policy, of)
        told = self._telling(of.line, part.outputs.shape[1] // self._heads)
        scored = scoring(self.policy, self.rules.dtype)
        for lane in lanes:
            slots = lane.given[0]
            run.see(slots.lines[:1], of.at, rule, slots.values, slots.bias, scored.rounds)
        self._go_through(lanes, run.steps, of.at, scored, rule, torch.finfo(store.sums.dtype).tiny, told)
        self._hand_back(lanes, store, of.line)

    def _lanes(self, part: Part, queries: Queries, store: SlotStore, of: Layout) -> list[Lane]:
        """The lanes, row after row of the batch."""
        run, (batch, query_heads, _, value_width) = loops.of_competing(), part.outputs.shape
        group, plans = query_heads // self._heads, [self._plan(part, row) for row in range(batch)]
        held = max(int(plan[0, BEFORE]) for plan in plans)
        slots = lines_of_slots(store, self.rules, held, of.line) if held else None
        (rows, numbers), begin = self._founders(part, store)
        readers = self._readers(part, queries)
        told = self.timeline.streams.get("evidence")
        nothing = store.sums.new_zeros(batch, self._heads, 0, 0)  # where nobody is observed
        evidence = Laid.of(nothing if told is None else told[:, :, part.columns])
        lanes = list[Lane]()
        for row, head, asked, heads in self._asked(part, queries):
            plan, asking = plans[row], slice(head * group, (head + 1) * group)
            live, room = int(plan[0, BEFORE]), max(1, int(plan[:, BEFORE : AFTER + 1].max()))
            lines = store.sums.new_zeros(2, room, len(of.line.own))
            if slots is not None:
                lines[0, :live] = slots[row, head, :live]
            read = (store.sums.new_zeros(1, room, value_width).numpy(), store.sums.new_zeros(1, room).numpy())
            tokens = run.Tokens(
                *evidence.of_head(row, head),
                *(rows[row, head].numpy(), numbers[row, head].numpy(), begin, readers[row, asking].numpy()),
            )
            of_slots = run.Slots(lines.numpy(), np.zeros(1, dtype=np.int64), *read)
            lanes.append(Lane(plan, (of_slots, tokens, asked, heads)))
        return lanes

    def _readers(self, part: Part, queries: Queries) -> Tensor:
        """Who is expected to read behind each chunk, [b, h, n, d]: its queries, turned there; none where nobody is.

        By how far they are turned a chunk's queries differ, and by which mean rotation then (`expected.py`) none do.
        """
        expects, rotation, positions = self.policy.expects, self.inputs.rotation, self.timeline.get("positions")
        whole = (part.tokens.stop - part.tokens.start) // self.chunk * self.chunk
        span = slice(part.tokens.start, part.tokens.start + whole)
        asked = queries.windowed[:, :, span].to(part.outputs.dtype)
        if expects is None:
            return asked[:, :, :0].contiguous()
        assert rotation is not None and positions is not None
        columns = slice(self.schedule.old + span.start, self.schedule.old + span.stop)
        of_chunks = positions[:, :, columns].unflatten(2, (-1, self.chunk))
        ahead = (of_chunks[..., -1:] + 1 - of_chunks).flatten(2)
        return (rotation.apply(asked, ahead) @ mean_rotation(rotation, expects.future, asked)).contiguous()

    def _founders(self, part: Part, store: SlotStore) -> tuple[Contributions, int]:
        """What the tokens that leave found slots with, and the column of the first of them."""
        if (columns := self._leaving(part.steps)) is None:
            sums, numbers = store.sums[:, :, :0], store.numbers[:, :, :0].double()
            return (sums.contiguous(), numbers.contiguous()), 0
        made, begin = self.leaving.made(columns)
        return made[1], begin - part.columns.start

    def _telling(self, line: Line, group: int) -> Any:
        """How queries tell, as loops want to know it."""
        observation, expects = self.policy.observation, self.policy.expects
        offsets = np.array(observation.offsets_in(self.chunk), dtype=np.int64)
        observed = (np.arange(group)[:, None] * self.chunk + offsets).flatten()
        key_at = line.founders_keys.start if line.turned else 0
        return loops.of_competing().Telling(
            *(self.chunk, key_at, float(observation.decay), observation.maximal, observation.apart, observed),
            *(expects is not None and expects.covariance, self.policy.sinks),
        )

    def _hand_back(self, lanes: list[Lane], store: SlotStore, line: Line) -> None:
        """The slots, where a store has them."""
        shape = (*store.sums.shape[:2], store.room, len(line.own))
        lines = store.sums.new_zeros(shape)
        for place, lane in zip(lines.flatten(0, 1), lanes, strict=True):
            slots, count = lane.given[0], int(lane.plan[-1, AFTER])
            place[:count] = torch.from_numpy(slots.lines[slots.which[0], :count])
        founders_keys = line.founders_keys if line.turned else None
        store.take_lines(lines, line.values.stop, line.numbers, line.evidence, founders_keys)
