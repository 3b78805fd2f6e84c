"""The tokens that leave the window in a call, chunk by chunk; what slots have no say in is done for many at once."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from memkit.engine.plan import chunk_columns, in_common
from memkit.engine.schedule import LeavingChunk, Schedule
from memkit.memory.rows import Chunk, Contributions, SlotRules, contributions, memory_keys, on_device
from memkit.memory.window import Columns, Sections, Timeline

__all__ = ["AHEAD", "LeavingTokens"]

Ahead = tuple[Tensor, Contributions | None, Contributions]
"""Of some tokens: memory keys [b, g, n, d], and what each adds to a slot that it founds (None where none does), and to
one that it joins."""

AHEAD = 2048
"""Tokens whose memory keys and rows are made at once: enough that each chunk's share of the overhead is small, and few
enough that they are still near when their chunk is folded in."""


class LeavingTokens:
    """Chunks, as they leave.

    Memory keys, and what each token adds to a slot that it founds or joins, depend on the token alone. With a graph
    they are made chunk by chunk: the backward pass of a slice of many is as large as they all are.

    founds: whether any token may found a slot; False: those of which the schedule says so, and what others would add if
    they did is not made.
    """

    def __init__(self, rules: SlotRules, timeline: Timeline, schedule: Schedule, founds: bool) -> None:
        self.rules, self.timeline, self.schedule, self.founds = rules, timeline, schedule, founds
        self.end = int((schedule.left_after + schedule.shift).max(initial=0))  # columns that leave in this call
        self.begin = self.stop = 0
        self.ahead: Ahead | None = None

    def chunk(self, leaving: LeavingChunk) -> Chunk:
        """The tokens that leave together. Rows that keep theirs get some, too, which nobody takes."""
        device, begin = self.timeline.keys.device, leaving.begin + self.schedule.shift
        where = chunk_columns(leaving, begin, device)
        first = in_common(leaving.begin == 0, leaving.leaves, device) != 0
        if torch.is_grad_enabled():
            begins = begin[leaving.leaves]
            chunk = self._with_graph(where, int(begins.min()), int(begins.max()) + leaving.size, first)
        else:
            chunk = Chunk.of(self.timeline.streams, where, first)
        if torch.is_grad_enabled() or not isinstance(where, slice):
            chunk.memory_keys = memory_keys(self.rules, chunk)
            return chunk
        keys, alone, joining = self._made(where)
        here = slice(where.start - self.begin, where.stop - self.begin)
        chunk.memory_keys = keys[:, :, here]
        some = joining[0][:, :, here], joining[1][:, :, here]
        if alone is not None and alone is not joining:
            rows = some[0] if joining[0] is alone[0] else alone[0][:, :, here]
            chunk.ahead = (rows, alone[1][:, :, here]), some
        else:
            chunk.ahead = None if alone is None else some, some
        return chunk

    def _with_graph(self, where: Columns, begin: int, end: int, first: bool | Tensor) -> Chunk:
        """The tokens at columns `where`, which lie in begin … end − 1."""
        held = {name: each.columns(begin, end) for name, each in self.sections.items()}
        # Rows that keep their tokens are told to begin at column 0.
        within = slice(0, end - begin) if isinstance(where, slice) else (where - begin).clamp(min=0)
        return dataclasses.replace(Chunk.of(held, within, first), where=where)

    @functools.cached_property
    def sections(self) -> dict[str, Sections]:
        """The streams, as chunks and windows are taken of them with a graph."""
        policy = self.rules.policy
        size = max(policy.chunk, (policy.window.capacity or 0) // 4)  # a window is a few of them
        return {name: Sections(stream, size) for name, stream in self.timeline.streams.items()}

    def made(self, where: slice) -> tuple[tuple[Tensor, Contributions, Contributions], int]:
        """What tokens at these columns, and at others around them, bring, and whatever instead of what they would bring
        as founders where none founds; the first column of those."""
        keys, alone, joining = self._made(where)
        return (keys, joining if alone is None else alone, joining), self.begin

    def _made(self, where: slice) -> Ahead:
        """Memory keys, and rows as founders and as joiners, of the columns `begin` … `stop` − 1, these among them."""
        if self.ahead is None or not self.begin <= where.start or where.stop > self.stop:
            size = where.stop - where.start
            self.begin = where.start
            self.stop = min(where.start + max(AHEAD // size, 1) * size, max(self.end, where.stop))
            block = slice(self.begin, self.stop)
            tokens = Chunk.of(self.timeline.streams, block, self._first(block))
            tokens.memory_keys = memory_keys(self.rules, tokens)
            everyone, alone = torch.ones(tokens.keys.shape[:3], dtype=torch.bool, device=tokens.keys.device), None
            if self._alike or self._found(block):
                alone = contributions(self.rules, tokens, everyone)
            joining = alone if alone is not None and self._alike else contributions(self.rules, tokens, None)
            if alone is not None and not self.rules.policy.weighted and self.rules.policy.merging.of == "both":
                joining = alone[0], joining[1]
            self.ahead = tokens.memory_keys, alone, joining
        return self.ahead

    def _found(self, block: slice) -> bool:
        """Whether any of these columns may found a slot."""
        return self.founds or block.start < self._founded_until

    @functools.cached_property
    def _founded_until(self) -> int:
        """The column from which on no token founds any more."""
        chunks = [each for step in self.schedule.steps for each in step.leaving if each.new_slots[each.leaves].any()]
        return max((int((each.begin + self.schedule.shift).max()) + each.size for each in chunks), default=0)

    @property
    def _alike(self) -> bool:
        """Whether a token adds the same where it founds and where it joins."""
        policy = self.rules.policy
        of_founders = any(statistic.of_founder for statistic in policy.statistics)
        return not (policy.weighted or of_founders) and policy.merging.of == "both"

    def _first(self, block: slice) -> bool | Tensor:
        """Which columns hold tokens of a row's first chunk, [b, 1, n]; False where none of these leaves any more."""
        if self.schedule.left_before.all():
            return False
        device = self.timeline.keys.device
        end = on_device(self.schedule.shift + self.schedule.course.first_end(), device)[:, None, None]
        return torch.arange(block.start, block.stop, device=device) < end
