"""OBSERVE: once a chunk has been read, its observed queries say what every row was worth to them.

Queries of the incomplete chunk wait in the memory, so that a text may be split anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from memkit.engine.expected import expected_shares
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries, scaled
from memkit.engine.schedule import Schedule, Step, common
from memkit.memory.rows import SlotRules, SlotView, on_device
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline
from memkit.pieces.evidence import SHARE, softmax_evidence

__all__ = ["Observer", "alike_rows"]


class Observer:
    """The observed queries of a call, those that waited included, and what is made of them."""

    def __init__(self, inputs: AttendInputs, schedule: Schedule) -> None:
        assert inputs.queries is not None
        self.inputs, self.policy, self.schedule, self.device = inputs, inputs.policy, schedule, inputs.keys.device
        self.waits = np.array(self.policy.observation.waits, dtype=np.int64)
        waiting = None if inputs.memory is None else inputs.memory.observed
        new = inputs.queries.detach()
        self.queries = new if waiting is None else torch.cat((waiting, new), dim=2)
        self.waited = 0 if waiting is None else waiting.shape[2]
        self.later: dict[tuple[int, int], Tensor] = {}
        self.near: dict[tuple[int, int], Tensor] = {}
        self.telling: dict[int, slice | Tensor] = {}

    def _at(self, chunk_begin: np.ndarray, offsets: np.ndarray) -> Tensor:
        """The queries [b, h, n, d] at offsets, of those that wait, in the chunks that begin there; any where one has
        not come yet."""
        if not self.queries.shape[2]:
            rows, heads, _, width = self.queries.shape
            return self.queries.new_zeros(rows, heads, len(offsets), width)
        positions = chunk_begin[:, None] + offsets
        new = positions - self.schedule.seen[:, None]
        first = common(new[:, 0], np.ones(len(new), dtype=bool))
        if first is not None and first >= 0 and len(offsets) == self.policy.chunk:
            span = slice(first + self.waited, first + self.waited + self.policy.chunk)
            if span.stop <= self.queries.shape[2]:
                return self.queries[:, :, span]
        where = np.where(new >= 0, new + self.waited, np.searchsorted(self.waits, offsets))
        index = on_device(where.clip(max=self.queries.shape[2] - 1), self.device)[:, None, :, None]
        return self.queries.gather(2, index.expand(-1, self.queries.shape[1], -1, self.queries.shape[3]))

    def waiting(self) -> Tensor:
        """The observed queries of each row's incomplete chunk, [b, h, n, d], for the memory."""
        return self._at(self.schedule.course.newest(), self.waits).clone()

    @torch.no_grad()
    def observe(self, step: Step, rules: SlotRules, timeline: Timeline, store: SlotStore) -> Tensor | None:
        """Give every row its evidence, for the rows of the batch whose chunk is complete after a step.

        Where the step's queries are just those that are observed, what they read is known by then: outputs
        [b, h, n, v]; else None.
        """
        schedule, column = self.schedule, self.schedule.old + step.stop
        end = schedule.seen + step.stop
        ended, chunk_begin = schedule.course.ends(end)
        complete = step.active & (schedule.lengths >= step.stop) & ended
        if not complete.any():
            return None
        outputs, sizes = None, end - chunk_begin
        older = column - sizes - step.first  # columns of the window before the chunk
        # Readers to come are not expected to be as the sinks' queries are.
        sinks = (self.policy.sinks - chunk_begin).clip(0, None if self.policy.expects is not None else 0)
        facts = (older, sizes, sinks) if self.policy.fills_up else (older, sizes, sinks, step.slots)
        for rows in alike_rows(complete, *facts):
            first = int(np.flatnonzero(complete)[0]) if rows is None else int(rows[0])
            of_rows = step.slots if rows is None else step.slots[rows]
            chunk, begin, slots = int(sizes[first]), int(step.first[first]), int(of_rows.max())
            # A step that is just the chunk: all its queries read, and those that are observed tell.
            whole = rows is None and step.stop - step.start == chunk and self.policy.expects is None
            offsets = np.arange(chunk) if whole else self._observed(chunk)
            queries = self._at(chunk_begin, offsets)
            at = slice(None) if rows is None else on_device(rows, self.device)
            held = {name: stream[at, :, begin:column] for name, stream in timeline.streams.items()}
            positions = held.get("positions")
            if positions is not None:
                positions = positions[:, :, int(older[first]) :][:, :, on_device(offsets, self.device)]
            asked = Queries.of(self.policy, queries[at], self.inputs.parameters, self.inputs.rotation, positions)
            view = store.read(rules).first(slots) if slots else None
            if view is not None and int(of_rows.min()) < slots:
                view = self._hiding(view, step.slots)
            scores, values = self.met(asked, held["keys"], held["values"], view, at)
            scores[..., -chunk:].masked_fill_(self._later(chunk, offsets), -torch.inf)
            telling = self._telling(chunk) if whole else slice(None)
            read, told = softmax_evidence(
                scores, values, telling, self._near(chunk, int(older[first])), self.policy.missed
            )
            if self.policy.expects is not None:
                assert positions is not None
                ahead = held["positions"][:, :, -1:] + 1 - positions
                left_out = int((offsets < sinks[first]).sum())
                told[..., SHARE] = self._expected(asked, ahead, held["keys"], view, at, left_out)
            store.about_to_write()
            evidence = timeline.streams["evidence"][:, :, begin:column]
            self._add(evidence, at, told[:, :, slots:])
            if slots:
                assert store.evidence is not None
                self._add(store.evidence[:, :, :slots], at, told[:, :, :slots])
            if whole:
                outputs = read.reshape(*queries.shape[:3], -1)
        return outputs

    def _hiding(self, view: SlotView, live: np.ndarray) -> SlotView:
        """The slots, with what stands behind each row's last hidden; live [b]: slots of each row."""
        beyond = torch.arange(view.keys.shape[2], device=self.device) >= on_device(live, self.device)[:, None, None]
        bias = view.keys.new_zeros(beyond.shape) if view.bias is None else view.bias
        return dataclasses.replace(view, bias=bias.masked_fill(beyond, -torch.inf))

    def _add(self, evidence: Tensor, at: slice | Tensor, told: Tensor) -> None:
        """Add what was told of some rows of the batch to their evidence."""
        if isinstance(at, slice):
            self.policy.observation.add_(evidence, told)
        else:
            evidence[at] = self.policy.observation.added(evidence[at], told)

    def met(
        self, asked: Queries, keys: Tensor, values: Tensor, view: SlotView | None, at: slice | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores [b, g, r·n, m] of queries against slots and window, and the values [b, g, m, v] there.

        Keys and values of the window: [b, g, w, …]; `view` is of all rows of the batch, those meant are `at`.
        """
        wide = torch.promote_types(keys.dtype, torch.float32)
        if view is None:
            scores, values = self._scores(asked.windowed, asked.window_scale, keys), values.to(wide)
        else:
            slots = view.keys.shape[2]
            values = torch.cat((view.values[at].to(wide), values.to(wide)), dim=2)
            if asked.alike and asked.window_scale is asked.memory_scale:
                scores = self._scores(asked.windowed, asked.window_scale, torch.cat((view.keys[at], keys), dim=2))
            else:
                of_slots = self._scores(asked.remembering, asked.memory_scale, view.keys[at])
                scores = torch.cat((of_slots, self._scores(asked.windowed, asked.window_scale, keys)), dim=-1)
            if view.bias is not None:
                scores[..., :slots].add_(view.bias[at, :, None])
        return scores, values

    def _expected(
        self, asked: Queries, ahead: Tensor, keys: Tensor, view: SlotView | None, at: slice | Tensor, left_out: int
    ) -> Tensor:
        """The share [b, g, m] that slots and window are expected to get from those who go on behind the chunk.

        ahead [b, 1, n]: how far behind each observed query they begin; left_out: the first queries, which are sinks'.
        """
        expects, rotation, scale = self.policy.expects, self.inputs.rotation, self.inputs.checked_scale
        assert expects is not None and rotation is not None
        some = slice(left_out if left_out < ahead.shape[2] else 0, None)
        wide = torch.promote_types(keys.dtype, torch.float32)
        turned = rotation.apply(asked.windowed[:, :, some].to(wide), ahead[:, :, some])
        met, bias, parts = keys.to(wide), None, [(asked.window_scale, keys.shape[2])]
        if view is not None:
            met = torch.cat((view.keys[at].to(wide), met), dim=2)
            bias = None if view.bias is None else pad(view.bias[at].to(wide), (0, keys.shape[2]))
            parts.insert(0, (asked.memory_scale, view.keys.shape[2]))
        scales = [each.detach().to(wide)[:, None].expand(-1, rows) for each, rows in parts if each is not None]
        if scales:
            scale = scale * torch.cat(scales, dim=1)
        return expected_shares(expects, turned, met, scale, rotation, bias=bias, sinks=self.policy.sinks)

    def _observed(self, chunk: int) -> np.ndarray:
        """The offsets of the observed queries in a chunk of this length."""
        return np.array(self.policy.observation.offsets_in(chunk), dtype=np.int64)

    def _telling(self, chunk: int) -> slice | Tensor:
        """Which of all of a chunk's queries, a group's heads in a row [r·c], are observed."""
        if chunk not in self.telling:
            every, uneven = divmod(chunk, min(self.policy.observation.queries, chunk))
            begins = np.arange(self._group)[:, None] * chunk
            self.telling[chunk] = (
                on_device((begins + self._observed(chunk)).flatten(), self.device)
                if uneven
                else slice(every - 1, None, every)
            )
        return self.telling[chunk]

    def _later(self, chunk: int, offsets: np.ndarray) -> Tensor:
        """Which of a chunk's tokens come after each query that is asked, a group's heads in a row, [r·n, c]."""
        key = chunk, len(offsets)
        if key not in self.later:
            later = torch.arange(chunk, device=self.device) > on_device(offsets, self.device)[:, None]
            self.later[key] = later.repeat(self._group, 1)
        return self.later[key]

    def _near(self, chunk: int, older: int) -> Tensor | None:
        """Which tokens of the window, `older` ones and then the chunk's, stand too near before each observed query, a
        group's heads in a row, [r·n, older + c]; None where none is too near."""
        apart = self.policy.observation.apart
        if not apart:
            return None
        key = chunk, older
        if key not in self.near:
            places = on_device(self._observed(chunk), self.device)[:, None] + older
            ahead = places - torch.arange(older + chunk, device=self.device)
            self.near[key] = (ahead < apart).repeat(self._group, 1)
        return self.near[key]

    @property
    def _group(self) -> int:
        """Query heads for each key/value head."""
        assert self.inputs.queries is not None
        return self.inputs.queries.shape[1] // self.inputs.keys.shape[1]

    def _scores(self, queries: Tensor, scale: Tensor | None, keys: Tensor) -> Tensor:
        """Scores of queries [b, h, n, d], a group's in a row, against keys [b, g, m, d]: [b, g, r·n, m]."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        queries = scaled(queries.to(wide), scale) * self.inputs.checked_scale
        grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1])
        return grouped @ keys.to(wide).mT


def alike_rows(among: np.ndarray, *facts: np.ndarray) -> Iterator[np.ndarray | None]:
    """The rows of a batch in groups of equal facts; None for all rows at once."""
    if among.all() and all((fact == fact[0]).all() for fact in facts):
        yield None
        return
    chosen = np.flatnonzero(among)
    keys = np.stack([fact[chosen] for fact in facts], axis=1)
    for key in np.unique(keys, axis=0):
        yield chosen[(keys == key).all(axis=1)]
