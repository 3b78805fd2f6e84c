"""FOLD where slots move or are weighed anew: slots compete with tokens, or weigh what their readers told.

All that a row (a slot, or a token on its way into one) carries stands in one line of numbers: its sums, its statistics,
its evidence, and its key as queries meet it, where that stays its founder's. A fold then is one sum of lines per slot:
what is a founder's alone is 0 in the lines of those that join.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.memory.rows import Chunk, SlotRules, constant, contributions, read_slots
from memkit.memory.slots import SlotStore, flat_slots
from memkit.pieces.chunk import Assignment
from memkit.pieces.evidence import JUDGED, SHARE
from memkit.pieces.readout import TINY
from memkit.pieces.statistics import COUNT, MASS
from memkit.policy import Policy

__all__ = ["replace"]

SHARE_EPS = 1e-9
"""Added to a row's share where it is a weight: nobody weighs nothing."""


@dataclass(frozen=True)
class Line:
    """Which columns of a line [d + v + s (+ 3) (+ d)] hold what.

    keys, values, numbers, evidence, founders_keys: empty where a policy has no such columns. weighed: those that grow
    with a row's weight; own: those that stay as they are when another row joins; bool, a number per column.
    """

    keys: slice
    values: slice
    numbers: slice
    evidence: slice
    founders_keys: slice
    weighed: Tensor
    own: Tensor

    @property
    def turned(self) -> bool:
        """Whether a line has a founder's key as queries meet it."""
        return self.founders_keys.stop > self.founders_keys.start

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, policy: Policy, width: int, value_width: int, device: torch.device) -> Line:
        """The line of a policy's rows, keys `width` and values `value_width` wide."""
        of_values = policy.merging.of == "values"
        turned = policy.keeps_keys and policy.rotary.rotates_slots
        numbers = [(each.weighed and not (of_values and each.of_keys)) for each in policy.statistics]
        own = [each.founders_own(policy.merging.of) for each in policy.statistics]
        parts = [  # which of its columns are weighed, and which are a founder's own
            ([not of_values] * width, [of_values] * width),
            ([True] * value_width, [False] * value_width),
            (numbers, own),
            ([False] * 3 * policy.observes, [True] * 3 * policy.observes),
            ([False] * width * turned, [True] * width * turned),
        ]
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        keys, values, statistics, evidence, founders_keys = (
            slice(end - len(part[0]), end) for end, part in zip(ends, parts, strict=True)
        )
        flags = (tuple(itertools.chain.from_iterable(part[which] for part in parts)) for which in (0, 1))
        weighed, of_founders = (constant(flag, device) for flag in flags)
        return cls(keys, values, statistics, evidence, founders_keys, weighed, of_founders)


def replace(store: SlotStore, rules: SlotRules, assignment: Assignment, chunk: Chunk, kept: int, live: int) -> None:
    """Take a chunk in. Slots 0 … kept − 1 stay; the candidates, slots kept … live − 1 and then the chunk's tokens, go
    where the assignment says: a founder takes a slot as it is; one that joins adds its sums, scaled to its weight.
    """
    policy, width = rules.policy, rules.width
    line = Line.of(policy, width, store.sums.shape[-1] - width, store.sums.device)
    rows = _tokens(rules, chunk, assignment.founded[:, :, live - kept :], line)
    if live:
        rows = torch.cat((_slots(store, rules, live, line), rows), dim=2)
    slot, founded = assignment.slot, assignment.founded
    if kept:  # all rows from here on: those that stay are founders of their own slots
        own = torch.arange(kept, device=rows.device).expand(*rows.shape[:2], -1)
        slot, founded = (
            torch.cat((own, slot), dim=2),
            torch.cat((torch.ones_like(own, dtype=torch.bool), founded), dim=2),
        )
    joins, target = ~founded, flat_slots(slot, store.room)
    stored = slot >= 0 if assignment.drops else None
    if policy.observes:
        rows = rows * _factors(store, policy, line, rows.detach(), target, joins, stored)
    if policy.merging.joins:
        rows = rows.masked_fill(joins.unsqueeze(-1) & line.own, 0)
    if stored is not None:
        rows = rows.masked_fill(~stored.unsqueeze(-1), 0)
    store.about_to_write()
    lines = _summed(store, target, rows).view(*store.sums.shape[:3], -1)
    store.sums, store.numbers = lines[..., : line.values.stop], lines[..., line.numbers]
    store.evidence = lines[..., line.evidence] if policy.observes else None
    if store.evidence is not None and torch.is_grad_enabled():  # written into later, and carries no gradient
        store.evidence = store.evidence.detach().clone()
    store.founders_keys = lines[..., line.founders_keys] if line.turned else None
    store.view = None


def _tokens(rules: SlotRules, chunk: Chunk, founded: Tensor, line: Line) -> Tensor:
    """The lines of a chunk's tokens, [b, g, c, …]; what is a founder's own may stand in all of them."""
    if chunk.ahead is None or (rules.policy.weighted and not rules.policy.merging.by_share):
        rows, numbers = contributions(rules, chunk, founded)
    else:
        rows, numbers = chunk.ahead[0]
    parts = [rows, numbers.to(rows.dtype)]
    if rules.policy.observes:
        assert chunk.evidence is not None
        parts.append(chunk.evidence)
    if line.turned:
        parts.append(chunk.keys.to(rows.dtype))
    return torch.cat(parts, dim=-1)


def _slots(store: SlotStore, rules: SlotRules, live: int, line: Line) -> Tensor:
    """The lines of the slots that there are, [b, g, live, …]."""
    parts = [store.sums, store.numbers.to(store.sums.dtype)]
    if store.evidence is not None:
        parts.append(store.evidence)
    if line.turned:
        keys = store.founders_keys
        if keys is None:  # not as the plan has read them, without a graph
            keys = read_slots(rules, store.sums, store.numbers).keys.to(store.sums.dtype)
        parts.append(keys)
    return torch.cat([part[:, :, :live] for part in parts], dim=-1)


def _factors(
    store: SlotStore, policy: Policy, line: Line, rows: Tensor, target: Tensor, joins: Tensor, stored: Tensor | None
) -> Tensor:
    """What the lines of observed rows [b, g, n, …] are multiplied by.

    A founder takes over the share of all that join it; where the share is a row's weight, everyone whose slot somebody
    joins is scaled to it. An empty row, as a batch has where slots are unequally many, is 0 whatever its factor.
    """
    evidence, numbers = rows[..., line.evidence], rows[..., line.numbers]
    there = numbers[..., policy.statistics.index(COUNT)] > 0
    rate = (evidence[..., SHARE] / evidence[..., JUDGED].clamp(min=1) + SHARE_EPS) * there
    # Of each row's slot: the weight of all that goes there, and whether anybody joins.
    facts = torch.stack((rate, joins.to(rate.dtype)), dim=-1)
    if stored is not None:
        facts = facts * stored.unsqueeze(-1)
    total, joined = _summed(store, target, facts)[target].view(*rate.shape, 2).unbind(-1)
    factors = torch.ones_like(rows)
    if policy.merging.by_share:
        mass = numbers[..., policy.statistics.index(MASS)].clamp(min=TINY)
        factors = torch.where(line.weighed & (joined > 0).unsqueeze(-1), (rate / mass).unsqueeze(-1), 1)
    factors[..., line.evidence.start + SHARE] = total / rate.clamp(min=TINY)
    return factors


def _summed(store: SlotStore, target: Tensor, rows: Tensor) -> Tensor:
    """Lines [b, g, n, s] summed per slot, [b·g·M, s]."""
    sums = rows.new_zeros(store.sums.shape[0] * store.sums.shape[1] * store.room, rows.shape[-1])
    flat = rows.flatten(0, 2)
    if sums.device.type == "cuda":  # sorts and reduces by segment: the same order every time
        return sums.index_put((target,), flat, accumulate=True)
    return sums.index_add(0, target, flat)
