"""The torch engine: plan → fold → read, chunk by chunk, vectorised over rows, heads and the tokens of a chunk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit.engine.fold import Chunk, Slots, contributions, read_keys, scalars_by_name
from memkit.engine.read import Part, attend_parts, hidden
from memkit.engine.schedule import Exit, Schedule, Step, common
from memkit.memory import Memory, Ready, held
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.pieces.routing import Leaving, Placement
from memkit.plan import Plan
from memkit.policy import Policy

__all__ = ["Call", "attend", "plan"]

WINDOW_SLACK = 64
"""Tokens a decoding window takes beyond what it holds before it is moved to the front of its buffer."""


@dataclass(frozen=True)
class Call:
    """A checked call. Tensors as `memkit.attend` takes them; queries and values are None where only a plan is wanted."""

    policy: Policy
    queries: Tensor | None
    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    parameters: PolicyParameters | None
    rotation: Rotation | None
    scale: float
    memory: Memory | None
    lengths: np.ndarray
    plan: Plan | None
    differentiable: bool


def attend(call: Call) -> tuple[Tensor, Memory]:
    """Outputs [b, h, t, v] and the memory after the call."""
    if call.differentiable:
        run = _Run(call)
        return run.read(), run.memory()
    if (memory := call.memory) is not None:
        memory.check_usable()
        if memory.requires_grad:  # another graph may still need these tensors: leave them alone
            call = dataclasses.replace(call, memory=memory.fork().detach())
        else:
            memory.taken = True
    with torch.no_grad():
        run = _Run(call)
        return run.read(), run.memory()


@torch.no_grad()
def plan(call: Call) -> Plan:
    """The plan that `attend` would follow."""
    run = _Run(call)
    for step in run.schedule.steps:
        if step.exit is not None:
            run.absorb(step.exit)
    return run.record()


class _Run:
    """One call in progress: the timeline of windows and new tokens, and the slots."""

    def __init__(self, call: Call) -> None:
        self.call, self.policy = call, call.policy
        rows, heads, tokens, width = call.keys.shape
        self.rows, self.heads, self.tokens, self.width = rows, heads, tokens, width
        memory = call.memory
        seen = memory.seen_rows if memory is not None else np.zeros(rows, dtype=np.int64)
        self.schedule = Schedule(call.policy, seen, call.lengths, tokens)
        self.dtype = torch.promote_types(call.keys.dtype, torch.float32)
        self.device = call.keys.device
        self.next_positions: Tensor | None = None
        self._timeline()
        self._open_slots()
        self.placements: list[tuple[Exit, Placement]] = []

    # The timeline: columns of the windows' old tokens and this call's, newest last

    def _timeline(self) -> None:
        call, memory, old = self.call, self.call.memory, self.schedule.old
        keys, values, weights = call.keys, call.values, call.weights
        if not self.schedule.even:
            padding = ~self._columns_below(call.lengths)
            keys = keys.masked_fill(padding[:, None, :, None], 0)
            values = None if values is None else values.masked_fill(padding[:, None, :, None], 0)
        if weights is None and self.policy.merging.learned and not self.policy.exact_slots:
            weights = keys.new_ones(keys.shape[:3])
        positions = self._positions()
        self.buffered = memory is not None and self._fits(memory)
        if memory is None:
            self.keys, self.values, self.weights, self.positions = keys, values, weights, positions
        elif self.buffered:
            begin, end, stop = memory.end - old, memory.end, memory.end + self.tokens
            for name, new, axis in (
                ("keys", keys, 2),
                ("values", values, 2),
                ("weights", weights, 2),
                ("positions", positions, 1),
            ):
                buffer = getattr(memory, name)
                if buffer is not None:
                    buffer.narrow(axis, end, self.tokens).copy_(new)
                    buffer = buffer.narrow(axis, begin, stop - begin)
                setattr(self, name, buffer)
        else:
            window = slice(memory.end - old, memory.end)
            self.keys = torch.cat((memory.keys[:, :, window], keys), dim=2)
            self.values = None if values is None else torch.cat((memory.values[:, :, window], values), dim=2)
            self.weights = self.positions = None
            if weights is not None:
                assert memory.weights is not None
                self.weights = torch.cat((memory.weights[:, :, window], weights), dim=2)
            if positions is not None:
                assert memory.positions is not None
                self.positions = torch.cat((memory.positions[:, window], positions), dim=1)

    def _fits(self, memory: Memory) -> bool:
        """Whether the new tokens can be written behind the window in its own buffer; moves the window if that helps."""
        if self.call.differentiable or self.call.values is None or not self.schedule.even:
            return False
        room, old = memory.keys.shape[2], self.schedule.old
        if memory.end + self.tokens > room >= old + self.tokens:
            _move_to_front(memory, old)
        return memory.end + self.tokens <= room

    def _positions(self) -> Tensor | None:
        """Positions of this call's tokens, [b, t] float64, where the policy un-rotates."""
        if not self.policy.needs_rotation:
            return None
        assert self.call.rotation is not None
        given, memory = self.call.rotation.positions, self.call.memory
        if given is not None:
            positions = given.to(self.device).double()
        else:
            begin = torch.zeros(self.rows, device=self.device, dtype=torch.float64)
            if memory is not None and memory.next_positions is not None:
                begin = memory.next_positions
            positions = begin[:, None] + torch.arange(self.tokens, device=self.device)
        if self.tokens:
            last = torch.from_numpy(np.maximum(self.call.lengths - 1, 0)).to(self.device)
            self.next_positions = positions.gather(1, last[:, None])[:, 0] + (last >= 0)
            none = torch.from_numpy(self.call.lengths == 0).to(self.device)
            before = (
                memory.next_positions if memory is not None and memory.next_positions is not None else positions[:, 0]
            )
            self.next_positions = torch.where(none, before, self.next_positions)
        else:
            self.next_positions = memory.next_positions if memory is not None else positions.new_zeros(self.rows)
        return positions

    def _columns_below(self, lengths: np.ndarray) -> Tensor:
        """[b, t]: whether a column of this call is one of the row's own tokens."""
        return torch.arange(self.tokens, device=self.device) < self._rows_tensor(lengths)[:, None]

    def _rows_tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device)

    # Slots

    def _open_slots(self) -> None:
        memory, call = self.call.memory, self.call
        value_width = 0 if call.values is None else call.values.shape[-1]
        room = int(self.schedule.slots_after.max(initial=0))
        columns = len(self.policy.columns)
        if memory is None:
            sums = call.keys.new_zeros(self.rows, self.heads, room, self.width + value_width, dtype=self.dtype)
            scalars = call.keys.new_zeros(self.rows, self.heads, room, columns, dtype=torch.float64)
            self.slots = Slots(sums, scalars, in_place=not call.differentiable)
        else:
            sums, scalars = memory.sums, memory.scalars
            if call.values is None:
                sums, scalars = sums[..., : self.width].clone(), scalars.clone()
            self.slots = Slots(sums, scalars, in_place=not call.differentiable)
            if room > sums.shape[2]:
                decoding = self.buffered and sums.shape[2] > 0
                self.slots.grow(min(room * 3 // 2, self._most_slots()) if decoding else room)
        self.ready = memory.ready if memory is not None and self.buffered else None
        if self.ready is not None and self.ready.route.shape[2] != self.slots.sums.shape[2]:
            self.ready = None

    def _most_slots(self) -> int:
        """Slots the schedule grants within twice the tokens so far: more room than that waits for its need."""
        return self.policy.slots_after(2 * int(self.schedule.after.max()) + 2 * self.policy.chunk)

    def _read_slots(self, sums: Tensor, scalars: Tensor) -> Ready:
        """Sums [..., d + v] and scalars [..., s] as they are read. Acts on any leading axes; bias without query axis."""
        call, policy = self.call, self.policy
        numbers = scalars_by_name(policy, scalars)
        route, keys = read_keys(policy, sums[..., : self.width], numbers, call.parameters, call.rotation)
        if call.values is None:
            return Ready(route, keys, keys, None)
        values = sums[..., self.width :]
        bias = None
        if not policy.exact_slots:
            values = policy.readout.value(values, numbers)
            bias = policy.readout.bias(numbers)
        dtype = call.keys.dtype
        return Ready(route, keys.to(dtype), values.to(dtype), None if bias is None else bias.detach().to(dtype))

    def _all_ready(self) -> Ready:
        if self.ready is None:
            self.ready = self._read_slots(self.slots.sums, self.slots.scalars)
        return self.ready

    def _refresh(self, slot: Tensor) -> None:
        """Read the slots that a chunk has touched again."""
        ready, slots = self.ready, self.slots
        if ready is None or not slots.in_place or self.policy.exact_slots or slots.sums.shape[2] <= slot.shape[2]:
            self.ready = None
            return
        touched = slots.flat(slot.clamp(min=0))
        fresh = self._read_slots(slots.sums.flatten(0, 2)[touched], slots.scalars.flatten(0, 2)[touched])
        pairs = [(ready.route, fresh.route), (ready.keys, fresh.keys), (ready.values, fresh.values)]
        if ready.bias is not None and fresh.bias is not None:
            pairs.append((ready.bias, fresh.bias))
        for index, (whole, part) in enumerate(pairs):
            if all(whole is not earlier for earlier, _ in pairs[:index]):
                whole.flatten(0, 2).index_copy_(0, touched, part)

    # PLAN and FOLD: a chunk leaves the window

    def absorb(self, exit_: Exit) -> None:
        """Place a chunk's tokens and add them to the slots."""
        chunk = self._chunk(exit_)
        given = self.call.plan
        placement = self._place(exit_, chunk, self._route(exit_)) if given is None else self._given(given, exit_)
        self.placements.append((exit_, placement))
        rows, scalars = contributions(self.policy, chunk, placement.founded)
        self.slots.fold(self.policy, placement.slot, placement.founded, rows, scalars)
        self._refresh(placement.slot)

    def _chunk(self, exit_: Exit) -> Chunk:
        begin = exit_.begin + self.schedule.shift
        if (column := common(begin, exit_.leaves)) is not None:
            where: slice | Tensor = slice(column, column + self.policy.chunk)
        else:
            first = self._rows_tensor(np.where(exit_.leaves, begin, 0))
            where = first[:, None] + torch.arange(self.policy.chunk, device=self.device)
        keys = _columns(self.keys, where)
        positions = None if self.positions is None else _columns(self.positions.unsqueeze(1), where)
        return Chunk(
            keys=keys,
            memory_keys=self._memory_keys(keys, positions),
            values=None if self.values is None else _columns(self.values, where),
            weights=None if self.weights is None else _columns(self.weights, where),
            positions=positions,
            first=_shared(exit_.begin == 0, exit_.leaves, self.device),
        )

    def _memory_keys(self, keys: Tensor, positions: Tensor | None) -> Tensor:
        keys = keys.to(self.dtype)
        if self.policy.exact_slots:
            return keys
        keys = self.policy.rotary.memory_keys(keys, self.call.rotation, positions)
        if self.policy.readout.layer_norm:
            parameters = self.call.parameters
            norm = None if parameters is None else parameters.key_norm
            keys = self.policy.readout.key(keys, {}, norm)
        return keys

    def _route(self, exit_: Exit) -> Tensor | None:
        """The slots' keys as routing compares them; None where it looks at none."""
        most = int(exit_.live[exit_.leaves].max())
        if self.policy.exact_slots or not self.policy.routing.compares or not most:
            return None
        return self._all_ready().route[:, :, :most].detach()

    @torch.no_grad()
    def _place(self, exit_: Exit, chunk: Chunk, route: Tensor | None) -> Placement:
        leaves = torch.from_numpy(exit_.leaves).to(self.device)[:, None, None]
        policy = self.policy
        live, grant, forced = (
            _shared(numbers, exit_.leaves, self.device) for numbers in (exit_.live, exit_.grant, exit_.forced)
        )
        if policy.exact_slots:
            offsets = torch.arange(policy.chunk, device=self.device)
            founded = (offsets < forced).expand(chunk.keys.shape[:3])
            placement = Placement(torch.where(founded, live + offsets, -1), founded)
        else:
            keys = chunk.memory_keys.detach()
            leaving = Leaving(
                keys=keys,
                slots=keys[:, :, :0] if route is None else route,
                live=live,
                sinks=policy.sinks,
                forced=forced,
                grant=grant,
                alone=lambda: self._alone(chunk),
                joining=policy.merging.joins,
            )
            admission = policy.admission
            placement = policy.routing.place(
                leaving,
                None if admission is None else admission.priority,
                admission is not None and admission.compares,
            )
        if exit_.leaves.all():
            return placement
        return Placement(torch.where(leaves, placement.slot, -1), placement.founded & leaves)

    def _alone(self, chunk: Chunk) -> Tensor:
        """The chunk's tokens as slots of their own would be read by routing."""
        everyone = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=self.device)
        rows, scalars = contributions(self.policy, chunk, everyone)
        numbers = scalars_by_name(self.policy, scalars)
        parameters = self.call.parameters
        return self.policy.readout.key(
            rows[..., : self.width], numbers, None if parameters is None else parameters.key_norm
        )

    def _given(self, given: Plan, exit_: Exit) -> Placement:
        first = np.where(exit_.leaves, exit_.begin - given.begin, 0)
        if (column := common(first, exit_.leaves)) is not None:
            where: slice | Tensor = slice(column, column + self.policy.chunk)
        else:
            where = self._rows_tensor(first)[:, None] + torch.arange(self.policy.chunk, device=self.device)
        slot, founded = _columns(given.slot.to(self.device), where), _columns(given.founded.to(self.device), where)
        leaves = torch.from_numpy(exit_.leaves).to(self.device)[:, None, None]
        return Placement(torch.where(leaves, slot, -1), founded & leaves)

    def record(self) -> Plan:
        """What has been placed, as a plan."""
        schedule = self.schedule
        slot = torch.full((self.rows, self.heads, schedule.leaving), -1, device=self.device)
        founded = torch.zeros_like(slot, dtype=torch.bool)
        for exit_, placement in self.placements:
            first = np.where(exit_.leaves, exit_.begin - schedule.left_before, 0)
            rows = self._rows_tensor(np.flatnonzero(exit_.leaves))
            where = self._rows_tensor(first[exit_.leaves])[:, None] + torch.arange(
                self.policy.chunk, device=self.device
            )
            where = where[:, None].expand(-1, self.heads, -1)
            slot[rows] = slot[rows].scatter(2, where, placement.slot[rows])
            founded[rows] = founded[rows].scatter(2, where, placement.founded[rows])
        chunk = self.policy.chunk or 1
        counts = [
            [
                self.policy.slots_after_chunk(min(left + (i + 1) * chunk, after) // chunk - 1)
                for i in range(schedule.leaving // chunk)
            ]
            for left, after in zip(schedule.left_before.tolist(), schedule.left_after.tolist(), strict=True)
        ]
        return Plan(
            slot=slot,
            founded=founded,
            begin=schedule.left_before,
            length=schedule.left_after - schedule.left_before,
            slots=np.array(counts, dtype=np.int64).reshape(self.rows, -1),
        )

    # READ

    def read(self) -> Tensor:
        """Every step's queries against their slots and window: [b, h, t, v]; padding's outputs are 0."""
        call = self.call
        assert call.queries is not None and call.values is not None
        windowed, remembering = self._heated(call.queries)
        outputs = []
        for step in self.schedule.steps:
            if step.exit is not None:
                self.absorb(step.exit)
            if step.stop > step.start:
                outputs.append(attend_parts(self._parts(step, windowed, remembering), call.scale))
        shape = (*call.queries.shape[:3], call.values.shape[-1])
        missing = self.tokens - int(call.lengths.max(initial=0))
        if missing or not outputs:
            outputs.append(call.queries.new_zeros(*shape[:2], missing if outputs else self.tokens, shape[3]))
        output = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
        if self.schedule.even:
            return output
        return output.masked_fill(~self._columns_below(call.lengths)[:, None, :, None], 0)

    def _heated(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries as they meet the window and the slots."""
        parameters, policy = self.call.parameters, self.policy
        remembering = queries
        if not policy.exact_slots and policy.rotary.needs_rotation:
            positions = self.positions
            assert positions is not None
            remembering = policy.rotary.memory_queries(queries, self.call.rotation, positions[:, None, -self.tokens :])
        if parameters is None:
            return queries, remembering
        window, memory = parameters.temperature_window, parameters.temperature_memory
        heated = queries if window is None else queries * window.to(queries.dtype)[:, None, None]
        if policy.exact_slots:
            return heated, heated
        return heated, remembering if memory is None else remembering * memory.to(queries.dtype)[:, None, None]

    def _parts(self, step: Step, windowed: Tensor, remembering: Tensor) -> list[Part]:
        """The key sets of a step: slots, older columns of the window, and the step's own, causally."""
        parts: list[Part] = []
        most = int(step.slots[step.active].max())
        if most:
            ready = self._all_ready()
            bias = None if ready.bias is None else ready.bias[:, :, None, :most]
            if common(step.slots, step.active) is None:
                bias = self._hiding(
                    torch.arange(most, device=self.device) >= self._rows_tensor(step.slots)[:, None], bias
                )
            parts.append(
                Part(
                    remembering[:, :, step.start : step.stop], ready.keys[:, :, :most], ready.values[:, :, :most], bias
                )
            )
        queries = windowed[:, :, step.start : step.stop]
        begin, end = self.schedule.old + step.start, self.schedule.old + step.stop
        first = int(step.first[step.active].min())
        alone = step.stop - step.start == 1
        parts += self._older(step, queries, first, end if alone else begin)
        if not alone:
            keys, values = self._window(begin, end)
            parts.append(Part(queries, keys, values, causal=True))
        return parts

    def _older(self, step: Step, queries: Tensor, first: int, end: int) -> list[Part]:
        """Columns first … end − 1, which every query of the step sees but where rows or a band differ."""
        bounds = [first, end]
        band = self.policy.window.band
        if band is not None:  # the columns that the step's later queries no longer see
            last = self.schedule.old + step.stop - band
            bounds = sorted({first, min(max(last, first), end), end})
        uneven = common(step.first, step.active) is None
        parts = []
        for begin, stop in zip(bounds[:-1], bounds[1:], strict=True):
            if stop == begin:
                continue
            columns = torch.arange(begin, stop, device=self.device)
            bias = None
            if uneven:
                bias = self._hiding(columns < self._rows_tensor(step.first)[:, None], None)
            if band is not None and begin < self.schedule.old + step.stop - band:
                seen_from = torch.arange(step.start, step.stop, device=self.device) + self.schedule.old - band + 1
                fallen = torch.zeros(len(seen_from), stop - begin, dtype=queries.dtype, device=self.device)
                fallen = fallen.masked_fill(columns < seen_from[:, None], hidden(queries.dtype))
                bias = fallen[None, None] if bias is None else torch.minimum(bias, fallen)
            parts.append(Part(queries, *self._window(begin, stop), bias))
        return parts

    def _window(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        assert self.values is not None
        return self.keys[:, :, begin:end], self.values[:, :, begin:end]

    def _hiding(self, hide: Tensor, bias: Tensor | None) -> Tensor:
        """A bias that hides keys by row: hide [b, n] → [b, 1, 1, n], on top of `bias`."""
        dtype = self.call.keys.dtype
        mask = torch.zeros(hide.shape, dtype=dtype, device=self.device).masked_fill(hide, hidden(dtype))[:, None, None]
        return mask if bias is None else mask + bias

    # What is carried on

    def memory(self) -> Memory:
        """The memory after the call."""
        call, schedule, before = self.call, self.schedule, self.call.memory
        assert self.values is not None
        keep = int(held(self.policy, schedule.after).max(initial=0))
        shared = {
            "policy": self.policy,
            "seen_rows": schedule.after,
            "next_positions": self.next_positions,
            "sums": self.slots.sums,
            "scalars": self.slots.scalars,
            "ready": self.ready if self.buffered else None,
        }
        if self.buffered:
            assert before is not None
            return dataclasses.replace(before, **shared, end=before.end + self.tokens, taken=False)
        capacity = self.policy.window.capacity
        slack = 0 if call.differentiable else WINDOW_SLACK
        if capacity is None:  # a window of all tokens grows by a quarter, and not before it decodes
            room = keep if before is None or call.differentiable else keep + keep // 4 + slack
        else:
            room = max(keep, capacity + slack)
        kept = {
            name: None if tensor is None else self._newest(tensor, keep, room)
            for name, tensor in (("keys", self.keys), ("values", self.values), ("weights", self.weights))
        }
        positions = None
        if self.positions is not None:
            positions = self._newest(self.positions[:, None, :, None], keep, room)[:, 0, :, 0]
        return Memory(**shared, **kept, positions=positions, end=keep)

    def _newest(self, timeline: Tensor, keep: int, room: int) -> Tensor:
        """The last `keep` tokens of each row, right-aligned, in a buffer with room for `room`."""
        if self.schedule.even:
            newest = timeline[:, :, timeline.shape[2] - keep :]
        else:
            last = self._rows_tensor(self.schedule.old + self.call.lengths)
            where = (last[:, None] - keep + torch.arange(keep, device=self.device)).clamp(min=0)
            newest = _columns(timeline, where)
        if self.call.differentiable:
            return newest.clone()
        buffer = timeline.new_zeros(*timeline.shape[:2], room, *timeline.shape[3:])
        buffer[:, :, :keep] = newest
        return buffer


def _columns(timeline: Tensor, where: slice | Tensor) -> Tensor:
    """Columns of [b, g, n, …]: one slice for all rows, or per row by number, where [b, c]."""
    if isinstance(where, slice):
        return timeline[:, :, where]
    index = where[:, None].reshape(where.shape[0], 1, where.shape[1], *[1] * (timeline.ndim - 3))
    return timeline.gather(2, index.expand(-1, timeline.shape[1], -1, *timeline.shape[3:]))


def _shared(numbers: np.ndarray, among: np.ndarray, device: torch.device):
    """What the rows in `among` have in common, as one number; else one per row, [b, 1, 1]."""
    one = common(numbers, among)
    if one is not None:
        return bool(one) if numbers.dtype == np.bool_ else one
    return torch.from_numpy(numbers * among).to(device)[:, None, None]


def _move_to_front(memory: Memory, old: int) -> None:
    """Move the window's newest `old` columns to the front of its buffer."""
    for name, axis in (("keys", 2), ("values", 2), ("weights", 2), ("positions", 1)):
        buffer: Tensor | None = getattr(memory, name)
        if buffer is not None:
            buffer.narrow(axis, 0, old).copy_(buffer.narrow(axis, memory.end - old, old).clone())
    memory.end = old
