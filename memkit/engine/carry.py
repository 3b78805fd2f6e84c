"""What a call takes over from the memory it is given, and what it hands on."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from memkit.engine.inputs import AttendInputs
from memkit.engine.schedule import Schedule
from memkit.memory import Memory
from memkit.memory.held import HeldSlots
from memkit.memory.memory import DecodeBuffer
from memkit.memory.rows import SlotRules, on_device, parameter_versions
from memkit.memory.slots import SlotStore
from memkit.memory.window import SLACK, Streams, Timeline, Window, room_for, stream_forms
from memkit.policy import Policy

__all__ = ["close", "open_store", "open_timeline", "without_padding"]


def open_timeline(inputs: AttendInputs, schedule: Schedule) -> tuple[Timeline, Tensor | None]:
    """The window and the call's tokens on one axis, and where positions go on, [b] (None without rotation)."""
    memory, old, tokens = inputs.memory, schedule.old, inputs.keys.shape[2]
    new, following = _new_tokens(inputs)
    if memory is None:
        return Timeline.of(None, old, new, in_place=False), following
    window, in_place = memory.window, False
    if not inputs.differentiable and inputs.values is not None and inputs.equal_lengths:
        if not window.fits(tokens) and old + tokens <= window.room:
            memory.about_to_write()
            window.move_to_front(old)
            uneven = bool((memory.seen_rows != memory.seen_rows[0]).any())
            if memory.buffer is not None and (uneven or memory.buffer.begin):  # it tells columns that are others now
                memory.buffer = None
        in_place = window.fits(tokens)
    return Timeline.of(window, old, new, in_place), following


def _new_tokens(inputs: AttendInputs) -> tuple[Streams, Tensor | None]:
    """What this call's tokens carry, 0 in the padding; and where positions go on."""
    policy, following = inputs.policy, None
    given: dict[str, Tensor | None] = {"keys": inputs.keys, "values": inputs.values, "weights": inputs.weights}
    new = {name: without_padding(inputs, tensor) for name, tensor in given.items() if tensor is not None}
    rows, heads, tokens, width = inputs.keys.shape
    value_width = 0 if inputs.values is None else inputs.values.shape[-1]
    forms = stream_forms(policy, rows, heads, tokens, (width, value_width), inputs.keys.dtype)
    if "weights" in forms and inputs.weights is None:
        new["weights"] = inputs.keys.new_ones(forms["weights"][0])
    if "evidence" in forms:
        shape, dtype = forms["evidence"]
        new["evidence"] = inputs.keys.new_zeros(shape, dtype=dtype)
    if "positions" in forms:
        new["positions"], following = _positions(inputs)
    return new, following


def _positions(inputs: AttendInputs) -> tuple[Tensor, Tensor]:
    """Positions of this call's tokens, [b, 1, t] float64, and where they go on, [b]."""
    rotation, device = inputs.rotation, inputs.keys.device
    assert rotation is not None
    rows, tokens = inputs.keys.shape[0], inputs.keys.shape[2]
    begin = None if inputs.memory is None else inputs.memory.next_positions
    if begin is None:
        begin = torch.zeros(rows, device=device, dtype=torch.float64)
    if rotation.positions is not None:
        positions = rotation.positions.to(device).double()
    else:
        positions = begin[:, None] + torch.arange(tokens, device=device)
    ends = torch.cat((begin[:, None], positions + 1), dim=1)
    return positions[:, None], ends.gather(1, on_device(inputs.row_lengths, device)[:, None])[:, 0]


def open_store(inputs: AttendInputs, schedule: Schedule, timeline: Timeline) -> SlotStore:
    """The slots, with room for those that the call founds."""
    policy, memory = inputs.policy, inputs.memory
    room = int(schedule.slots_after.max(initial=0))
    if memory is None:
        rows, heads, _, width = inputs.keys.shape
        width += 0 if inputs.values is None else inputs.values.shape[-1]
        return SlotStore.empty(policy, (rows, heads, room, width), inputs.keys, in_place=not inputs.differentiable)
    opened, made_with = memory.store, parameter_versions(inputs.parameters)
    if isinstance(opened, HeldSlots):
        folds = schedule.most_leaving > 0 or inputs.values is None or inputs.differentiable
        opened = opened.opened() if folds or not opened.reads(made_with) else opened.as_read()
        view = opened.view
    else:  # what the last call read goes for this one where it is in place, and reads alike
        view = opened.view if timeline.in_place else None
        view = None if view is None or view.made_with != made_with else view
    sums, numbers, evidence = opened.sums, opened.numbers, opened.evidence
    apart = inputs.values is None or inputs.differentiable
    if inputs.values is None:  # a plan only reads the memory, and only its keys
        sums, numbers = sums[..., : inputs.keys.shape[-1]].clone(), numbers.clone()
    elif apart:  # the memory that is returned shares nothing with this one
        sums, numbers, evidence = sums.clone(), numbers.clone(), None if evidence is None else evidence.clone()
    store = SlotStore(
        sums,
        numbers,
        view,
        evidence,
        in_place=not inputs.differentiable,
        founders_keys=opened.founders_keys,
        before_writing=None if apart else memory.about_to_write,
    )
    if room > store.room:
        if timeline.in_place and opened is memory.store:
            # Decoding makes room for an eighth more, if the schedule will ever grant so many.
            ahead = policy.slots_after(2 * (int(schedule.after.max()) + policy.chunk))
            ahead = max(ahead, room) if policy.takes_boundaries else ahead
            room = min(room * 9 // 8, ahead)
        store.grow(room)
    return store


def close(
    inputs: AttendInputs,
    rules: SlotRules,
    schedule: Schedule,
    timeline: Timeline,
    store: SlotStore,
    next_positions: Tensor | None,
) -> Memory:
    """The memory after the call."""
    policy, before, tokens = inputs.policy, inputs.memory, inputs.keys.shape[2]
    keep, cuts, seen = schedule.keep, schedule.course.cuts, schedule.after.copy()  # the schedule may be kept
    made_with = parameter_versions(inputs.parameters)

    def slots_at_rest() -> HeldSlots:
        """The slots, held once; as they were held before where nothing was folded in."""
        known = None if before is None or schedule.most_leaving else before.store
        if isinstance(known, HeldSlots) and known.reads(made_with):
            return known
        return HeldSlots.of(rules, store, int(schedule.slots_after.max(initial=0)), made_with)

    # Sums are what is read in float32, and twice as much in half precision; with a graph they are kept as they are.
    once = policy.holds_once_in(inputs.keys.dtype) or (before is not None and isinstance(before.store, HeldSlots))
    once = once and policy.holds_once and not inputs.differentiable
    if not timeline.in_place:
        decodes = before is not None and tokens <= SLACK
        room = keep if inputs.differentiable else room_for(policy, keep, decodes)
        ends = None if inputs.equal_lengths else on_device(schedule.old + inputs.row_lengths, inputs.keys.device)
        window = timeline.window(keep, room, ends)
        at_rest = slots_at_rest() if once else store.compact()
        return Memory(policy, seen, window, at_rest, next_positions, cuts=cuts)
    assert before is not None
    window, buffer = Window(before.window.streams, before.window.end + tokens), before.buffer
    if buffer is not None and policy.holds_once:
        slots = slots_at_rest()
        before.about_to_write()
        alike = bool((schedule.after == schedule.after[:1]).all()) and (cuts is None or cuts.alike)
        unchanged = slots is before.store and cuts is None  # what hides columns from rows hides the same ones
        if not unchanged and not (alike and _still_fits(buffer, slots, made_with)):
            window = timeline.window(keep, window.room, None)  # it then stands for itself
            return Memory(policy, seen, window, slots, next_positions, cuts=cuts)
        if not unchanged:
            slots = _written_over(buffer, slots)
        if alike and window.end > keep:
            window.move_to_front(keep)
            buffer = dataclasses.replace(buffer, begin=0)
        begun = schedule.after - schedule.course.newest()
        buffer = dataclasses.replace(buffer, until=decodes_until(policy, begun, window))
        return Memory(policy, seen, window, slots, next_positions, buffer=buffer, cuts=cuts)
    if not window.fits(1) and window.end > keep:  # as the next call would begin
        before.about_to_write()
        window.move_to_front(keep)
    if once:
        return Memory(policy, seen, window, slots_at_rest(), next_positions, cuts=cuts)
    compact = store.compact()
    # Where the next token can take the short cut, slots are held once; where folds read all anew, too.
    uneven = not (schedule.after == schedule.after[0]).all()
    apart = policy.rotary.turns_queries or (uneven and (policy.window.band is not None or cuts is not None))
    if store.view is not None and apart and not policy.replaces:
        compact.view = store.view
        compact.view.made_with = made_with
    return Memory(policy, seen, window, compact, next_positions, cuts=cuts)


def _still_fits(buffer: DecodeBuffer, slots: HeldSlots, made_with: tuple[int, ...]) -> bool:
    """Whether the slots may take the place of those at the buffer's front: as many, and scaled by the same numbers."""
    return buffer.slots == slots.room > 0 and (buffer.key_scale is None or buffer.made_with == made_with)


def _written_over(buffer: DecodeBuffer, slots: HeldSlots) -> HeldSlots:
    """The slots, written over those at the buffer's front."""
    keys, values = (whole.narrow(2, 0, slots.room) for whole in (buffer.keys, buffer.values))
    view, scale = slots.view, buffer.key_scale
    if buffer.bias is not None and view.bias is not None:
        buffer.bias.narrow(3, 0, slots.room).copy_(view.bias.unsqueeze(2))
    keys.copy_(view.keys if scale is None else view.keys * scale)
    return slots.standing_at(keys, values.copy_(view.values), scaled=scale is not None)


def decodes_until(policy: Policy, begun: np.ndarray, window: Window) -> int:
    """The window's end until which single tokens are decoded with nothing else to do; begun [b]: tokens of each row's
    newest chunk."""
    if not policy.chunk:
        return window.room
    # The first token of a chunk pushes one out; the last, after which its queries are observed, goes the long way.
    left = int((-begun % policy.chunk).min())
    return min(window.room, window.end + max(0, left - policy.observes))


def without_padding(inputs: AttendInputs, tensor: Tensor) -> Tensor:
    """[b, h, t, …] with 0 in the padding, so that nothing there may reach a gradient."""
    if inputs.equal_lengths:
        return tensor
    columns = torch.arange(inputs.keys.shape[2], device=inputs.keys.device)
    padding = columns >= on_device(inputs.row_lengths, inputs.keys.device)[:, None]
    return tensor.masked_fill(padding.view(len(padding), 1, -1, *[1] * (tensor.ndim - 3)), 0)
