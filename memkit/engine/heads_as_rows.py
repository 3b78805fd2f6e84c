"""Heads with unequal numbers of slots, as rows of the batch: one pass for all heads of a layer.

A pass of its own for each run of alike heads (`heads.py`) does small things many times over. Here rows with fewer slots
than others are filled up while the call goes; what is kept between calls is each run's own, with nothing filled up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from memkit.engine.carry import close, without_padding
from memkit.engine.checks import check
from memkit.engine.competing import usable
from memkit.engine.forward import Pass
from memkit.engine.heads import by_heads
from memkit.engine.inputs import AttendInputs
from memkit.engine.schedule import Schedule
from memkit.memory import HeadsMemory, Memory
from memkit.memory.heads import side_by_side
from memkit.memory.held import HeldSlots
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline, Window

__all__ = ["attend_heads_as_rows"]

ENABLED = True
"""Whether heads stand as rows. Off, each run of alike heads has a pass of its own: for who wonders what is wrong."""


FILLED_UP = 2
"""Heads stand as rows where, filled up, they have at most so many times the slots that they have in all: more work on
more rows then still costs less than a pass for each run of alike heads."""


def attend_heads_as_rows(given: AttendInputs) -> tuple[Tensor, Memory] | None:
    """Outputs [b, h, t, v] and the memory after the call; None where it takes the heads one run after the other.

    It does where the call is short, wants gradients or has learned parameters, where the policy's slots compete by a
    score that cannot be had of all heads at once, or where one head has far more slots than the others.
    """
    runs = given.policy.head_policies
    if not ENABLED or len(runs) < 2 or not runs[0][1].fills_up or given.policy.takes_boundaries:
        return None
    if given.parameters is not None or given.queries is None or given.keys.ndim != 4:
        return None
    if given.keys.shape[2] < given.policy.chunk:
        return None
    inputs, memory = check(given), given.memory
    assert memory is None or isinstance(memory, HeadsMemory)
    # With a chunk or more to come in some row, a chunk leaves wherever there are slots, and all of them are made anew.
    if inputs.differentiable or int(inputs.row_lengths.max(initial=0)) < inputs.policy.chunk:
        return None
    if (memory is not None and memory.requires_grad) or not _alike_enough(inputs):
        return None
    with torch.no_grad(), ExitStack() as parts:
        for part in () if memory is None else memory.parts:
            parts.enter_context(part.taken_over())
        run = Pass(_as_rows(inputs))
        output = without_padding(run.inputs, run.read(run.queries())[0])
        return output.unflatten(0, (len(inputs.keys), -1)).flatten(1, 2), HeadsMemory(
            inputs.policy, [*_parts(inputs, run)]
        )


def _alike_enough(inputs: AttendInputs) -> bool:
    """Whether heads have about as many slots, or each costs what its own slots do."""
    if usable(inputs.policy.head_policies[0][1], inputs.keys):
        return True
    seen = 0 if inputs.memory is None else inputs.memory.seen_rows
    tokens = int((seen + inputs.row_lengths).max())
    slots = [one.slots_after(tokens) for count, one in inputs.policy.head_policies for _ in range(count)]
    return max(slots) * len(slots) <= FILLED_UP * sum(slots)


def _as_rows(inputs: AttendInputs) -> AttendInputs:
    """The call with each head as a row: [b·g, …]."""
    heads, rotation = inputs.keys.shape[1], inputs.rotation
    assert inputs.queries is not None and inputs.values is not None
    if rotation is not None and rotation.positions is not None:
        rotation = dataclasses.replace(rotation, positions=rotation.positions.repeat_interleave(heads, 0))
    of_heads = tuple(one for count, one in inputs.policy.head_policies for _ in range(count))
    return dataclasses.replace(
        inputs,
        policy=of_heads[0],
        queries=inputs.queries.unflatten(1, (heads, -1)).flatten(0, 1),
        keys=_rows(inputs.keys),
        values=_rows(inputs.values),
        weights=None if inputs.weights is None else _rows(inputs.weights),
        rotation=rotation,
        memory=None if inputs.memory is None else _memory_of_rows(inputs.memory, of_heads[0].observes),
        lengths=None,
        row_lengths=np.repeat(inputs.row_lengths, heads),
        row_policies=of_heads * len(inputs.keys),
    )


def _rows(tensor: Tensor) -> Tensor:
    """[b, g, …] → [b·g, 1, …]."""
    return tensor.flatten(0, 1).unsqueeze(1)


def _memory_of_rows(memory: Memory, observes: bool) -> Memory:
    """A copy of the memory with each head as a row, filled up to the most slots."""
    assert isinstance(memory, HeadsMemory)
    parts, counts, heads = memory.parts, memory.heads_of_parts, memory.heads
    held = int(memory.held_rows.max(initial=0))
    windows = [part.window.last(held) for part in parts]
    streams = {
        name: torch.cat(
            [
                window[name].expand(-1, count, *window[name].shape[2:])
                for window, count in zip(windows, counts, strict=True)
            ],
            dim=1,
        )
        for name in windows[0]
    }
    stores = [part.store.opened() if isinstance(part.store, HeldSlots) else part.store for part in parts]
    sums, numbers, evidence, founders_keys = (
        _filled_up([getattr(store, name) for store in stores])
        for name in ("sums", "numbers", "evidence", "founders_keys")
    )
    assert sums is not None and numbers is not None
    following, observed = parts[0].next_positions, [part.observed for part in parts]
    return Memory(
        parts[0].policy,
        np.repeat(memory.seen_rows, heads),
        Window({name: _rows(stream) for name, stream in streams.items()}, held),
        SlotStore(sums, numbers, evidence=evidence, founders_keys=founders_keys),
        None if following is None else following.repeat_interleave(heads),
        torch.cat([each for each in observed if each is not None], 1).unflatten(1, (heads, -1)).flatten(0, 1)
        if observes
        else None,
    )


def _filled_up(each: list[Tensor | None]) -> Tensor | None:
    """[b, heads, m, s] of each part → all heads as rows [b·g, 1, M, s], 0 up to the most slots; None if one is None."""
    tensors = [tensor for tensor in each if tensor is not None]
    return _rows(side_by_side(tensors)) if len(tensors) == len(each) else None


def _parts(inputs: AttendInputs, run: Pass) -> Iterator[Memory]:
    """The memory of each run of alike heads after the pass, with as many slots as it has."""
    heads, begin = inputs.keys.shape[1], 0
    waiting = None if run.observer is None else run.observer.waiting()
    for _, part in by_heads(inputs):
        count = part.keys.shape[1]
        mine = slice(begin, begin + count)
        begin += count

        def own(tensor: Tensor, mine: slice = mine) -> Tensor:
            return tensor.unflatten(0, (-1, heads))[:, mine, 0]

        schedule = Schedule.of(part)
        slots = int(schedule.slots_after.max(initial=0))
        sums, numbers, evidence, founders_keys = (
            None if tensor is None else own(tensor)[:, :, :slots].clone()
            for tensor in (run.store.sums, run.store.numbers, run.store.evidence, run.store.founders_keys)
        )
        assert sums is not None and numbers is not None
        streams = {name: own(stream) for name, stream in run.timeline.streams.items()}
        if "positions" in streams:  # the same for all heads, and kept once
            streams["positions"] = streams["positions"][:, :1]
        memory = close(
            part,
            dataclasses.replace(run.rules, policy=part.policy, rotation=inputs.rotation),
            schedule,
            Timeline(streams, in_place=False),
            SlotStore(sums, numbers, evidence=evidence, founders_keys=founders_keys),
            None if run.next_positions is None else run.next_positions[::heads].clone(),
        )
        if waiting is not None:
            memory.observed = waiting.unflatten(0, (-1, heads))[:, mine].flatten(1, 2).clone()
        yield memory
