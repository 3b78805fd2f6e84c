"""The timeline of a call: what the windows hold and this call's tokens, on one axis of columns (see `schedule`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memkit.engine.call import Call
from memkit.engine.schedule import Schedule
from memkit.memory import Memory, held
from memkit.policy import Policy

__all__ = ["Timeline", "columns", "on_device", "window_room"]

WINDOW_SLACK = 64
"""Tokens a decoding window takes beyond its most before it is moved to the front of its buffer."""


class Timeline:
    """keys [b, g, n, d], values [b, g, n, v] (None in a plan), weights [b, g, n], positions [b, n], newest last.

    in_place: the new tokens were written behind the window in the memory's own buffer, of which these are views.
    """

    def __init__(self, call: Call, schedule: Schedule) -> None:
        self.call, self.schedule = call, schedule
        self.rows, self.heads, self.tokens = call.keys.shape[:3]
        self.device, memory = call.keys.device, call.memory
        keys, values, weights = call.keys, call.values, call.weights
        if not schedule.even:
            padding = ~self.own_columns()[:, None, :, None]
            keys = keys.masked_fill(padding, 0)
            values = None if values is None else values.masked_fill(padding, 0)
            weights = None if weights is None else weights.masked_fill(padding[..., 0], 0)
        if weights is None and call.policy.merging.learned and not call.policy.exact_slots:
            weights = keys.new_ones(keys.shape[:3])
        positions, self.next_positions = self._positions()
        self.in_place = memory is not None and self._fits(memory)
        held = (
            (None, None, None, None)
            if memory is None
            else (memory.keys, memory.values, memory.weights, memory.positions)
        )
        self.keys = self._join(held[0], keys, 2)
        self.values = None if values is None else self._join(held[1], values, 2)
        self.weights = None if weights is None else self._join(held[2], weights, 2)
        self.positions = None if positions is None else self._join(held[3], positions, 1)

    def own_columns(self) -> Tensor:
        """[b, t]: whether a column of this call is one of the row's own tokens, or padding."""
        return torch.arange(self.tokens, device=self.device) < self.per_row(self.call.lengths)[:, None]

    def per_row(self, numbers: np.ndarray) -> Tensor:
        """Numbers of the host, one per row, as a tensor [b]."""
        return on_device(numbers, self.device)

    def carry(self) -> dict[str, Tensor | int | None]:
        """The window as a memory carries it on."""
        call, memory = self.call, self.call.memory
        keep = int(held(call.policy, self.schedule.after).max(initial=0))
        if self.in_place:
            assert memory is not None
            return {"end": memory.end + self.tokens, "next_positions": self.next_positions}
        short = memory is not None and self.tokens <= WINDOW_SLACK
        if call.differentiable:
            room = keep
        elif short and call.policy.window.capacity is None:  # by a quarter, and not before it decodes
            room = keep + keep // 4 + WINDOW_SLACK
        else:
            room = window_room(call.policy, keep)
        window: dict[str, Tensor | int | None] = {"end": keep, "next_positions": self.next_positions, "positions": None}
        for name, tensor in (("keys", self.keys), ("values", self.values), ("weights", self.weights)):
            window[name] = None if tensor is None else self._newest(tensor, keep, room)
        if self.positions is not None:
            window["positions"] = self._newest(self.positions[:, None], keep, room)[:, 0]
        return window

    def _fits(self, memory: Memory) -> bool:
        """Whether the new tokens can be written behind the window in its own buffer; moves the window if that helps."""
        if self.call.differentiable or self.call.values is None or not self.schedule.even:
            return False
        room, old = memory.keys.shape[2], self.schedule.old
        if memory.end + self.tokens > room >= old + self.tokens:
            memory.written = True
            for buffer, axis in ((memory.keys, 2), (memory.values, 2), (memory.weights, 2), (memory.positions, 1)):
                if buffer is not None:
                    buffer.narrow(axis, 0, old).copy_(buffer.narrow(axis, memory.end - old, old).clone())
            memory.end = old
        return memory.end + self.tokens <= room

    def _join(self, held: Tensor | None, new: Tensor, axis: int) -> Tensor:
        memory, old = self.call.memory, self.schedule.old
        if memory is None:
            return new
        assert held is not None
        if self.in_place:
            held.narrow(axis, memory.end, self.tokens).copy_(new)
            return held.narrow(axis, memory.end - old, old + self.tokens)
        return torch.cat((held.narrow(axis, memory.end - old, old), new), dim=axis)

    def _positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Positions of this call's tokens, [b, t] float64, and where they go on, [b]; None without rotation."""
        call, memory = self.call, self.call.memory
        if not call.policy.needs_rotation:
            return None, None
        assert call.rotation is not None
        begin = None if memory is None else memory.next_positions
        if begin is None:
            begin = torch.zeros(self.rows, device=self.device, dtype=torch.float64)
        if call.rotation.positions is not None:
            positions = call.rotation.positions.to(self.device).double()
        else:
            positions = begin[:, None] + torch.arange(self.tokens, device=self.device)
        lengths = self.per_row(call.lengths)
        ends = torch.cat((begin[:, None], positions + 1), dim=1)
        return positions, ends.gather(1, lengths[:, None])[:, 0]

    def _newest(self, timeline: Tensor, keep: int, room: int) -> Tensor:
        """The last `keep` tokens of each row, right-aligned, in a buffer with room for `room`."""
        if self.schedule.even:
            newest = timeline[:, :, timeline.shape[2] - keep :]
        else:
            last = self.per_row(self.schedule.old + self.call.lengths)
            newest = columns(timeline, (last[:, None] - keep + torch.arange(keep, device=self.device)).clamp(min=0))
        if self.call.differentiable:
            return newest.clone()
        buffer = timeline.new_zeros(*timeline.shape[:2], room, *timeline.shape[3:])
        buffer[:, :, :keep] = newest
        return buffer


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; the host does not wait for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def window_room(policy: Policy, held: int) -> int:
    """Tokens for which a prefill that leaves `held` in the window makes room: a quarter more, at most what the window
    can hold, and some slack."""
    capacity = policy.window.capacity
    return held if capacity is None else min(capacity, held + held // 4) + WINDOW_SLACK


def columns(timeline: Tensor, where: slice | Tensor) -> Tensor:
    """Columns of [b, g, n, …]: one slice for all rows, or by number per row, where [b, c]."""
    if isinstance(where, slice):
        return timeline[:, :, where]
    index = where.reshape(where.shape[0], 1, where.shape[1], *[1] * (timeline.ndim - 3))
    return timeline.gather(2, index.expand(-1, timeline.shape[1], -1, *timeline.shape[3:]))
