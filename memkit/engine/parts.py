"""Which key sets the queries of a step meet: slots, older columns of the window, and the step's own, causally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from memkit.engine.call import Call
from memkit.engine.read import Part
from memkit.engine.schedule import Schedule, Step, common
from memkit.engine.timeline import Timeline, on_device
from memkit.memory import Ready

__all__ = ["Parts", "Queries", "Snapshots", "heated", "readable_together"]


@dataclass(frozen=True)
class Queries:
    """A call's queries, as they meet the window and as they meet the slots; temperatures are applied step by step.

    windowed, remembering [b, h, t, d]: one and the same tensor unless memory is un-rotated; window_heat, memory_heat
    [h]: temperatures, None for 1.
    """

    windowed: Tensor
    remembering: Tensor
    window_heat: Tensor | None
    memory_heat: Tensor | None

    @classmethod
    def of(cls, call: Call, timeline: Timeline) -> Queries:
        """The queries of a call."""
        policy, queries = call.policy, call.queries
        assert queries is not None
        if not timeline.schedule.even:  # nothing that stands in the padding may reach a gradient
            queries = queries.masked_fill(~timeline.own_columns()[:, None, :, None], 0)
        remembering = queries
        if not policy.exact_slots:
            positions = timeline.positions
            if positions is not None:
                positions = positions[:, None, positions.shape[1] - queries.shape[2] :]
            remembering = policy.rotary.memory_queries(queries, call.rotation, positions)
        if call.parameters is None:
            return cls(queries, remembering, None, None)
        window = call.parameters.temperature_window
        # Sinks without growth are plain tokens.
        return cls(queries, remembering, window, window if policy.exact_slots else call.parameters.temperature_memory)

    @property
    def alike(self) -> bool:
        """Whether window and slots meet the same tensor."""
        return self.remembering is self.windowed

    def for_window(self, span: slice) -> Tensor:
        """The queries of a span, [b, h, s, d], as the window's keys meet them."""
        return heated(self.windowed[:, :, span], self.window_heat)

    def for_slots(self, span: slice) -> Tensor:
        """The queries of a span, [b, h, s, d], as the slots meet them."""
        return heated(self.remembering[:, :, span], self.memory_heat)


def readable_together(one: Step, other: Step, unequal_slots: bool) -> bool:
    """Whether two steps are alike: as many queries, older tokens of the window and slots, and all rows in step.

    unequal_slots: whether numbers of slots may differ, for the price of a mask.
    """
    numbers = (one.first, one.slots, other.first, other.slots)
    if any(common(each, one.active) is None for each in numbers) or one.stop - one.start == 1:
        return False
    facts = [
        (
            step.stop - step.start,
            int(step.first[0]) - step.start,
            step.most_slots > 0 if unequal_slots else step.most_slots,
        )
        for step in (one, other)
    ]
    return facts[0] == facts[1]


class Snapshots:
    """The slots as each of k steps reads them, whatever is folded in later: a batch row per row and step, [b·k, …]."""

    def __init__(self, steps: int, most: int) -> None:
        self.steps, self.most = steps, most
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.bias: Tensor | None = None

    def take(self, step: int, ready: Ready) -> None:
        """Note how the slots are read at a step."""
        self.keys = self._noted(self.keys, step, ready.keys)
        self.values = self._noted(self.values, step, ready.values)
        self.bias = None if ready.bias is None else self._noted(self.bias, step, ready.bias)

    def _noted(self, notes: Tensor | None, step: int, read: Tensor) -> Tensor:
        rows, heads, _, *width = read.shape
        if notes is None:
            notes = read.new_empty(rows * self.steps, heads, self.most, *width)
        notes.unflatten(0, (rows, self.steps))[:, step].copy_(read[:, :, : self.most])
        return notes


def _apart(timeline: Tensor, width: int, every: int) -> Tensor:
    """[b, h, n, d] → k stretches of `width` columns, one beginning `every` so many: [b·k, h, width, d]."""
    return timeline.unfold(2, width, every).permute(0, 2, 1, 4, 3).flatten(0, 1)


def heated(queries: Tensor, temperature: Tensor | None) -> Tensor:
    """Queries [b, h, s, d] times the temperature [h] of their head."""
    return queries if temperature is None else queries * temperature.to(queries.dtype)[:, None, None]


class Parts:
    """The parts of each step of a call."""

    def __init__(self, schedule: Schedule, keys: Tensor, values: Tensor) -> None:
        self.schedule, self.keys, self.values = schedule, keys, values
        self.device, self.dtype = keys.device, keys.dtype

    def of(self, step: Step, queries: Queries, ready: Ready | None) -> list[Part]:
        """What the step's queries meet; `ready` are the slots as they are then, None where none is live."""
        parts: list[Part] = []
        span = slice(step.start, step.stop)
        if ready is not None:
            most = step.most_slots
            bias = None if ready.bias is None else ready.bias[:, :, None, :most]
            uneven = common(step.slots, step.active) is None
            if uneven:
                slots = torch.arange(most, device=self.device)
                beyond = self._hiding(slots >= self._per_row(step.slots))
                bias = beyond if bias is None else bias + beyond
            read = (ready.keys[:, :, :most], ready.values[:, :, :most])
            parts.append(Part(queries.for_slots(span), *read, bias, hides=uneven))
        windowed = queries.for_window(span)
        begin, end = self.schedule.old + step.start, self.schedule.old + step.stop
        alone = step.stop - step.start == 1
        parts += self._older(step, windowed, end if alone else begin)
        if not alone:
            parts.append(self._part(windowed, begin, end, None, causal=True))
        return parts

    def of_many(self, steps: Sequence[Step], queries: Queries, slots: Snapshots) -> list[Part]:
        """What k alike steps meet, each with the slots as they were then: one batch row per row and step, [b·k, …]."""
        first, last = steps[0], steps[-1]
        size, span = first.stop - first.start, slice(first.start, last.stop)
        begin, end = self.schedule.old + first.start, self.schedule.old + last.stop
        older = begin - int(first.first[0])
        windowed = _apart(queries.for_window(span), size, size)
        remembering = _apart(queries.for_slots(span), size, size)
        parts = [self._slots_of_many(steps, remembering, slots)] if last.most_slots else []
        for columns, width, causal in (((begin - older, end - size), older, False), ((begin, end), size, True)):
            if width:
                seen = slice(*columns)
                keys, values = (_apart(each[:, :, seen], width, size) for each in (self.keys, self.values))
                parts.append(Part(windowed, keys, values, causal=causal))
        return parts

    def _slots_of_many(self, steps: Sequence[Step], queries: Tensor, slots: Snapshots) -> Part:
        assert slots.keys is not None and slots.values is not None
        live = [step.most_slots for step in steps]
        bias = None if slots.bias is None else slots.bias.unsqueeze(2)
        if min(live) < slots.most:
            rows = len(slots.keys) // len(steps)
            numbers = torch.arange(slots.most, device=self.device)
            beyond = self._hiding(numbers >= on_device(np.array(live * rows), self.device)[:, None])
            bias = beyond if bias is None else bias + beyond
        return Part(queries, slots.keys, slots.values, bias)

    def _older(self, step: Step, queries: Tensor, end: int) -> list[Part]:
        """Columns before `end` that the first query sees; masked where rows differ or later queries lose some."""
        first = int(step.first[step.active].min())
        band = self.schedule.policy.window.band
        kept = first  # the first column that all queries of the step still see
        if band is not None:
            kept = min(max(first, self.schedule.old + step.stop - band), end)
        uneven = common(step.first, step.active) is None
        parts: list[Part] = []
        for begin, stop in pairwise((first, kept, end)):
            if stop == begin:
                continue
            columns = torch.arange(begin, stop, device=self.device)
            bias = self._hiding(columns < self._per_row(step.first)) if uneven else None
            if band is not None and begin < kept:
                oldest = torch.arange(step.start, step.stop, device=self.device) + self.schedule.old - band + 1
                fallen = self._hiding(columns < oldest[:, None]).transpose(0, 2)
                bias = fallen if bias is None else torch.minimum(bias, fallen)
            parts.append(self._part(queries, begin, stop, bias))
        return parts

    def _part(self, queries: Tensor, begin: int, end: int, bias: Tensor | None, causal: bool = False) -> Part:
        keys, values = self.keys[:, :, begin:end], self.values[:, :, begin:end]
        return Part(queries, keys, values, bias, causal, columns=(begin, end), hides=bias is not None)

    def _hiding(self, hide: Tensor) -> Tensor:
        """A bias that hides keys: hide [b, n] → [b, 1, 1, n]."""
        bias = torch.zeros(hide.shape, dtype=self.dtype, device=self.device)
        return bias.masked_fill_(hide, -torch.inf)[:, None, None]

    def _per_row(self, numbers: np.ndarray) -> Tensor:
        return on_device(numbers, self.device)[:, None]
