"""Stretches of chunks on the CPU, by lanes: a key/value head of a row of the batch each, with its query heads.

Lanes have nothing to do with each other, so that threads take them: each goes through all stages of some chunks in one
compiled loop, with as many slots as it has. There are three kinds: `competing.py`, whose slots compete and are made
anew; `folding.py`, whose slots are sums; and `sliding.py`, whose window slides, with sinks at most. What loops do
not know goes through `forward.py` step by step.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit import loops
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries
from memkit.engine.leaving import AHEAD, LeavingTokens
from memkit.engine.schedule import LeavingChunk, Schedule, Step, common
from memkit.engine.threads import in_threads
from memkit.memory.rows import SlotRules
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline

__all__ = ["AFTER", "BEFORE", "FEWEST", "Laid", "Lane", "Lanes", "Part", "askable", "of_lanes"]

ENABLED = True
"""Whether there are lanes. Off, steps go one by one: for who wonders what is wrong."""

STEP = ("start", "stop", "column", "first", "leaving", "before", "after", "kept", "sink_tokens", "of_sinks")
"""What loops are told of a step of one row: its queries, among the part's tokens, none where the row has ended; the
column of the first one, and the first column that it sees; the column at which the chunk begins that leaves, −1 for
none; slots before it, and after it; how many of those before, the first ones, always stay; how many tokens of the chunk
found in any case; how many of the step's first queries are sinks'."""

BEFORE, AFTER = STEP.index("before"), STEP.index("after")

FEWEST = 2 / 3
"""Lanes for each thread from which on those pay that fold or read what others fold and read by operations as well: they
read one and a half times as fast as PyTorch's kernels do, between whose threads a head is shared."""

PIECE = 4
"""Chunks that a thread takes of a lane before it asks again which lane has most left to do."""


@dataclass
class Lane:
    """One lane of a stretch: its steps [steps, 10], what a loop has of it, and how many of the steps are done."""

    plan: np.ndarray
    given: tuple[Any, ...]
    done: int = 0
    taken: bool = False

    @property
    def left(self) -> int:
        """Slots that are still to be read, and steps: what there is left to do; 0 where nothing is."""
        return int(self.plan[self.done :, AFTER].sum()) + max(0, len(self.plan) - self.done)


@dataclass(frozen=True)
class Laid:
    """A tensor [b, h, n, x] as loops take it: flat, and how far apart its rows, heads and tokens stand."""

    flat: np.ndarray
    row: int
    head: int
    token: int

    @classmethod
    def of(cls, tensor: Tensor) -> Laid:
        """The tensor, of the same memory where its tokens stand behind each other, without gaps within."""
        if tensor.stride(-1) != 1 or tensor.stride(-2) < tensor.shape[-1]:
            tensor = tensor.contiguous()
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
        row, head, token, _ = tensor.stride()
        if tensor.shape[-2] == 1:  # whose stride may be anything, even in a contiguous tensor
            token = tensor.shape[-1]
        return cls(tensor.as_strided((span,), (1,)).numpy(), row, head, token)

    def of_heads(self, row: int, head: int) -> tuple[np.ndarray, int, int]:
        """A row's numbers from a head on, and how far apart heads and tokens stand."""
        return self.flat[row * self.row + head * self.head :], self.head, self.token

    def of_head(self, row: int, head: int) -> tuple[np.ndarray, int]:
        """A head's numbers, and whatever stands behind them, and how far apart tokens stand."""
        return self.flat[row * self.row + head * self.head :], self.token


@dataclass(frozen=True)
class Part:
    """Steps that lanes go through at once: their tokens of the call, and the columns that they see or that leave before
    them. Loops count both from the first one on.

    outputs [b, h, s, v]: of these tokens, float32 or float64, which is what loops compute in.
    """

    steps: Sequence[Step]
    tokens: slice
    columns: slice
    outputs: Tensor


def askable(keys: Tensor) -> bool:
    """Whether there may be lanes for such keys: whether policies are worth a look."""
    return ENABLED and loops.ENABLED and keys.device.type == "cpu" and not torch.is_grad_enabled()


def of_lanes(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """What each lane has of tensors [b, g, …], as arrays; none of what is not there."""
    arrays = [None if each is None else each.detach().contiguous().flatten(0, 1).numpy() for each in tensors]
    some = next(each for each in arrays if each is not None)
    for lane in range(len(some)):
        yield tuple(some[lane, :0, 0] if each is None else each[lane] for each in arrays)


class Lanes(ABC):
    """The lanes of one call.

    known: whether loops know this call's policy and tensors; where not, nothing else is to be asked.
    """

    known: bool

    def __init__(
        self, inputs: AttendInputs, schedule: Schedule, rules: SlotRules, timeline: Timeline, leaving: LeavingTokens
    ) -> None:
        self.inputs, self.schedule, self.rules, self.timeline, self.leaving = inputs, schedule, rules, timeline, leaving
        self.policy, self.chunk, self.lock = rules.policy, rules.policy.chunk, threading.Lock()

    def read(self, steps: Sequence[Step], queries: Queries, store: SlotStore, output: Tensor) -> None:
        """All stages of these steps; the outputs go into `output` [b, h, t, v], of all tokens of the call."""
        tokens, leaving = slice(steps[0].start, steps[-1].stop), self._leaving(steps)
        first = int(steps[0].first[steps[0].active].min())
        columns = slice(first if leaving is None else min(first, leaving.start), self.schedule.old + tokens.stop)
        here = output[:, :, tokens]
        part = Part(steps, tokens, columns, here.to(torch.promote_types(here.dtype, torch.float32)))
        self.go_through(part, queries, store)
        if part.outputs is not here:
            here.copy_(part.outputs)

    @abstractmethod
    def go_through(self, part: Part, queries: Queries, store: SlotStore) -> None:
        """All stages of these steps."""

    @abstractmethod
    def knows(self, step: Step) -> bool:
        """Whether loops know a step before which at most one whole chunk leaves a row."""

    def takes(self, step: Step) -> bool:
        """Whether lanes go through a step."""
        leaves = all(each.size == self.chunk and self._column(each) is not None for each in step.leaving)
        return leaves and bool(step.active.any()) and self.knows(step)

    def stretches(self) -> list[list[Step]]:
        """The steps, those together that lanes go through at once."""
        groups, together = list[list[Step]](), False
        for step in self.schedule.steps:
            taken = self.takes(step)
            if taken and together and step.stop - groups[-1][0].start <= AHEAD:
                groups[-1].append(step)
            else:
                groups.append([step])
            together = taken
        return groups

    @property
    def enough(self) -> bool:
        """Whether there are enough lanes for the threads that there are."""
        return self.inputs.keys.shape[0] * self._heads >= FEWEST * torch.get_num_threads()

    @property
    def _heads(self) -> int:
        """Key/value heads."""
        return self.inputs.keys.shape[1]

    def _column(self, leaving: LeavingChunk) -> int | None:
        """The column at which the chunk begins, if it is one and the same for all rows that it leaves."""
        return common(leaving.begin + self.schedule.shift, leaving.leaves)

    def _leaving(self, steps: Sequence[Step]) -> slice | None:
        """From the first column of which a token leaves to the last; None where none does."""
        columns = [self._column(each) for step in steps for each in step.leaving]
        if not columns or columns[0] is None or columns[-1] is None:
            return None
        return slice(columns[0], columns[-1] + self.chunk)

    def _plan(self, part: Part, row: int) -> np.ndarray:
        """What the steps are for a row of the batch, as loops want to know it: `STEP`, [steps, 10]."""
        plan, length = np.zeros((len(part.steps), len(STEP)), dtype=np.int64), int(self.schedule.lengths[row])
        for step, numbers in zip(part.steps, plan, strict=True):
            numbers[:2] = step.start, max(step.start, min(step.stop, length))
            numbers[:2] -= part.tokens.start
            numbers[2:5] = self.schedule.old + step.start, step.first[row], -1
            numbers[2:4] -= part.columns.start
            numbers[BEFORE] = numbers[AFTER] = step.slots[row]
            numbers[-1] = max(0, self.policy.sinks - int(self.schedule.seen[row]) - step.start)
            for each in step.leaving:
                if not each.leaves[row]:
                    continue
                column, before = each.begin[row] + self.schedule.shift[row], int(each.slots_before[row])
                kept, after = min(before, self.policy.sinks), before + int(each.new_slots[row])
                numbers[4:9] = column - part.columns.start, before, after, kept, int(each.sink_tokens[row])
        return plan

    def _asked(self, part: Part, queries: Queries) -> Iterator[tuple[int, int, Any, Any]]:
        """Each lane, row after row of the batch: row, key/value head, queries and what they meet, query heads."""
        run, heads, (rows, query_heads, _, value_width) = loops.of_reading(), self._heads, part.outputs.shape
        group, dtype = query_heads // heads, part.outputs.dtype
        windowed = Laid.of(queries.windowed[:, :, part.tokens].to(dtype))
        remembering = windowed if queries.alike else Laid.of(queries.remembering[:, :, part.tokens].to(dtype))
        keys, values = (
            Laid.of(each[:, :, part.columns].to(dtype)) for each in (self.timeline.keys, self.timeline.values)
        )
        outputs, learned = Laid.of(part.outputs), (queries.window_scale, queries.memory_scale)
        ones = part.outputs.new_ones(query_heads)
        scales = [(ones if each is None else each.detach().to(dtype)).numpy() for each in learned]
        alike = queries.alike and queries.window_scale is queries.memory_scale
        facts = (alike, self.rules.width, value_width, float(self.inputs.checked_scale))
        for row, head in np.ndindex(rows, heads):
            some = slice(head * group, (head + 1) * group)
            asked = run.Asked(
                *(*windowed.of_heads(row, some.start), *remembering.of_heads(row, some.start)),
                *(*keys.of_head(row, head), *values.of_head(row, head), *outputs.of_heads(row, some.start)),
            )
            yield row, head, asked, run.Heads(*(each[some] for each in scales), *facts)

    def _go_through(self, lanes: list[Lane], run: Callable[..., None], *facts: Any) -> None:
        """Have threads go through the lanes, by a loop that takes some steps, what a lane has, and these facts."""

        def go_on() -> None:
            while (lane := self._taken(lanes)) is not None:
                run(lane.plan[lane.done : lane.done + PIECE], *lane.given, *facts)
                lane.done += PIECE
                lane.taken = False

        in_threads(go_on, min(torch.get_num_threads(), len(lanes)))

    def _taken(self, lanes: list[Lane]) -> Lane | None:
        """The lane with most left to do of those that no thread is at, taken; None where there is none."""
        with self.lock:
            lane = max((one for one in lanes if one.left and not one.taken), key=lambda one: one.left, default=None)
            if lane is not None:
                lane.taken = True
            return lane
