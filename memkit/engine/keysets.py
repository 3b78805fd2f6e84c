"""Which key sets the queries of a step meet: slots, older columns of the window, and the step's own, causally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from memkit.engine.read import KeySet
from memkit.engine.schedule import Schedule, Step, common
from memkit.memory.rows import SlotView, on_device
from memkit.memory.window import Sections, side_by_side
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy

__all__ = ["KeySets", "Queries", "Snapshots", "apart", "readable_together", "scaled"]


JOINED = {"cpu": (256, 512)}
"""Per kind of device, up to how many queries and older tokens of the window a step meets its own tokens and the older
ones as one set, behind a mask: one call of the kernel. A second one costs more than the scores that the mask hides, but
not more than a mask over many. The fast kernel for GPUs takes none."""


@dataclass(frozen=True)
class Queries:
    """A call's queries, as they meet the window and as they meet the slots; their scales are applied step by step.

    windowed, remembering [b, h, t, d]: one and the same tensor unless memory is un-rotated; window_scale, memory_scale
    [h]: what each head's are multiplied by, None for 1; begin: the first token whose queries they are; spans count
    from the call's first token in any case.
    """

    windowed: Tensor
    remembering: Tensor
    window_scale: Tensor | None
    memory_scale: Tensor | None
    begin: int = 0

    @classmethod
    def of(
        cls,
        policy: Policy,
        queries: Tensor,
        parameters: PolicyParameters | None,
        rotation: Rotation | None,
        positions: Tensor | None,
    ) -> Queries:
        """Queries [b, h, t, d] at positions [b, 1, t], where the policy rotates."""
        remembering = policy.rotary.memory_queries(queries, rotation, positions)
        if parameters is None:
            return cls(queries, remembering, None, None)
        window = parameters.query_scale_window
        # Sinks without growth are plain tokens.
        return cls(queries, remembering, window, window if policy.sinks_only else parameters.query_scale_memory)

    @property
    def alike(self) -> bool:
        """Whether window and slots meet the same tensor."""
        return self.remembering is self.windowed

    def for_window(self, span: slice) -> Tensor:
        """The queries of a span, [b, h, s, d], as the window's keys meet them."""
        return scaled(self._at(self.windowed, span), self.window_scale)

    def for_slots(self, span: slice) -> Tensor:
        """The queries of a span, [b, h, s, d], as the slots meet them."""
        return scaled(self._at(self.remembering, span), self.memory_scale)

    def _at(self, queries: Tensor, span: slice) -> Tensor:
        return queries[:, :, span.start - self.begin : span.stop - self.begin]

    def of_each(self, steps: Sequence[Step]) -> list[Queries]:
        """The queries of each step, which follow one another: taken apart once (see `Sections`)."""
        sizes, end = [step.stop - step.start for step in steps], steps[-1].stop if steps else 0
        windowed = self.windowed[:, :, :end].split(sizes, dim=2) if steps else ()
        remembering = windowed if self.alike or not steps else self.remembering[:, :, :end].split(sizes, dim=2)
        return [
            Queries(alone, slotted, self.window_scale, self.memory_scale, step.start)
            for step, alone, slotted in zip(steps, windowed, remembering, strict=True)
        ]

    def of_steps(self, span: slice, size: int) -> tuple[Tensor, Tensor]:
        """The queries of steps of this size, [b·k, h, size, d] each, as the window and as the slots meet them."""
        # One operation takes queries apart and scales them.
        windowed = scaled(_stretches(self.windowed[:, :, span], size, size), self.window_scale).flatten(0, 1)
        if self.alike and self.window_scale is self.memory_scale:
            return windowed, windowed
        remembering = _stretches(self.remembering[:, :, span], size, size)
        return windowed, scaled(remembering, self.memory_scale).flatten(0, 1)


def readable_together(one: Step, other: Step, unequal_slots: bool) -> bool:
    """Whether two steps are alike: as many queries, older tokens of the window and slots, and all rows in step.

    unequal_slots: whether numbers of slots may differ, for the price of a call per step.
    """
    if one.alike is None or other.alike is None:
        return False
    (*window, slots), (*others, most) = one.alike, other.alike
    return window == others and ((slots > 0) == (most > 0) if unequal_slots else slots == most)


class Snapshots:
    """The slots as each of k steps reads them, whatever is folded in later: a batch row per row and step, [b·k, …]."""

    def __init__(self, steps: int, most: int) -> None:
        self.steps, self.most = steps, most
        self.notes: list[Tensor | None] = [None, None, None]  # of keys, values and bias, [b, k, …]

    @classmethod
    def of(cls, view: SlotView, steps: int) -> Snapshots:
        """Slots as they were read at all steps, [b·k, …]."""
        made = cls(steps, view.keys.shape[2])
        read = (view.keys, view.values, view.bias)
        made.notes = [None if each is None else each.unflatten(0, (-1, steps)) for each in read]
        return made

    def take(self, step: int, view: SlotView) -> None:
        """Note how the slots are read at a step."""
        for number, read in enumerate((view.keys, view.values, view.bias)):
            if read is None:
                continue
            rows, heads, room, *width = read.shape
            notes = self.notes[number]
            if notes is None:
                notes = self.notes[number] = read.new_empty(rows, self.steps, heads, self.most, *width)
            notes[:, step] = read if room == self.most else read[:, :, : self.most]

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and bias."""
        keys, values, bias = (None if each is None else each.flatten(0, 1) for each in self.notes)
        assert keys is not None and values is not None
        return keys, values, bias


def apart(timeline: Tensor, width: int, every: int) -> Tensor:
    """[b, h, n, …] → k stretches of `width` columns, one beginning `every` so many: [b·k, h, width, …]."""
    return _stretches(timeline, width, every).flatten(0, 1)


def _stretches(timeline: Tensor, width: int, every: int) -> Tensor:
    """The same, [b, k, h, width, …], and a view."""
    return timeline.unfold(2, width, every).movedim(2, 1).movedim(-1, 3)


def scaled(queries: Tensor, scale: Tensor | None) -> Tensor:
    """Queries [..., h, s, d] times the scale [h] of their head."""
    return queries if scale is None else queries * scale.to(queries.dtype)[:, None, None]


class KeySets:
    """The key sets of each step of a call; sections: the streams' sections, where a graph is recorded."""

    def __init__(
        self, schedule: Schedule, keys: Tensor, values: Tensor, sections: dict[str, Sections] | None = None
    ) -> None:
        self.schedule, self.keys, self.values, self.sections = schedule, keys, values, sections
        self.device, self.dtype = keys.device, keys.dtype

    def of(self, step: Step, queries: Queries, view: SlotView | None) -> list[KeySet]:
        """What the step's queries meet; `view` is how the slots are read then, None where none is live."""
        sets: list[KeySet] = []
        span = slice(step.start, step.stop)
        if view is not None:
            most = step.most_slots
            bias = None if view.bias is None else view.bias[:, :, None, :most]
            uneven = common(step.slots, step.active) is None
            if uneven:
                slots = torch.arange(most, device=self.device)
                beyond = self._hiding(slots >= self._per_row(step.slots))
                bias = beyond if bias is None else bias + beyond
            read = (view.keys[:, :, :most], view.values[:, :, :most])
            sets.append(KeySet(queries.for_slots(span), *read, bias, hides=uneven))
        windowed = queries.for_window(span)
        begin, end = self.schedule.old + step.start, self.schedule.old + step.stop
        first = common(step.first, step.active)
        if first is not None and self._joinable(begin - first, step.stop - step.start):
            return [*sets, self._set(windowed, first, end, self._mask(begin - first, step.stop - step.start))]
        alone = step.stop - step.start == 1
        sets += self._older(step, windowed, end if alone else begin)
        if not alone:
            sets.append(self._set(windowed, begin, end, None, causal=True))
        return sets

    def of_many(self, steps: Sequence[Step], queries: Queries, slots: Snapshots | None) -> list[KeySet]:
        """What k alike steps meet, each with the slots as they were then: one batch row per row and step, [b·k, …].

        Columns are those of the first step; those of each next one stand as many further as a step has queries.
        """
        first, last = steps[0], steps[-1]
        size, span = first.stop - first.start, slice(first.start, last.stop)
        begin, end = self.schedule.old + first.start, self.schedule.old + last.stop
        older = begin - int(first.first[0])
        windowed, remembering = queries.of_steps(span, size)
        sets = [self._slots_of_many(steps, remembering, slots)] if last.most_slots and slots is not None else []
        if self._joinable(older, size):
            sets.append(self._window_of_many(windowed, begin - older, end, older + size, self._mask(older, size)))
            return sets
        if older:
            sets.append(self._window_of_many(windowed, begin - older, end - size, older))
        sets.append(self._window_of_many(windowed, begin, end, size, causal=True))
        return sets

    def _window_of_many(
        self, queries: Tensor, begin: int, end: int, width: int, bias: Tensor | None = None, causal: bool = False
    ) -> KeySet:
        """Stretches of `width` of the columns begin … end − 1, one for each step."""
        every = queries.shape[2]
        keys, values = (apart(each[:, :, begin:end], width, every) for each in (self.keys, self.values))
        return KeySet(queries, keys, values, bias, causal, columns=(begin, begin + width))

    def _joinable(self, older: int, size: int) -> bool:
        """Whether a step's own tokens and older ones before them are met as one set."""
        most_queries, most_older = JOINED.get(self.device.type, (0, 0))
        fits = 1 < size <= most_queries and 0 < older <= most_older
        return fits and self.schedule.policy.window.band is None

    def _mask(self, older: int, size: int) -> Tensor:
        """The bias of a step's own tokens and those before them as one set, [1, 1, size, older + size]."""
        hidden = torch.full((size, older + size), -torch.inf, dtype=self.dtype, device=self.device)
        return hidden.triu_(older + 1)[None, None]

    def _slots_of_many(self, steps: Sequence[Step], queries: Tensor, slots: Snapshots) -> KeySet:
        keys, values, bias = slots.read()
        counts = tuple(step.most_slots for step in steps)
        bias = None if bias is None else bias.unsqueeze(2)
        return KeySet(queries, keys, values, bias, counts=counts if min(counts) < slots.most else None)

    def _older(self, step: Step, queries: Tensor, end: int) -> list[KeySet]:
        """Columns before `end` that the first query sees; masked where rows differ or later queries lose some."""
        first = int(step.first[step.active].min())
        band = self.schedule.policy.window.band
        kept = first  # the first column that all queries of the step still see
        if band is not None:
            kept = min(max(first, self.schedule.old + step.stop - band), end)
        uneven = common(step.first, step.active) is None
        sets: list[KeySet] = []
        for begin, stop in pairwise((first, kept, end)):
            if stop == begin:
                continue
            columns = torch.arange(begin, stop, device=self.device)
            bias = self._hiding(columns < self._per_row(step.first)) if uneven else None
            if band is not None and begin < kept:
                oldest = torch.arange(step.start, step.stop, device=self.device) + self.schedule.old - band + 1
                fallen = self._hiding(columns < oldest[:, None]).transpose(0, 2)
                bias = fallen if bias is None else torch.minimum(bias, fallen)
            sets.append(self._set(queries, begin, stop, bias, hides=bias is not None))
        return sets

    def _set(
        self, queries: Tensor, begin: int, end: int, bias: Tensor | None, causal: bool = False, hides: bool = False
    ) -> KeySet:
        """The columns begin … end − 1."""
        columns = (begin, end)
        if self.sections is None:
            keys, values = self.keys[:, :, begin:end], self.values[:, :, begin:end]
            return KeySet(queries, keys, values, bias, causal, columns, hides)
        parts = self.sections["keys"].parts(begin, end), self.sections["values"].parts(begin, end)
        with torch.no_grad():
            keys, values = map(side_by_side, parts)
        return KeySet(queries, keys, values, bias, causal, columns, hides, parts=parts)

    def _hiding(self, hide: Tensor) -> Tensor:
        """A bias that hides keys: hide [b, n] → [b, 1, 1, n]."""
        bias = torch.zeros(hide.shape, dtype=self.dtype, device=self.device)
        return bias.masked_fill_(hide, -torch.inf)[:, None, None]

    def _per_row(self, numbers: np.ndarray) -> Tensor:
        return on_device(numbers, self.device)[:, None]
