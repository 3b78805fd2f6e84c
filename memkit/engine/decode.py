"""Decoding one token while no chunk leaves: slots and window stand side by side, and one fused call reads both.

Softmax does not mind the order of its keys. So decoding keeps the slots, as they are read, directly before the window
in one buffer, and appends each token behind; until the next chunk leaves, nothing else moves (under a sliding window
the sinks do). What differs between slots and window is folded into the slots' keys (temperatures, as the ratio of the
two) or into one bias (counts).

This is a shortcut: whatever does not fit it takes the way of every other call, with the same result.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from memkit.engine.call import Call
from memkit.engine.fold import SlotRules, parameter_versions, read_slots
from memkit.engine.read import default_scale
from memkit.engine.validation import check_signs
from memkit.memory import Memory, Ready, SideBySide
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotary, Rotation
from memkit.policy import Policy

__all__ = ["decode", "decode_again"]


def decode(call: Call) -> tuple[Tensor, Memory] | None:
    """Outputs [b, h, 1, v] and the memory after the call; None where the call is not of this kind."""
    memory = call.memory
    if memory is None or not _applies(call, memory):
        return None
    assert call.queries is not None and call.values is not None
    made_with, side = parameter_versions(call.parameters), memory.side_by_side
    if side is None or memory.end >= side.until or side.made_with != made_with:
        memory = _place_side_by_side(call, memory, made_with)
    return _one_more(memory, call.queries, call.keys, call.values, call.weights, call.scale)


def decode_again(
    policy: Policy,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None,
    parameters: PolicyParameters | None,
    rotation: Rotation | None,
    scale: float | None,
    memory: Memory,
) -> tuple[Tensor, Memory] | None:
    """`decode` of a call that looks like the one before it, which has been checked; None where it does not."""
    side = memory.side_by_side
    if side is None or memory.taken or memory.lost or memory.end >= side.until or torch.is_grad_enabled():
        return None
    if side.keys.is_inference() and not torch.is_inference_mode_enabled():
        return None
    scale = default_scale(queries.shape[-1]) if scale is None else scale
    if not (side.policy is policy and side.parameters is parameters and side.rotation is rotation):
        return None
    if side.looks != _looks(queries, keys, values, weights, scale) or side.made_with != parameter_versions(parameters):
        return None
    if weights is not None:
        check_signs(weights)
    try:
        return _one_more(memory, queries, keys, values, weights, scale)
    except BaseException as error:
        memory.call_failed(error)
        raise


def _looks(queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None, scale: float) -> tuple[Any, ...]:
    """What the check of a call depends on, but for its objects and the numbers in its tensors."""
    tensors = (queries, keys, values) if weights is None else (queries, keys, values, weights)
    return scale, *[(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _one_more(
    memory: Memory, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor | None, scale: float
) -> tuple[Tensor, Memory]:
    """Put one token behind the window, and read slots and window with one call."""
    side, end = memory.side_by_side, memory.end
    assert side is not None
    memory.keys.narrow(2, end, 1).copy_(keys)
    memory.values.narrow(2, end, 1).copy_(values)
    following = _append(memory, weights)
    if side.heat is not None:
        queries = queries * side.heat
    begin = side.begin
    if side.band:
        begin = end + 1 - side.band
        if side.sinks is not None:  # over what the window leaves behind
            memory.written = True
            side.keys.narrow(2, begin, side.slots).copy_(side.sinks[0])
            side.values.narrow(2, begin, side.slots).copy_(side.sinks[1])
    columns = side.slots + end + 1 - begin
    rows, heads, _, width = queries.shape
    output = scaled_dot_product_attention(
        queries.reshape(rows, keys.shape[1], -1, width),  # a group's queries in a row before their one key/value head
        side.keys.narrow(2, begin, columns),
        side.values.narrow(2, begin, columns),
        None if side.bias is None else side.bias.narrow(3, begin, columns),
        scale=scale,
    )
    return output.reshape(rows, heads, 1, -1), memory.one_token_later(following)


def _append(memory: Memory, weights: Tensor | None) -> Tensor | None:
    """Write the new token's weight and position; the next token's position."""
    if memory.weights is not None:
        newest = memory.weights.narrow(2, memory.end, 1)
        newest.fill_(1) if weights is None else newest.copy_(weights)
    if memory.positions is None or memory.next_positions is None:
        return memory.next_positions
    memory.positions[:, memory.end] = memory.next_positions
    return memory.next_positions + 1


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
    assert call.queries is not None and call.values is not None
    policy, slots, held = call.policy, int(memory.live_rows[0]), int(memory.held_rows[0])
    seen, band = int(memory.seen_rows[0]), policy.window.band
    window, room = slice(memory.end - held, memory.end), memory.keys.shape[2]
    ready = _ready(call, memory, slots, made_with) if slots else None
    if ready is None:
        moved, keys, values, bias = memory, memory.keys, memory.values, None
    else:
        keys, values = (
            _behind(read, old[:, :, window], room)
            for read, old in ((ready.keys * _heat(call), memory.keys), (ready.values, memory.values))
        )
        bias = None if ready.bias is None else pad(ready.bias, (0, room)).unsqueeze(2)
        moved = dataclasses.replace(memory, end=held, keys=keys[:, :, slots:], values=values[:, :, slots:], ready=None)
        for buffer, axis in ((moved.weights, 2), (moved.positions, 1)):
            if buffer is not None:
                memory.written = True
                buffer.narrow(axis, 0, held).copy_(buffer.narrow(axis, memory.end - held, held).clone())
    heat = None if call.parameters is None else call.parameters.temperature_window
    until = room
    if band is not None and seen < band:
        until, band = min(room, moved.end + band - seen), 0
    elif band is None and policy.chunk:
        until = min(room, moved.end + policy.chunk - seen % policy.chunk)
    moved.side_by_side = SideBySide(
        slots=slots,
        begin=0 if slots else moved.end - held,
        band=band or 0,
        sinks=(ready.keys, ready.values) if band and ready is not None else None,
        until=until,
        keys=keys,
        values=values,
        bias=bias,
        heat=None if heat is None else heat.detach().to(call.keys.dtype)[:, None, None],
        made_with=made_with,
        policy=policy,
        parameters=call.parameters,
        rotation=call.rotation,
        looks=_looks(call.queries, call.keys, call.values, call.weights, call.scale),
    )
    return moved


def _ready(call: Call, memory: Memory, slots: int, made_with: tuple[int, ...]) -> Ready:
    """The slots as they are read, which the call that took the last chunk in has left here in most cases."""
    ready = memory.ready
    if ready is None or ready.made_with != made_with:
        return read_slots(SlotRules.of(call), memory.sums[:, :, :slots], memory.scalars[:, :, :slots])
    bias = None if ready.bias is None else ready.bias[:, :, :slots]
    return Ready(ready.route[:, :, :slots], ready.keys[:, :, :slots], ready.values[:, :, :slots], bias)


def _behind(slots: Tensor, window: Tensor, room: int) -> Tensor:
    """Slots [b, g, m, d], the window [b, g, n, d] behind them, and the rest of `room` tokens empty."""
    rest = window.new_empty(*window.shape[:2], room - window.shape[2], window.shape[3])
    return torch.cat((slots, window, rest), dim=2)


def _heat(call: Call) -> Tensor | float:
    """What slots' keys are scaled by, so that the window's queries read them as the memory's would."""
    parameters = call.parameters
    if parameters is None or parameters.temperature_memory is None or parameters.temperature_window is None:
        return 1.0
    return (parameters.temperature_memory / parameters.temperature_window).to(call.keys.dtype)[:, None, None]
