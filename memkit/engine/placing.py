"""PLAN: where the tokens of a leaving chunk go. Keys, weights and parameters decide; no query, no gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from memkit.engine.call import Call
from memkit.engine.fold import Chunk, SlotRules, Slots, memory_keys, read_tokens
from memkit.engine.schedule import Exit, Schedule, common
from memkit.engine.timeline import Timeline, columns
from memkit.pieces.routing import Leaving, Placement
from memkit.plan import Plan

__all__ = ["follow", "leaving_chunk", "place", "record"]


def leaving_chunk(call: Call, timeline: Timeline, schedule: Schedule, exit_: Exit) -> Chunk:
    """The tokens that leave. Rows that keep theirs get some tokens too, which `place` then drops."""
    where = _span(timeline, exit_, exit_.begin + schedule.shift)
    chunk = Chunk(
        keys=columns(timeline.keys, where),
        values=None if timeline.values is None else columns(timeline.values, where),
        weights=None if timeline.weights is None else columns(timeline.weights, where),
        positions=None if timeline.positions is None else columns(timeline.positions[:, None], where),
        first=_shared(timeline, exit_.begin == 0, exit_.leaves) != 0,
        where=where,
    )
    return dataclasses.replace(chunk, memory_keys=memory_keys(SlotRules.of(call), chunk))


@torch.no_grad()
def place(call: Call, timeline: Timeline, exit_: Exit, chunk: Chunk, slots: Slots) -> Placement:
    """Each token's slot, and whether it founds it."""
    policy = call.policy
    live, grant, forced = (
        _shared(timeline, numbers, exit_.leaves) for numbers in (exit_.live, exit_.grant, exit_.forced)
    )
    if policy.exact_slots:
        offsets = torch.arange(policy.chunk, device=timeline.device)
        founded = (offsets < forced).expand(chunk.keys.shape[:3])
        placement = Placement(torch.where(founded, live + offsets, -1), founded)
    else:
        keys = chunk.memory_keys
        assert keys is not None
        most = int(exit_.live[exit_.leaves].max())
        compares = policy.routing.compares and most > 0
        admission = policy.admission
        placement = policy.routing.place(
            Leaving(
                keys=keys,
                slots=slots.ready.route[:, :, :most] if compares else keys[:, :, :0],
                live=live,
                sinks=policy.sinks,
                forced=forced,
                grant=grant,
                alone=lambda: read_tokens(slots.rules, chunk),
                joining=policy.merging.joins,
                most=int(exit_.grant[exit_.leaves].max()),
            ),
            None if admission is None else admission.priority,
            admission is not None and admission.compares,
        )
    return _only(timeline, exit_, placement)


def follow(timeline: Timeline, exit_: Exit, plan: Plan) -> Placement:
    """Each token's slot as a given plan says."""
    where = _span(timeline, exit_, exit_.begin - plan.begin)
    slot, founded = (columns(tensor.to(timeline.device), where) for tensor in (plan.slot, plan.founded))
    return _only(timeline, exit_, Placement(slot, founded))


def record(timeline: Timeline, schedule: Schedule, placements: list[tuple[Exit, Placement]]) -> Plan:
    """What has been placed, as a plan."""
    policy = schedule.policy
    slot = torch.full((timeline.rows, timeline.heads, schedule.leaving), -1, device=timeline.device)
    founded = torch.zeros_like(slot, dtype=torch.bool)
    for exit_, placement in placements:
        rows = timeline.per_row(np.flatnonzero(exit_.leaves))
        begin = (exit_.begin - schedule.left_before)[exit_.leaves]
        where = timeline.per_row(begin)[:, None] + torch.arange(policy.chunk, device=timeline.device)
        where = where[:, None].expand(-1, timeline.heads, -1)
        slot[rows] = slot[rows].scatter(2, where, placement.slot[rows])
        founded[rows] = founded[rows].scatter(2, where, placement.founded[rows])
    chunk = policy.chunk or 1
    left = schedule.left_before[:, None] + chunk * (1 + np.arange(schedule.leaving // chunk))
    left = np.minimum(left, schedule.left_after[:, None])
    counts = [[policy.slots_after_chunk(tokens // chunk - 1) for tokens in row] for row in left.tolist()]
    return Plan(
        slot=slot,
        founded=founded,
        begin=schedule.left_before,
        length=schedule.left_after - schedule.left_before,
        slots=np.array(counts, dtype=np.int64).reshape(left.shape),
    )


def _span(timeline: Timeline, exit_: Exit, begin: np.ndarray) -> slice | Tensor:
    """The chunk's tokens from `begin` [b] on: one slice where the leaving rows agree, else numbers [b, c]."""
    size = timeline.call.policy.chunk
    if (first := common(begin, exit_.leaves)) is not None:
        return slice(first, first + size)
    return timeline.per_row(np.where(exit_.leaves, begin, 0))[:, None] + torch.arange(size, device=timeline.device)


def _shared(timeline: Timeline, numbers: np.ndarray, among: np.ndarray) -> int | Tensor:
    """What the rows in `among` have in common, as one number; else one per row, [b, 1, 1]."""
    one = common(numbers, among)
    if one is not None:
        return one
    return timeline.per_row(numbers * among)[:, None, None]


def _only(timeline: Timeline, exit_: Exit, placement: Placement) -> Placement:
    """The placement, with the tokens of rows that keep theirs dropped."""
    if exit_.leaves.all():
        return placement
    leaves = timeline.per_row(exit_.leaves)[:, None, None]
    slot, founded = torch.where(leaves, placement.slot, -1), placement.founded & leaves
    return Placement(slot, founded, founds=placement.founds)
