"""PLAN: where the tokens of a leaving chunk go: score → admit → assign. No gradient flows through it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memkit.engine.inputs import Plan
from memkit.engine.schedule import LeavingChunk, Schedule, common
from memkit.memory.contest import Contest
from memkit.memory.rows import Chunk, SlotRules, on_device, read_tokens, read_values
from memkit.memory.slots import SlotStore
from memkit.memory.window import Columns, columns
from memkit.pieces.admission import Admission
from memkit.pieces.chunk import Assignment, ChunkContext, Parted, as_tensor, maximum
from memkit.pieces.evidence import Evidence
from memkit.pieces.routing import Routing

__all__ = ["assign", "candidates", "chunk_columns", "compete", "follow", "in_common", "place", "record"]


@torch.no_grad()
def place(rules: SlotRules, leaving: LeavingChunk, chunk: Chunk, store: SlotStore) -> Assignment:
    """Each token's slot, and whether it founds it."""
    policy, device = rules.policy, chunk.keys.device
    counts = (leaving.slots_before, leaving.new_slots, leaving.sink_tokens)
    before, new, sink_tokens = (
        one if one is not None else per_row(numbers, leaving.leaves, device)
        for one, numbers in zip(leaving.shared, counts, strict=True)
    )
    most = leaving.most_before
    assert chunk.memory_keys is not None
    context = ChunkContext(
        keys=chunk.memory_keys,
        read_values=lambda: chunk.values,
        evidence=None if chunk.evidence is None else Evidence.of(chunk.evidence),
        slots=store.read(rules).route[:, :, :most] if policy.compares and most else chunk.memory_keys[:, :, :0],
        slots_before=before,
        sinks=policy.sinks,
        sink_tokens=sink_tokens,
        new_slots=new,
        joins=policy.merging.joins,
        similarity=policy.routing.similarity,
        alone=lambda: read_tokens(rules, chunk),
        most_new=leaving.most_new,
    )
    return _only(leaving, assign(policy, context))


class Chooses(Protocol):
    """What of a policy says where tokens go."""

    @property
    def admission(self) -> Admission | None: ...

    @property
    def routing(self) -> Routing: ...


@torch.no_grad()
def compete(rules: SlotRules, chunk: Chunk, store: SlotStore, contest: Contest, sink_tokens: int) -> Assignment:
    """Where the candidates go: slots that are none of the first `contest.kept`, and behind them the chunk's tokens.

    sink_tokens: how many of these found in any case.
    """
    return assign(rules.policy, candidates(rules, chunk, store, contest, sink_tokens))


def candidates(rules: SlotRules, chunk: Chunk, store: SlotStore, contest: Contest, sink_tokens: int) -> ChunkContext:
    """What there is to know of the candidates."""
    policy, kept, before, device = rules.policy, contest.kept, contest.most_before, chunk.keys.device
    assert chunk.memory_keys is not None and chunk.values is not None
    keys, tokens_values, evidence = chunk.memory_keys, chunk.values, chunk.evidence
    view = store.read(rules).first(before) if before else None
    slots = keys[:, :, :0] if view is None else view.route[:, :, :kept]
    if view is not None:
        keys = contest.behind(view.route[:, :, kept:], keys, kept)
        if evidence is not None and store.evidence is not None:
            evidence = contest.behind(store.evidence[:, :, kept:before], evidence, kept)

    def values() -> Tensor:
        alone = read_values(rules, chunk) if policy.readout.own else tokens_values
        read = alone if view is None else contest.behind(view.values[:, :, kept:], alone, kept)
        return read.to(store.sums.dtype)

    def alone() -> Tensor:
        if policy.keeps_keys:  # a founder's key is read as it came
            return keys
        read = read_tokens(rules, chunk)
        return read if view is None else contest.behind(view.route[:, :, kept:], read, kept)

    return ChunkContext(
        keys=keys,
        read_values=values,
        evidence=None if evidence is None else Evidence.of(evidence),
        slots=slots,
        slots_before=kept,
        sinks=policy.sinks,
        sink_tokens=sink_tokens,
        new_slots=contest.new_slots(device),
        joins=policy.merging.joins,
        similarity=policy.routing.similarity,
        alone=alone,
        most_new=contest.most_new,
        present=contest.present(device),
        most_left=contest.most_left,
        competes=True,
    )


def assign(policy: Chooses, chunk: ChunkContext) -> Assignment:
    """Score → admit → assign: who founds a slot, and which slot the others join.

    A chunk of which all or none found asks no admission. Under routing `nearest` the others join the slot whose key, as
    it is read, is most like their memory key, sinks left out, the lowest on ties (`pieces/routing.py`).
    """
    drops = policy.routing.drops or not chunk.joins
    everywhere = chunk.offsets.expand(chunk.shape)
    nowhere = everywhere[..., :0]
    if isinstance(chunk.new_slots, int) and chunk.new_slots == chunk.keys.shape[2]:
        everyone = chunk.keys.new_ones(chunk.shape, dtype=torch.bool)
        parted = Parted(everywhere, nowhere)
        return Assignment(chunk.slots_before + everywhere, everyone, drops=False, parted=parted)
    founded = _admitted(policy, chunk) if chunk.max_new_slots else None
    if chunk.joins:
        slot = policy.routing.targets(chunk, founded).expand(chunk.shape)
    else:
        slot = torch.full(chunk.shape, -1, device=chunk.keys.device)
    if founded is None:
        nobody = as_tensor(False, slot).expand(chunk.shape)
        return Assignment(slot, nobody, drops, founds=False, parted=Parted(nowhere, everywhere))
    parted = chunk.parted(founded)
    slot = torch.where(founded, chunk.slots_before + founded.cumsum(-1) - 1, slot)
    return Assignment(slot, founded, drops, parted=None if parted.others is None else parted)


def _admitted(policy: Chooses, chunk: ChunkContext) -> Tensor:
    """Which tokens found: sinks, then the highest scores, the earliest on ties; bool [b, g, c]."""
    admission = policy.admission
    if admission is None:
        return policy.routing.founders(chunk).expand(chunk.shape)
    first = chunk.sink_tokens
    if admission.compares and not chunk.competes:  # with what is there; in an empty memory token 0 is
        first = maximum(first, chunk.is_first)
    score = admission.score(chunk).expand(chunk.shape).to(chunk.keys.dtype)
    score = score.masked_fill(chunk.offsets < first, torch.inf)
    if chunk.absent is not None:
        score = score.masked_fill(chunk.absent, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    first = (chunk.offsets < chunk.new_slots).expand_as(order)
    return torch.zeros_like(first).scatter_(2, order, first)


def follow(leaving: LeavingChunk, plan: Plan, device: torch.device) -> Assignment:
    """Each token's slot as a given plan says."""
    where = chunk_columns(leaving, leaving.begin - plan.begin, device)
    slot, founded = (columns(tensor, where) for tensor in (plan.slot, plan.founded))
    return _only(leaving, Assignment(slot, founded))


def record(schedule: Schedule, heads: int, device: torch.device, done: list[tuple[LeavingChunk, Assignment]]) -> Plan:
    """What has been assigned, as a plan."""
    slot = torch.full((len(schedule.seen), heads, schedule.most_leaving), -1, device=device)
    founded = torch.zeros_like(slot, dtype=torch.bool)
    for leaving, assignment in done:
        rows = on_device(np.flatnonzero(leaving.leaves), device)
        begin = on_device((leaving.begin - schedule.left_before)[leaving.leaves], device)
        where = begin[:, None] + torch.arange(leaving.size, device=device)
        where = where[:, None].expand(-1, heads, -1)
        slot[rows] = slot[rows].scatter(2, where, assignment.slot[rows])
        founded[rows] = founded[rows].scatter(2, where, assignment.founded[rows])
    return Plan(
        slot=slot,
        founded=founded,
        begin=schedule.left_before.copy(),
        length=schedule.left_after - schedule.left_before,
        slots=schedule.course.counts(schedule.most_leaving),
    )


def chunk_columns(leaving: LeavingChunk, begin: np.ndarray, device: torch.device) -> Columns:
    """The chunk's columns from `begin` [b] on: one slice where the leaving rows agree, else numbers [b, c]."""
    size = leaving.size
    if (first := common(begin, leaving.leaves)) is not None:
        return slice(first, first + size)
    return on_device(np.where(leaving.leaves, begin, 0), device)[:, None] + torch.arange(size, device=device)


def in_common(numbers: np.ndarray, among: np.ndarray, device: torch.device) -> int | Tensor:
    """What the rows in `among` have in common, as one number; else one per row, [b, 1, 1]."""
    one = common(numbers, among)
    return one if one is not None else per_row(numbers, among, device)


def per_row(numbers: np.ndarray, among: np.ndarray, device: torch.device) -> Tensor:
    """The numbers of the rows in `among`, 0 in others, [b, 1, 1]."""
    return on_device(numbers * among, device)[:, None, None]


def _only(leaving: LeavingChunk, assignment: Assignment) -> Assignment:
    """The assignment, with the tokens of rows that keep theirs dropped."""
    if leaving.leaves.all():
        return assignment
    leaves = on_device(leaving.leaves, assignment.slot.device)[:, None, None]
    slot, founded = torch.where(leaves, assignment.slot, -1), assignment.founded & leaves
    return Assignment(slot, founded, founds=assignment.founds)
