"""PLAN and FOLD where slots compete with the tokens that leave; on the CPU by compiled loops, in few passes.

They know one kind of memory, which stock models are served with: a founder's key stays; whoever loses is dropped, or
leaves its value, weighed by its share, with the winner most like it by cosine. Everything else is PyTorch's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from memkit import loops
from memkit.engine.plan import candidates, compete
from memkit.memory import replacing
from memkit.memory.contest import Contest
from memkit.memory.replacing import SHARE_EPS, Line, replace
from memkit.memory.rows import Chunk, SlotRules, SlotView
from memkit.memory.slots import SlotStore
from memkit.pieces.admission import Attention, ExpectedAttention, KeyDifference, KeyNorm, OutputError
from memkit.pieces.merging import Drop, WeightedMean
from memkit.pieces.readout import TINY, Readout
from memkit.pieces.routing import Nearest
from memkit.pieces.statistics import COUNT, FOUNDER_MASS, MASS
from memkit.policy import Policy

__all__ = ["Layout", "by_loops", "contend", "has_loops", "layout", "merging", "scoring"]


@dataclass(frozen=True, eq=False)
class Layout:
    """A line, and where it has what as loops want to know it; which numbers grow with a row's weight, and which are a
    founder's own, bool [s] each."""

    line: Line
    at: Any
    weighed: np.ndarray
    own: np.ndarray


def contend(rules: SlotRules, chunk: Chunk, store: SlotStore, contest: Contest, sink_tokens: int) -> None:
    """Take a chunk in: who stays has a slot, and who loses leaves what the rule says.

    The first `contest.kept` slots are no candidates; the first `sink_tokens` candidates stay in any case.
    """
    if by_loops(rules.policy, store):
        _contend_by_loops(rules, chunk, store, contest, sink_tokens)
    else:
        replace(store, rules, compete(rules, chunk, store, contest, sink_tokens), chunk, contest)


def by_loops(policy: Policy, store: SlotStore) -> bool:
    """Whether loops know this memory, and can be run on these slots."""
    return not torch.is_grad_enabled() and has_loops(policy) and loops.usable(store.sums, store.numbers)


@functools.lru_cache(maxsize=64)
def has_loops(policy: Policy) -> bool:
    """Whether loops know how slots and tokens compete under this policy."""
    routing, merging, admission = policy.routing, policy.merging, policy.admission
    if not policy.competes:
        return False
    means = type(policy.readout) is Readout and policy.readout.spec.value == "mean"
    if admission is None or not policy.keeps_keys or not means:
        return False
    nearest = type(routing) is Nearest and routing.similarity == "cosine" and routing.new_slots and not routing.drops
    joins = nearest and type(merging) is WeightedMean and merging.by_share and merging.of == "values"
    return joins or type(merging) is Drop


@functools.lru_cache(maxsize=64)
def scoring(policy: Policy, dtype: torch.dtype) -> Any:
    """What candidates whose values are read in this dtype score, as loops want to know it; None where they do not know
    the admission, or how to round so."""
    admission, run, rounds = policy.admission, loops.compiled(), dtype == torch.bfloat16
    if dtype == torch.float16:
        return None
    if type(admission) is OutputError:
        return run.Scoring(run.ERRORS, admission.pool, False, float(admission.difference), False, rounds)
    if type(admission) is Attention or type(admission) is ExpectedAttention:
        return run.Scoring(run.SHARES, admission.pool, True, 0.0, admission.value_norm, rounds)
    if type(admission) is KeyNorm or type(admission) is KeyDifference:
        by = run.KEY_NORMS if type(admission) is KeyNorm else run.KEY_DIFFERENCES
        return run.Scoring(by, 1, False, 0.0, False, rounds)
    return None


@functools.lru_cache(maxsize=64)
def merging(policy: Policy, layout: Layout) -> Any:
    """What becomes of those that lose, as loops want to know it."""
    rule = policy.merging
    facts = (rule.joins, layout.weighed, layout.own, SHARE_EPS, float(rule.cap or np.inf), TINY)
    return loops.compiled().Merging(*facts, policy.readout.spec.bias == "mass")


@functools.lru_cache(maxsize=64)
def layout(policy: Policy, width: int, value_width: int) -> Layout:
    """The line of a policy's rows."""
    line = Line.of(policy, width, value_width, torch.device("cpu"))
    numbers = {each: line.numbers.start + place for place, each in enumerate(policy.statistics)}
    mass, told = numbers.get(MASS, numbers[COUNT]), line.evidence.stop - line.evidence.start
    at = (line.keys.stop, line.values.stop, mass, numbers.get(FOUNDER_MASS, mass), line.evidence.start, told)
    weighed = np.zeros(len(line.own), dtype=bool)
    for columns in line.weighed:
        weighed[columns] = True
    own = line.own[line.numbers].numpy()
    return Layout(line, loops.compiled().Columns(*at), weighed[line.numbers], own)


@torch.no_grad()
def _contend_by_loops(rules: SlotRules, chunk: Chunk, store: SlotStore, contest: Contest, sink_tokens: int) -> None:
    """The same in passes over lines: who stays, then whom the losers join, then how slots are read."""
    policy, width, kept, value_width = rules.policy, rules.width, contest.kept, store.sums.shape[-1] - rules.width
    of, run = layout(policy, width, value_width), loops.compiled()
    line, at, rule = of.line, of.at, merging(policy, of)
    tokens = replacing.lines_of_tokens(rules, chunk, line)
    slots = (
        replacing.lines_of_slots(store, rules, contest.most_before, line) if contest.most_before else tokens[:, :, :0]
    )
    shape, heads = (*tokens.shape[:2], max(store.room, max(contest.after))), tokens.shape[1]
    before, after = (np.repeat(np.array(each), heads) for each in (contest.before, contest.after))
    there, coming = loops.rows(slots), loops.rows(tokens)
    scores = _scores(rules, chunk, store, contest, sink_tokens, (there, coming, before, kept, at))
    order = np.empty(scores.shape, dtype=np.int64)
    run.rankings(scores, min(sink_tokens, scores.shape[1]), order)
    lines = tokens.new_empty(*shape, tokens.shape[-1])
    losers = tokens.new_empty(len(before), contest.most_left, tokens.shape[-1])
    keys, out = tokens.new_empty(*losers.shape[:2], width), loops.rows(lines)
    run.admit(there, coming, before, after, kept, order, out, losers.numpy(), keys.numpy())
    if rule.joins:
        products = torch.bmm(keys, lines.flatten(0, 1)[:, : max(contest.after), :width].mT)
        lost = before + contest.size - after
        run.join(products.numpy(), losers.numpy(), lost, after, kept + sink_tokens, at, rule, out)
    store.about_to_write()
    store.take_lines(lines, line.values.stop, line.numbers, line.evidence, line.founders_keys if line.turned else None)
    if policy.readout.spec.bias != "count":
        store.view = _read(rules, store, at, rule, out)


def _scores(
    rules: SlotRules, chunk: Chunk, store: SlotStore, contest: Contest, sink_tokens: int, lines: tuple[Any, ...]
) -> np.ndarray:
    """What the candidates score, [R, n], by the admission; where it is one that loops know, by them.

    lines: those of slots and of tokens, before [R], kept, and where they have what.
    """
    admission = rules.policy.admission
    assert admission is not None
    there, _, before, kept, _ = lines
    score = np.zeros((len(before), max(before - kept + contest.size)), dtype=there.dtype)
    if contest.all_or_none:  # asks no admission, as in `plan.assign`
        return score
    known = scoring(rules.policy, rules.dtype)
    if known is None:
        context = candidates(rules, chunk, store, contest, sink_tokens)
        return loops.rows(admission.score(context).expand(context.shape).to(store.sums.dtype), 1)
    loops.compiled().score(*lines, known, np.finfo(score.dtype).tiny, score)
    return score


def _read(rules: SlotRules, store: SlotStore, at: Any, rule: Any, lines: np.ndarray) -> SlotView:
    """The slots as they are read: `rows.read_slots`."""
    values = store.sums.new_empty(*store.sums.shape[:3], store.sums.shape[3] - rules.width)
    bias = store.sums.new_empty(values.shape[:3])
    loops.compiled().read(lines, at, rule, loops.rows(values), loops.rows(bias, 1))
    route = store.sums[..., : rules.width]
    keys = route if store.founders_keys is None else store.founders_keys
    of_mass = bias.to(rules.dtype) if rule.by_mass else None
    return SlotView(route, keys.to(rules.dtype), values.to(rules.dtype), of_mass)
