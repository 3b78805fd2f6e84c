"""Decoding one token while no chunk leaves: slots and window stand side by side, and one fused call reads both.

Softmax does not mind the order of its keys. So decoding keeps the slots, as they are read, directly before the window
in one buffer, and appends each token behind; until the next chunk leaves, nothing else moves. What differs between
slots and window is folded into the slots' keys (temperatures, as the ratio of the two) or into one bias (counts).

This is a shortcut: whatever does not fit it takes the way of every other call, with the same result.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn.functional import pad

from memkit.engine.call import Call
from memkit.engine.fold import parameter_versions, read_slots
from memkit.engine.read import Part, attend_parts
from memkit.memory import Memory, SideBySide
from memkit.pieces.rotary import Rotary
from memkit.policy import Policy

__all__ = ["decode"]


def decode(call: Call) -> tuple[Tensor, Memory] | None:
    """Outputs [b, h, 1, v] and the memory after the call; None where the call is not of this kind."""
    memory = call.memory
    if memory is None or not _applies(call, memory):
        return None
    assert call.queries is not None and call.values is not None
    made_with, banded = parameter_versions(call), call.policy.window.band is not None
    if not banded and (memory.side_by_side is None or memory.side_by_side.made_with != made_with):
        memory = _place_side_by_side(call, memory, made_with)
    here = slice(memory.end, memory.end + 1)
    memory.keys[:, :, here], memory.values[:, :, here] = call.keys, call.values
    if memory.weights is not None:
        memory.weights[:, :, here] = 1 if call.weights is None else call.weights
    following = memory.next_positions
    if memory.positions is not None and following is not None:
        memory.positions[:, memory.end] = following
        following = following + 1
    queries, heat = call.queries, None if call.parameters is None else call.parameters.temperature_window
    if heat is not None:
        queries = queries * heat.to(queries.dtype)[:, None, None]
    output, _ = attend_parts(_band(call, memory, queries) if banded else _all_at_once(memory, queries), call.scale)
    after = dataclasses.replace(
        memory, seen_rows=memory.seen_rows + 1, end=memory.end + 1, next_positions=following, taken=False
    )
    return output, after


def _all_at_once(memory: Memory, queries: Tensor) -> list[Part]:
    """Slots and window, side by side."""
    side = memory.side_by_side
    assert side is not None
    seen = slice(side.begin, side.slots + memory.end + 1)
    bias = None if side.bias is None else side.bias[:, :, :, seen]
    return [Part(queries, side.keys[:, :, seen], side.values[:, :, seen], bias)]


def _band(call: Call, memory: Memory, queries: Tensor) -> list[Part]:
    """Under a sliding window, which leaves its oldest token behind at each step: sinks apart, if there are any."""
    size = min(int(memory.held_rows[0]) + 1, call.policy.window.band or 0)
    seen = slice(memory.end + 1 - size, memory.end + 1)
    parts = [Part(queries, memory.keys[:, :, seen], memory.values[:, :, seen])]
    if slots := int(memory.live_rows[0]):
        ready = read_slots(call, memory.sums[:, :, :slots], memory.scalars[:, :, :slots])
        parts.append(Part(queries, ready.keys, ready.values))
    return parts


def _applies(call: Call, memory: Memory) -> bool:
    """One token per row, rows alike, room in the buffer, no chunk that leaves, one query for slots and window."""
    policy, position = call.policy, int(memory.seen_rows[0])
    plain = call.keys.shape[2] == 1 and call.plan is None and not memory.keys.requires_grad
    if not plain or memory.end == memory.keys.shape[2] or memory.sums.requires_grad:
        return False
    if position == 0 or _leaves(policy, position):
        return False
    if not policy.exact_slots and type(policy.rotary).memory_queries is not Rotary.memory_queries:
        return False
    if policy.needs_rotation and (
        not policy.rotary.rotates_slots or call.rotation is None or call.rotation.positions is not None
    ):
        return False
    if len(memory.seen_rows) > 1 and not (memory.seen_rows == position).all():
        return False
    if not call.lengths.all():
        return False
    if call.parameters is None or call.parameters.temperature_memory is None:
        return True
    # Temperatures are folded into the slots' keys, per key/value head and as a ratio.
    window = call.parameters.temperature_window
    assert call.queries is not None and window is not None
    return call.queries.shape[1] == call.keys.shape[1] and bool(window.detach().all())


def _leaves(policy: Policy, position: int) -> bool:
    """Whether the token at `position` pushes a chunk, or a sink, out of the window."""
    band = policy.window.band
    if band is not None:
        return band <= position < band + policy.sinks
    return policy.chunk > 0 and position % policy.chunk == 0


def _place_side_by_side(call: Call, memory: Memory, made_with: tuple[int, ...]) -> Memory:
    """The memory with its window moved directly behind a copy of the slots as they are read."""
    slots, held = int(memory.live_rows[0]), int(memory.held_rows[0])
    if not slots:
        side = SideBySide(0, memory.end - held, memory.keys, memory.values, None, made_with)
        return dataclasses.replace(memory, side_by_side=side)
    ready = read_slots(call, memory.sums[:, :, :slots], memory.scalars[:, :, :slots])
    room, window = memory.keys.shape[2], slice(memory.end - held, memory.end)
    buffers: list[Tensor] = []
    for read, old in ((ready.keys * _heat(call), memory.keys), (ready.values, memory.values)):
        buffer = old.new_zeros(*old.shape[:2], slots + room, old.shape[3])
        buffer[:, :, :slots] = read
        buffer[:, :, slots : slots + held] = old[:, :, window]
        buffers.append(buffer)
    keys, values = buffers
    bias = None if ready.bias is None else pad(ready.bias, (0, room)).unsqueeze(2)
    moved = dataclasses.replace(
        memory,
        end=held,
        keys=keys[:, :, slots:],
        values=values[:, :, slots:],
        ready=None,
        side_by_side=SideBySide(slots, 0, keys, values, bias, made_with),
    )
    for buffer, axis in ((moved.weights, 2), (moved.positions, 1)):
        if buffer is not None:
            buffer.narrow(axis, 0, held).copy_(buffer.narrow(axis, memory.end - held, held).clone())
    return moved


def _heat(call: Call) -> Tensor | float:
    """What slots' keys are scaled by, so that the window's queries read them as the memory's would."""
    parameters = call.parameters
    if parameters is None or parameters.temperature_memory is None or parameters.temperature_window is None:
        return 1.0
    return (parameters.temperature_memory / parameters.temperature_window).to(call.keys.dtype)[:, None, None]
