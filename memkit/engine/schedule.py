"""When tokens leave the window during a call: whole numbers on the host, no tensor looked at.

Rows may be at unequal positions. All of them share one time axis, the *column*: the tokens of this call stand at
columns `old` … `old + t − 1` in every row, and what their windows already hold stands right-aligned before that. So
token p of row r is at column p + shift[r], and appending is the same slice for all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from memkit.engine.course import Course, Rows, course_of
from memkit.engine.inputs import AttendInputs
from memkit.memory.cuts import Cuts
from memkit.policy import Policy

__all__ = ["BAND_STEP", "LeavingChunk", "Schedule", "Step", "common"]

KEPT = 4096
"""Chunks of all rows, up to which the schedule of a call is kept for the next one that is alike."""

BAND_STEP = 128
"""Queries read together under a sliding window: the part of the band that needs a mask is this wide."""


@dataclass(frozen=True)
class LeavingChunk:
    """A chunk that leaves the window of some rows.

    Under a block window of W chunks of C tokens chunk c leaves before the query at (c + W)·C, and min(C, max(0, budget
    − slots)) of its tokens found a slot (`Policy.slots_with_chunk`); all of the first, under `first_chunk: whole`.

    size: its tokens; leaves [b]: which rows; begin [b]: the chunk's first position; slots_before [b]: slots there are
    before it; new_slots [b]: its tokens that found; sink_tokens [b]: how many of those are sinks.
    """

    size: int
    leaves: Rows
    begin: Rows
    slots_before: Rows
    new_slots: Rows
    sink_tokens: Rows

    @functools.cached_property
    def most_before(self) -> int:
        """The most slots that any of the rows has before it."""
        return int(self.slots_before[self.leaves].max())

    @functools.cached_property
    def most_new(self) -> int:
        """The most of its tokens that found in any of the rows."""
        return int(self.new_slots[self.leaves].max())

    @functools.cached_property
    def shared(self) -> tuple[int | None, ...]:
        """Slots before it, new slots and sink tokens, as far as all of the rows have equally many."""
        return tuple(common(each, self.leaves) for each in (self.slots_before, self.new_slots, self.sink_tokens))


@dataclass(frozen=True)
class Step:
    """Queries start … stop − 1 of this call, during which no chunk leaves any window; before it, those `leaving` do.

    leaving: chunks of different lengths, at most one of each row; active [b]: rows with a token in this step; first
    [b]: the first column each row sees exactly (at the step's first query); slots [b]: slots each row reads.
    """

    start: int
    stop: int
    leaving: tuple[LeavingChunk, ...]
    active: Rows
    first: Rows
    slots: Rows

    @functools.cached_property
    def most_slots(self) -> int:
        """The most slots that any active row reads."""
        return int(self.slots[self.active].max(initial=0))

    @functools.cached_property
    def alike(self) -> tuple[int, int, int] | None:
        """What all active rows share: queries, older tokens of the window, slots; None where they differ, or with one
        query alone."""
        first, slots = common(self.first, self.active), common(self.slots, self.active)
        if first is None or slots is None or self.stop - self.start == 1:
            return None
        return self.stop - self.start, first - self.start, slots


class Schedule:
    """The steps of a call of `tokens` columns, of which `lengths[r]` are row r's, after `seen[r]` tokens.

    cuts, boundaries, row_policies: as for `course_of`. What follows from positions alone is worked out once for all
    calls that are alike, as training's are (`of`).
    """

    def __init__(
        self,
        policy: Policy,
        seen: Rows,
        lengths: Rows,
        tokens: int,
        cuts: Cuts | None = None,
        boundaries: Rows | None = None,
        row_policies: Sequence[Policy] | None = None,
    ) -> None:
        self.policy, self.seen, self.lengths, self.tokens = policy, seen, lengths, tokens
        self.course: Course = course_of(policy, seen, lengths, cuts, boundaries, row_policies)
        self.left_before, self.left_after = self.course.left_before, self.course.left_after
        self.old = int((seen - self.left_before).max(initial=0))
        self.shift = self.old - seen
        self.after = seen + lengths

    @classmethod
    def of(cls, inputs: AttendInputs) -> Schedule:
        """A call's schedule, not to be changed. Short ones that positions alone tell are kept for alike calls."""
        policy, memory, lengths = inputs.policy, inputs.memory, inputs.row_lengths
        rows, _, tokens, _ = inputs.keys.shape
        seen = np.zeros(rows, dtype=np.int64) if memory is None else memory.seen_rows
        if policy.takes_boundaries or inputs.row_policies is not None or rows * tokens > KEPT * max(1, policy.chunk):
            cuts = None if memory is None else memory.cuts
            return cls(policy, seen, lengths, tokens, cuts, inputs.row_boundaries, inputs.row_policies)
        return _of_positions(policy, tuple(seen.tolist()), tuple(lengths.tolist()), tokens)

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The steps, in order."""
        return list(self._steps())

    @property
    def most_leaving(self) -> int:
        """The most tokens that leave any row's window during the call."""
        return int((self.left_after - self.left_before).max(initial=0))

    @property
    def slots_after(self) -> Rows:
        """Slots of each row after the call."""
        return self.course.slots(self.left_after)

    @property
    def keep(self) -> int:
        """Tokens in the longest window after the call."""
        return int((self.after - self.left_after).max(initial=0))

    def _steps(self):
        left = self.left_before.copy()
        for start, stop in zip((bounds := self._bounds())[:-1], bounds[1:], strict=True):
            active = self.lengths > start
            begin = self.course.begin(start)
            leaving = tuple(self._leaving(active & (begin > left), left))
            left = np.where(active, begin, left)
            yield Step(start, stop, leaving, active, begin + self.shift, self.course.slots(left))

    def _bounds(self) -> list[int]:
        """Where steps begin and end, counted in this call's tokens."""
        bounds = {0, int(self.lengths.max(initial=0))}
        if self.policy.window.capacity is None:
            return sorted(bounds)
        if (band := self.policy.window.band) is not None:
            # Sinks leave one at a time, when positions band … band + sinks − 1 arrive.
            arrivals = np.unique(np.arange(band, band + self.policy.sinks + 1)[None] - self.seen[:, None])
            bounds.update(range(0, self.tokens, min(BAND_STEP, band)))
        else:
            arrivals = self.course.arrivals()
        bounds.update(int(arrival) for arrival in arrivals if 0 < arrival < max(bounds))
        return sorted(bound for bound in bounds if bound <= int(self.lengths.max(initial=0)))

    def _leaving(self, leaves: Rows, left: Rows) -> Iterator[LeavingChunk]:
        """The chunks that begin at `left` and leave these rows, one for each length there is."""
        policy = self.policy
        if not leaves.any():
            return
        sizes = self.course.sizes(left)
        before, after = self.course.slots(left), self.course.slots(left + np.where(leaves, sizes, 0))
        if not policy.merging.joins and not policy.competes:  # a chunk of which nothing is kept changes nothing
            leaves = leaves & (after > before)
        for size in np.unique(sizes[leaves]).tolist():
            here = leaves & (sizes == size)
            yield LeavingChunk(size, here, left.copy(), before, after - before, np.clip(policy.sinks - left, 0, size))


@functools.lru_cache(maxsize=16)
def _of_positions(policy: Policy, seen: tuple[int, ...], lengths: tuple[int, ...], tokens: int) -> Schedule:
    before, new = (np.array(each, dtype=np.int64) for each in (seen, lengths))
    schedule = Schedule(policy, before, new, tokens)
    for each in (before, new, schedule.left_before, schedule.left_after, schedule.shift, schedule.after):
        each.flags.writeable = False
    return schedule


def common(numbers: Rows, among: Rows) -> int | None:
    """The number that all rows in `among` share; None where they differ."""
    chosen = numbers[among]
    return int(chosen[0]) if len(chosen) and (chosen == chosen[0]).all() else None
