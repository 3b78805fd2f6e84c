"""FOLD where slots move or are weighed anew: slots compete with tokens, or weigh what their readers told.

All that a row (a slot, or a token on its way into one) carries stands in one line of numbers: its sums, its statistics,
its evidence, and its key as queries meet it, where that stays its founder's. A fold then moves the lines that stay, and
adds the lines of those that join, in which what is a founder's alone is 0.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.memory.contest import Contest
from memkit.memory.rows import Chunk, SlotRules, constant, contributions, read_slots
from memkit.memory.slots import SlotStore, flat_slots
from memkit.pieces.chunk import Assignment, picked
from memkit.pieces.evidence import JUDGED, SHARE
from memkit.pieces.readout import TINY
from memkit.pieces.statistics import MASS
from memkit.policy import Policy

__all__ = ["SHARE_EPS", "Line", "lines_of_slots", "lines_of_tokens", "replace"]

SHARE_EPS = 1e-9
"""Added to a row's share where it is a weight: nobody weighs nothing."""


@dataclass(frozen=True)
class Line:
    """Which columns of a line [d + v + s (+ 3) (+ d)] hold what.

    keys, values, numbers, evidence, founders_keys: empty where a policy has no such columns. weighed: the runs of
    columns that grow with a row's weight; own: columns that stay as they are when another row joins, a bool for each.
    """

    keys: slice
    values: slice
    numbers: slice
    evidence: slice
    founders_keys: slice
    weighed: tuple[slice, ...]
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
        told = policy.observation.numbers if policy.observes else 0
        parts = [  # which of its columns are weighed, and which are a founder's own
            ([not of_values] * width, [of_values] * width),
            ([True] * value_width, [False] * value_width),
            (numbers, own),
            ([False] * told, [True] * told),
            ([False] * width * turned, [True] * width * turned),
        ]
        ends = list(itertools.accumulate(len(part[0]) for part in parts))
        keys, values, statistics, evidence, founders_keys = (
            slice(end - len(part[0]), end) for end, part in zip(ends, parts, strict=True)
        )
        weighed, of_founders = (tuple(itertools.chain.from_iterable(part[which] for part in parts)) for which in (0, 1))
        return cls(keys, values, statistics, evidence, founders_keys, _runs(weighed), constant(of_founders, device))


def replace(store: SlotStore, rules: SlotRules, assignment: Assignment, chunk: Chunk, contest: Contest) -> None:
    """Take a chunk in. The first slots that are no candidates stay; the candidates go where the assignment says: a
    founder takes a slot as it is; one that joins adds its sums, scaled to its weight.

    Equally many candidates found in all heads.
    """
    policy, width, kept = rules.policy, rules.width, contest.kept
    line = Line.of(policy, width, store.sums.shape[-1] - width, store.sums.device)
    rows = lines_of_tokens(rules, chunk, line, contest.of_tokens(assignment.founded))
    if contest.most_before:
        rows = contest.behind(lines_of_slots(store, rules, contest.most_before, line), rows)
    assert assignment.parted is not None and assignment.parted.others is not None
    founders, others, stay = assignment.parted.founders, assignment.parted.others, assignment.parted.stay
    if kept:
        own = torch.arange(kept, device=rows.device).expand(*rows.shape[:2], -1)
        founders = torch.cat((own, founders + kept), dim=2)
    lines = picked(rows, founders)
    if (empty := contest.empty_after(lines.shape[1], rows.device)) is not None:
        lines.view(-1, lines.shape[-1]).index_fill_(0, empty, 0)
    if policy.merging.joins and others.shape[2]:
        slot = assignment.slot.gather(2, others)
        stored = slot >= 0 if assignment.drops else None
        if stay is not None:
            stored = stay.expand_as(slot) if stored is None else stored & stay
        _join(lines, picked(rows, others + kept), slot, policy, line, stored)
    if (more := store.room - lines.shape[2]) > 0:
        lines = torch.cat((lines, lines.new_zeros(*lines.shape[:2], more, lines.shape[3])), dim=2)
    store.about_to_write()
    store.take_lines(lines, line.values.stop, line.numbers, line.evidence, line.founders_keys if line.turned else None)


def _join(lines: Tensor, joining: Tensor, slot: Tensor, policy: Policy, line: Line, stored: Tensor | None) -> None:
    """Add rows [b, g, n, …] to the lines of slots [b, g, m, …] that they join, in place; stored: but for those dropped.

    Where rows are observed, a slot takes over the share of all that join it; where the share is a row's weight, the row
    and the slot that it joins are scaled to it. No row counts for more than `merging.cap` times the slot that it joins.
    """
    evidence = joining[..., line.evidence], lines[..., line.evidence]
    joining = joining.masked_fill(line.own, 0)
    if stored is not None:
        joining = joining.masked_fill(~stored.unsqueeze(-1), 0)
    target = flat_slots(slot, lines.shape[2])
    if policy.observes:
        theirs, own = (_rate(each.detach()) for each in evidence)
        if (cap := policy.merging.cap) is not None:
            theirs = torch.minimum(theirs, cap * own.gather(2, slot.clamp(min=0)))
        somebody = torch.ones_like(theirs)
        if stored is not None:
            theirs, somebody = theirs * stored, somebody * stored
        weight, joined = _summed(torch.stack((theirs, somebody), dim=-1), target, own)
        if policy.merging.by_share:
            mass = line.numbers.start + policy.statistics.index(MASS)
            theirs = theirs / joining[..., mass].detach().clamp(min=TINY)
            scale = torch.where(joined > 0, own / lines[..., mass].detach().clamp(min=TINY), 1).unsqueeze(-1)
            for columns in line.weighed:
                joining[..., columns].mul_(theirs.unsqueeze(-1))
                lines[..., columns].mul_(scale)
        lines[..., line.evidence.start + SHARE].mul_((own + weight) / own)
    flat = lines.view(-1, lines.shape[-1])
    if flat.device.type == "cuda":  # as in `_summed`
        flat.index_put_((target,), joining.flatten(0, 2), accumulate=True)
    else:
        flat.index_add_(0, target, joining.flatten(0, 2))


def _rate(evidence: Tensor) -> Tensor:
    """What rows weigh by their evidence [..., e]: their mean share, and a little."""
    return evidence[..., SHARE] / evidence[..., JUDGED].clamp(min=1) + SHARE_EPS


def lines_of_tokens(rules: SlotRules, chunk: Chunk, line: Line, founded: Tensor | None = None) -> Tensor:
    """The lines of a chunk's tokens, [b, g, c, …]; what is a founder's own may stand in all of them.

    founded [b, g, c]; None: whoever stays founds, and no weight is learned.
    """
    alone = None if chunk.ahead is None else chunk.ahead[0]
    if founded is None and alone is None:
        founded = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=chunk.keys.device)
    if alone is None or (rules.policy.weighted and not rules.policy.merging.by_share):
        rows, numbers = contributions(rules, chunk, founded)
    else:
        rows, numbers = alone
    parts = [rows, numbers.to(rows.dtype)]
    if rules.policy.observes:
        assert chunk.evidence is not None
        parts.append(chunk.evidence)
    if line.turned:
        parts.append(chunk.keys.to(rows.dtype))
    return torch.cat(parts, dim=-1)


def lines_of_slots(store: SlotStore, rules: SlotRules, live: int, line: Line) -> Tensor:
    """The lines of the slots that there are, [b, g, live, …]."""
    if store.lines is not None:
        return store.lines[:, :, :live]
    parts = [store.sums, store.numbers.to(store.sums.dtype)]
    if store.evidence is not None:
        parts.append(store.evidence)
    if line.turned:
        keys = store.founders_keys
        if keys is None:  # not as the plan has read them, without a graph
            keys = read_slots(rules, store.sums, store.numbers).keys.to(store.sums.dtype)
        parts.append(keys)
    return torch.cat([part[:, :, :live] for part in parts], dim=-1)


def _summed(facts: Tensor, target: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Facts [b, g, n, k] of rows summed per slot that they go to: k tensors like one of the slots, [b, g, m]."""
    sums, facts = facts.new_zeros(like.numel(), facts.shape[-1]), facts.flatten(0, 2)
    if sums.device.type == "cuda":  # sorts and reduces by segment: the same order every time
        sums.index_put_((target,), facts, accumulate=True)
    else:
        sums.index_add_(0, target, facts)
    return sums.view(*like.shape, -1).unbind(-1)


def _runs(flags: tuple[bool, ...]) -> tuple[slice, ...]:
    """Where flags are set: stretches of columns."""
    runs, begin = list[slice](), 0
    for flag, group in itertools.groupby(flags):
        end = begin + len(list(group))
        if flag:
            runs.append(slice(begin, end))
        begin = end
    return tuple(runs)
