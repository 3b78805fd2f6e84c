"""Stretches of whole chunks on the CPU, by lanes: a key/value head of a row of the batch each, with its query heads.

Lanes have nothing to do with each other where slots compete and readers are observed, so that threads take them: each
goes through PLAN, FOLD, READ and OBSERVE of some chunks in one compiled loop (`memkit/loops/lanes.py`), with as many
slots as it has. What loops do not know, and what is no whole chunk, goes through `forward.py` step by step.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit import loops
from memkit.engine.contests import Layout, has_loops, layout, merging, scoring
from memkit.engine.expected import mean_rotation
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries
from memkit.engine.leaving import AHEAD, LeavingTokens
from memkit.engine.schedule import Schedule, Step, common
from memkit.engine.threads import in_threads
from memkit.memory.replacing import Line, lines_of_slots
from memkit.memory.rows import Contributions, SlotRules
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline
from memkit.pieces.evidence import output_errors
from memkit.pieces.observation import Observation
from memkit.policy import Policy

__all__ = ["Lanes", "strided", "usable"]

ENABLED = True
"""Whether there are lanes. Off, steps go one by one: for who wonders what is wrong."""

BEFORE, AFTER = 4, 5
"""Where a step's numbers have how many slots there are before and after it."""

PIECE = 4
"""Chunks that a thread takes of a lane before it asks again which lane has most left to do."""


@dataclass
class Lane:
    """One lane of a stretch: what its steps are about (`loops/lanes.py`), and how many of them are done."""

    plan: np.ndarray
    slots: Any
    tokens: Any
    done: int = 0
    taken: bool = False

    @property
    def left(self) -> int:
        """Slots that are still to be read, and steps: what there is left to do; 0 where nothing is."""
        return int(self.plan[self.done :, AFTER].sum()) + max(0, len(self.plan) - self.done)

    @property
    def lines(self) -> np.ndarray:
        """The slots' lines as they stand, [m, L]."""
        return self.slots.lines[self.slots.which[0], : self.plan[-1, AFTER]]


@functools.lru_cache(maxsize=64)
def known(policy: Policy) -> bool:
    """Whether loops know all that a whole chunk takes under this policy."""
    if not has_loops(policy) or not loops.with_products() or policy.takes_boundaries or scoring(policy) is None:
        return False
    founds_alike = policy.merging.by_share or not policy.weighted
    if type(policy.observation) is not Observation:
        return False
    return policy.missed is output_errors and founds_alike and policy.readout.spec.bias != "count"


def usable(policy: Policy, keys: Tensor) -> bool:
    """Whether lanes go through whole chunks of such keys under this policy."""
    asked = ENABLED and keys.device.type == "cpu" and not torch.is_grad_enabled()
    return asked and known(policy) and loops.usable(keys)  # in this order: who has no use for Numba does not import it


class Lanes:
    """The lanes of one call."""

    def __init__(
        self, inputs: AttendInputs, schedule: Schedule, rules: SlotRules, timeline: Timeline, leaving: LeavingTokens
    ) -> None:
        self.inputs, self.schedule, self.rules, self.timeline, self.leaving = inputs, schedule, rules, timeline, leaving
        self.policy, self.chunk, self.lock = rules.policy, rules.policy.chunk, threading.Lock()
        # Of whom no query scale has been learned, for whom slots and window meet one query.
        plain = inputs.parameters is None and not rules.policy.rotary.turns_queries
        self.known = plain and usable(rules.policy, inputs.keys)

    def stretches(self) -> list[list[Step]]:
        """The steps, those together that lanes go through at once."""
        groups, most, together = list[list[Step]](), max(1, AHEAD // self.chunk), False
        for step in self.schedule.steps:
            whole = self.takes(step)
            if whole and together and len(groups[-1]) < most:
                groups[-1].append(step)
            else:
                groups.append([step])
            together = whole
        return groups

    def takes(self, step: Step) -> bool:
        """Whether lanes go through a step: a chunk of all rows, before which one chunk leaves all of them, or none."""
        if not self.known:
            return False
        schedule, end = self.schedule, self.schedule.seen + step.stop
        if step.stop - step.start != self.chunk or not step.active.all() or (schedule.lengths < step.stop).any():
            return False
        ended, begin = schedule.course.ends(end)
        if not ended.all() or (end - begin != self.chunk).any() or common(step.first, step.active) is None:
            return False
        return all(each.leaves.all() and self._column(each.begin) is not None for each in step.leaving)

    def _column(self, begin: np.ndarray) -> int | None:
        """The column of these positions, if it is one and the same."""
        return common(begin + self.schedule.shift, np.ones(len(begin), dtype=bool))

    def read(self, steps: Sequence[Step], queries: Queries, store: SlotStore, output: Tensor) -> None:
        """PLAN, FOLD, READ and OBSERVE; the outputs go into `output` [b, h, t, v], of all tokens of the call."""
        store.about_to_write()
        of, run = layout(self.policy, self.rules.width, output.shape[-1]), loops.of_lanes()
        lanes, rule = self._lanes(steps, queries, store, output, of), merging(self.policy, of)
        for lane in lanes:
            loops.compiled().read(lane.slots.lines[:1], of.at, rule, lane.slots.values, lane.slots.bias)
        reading = self._reading(of.line, output.shape[1] // self.inputs.keys.shape[1])
        facts = (of.at, scoring(self.policy), rule, torch.finfo(store.sums.dtype).tiny, reading)

        def go_on() -> None:
            while (lane := self._taken(lanes)) is not None:
                run.steps(lane.plan[lane.done : lane.done + PIECE], lane.slots, lane.tokens, *facts)
                lane.done += PIECE
                lane.taken = False

        in_threads(go_on, min(torch.get_num_threads(), len(lanes)))
        self._hand_back(lanes, store, of.line)

    def _taken(self, lanes: list[Lane]) -> Lane | None:
        """The lane with most left to do of those that no thread is at, taken; None where there is none."""
        with self.lock:
            lane = max((one for one in lanes if one.left and not one.taken), key=lambda one: one.left, default=None)
            if lane is not None:
                lane.taken = True
            return lane

    def _lanes(
        self, steps: Sequence[Step], queries: Queries, store: SlotStore, output: Tensor, of: Layout
    ) -> list[Lane]:
        """The lanes, row after row of the batch."""
        run, heads, group = loops.of_lanes(), self.inputs.keys.shape[1], output.shape[1] // self.inputs.keys.shape[1]
        plans = [self._plan(steps, row) for row in range(len(output))]
        held = max(int(plan[0, BEFORE]) for plan in plans)
        slots = lines_of_slots(store, self.rules, held, of.line) if held else None
        (rows, numbers), begin = self._founders(steps, store)
        readers, evidence = self._readers(steps, queries), self.timeline.streams["evidence"]
        asked, keys, values = (_along(each) for each in (queries.windowed, self.timeline.keys, self.timeline.values))
        lanes = list[Lane]()
        for row, head in np.ndindex(len(output), heads):
            plan, asking = plans[row], slice(head * group, (head + 1) * group)
            live, room = int(plan[0, BEFORE]), max(1, int(plan[:, BEFORE : AFTER + 1].max()))
            lines = store.sums.new_zeros(2, room, len(of.line.own))
            if slots is not None:
                lines[0, :live] = slots[row, head, :live]
            read = (store.sums.new_zeros(1, room, output.shape[-1]).numpy(), store.sums.new_zeros(1, room).numpy())
            tokens = run.Tokens(
                *strided(asked[row, asking]),
                *strided(keys[row, head]),
                *strided(values[row, head]),
                *strided(evidence[row, head]),
                *strided(output[row, asking]),
                *(rows[row, head].numpy(), numbers[row, head].numpy(), begin),
                *(readers[row, asking].numpy(), steps[0].start),
            )
            lanes.append(Lane(plan, run.Slots(lines.numpy(), np.zeros(1, dtype=np.int64), *read), tokens))
        return lanes

    def _plan(self, steps: Sequence[Step], row: int) -> np.ndarray:
        """What the steps are for a row of the batch, as loops want to know it, [steps, 9]."""
        plan = np.zeros((len(steps), 9), dtype=np.int64)
        for step, numbers in zip(steps, plan, strict=True):
            numbers[:4] = step.start, self.schedule.old + step.start, step.first[row], -1
            numbers[BEFORE] = numbers[AFTER] = step.slots[row]
            numbers[8] = max(0, self.policy.sinks - int(self.schedule.seen[row]) - step.start)
            for each in step.leaving:
                before, column = int(each.slots_before[row]), self._column(each.begin)
                kept, after = min(before, self.policy.sinks), before + int(each.new_slots[row])
                numbers[3:8] = -1 if column is None else column, before, after, kept, int(each.sink_tokens[row])
        return plan

    def _readers(self, steps: Sequence[Step], queries: Queries) -> Tensor:
        """Who is expected to read behind each chunk, [b, h, n, d]: its queries, turned there; none where nobody is.

        By how far they are turned a chunk's queries differ, and by which mean rotation then (`expected.py`) none do.
        """
        expects, rotation, positions = self.policy.expects, self.inputs.rotation, self.timeline.get("positions")
        span = slice(steps[0].start, steps[-1].stop)
        if expects is None:
            return queries.windowed[:, :, :0].contiguous()
        assert rotation is not None and positions is not None
        asked = queries.windowed[:, :, span]
        columns = slice(self.schedule.old + span.start, self.schedule.old + span.stop)
        of_chunks = positions[:, :, columns].unflatten(2, (-1, self.chunk))
        ahead = (of_chunks[..., -1:] + 1 - of_chunks).flatten(2)
        return (rotation.apply(asked, ahead) @ mean_rotation(rotation, expects.future, asked)).contiguous()

    def _founders(self, steps: Sequence[Step], store: SlotStore) -> tuple[Contributions, int]:
        """What the tokens that leave found slots with, and the column of the first of them."""
        columns = [self._column(each.begin) for step in steps for each in step.leaving]
        if not columns or columns[0] is None or columns[-1] is None:
            sums, numbers = store.sums[:, :, :0], store.numbers[:, :, :0].double()
            return (sums.contiguous(), numbers.contiguous()), 0
        made, begin = self.leaving.made(slice(columns[0], columns[-1] + self.chunk))
        return made[1], begin

    def _reading(self, line: Line, group: int) -> Any:
        """How queries read and tell, as loops want to know it."""
        observation, width = self.policy.observation, self.rules.width
        offsets = np.array(observation.offsets_in(self.chunk), dtype=np.int64)
        observed = (np.arange(group)[:, None] * self.chunk + offsets).flatten()
        key_at = line.founders_keys.start if line.turned else 0
        facts = (float(self.inputs.checked_scale), key_at, float(observation.decay), observation.maximal)
        expects = self.policy.expects
        of_expected = expects is not None and expects.covariance, self.policy.sinks
        return loops.of_lanes().Reading(
            group, self.chunk, width, line.values.stop - width, *facts, observation.apart, observed, *of_expected
        )

    def _hand_back(self, lanes: list[Lane], store: SlotStore, line: Line) -> None:
        """The slots, where a store has them."""
        shape = (*store.sums.shape[:2], store.room, len(line.own))
        lines = store.sums.new_zeros(shape)
        for place, lane in zip(lines.flatten(0, 1), lanes, strict=True):
            place[: len(lane.lines)] = torch.from_numpy(lane.lines)
        founders_keys = line.founders_keys if line.turned else None
        store.take_lines(lines, line.values.stop, line.numbers, line.evidence, founders_keys)


def _along(tensor: Tensor) -> Tensor:
    """[b, h, n, x] whose tokens stand behind each other, without gaps within."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-2) >= tensor.shape[-1] else tensor.contiguous()


def strided(tensor: Tensor) -> tuple[Any, ...]:
    """From the first number of [(h,) n, x] to its last, and how far apart its heads and tokens begin."""
    assert tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    return (tensor.as_strided((span,), (1,)).numpy(), *tensor.stride()[:-1])
