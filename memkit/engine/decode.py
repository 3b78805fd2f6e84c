"""Decoding one token while no chunk leaves: slots and window stand side by side, and one fused call reads both.

Softmax does not mind the order of its keys. So decoding keeps the slots, as they are read, directly before the window
in one buffer, and appends each token behind; until the next chunk leaves, nothing else moves (under a sliding window
the sinks do). What differs between slots and window is folded into the slots' keys (query scales, as the ratio of
the two) or into one bias (counts). Rows at unequal positions have unequally many slots and tokens in their windows: the
bias hides what is not theirs.

This is a shortcut: whatever does not fit it takes the way of every other call, with the same result up to rounding: all
keys are summed in one softmax instead of in several, and query scales are rounded where they meet the slots' keys.
`ENABLED = False` switches it off.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from memkit.engine.carry import decodes_until
from memkit.engine.checks import check_signs
from memkit.engine.inputs import AttendInputs
from memkit.engine.read import default_scale
from memkit.memory import Memory
from memkit.memory.held import HeldSlots
from memkit.memory.memory import DecodeBuffer
from memkit.memory.rows import SlotRules, parameter_versions
from memkit.memory.slots import SlotStore
from memkit.memory.window import Window

__all__ = ["decode", "decode_as_before"]

ENABLED = True
"""Whether single tokens take this way. Off, they take that of every other call: for whoever wonders which is wrong."""


def decode(inputs: AttendInputs) -> tuple[Tensor, Memory] | None:
    """Outputs [b, h, 1, v] and the memory after the call; None where the call is not of this kind."""
    memory = inputs.memory
    if not ENABLED or memory is None or not _applies(inputs, memory):
        return None
    made_with, buffer = parameter_versions(inputs.parameters), memory.buffer
    if buffer is None or memory.window.end >= buffer.until or buffer.made_with != made_with:
        memory = _side_by_side(inputs, memory, made_with)
    return _one_more(memory, inputs)


def decode_as_before(given: AttendInputs) -> tuple[Tensor, Memory] | None:
    """`decode` of a call that looks like the one before it, which has been checked; None where it does not."""
    memory = given.memory
    if not isinstance(memory, Memory) or given.lengths is not None or given.plan is not None or not ENABLED:
        return None
    if given.boundaries is not None or (memory.cuts is not None and any(memory.cuts.ended)):
        return None
    buffer = memory.buffer
    if buffer is None or memory.taken or memory.lost or memory.window.end >= buffer.until or torch.is_grad_enabled():
        return None
    if not torch.is_inference_mode_enabled():  # what was made in it is not to be written into here
        written = (buffer.keys, memory.observed)
        if any(each is not None and each.is_inference() for each in written):
            return None
    if not (
        buffer.policy is given.policy
        and buffer.parameters is given.parameters
        and buffer.rotation is given.rotation
        and buffer.made_with == parameter_versions(given.parameters)
    ):
        return None
    tensors = (given.queries, given.keys, given.values)
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or not isinstance(given.weights, Tensor | None):
        return None
    if given.scale is None:
        given.scale = default_scale(given.queries.shape[-1]) if given.queries is not None else None
    if buffer.signature != _signature(given):
        return None
    if given.weights is not None:
        check_signs(given.weights)
    try:
        return _one_more(memory, given)
    except BaseException as error:
        memory.call_failed(error)
        raise


def _signature(given: AttendInputs) -> tuple[Any, ...]:
    """What the check of a call depends on, but for its objects and the numbers in its tensors."""
    tensors = (given.queries, given.keys, given.values, given.weights)
    return given.scale, *[None if each is None else (each.shape, each.dtype, each.device) for each in tensors]


def _one_more(memory: Memory, given: AttendInputs) -> tuple[Tensor, Memory]:
    """Put one token behind the window, and read slots and window with one call."""
    buffer, window, queries = memory.buffer, memory.window, given.queries
    assert buffer is not None and queries is not None and given.values is not None
    end = window.end
    window.streams["keys"].narrow(2, end, 1).copy_(given.keys)
    window.streams["values"].narrow(2, end, 1).copy_(given.values)
    following = _append(memory, given.weights)
    if memory.observed is not None:
        _wait(memory, queries)
    if buffer.query_scale is not None:
        queries = queries * buffer.query_scale
    begin = buffer.begin
    if buffer.band:
        begin = end + 1 - buffer.band
        if buffer.sinks is not None:  # over what the window leaves behind
            memory.about_to_write()
            buffer.keys.narrow(2, begin, buffer.slots).copy_(buffer.sinks[0])
            buffer.values.narrow(2, begin, buffer.slots).copy_(buffer.sinks[1])
    columns = buffer.slots + end + 1 - begin
    rows, heads, _, width = queries.shape
    output = scaled_dot_product_attention(
        queries.reshape(rows, given.keys.shape[1], -1, width),  # a group's queries in a row before their one head
        buffer.keys.narrow(2, begin, columns),
        buffer.values.narrow(2, begin, columns),
        None if buffer.bias is None else buffer.bias.narrow(3, begin, columns),
        scale=given.scale,
    )
    ending = None if given.row_boundaries is None else given.row_boundaries[:, 0]
    return output.reshape(rows, heads, 1, -1), memory.one_token_later(following, ending)


def _append(memory: Memory, weights: Tensor | None) -> Tensor | None:
    """Write the new token's weight and position; the next token's position."""
    streams, end = memory.window.streams, memory.window.end
    if "weights" in streams:
        newest = streams["weights"].narrow(2, end, 1)
        newest.fill_(1) if weights is None else newest.copy_(weights)
    if memory.observed is not None:
        streams["evidence"].narrow(2, end, 1).zero_()
    if "positions" not in streams or memory.next_positions is None:
        return memory.next_positions
    streams["positions"][:, 0, end] = memory.next_positions
    return memory.next_positions + 1


def _wait(memory: Memory, queries: Tensor) -> None:
    """Keep the token's query if it is one that is observed."""
    policy, observed = memory.policy, memory.observed
    offsets, begun = policy.observation.waits, _begun(memory) % policy.chunk
    if observed is None:
        return
    if (begun == begun[0]).all():
        if begun[0] in offsets:
            observed[:, :, offsets.index(begun[0])] = queries[:, :, 0]
        return
    for row, offset in enumerate(begun.tolist()):
        if offset in offsets:
            observed[row, :, offsets.index(offset)] = queries[row, :, 0]


def _applies(inputs: AttendInputs, memory: Memory) -> bool:
    """One token per row, room in the buffer, no chunk that leaves, one query for slots and window, rows alike where a
    window slides or the caller cuts chunks; and where query scales are learned, as many key/value heads as query heads
    and no scale of 0."""
    policy, positions = inputs.policy, memory.seen_rows
    plain = inputs.keys.shape[2] == 1 and inputs.plan is None and not memory.keys.requires_grad
    if not plain or not memory.window.fits(1) or memory.store.requires_grad:
        return False
    if not positions.all() or _leaves(memory, positions) or (policy.observes and _ends(inputs, memory, positions)):
        return False
    if memory.cuts is not None and not memory.cuts.alike:
        return False
    if policy.rotary.turns_queries:
        return False
    if "positions" in policy.streams and (inputs.rotation is None or inputs.rotation.positions is not None):
        return False
    if not _alike(memory) and (memory.cuts is not None or policy.window.band is not None or policy.sinks_only):
        return False
    if not inputs.row_lengths.all():
        return False
    if inputs.parameters is None or inputs.parameters.query_scale_memory is None:
        return True
    # Query scales are folded into the slots' keys, per key/value head and as a ratio.
    window = inputs.parameters.query_scale_window
    assert inputs.queries is not None and window is not None
    return inputs.queries.shape[1] == inputs.keys.shape[1] and bool(window.detach().all())


def _alike(memory: Memory) -> bool:
    """Whether all rows are at one position."""
    return bool((memory.seen_rows == memory.seen_rows[:1]).all())


def _leaves(memory: Memory, positions: np.ndarray) -> bool:
    """Whether the tokens at these positions, [b], may push a chunk, or a sink, out of any row's window."""
    policy, band = memory.policy, memory.policy.window.band
    if band is not None:
        return bool(((positions >= band) & (positions < band + policy.sinks)).any())
    if memory.cuts is not None:
        return bool(memory.cuts.opens(memory.seen_rows, policy.chunk).any())
    return policy.chunk > 0 and bool((positions % policy.chunk == 0).any())


def _ends(inputs: AttendInputs, memory: Memory, positions: np.ndarray) -> bool:
    """Whether the token at its row's position, [b], is the last of its chunk, in any row."""
    chunk = memory.policy.chunk
    if memory.cuts is None:
        return bool(((positions + 1) % chunk == 0).any())
    return inputs.row_boundaries is not None or bool((positions + 1 - memory.cuts.newest >= chunk).any())


def _begun(memory: Memory) -> np.ndarray:
    """Tokens of each row since its newest chunk began, [b]; or since a chunk of the same length did."""
    return memory.seen_rows if memory.cuts is None else memory.seen_rows - memory.cuts.newest


def _side_by_side(inputs: AttendInputs, memory: Memory, made_with: tuple[int, ...]) -> Memory:
    """The memory with its window moved directly behind a copy of the slots as they are read."""
    policy, slots, held = inputs.policy, int(memory.live_rows.max()), int(memory.held_rows.max())
    seen, band, room = int(memory.seen_rows[0]), policy.window.band, memory.window.room
    moved, keys, values, bias, sinks, ratio = memory, memory.keys, memory.values, None, None, None
    if slots:
        store = _held(inputs, memory, slots, made_with)
        view, newest, ratio = store.view, memory.window.last(held), _scale_ratio(inputs)
        assert view is not None
        keys = _behind(view.keys if ratio is None else view.keys * ratio, newest["keys"], room)
        values = _behind(view.values, newest["values"], room)
        bias = None if view.bias is None else pad(view.bias, (0, room)).unsqueeze(2)
        streams = {"keys": keys[:, :, slots:], "values": values[:, :, slots:]}
        for name in memory.window.streams.keys() - streams.keys():
            stream = memory.window.streams[name]
            streams[name] = torch.cat(
                (newest[name], stream.new_empty(*stream.shape[:2], room - held, *stream.shape[3:])), dim=2
            )
        if isinstance(store, HeldSlots):
            store = store.standing_at(keys[:, :, :slots], values[:, :, :slots], scaled=ratio is not None)
        else:
            sinks = view.keys, view.values
            store = dataclasses.replace(store, view=None)
        moved = dataclasses.replace(memory, window=Window(streams, held), store=store)
    end = moved.window.end
    if not _alike(memory):
        hidden = _not_theirs(memory, slots, end - held, keys.shape[2])
        bias = (keys.new_zeros(()) if bias is None else bias).masked_fill(hidden.to(keys.device), -torch.inf)
    until = room
    if band is not None and seen < band:
        until, band = min(room, end + band - seen), 0
    elif band is None and policy.chunk:
        until = decodes_until(policy, _begun(memory), moved.window)
    scale = None if inputs.parameters is None else inputs.parameters.query_scale_window
    moved.buffer = DecodeBuffer(
        slots=slots,
        begin=0 if slots else end - held,
        band=band or 0,
        sinks=sinks if band else None,
        until=until,
        keys=keys,
        values=values,
        bias=bias,
        query_scale=None if scale is None else scale.detach().to(inputs.keys.dtype)[:, None, None],
        key_scale=ratio,
        made_with=made_with,
        policy=policy,
        parameters=inputs.parameters,
        rotation=inputs.rotation,
        signature=_signature(inputs),
    )
    return moved


def _not_theirs(memory: Memory, slots: int, first: int, columns: int) -> Tensor:
    """Which of so many columns of a buffer with `slots` slots in front are no slot and no token of a row's window,
    bool [b, 1, 1, columns]; first: the column behind the slots where the longest window begins."""
    at, live, held = np.arange(columns), memory.live_rows[:, None], memory.held_rows[:, None]
    shorter = slots + first + held.max() - held
    hidden = (at >= live) & (at < shorter) if slots else at < shorter
    return torch.from_numpy(hidden)[:, None, None]


def _held(inputs: AttendInputs, memory: Memory, slots: int, made_with: tuple[int, ...]) -> SlotStore | HeldSlots:
    """The slots, held once, and as these parameters read them; or, where the policy's storage says so, a store."""
    store = memory.store
    if isinstance(store, HeldSlots):
        if store.reads(made_with):  # rows that had more of them may be gone
            return store if store.room == slots else store.mapped(lambda each: each[:, :, :slots].contiguous())
        store = store.opened()
    rules = SlotRules(
        inputs.policy, inputs.keys.shape[-1], inputs.keys.dtype, inputs.key_norm, inputs.rotation, valued=True
    )
    view = store.view if store.view is not None and store.view.made_with == made_with else None
    store = dataclasses.replace(store, view=view, before_writing=None)
    if inputs.policy.holds_once:
        return HeldSlots.of(rules, store, slots, made_with)
    store.view = store.read(rules).first(slots)
    return store


def _behind(slots: Tensor, window: Tensor, room: int) -> Tensor:
    """Slots [b, g, m, d], the window [b, g, n, d] behind them, and the rest of `room` tokens empty."""
    rest = window.new_empty(*window.shape[:2], room - window.shape[2], window.shape[3])
    return torch.cat((slots, window, rest), dim=2)


def _scale_ratio(inputs: AttendInputs) -> Tensor | None:
    """What slots' keys are multiplied by, so that the window's queries read them as the memory's would; None for 1."""
    parameters = inputs.parameters
    if parameters is None or parameters.query_scale_memory is None or parameters.query_scale_window is None:
        return None
    return (parameters.query_scale_memory / parameters.query_scale_window).to(inputs.keys.dtype)[:, None, None]
