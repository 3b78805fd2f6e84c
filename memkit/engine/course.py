"""How the rows' windows move during a call, and how many slots there are then: whole numbers on the host.

Chunks of one length follow from positions alone. Where the caller says where chunks end, a memory carries on where
those in its window begin (`Cuts`), and each row has a table of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np

from memkit.memory import tokens_in_window
from memkit.memory.cuts import Cuts
from memkit.pieces.window import BlockWindow
from memkit.policy import Policy

__all__ = ["Course", "Rows", "course_of"]

Rows = np.ndarray
"""One whole number (or bool) per row of the batch."""


class Course(ABC):
    """The windows of rows that have seen so many tokens and are given `lengths` more.

    left_before, left_after [b]: tokens that have left the window before and after the call; cuts: where the chunks are
    after it, None where positions tell.
    """

    left_before: Rows
    left_after: Rows
    cuts: Cuts | None = None

    def __init__(self, policy: Policy, seen: Rows, lengths: Rows) -> None:
        self.policy, self.seen, self.after = policy, seen, seen + lengths

    @abstractmethod
    def arrivals(self) -> Rows:
        """Tokens of the call, counted from its first, before which a chunk ends in any row."""

    @abstractmethod
    def begin(self, offset: int) -> Rows:
        """First position that each row's query at `offset` in the call sees exactly, [b]."""

    @abstractmethod
    def slots(self, left: Rows) -> Rows:
        """Slots of each row, [b], once so many of its tokens have left the window: before the call, or in it."""

    @abstractmethod
    def sizes(self, left: Rows) -> Rows:
        """Tokens of the chunks that begin at `left` and leave next, [b]; any number where none does."""

    @abstractmethod
    def ends(self, tokens: Rows) -> tuple[Rows, Rows]:
        """Which rows have a chunk that ends after so many tokens, [b] bool, and where that begins, [b]."""

    @abstractmethod
    def newest(self) -> Rows:
        """Where the chunk begins that the next token after the call belongs to, [b]."""

    @abstractmethod
    def first_end(self) -> Rows:
        """The end of each row's first chunk, [b], while that is in the window; else anything up to what has left."""

    def counts(self, most: int) -> Rows:
        """Slots of each row after every chunk that leaves in the call, [b, n]; shorter rows repeat their last number.

        most: the most tokens that leave in any row.
        """
        rows: list[list[int]] = []
        for row in range(len(self.seen)):
            left, counts = self.left_before.copy(), list[int]()
            while left[row] < self.left_after[row]:
                left[row] += self.sizes(left)[row]
                counts.append(int(self.slots(left)[row]))
            rows.append(counts or [int(self.slots(left)[row])])
        longest = max((len(row) for row in rows), default=0) if most else 0
        table = [(row + row[-1:] * longest)[:longest] for row in rows]
        return np.array(table, dtype=np.int64).reshape(len(rows), longest)


class _EqualChunks(Course):
    """Chunks of one length, or none."""

    def __init__(self, policy: Policy, seen: Rows, lengths: Rows, row_policies: Sequence[Policy] | None) -> None:
        super().__init__(policy, seen, lengths)
        self.chunk = policy.chunk
        self.row_policies = [policy] * len(seen) if row_policies is None else row_policies
        self.left_before = seen - tokens_in_window(policy, seen)
        self.left_after = self.after - tokens_in_window(policy, self.after)

    def arrivals(self) -> Rows:
        phases, end = np.unique(-self.seen % self.chunk), int((self.after - self.seen).max(initial=0))
        return np.concatenate([np.arange(phase, end, self.chunk) for phase in phases])

    def begin(self, offset: int) -> Rows:
        return self.policy.window.begin(self.seen + offset)

    def slots(self, left: Rows) -> Rows:
        if not self.chunk:
            return np.zeros_like(left)
        chunks = (left // self.chunk - 1).tolist()
        numbers = [policy.slots_after_chunk(index) for policy, index in zip(self.row_policies, chunks, strict=True)]
        return np.array(numbers, dtype=np.int64)

    def sizes(self, left: Rows) -> Rows:
        return np.full_like(left, self.chunk)

    def ends(self, tokens: Rows) -> tuple[Rows, Rows]:
        return tokens % self.chunk == 0, tokens - self.chunk

    def newest(self) -> Rows:
        return self.after // self.chunk * self.chunk

    def first_end(self) -> Rows:
        return np.full_like(self.seen, self.chunk)

    def counts(self, most: int) -> Rows:
        chunk = self.chunk or 1
        left = self.left_before[:, None] + chunk * (1 + np.arange(most // chunk))
        left = np.minimum(left, self.left_after[:, None])
        counts = [
            [policy.slots_after_chunk(tokens // chunk - 1) for tokens in row]
            for policy, row in zip(self.row_policies, left.tolist(), strict=True)
        ]
        return np.array(counts, dtype=np.int64).reshape(left.shape)


class _Given(Course):
    """Chunks that end where the caller says, or when they have `policy.chunk` tokens.

    begins: of each row's chunks, those in its window first; ended: whether the last one has by a boundary; known: slots
    of each row once so many tokens have left.
    """

    def __init__(self, policy: Policy, seen: Rows, lengths: Rows, cuts: Cuts, boundaries: Rows | None) -> None:
        super().__init__(policy, seen, lengths)
        assert isinstance(policy.window, BlockWindow)
        self.window, most = policy.window.chunks, policy.chunk
        self.begins = [list(row) for row in cuts.begins]
        self.ended = list(cuts.ended)
        self.known: list[dict[int, int]] = []
        for row, begins in enumerate(self.begins):
            given = [] if boundaries is None else (np.flatnonzero(boundaries[row]) + seen[row]).tolist()
            self.ended[row] = _begun(begins, self.ended[row], int(seen[row]), int(self.after[row]), given, most)
            slots = cuts.slots[row]
            known = {begins[0] if begins else 0: slots}
            for index, arrives in enumerate(begins[self.window :]):
                begin, end = begins[index], begins[index + 1]
                known[end] = slots = policy.slots_with_chunk(slots, begin, end, arrives)
            self.known.append(known)
        self.left_before = cuts.left
        in_window = tuple(tuple(row[-self.window :]) for row in self.begins)
        self.left_after = np.array([row[0] if row else 0 for row in in_window], dtype=np.int64)
        self.cuts = Cuts(in_window, tuple(self.ended), tuple(self.slots(self.left_after).tolist()))

    def arrivals(self) -> Rows:
        complete, _ = self.ends(self.after)
        ends = [
            row if not ended else [*row, int(after)]
            for row, ended, after in zip(self.begins, complete, self.after, strict=True)
        ]
        offsets = [np.array(row, dtype=np.int64) - seen for row, seen in zip(ends, self.seen, strict=True)]
        return np.unique(np.concatenate(offsets))

    def begin(self, offset: int) -> Rows:
        firsts: list[int] = []
        for row, seen in zip(self.begins, self.seen.tolist(), strict=True):
            index = bisect_right(row, seen + offset) - self.window
            firsts.append(row[max(index, 0)] if row else 0)
        return np.array(firsts, dtype=np.int64)

    def slots(self, left: Rows) -> Rows:
        numbers = [known[tokens] for known, tokens in zip(self.known, left.tolist(), strict=True)]
        return np.array(numbers, dtype=np.int64)

    def sizes(self, left: Rows) -> Rows:
        sizes: list[int] = []
        for row, begin in zip(self.begins, left.tolist(), strict=True):
            index = bisect_right(row, begin)
            sizes.append(row[index] - begin if index < len(row) else 0)
        return np.array(sizes, dtype=np.int64)

    def ends(self, tokens: Rows) -> tuple[Rows, Rows]:
        complete: list[bool] = []
        begins: list[int] = []
        for row, end, after, ended in zip(self.begins, tokens.tolist(), self.after.tolist(), self.ended, strict=True):
            index = bisect_left(row, end)  # chunks that have begun before that
            begin = row[index - 1] if index else 0
            last = index == len(row) and end == after and (ended or end - begin == self.policy.chunk)
            complete.append(bool(index) and (last or (index < len(row) and row[index] == end)))
            begins.append(begin)
        return np.array(complete, dtype=bool), np.array(begins, dtype=np.int64)

    def newest(self) -> Rows:
        complete, begins = self.ends(self.after)
        return np.where(complete, self.after, begins)

    def first_end(self) -> Rows:
        ends = [row[1] if len(row) > 1 else after for row, after in zip(self.begins, self.after.tolist(), strict=True)]
        return np.where(self.left_before > 0, 0, np.array(ends, dtype=np.int64))


def _begun(begins: list[int], ended: bool, seen: int, after: int, given: list[int], most: int) -> bool:
    """Add to `begins` the chunks that begin at the positions seen … after − 1; whether a boundary ends the last one.

    given: positions that are the last of their chunk, in order.
    """
    position, next_given = seen, 0
    while position < after:
        if ended or not begins or position - begins[-1] == most:
            begins.append(position)
        while next_given < len(given) and given[next_given] < position:
            next_given += 1
        full = begins[-1] + most - 1
        last = given[next_given] if next_given < len(given) and given[next_given] < full else full
        ended = next_given < len(given) and given[next_given] == last < after
        position = last + 1
    return ended


def course_of(
    policy: Policy,
    seen: Rows,
    lengths: Rows,
    cuts: Cuts | None,
    boundaries: Rows | None,
    row_policies: Sequence[Policy] | None = None,
) -> Course:
    """The course of a call.

    cuts: where the chunks are before it, None where there is no memory or positions tell; boundaries [b, t] bool: which
    tokens are the last of their chunk, None: none is said to be; row_policies: the policy that says how many slots each
    row may have, where rows differ in that alone and chunks are of one length; None: this one.
    """
    if not policy.takes_boundaries:
        return _EqualChunks(policy, seen, lengths, row_policies)
    return _Given(policy, seen, lengths, Cuts.fresh(len(seen)) if cuts is None else cuts, boundaries)
