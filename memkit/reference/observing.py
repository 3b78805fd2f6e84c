"""Memory that sees its readers, row by row: what observed queries tell of rows, and slots that compete with tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from memkit.engine.inputs import AttendInputs
from memkit.pieces.chunk import ChunkContext
from memkit.pieces.evidence import output_errors
from memkit.pieces.routing import NearestSpec, SegmentSpec
from memkit.reference.assignment import Assigned, evidence_of, nearest_of, ratings
from memkit.reference.rules import Rules
from memkit.reference.slot import Slot, Token, compared

__all__ = ["Observing", "compete", "mean"]

LEAST_SHARE = 1e-9


class Observing:
    """What one head's readers have told: of each slot, and of each token still held.

    Evidence is (a, m, n): decaying sums of error, of share, and of the chunks that judged; under `observe.again` also
    the most that readers told who have read the text again.
    """

    def __init__(
        self, rules: Rules, inputs: AttendInputs, row: int, head: int, seen: int, left: int, live: int, begin: int
    ) -> None:
        """Of a row that has seen so many tokens, of which `left` have left and found `live` slots; its chunk that goes
        on begins at `begin`."""
        self.any_length = rules.cut_by_caller
        self.spec, self.chunk = rules.spec.observe, rules.chunk
        self.own_measure = None if rules.policy.missed is output_errors else rules.policy.missed
        self.nothing = torch.zeros(4 if self.spec.again else 3, dtype=torch.float64)
        self.group = inputs.queries.shape[1] // inputs.keys.shape[1] if inputs.queries is not None else 1
        self.first = head * self.group
        self.slots: list[Tensor] = []
        self.tokens: dict[int, Tensor] = {}
        self.heard: dict[tuple[int, int], Tensor] = {}
        self.width = inputs.keys.shape[3]
        memory = inputs.memory
        if memory is None:
            return
        evidence, end = memory.window.streams["evidence"], memory.window.end
        for position in range(left, seen):
            self.tokens[position] = evidence[row, head, end - (seen - position)].double()
        assert memory.store.evidence is not None and memory.observed is not None
        self.slots = [memory.store.evidence[row, head, i].double() for i in range(live)]
        for i, offset in enumerate(self.waits()):
            position = begin + offset
            if position < seen:
                for h in range(self.first, self.first + self.group):
                    self.heard[position, h] = memory.observed[row, h, i].double()

    def offsets(self, chunk: int) -> list[int]:
        """Which queries of a chunk of this length are observed."""
        n = min(self.spec.queries, chunk)
        return [(i + 1) * chunk // n - 1 for i in range(n)]

    def waits(self) -> list[int]:
        """Which queries wait for the end of their chunk: all, where its length is not known before."""
        return list(range(self.chunk)) if self.any_length else self.offsets(self.chunk)

    def hear(self, query: Tensor, head: int, position: int, begin: int) -> None:
        """A query of the chunk at `begin` was read, which may be observed; its token has not been judged yet."""
        self.tokens.setdefault(position, self.nothing)
        if position - begin in self.waits():
            self.heard[position, head] = query

    def asked(self, begin: int, last: int) -> list[tuple[Tensor, int, int]]:
        """The observed queries of the chunk from `begin` to `last`: query, head, position."""
        wanted = [begin + offset for offset in self.offsets(last + 1 - begin)]
        return [(query, head, at) for (at, head), query in sorted(self.heard.items()) if at in wanted]

    def judge(
        self, asked: Iterable[tuple[Tensor, Tensor, int]], slots: int, tokens: range, expected: list[float] | None
    ) -> None:
        """Each row's evidence after a chunk. asked: (softmax, values, position) over slots, then tokens up to there;
        expected: the share of each row, where that is not what was asked for (`reference.expecting`)."""
        rows = slots + len(tokens)
        share, seen = [0.0] * rows, list[tuple[Tensor, Tensor, Tensor]]()
        for shares, values, position in asked:
            for j in range(len(shares)):
                share[j] += float(shares[j].detach())
            far = [j < slots or position - tokens[j - slots] >= self.spec.apart for j in range(len(shares))]
            seen.append((shares.detach(), values.detach(), torch.tensor(far)))
        error = self.missed(seen, rows)
        for j in range(rows):
            paid = share[j] / len(seen) if expected is None else expected[j]
            new = torch.tensor([error[j], paid, 1.0], dtype=torch.float64)
            if j < slots:
                self.slots[j] = self.joined(self.slots[j], new)
            else:
                at = tokens[j - slots]
                self.tokens[at] = self.joined(self.tokens[at], new)
        self.heard.clear()

    def missed(self, seen: list[tuple[Tensor, Tensor, Tensor]], rows: int) -> list[float]:
        """What queries would miss without each row, in the mean or as the admission says. seen: of each, position by
        position and of each the group's heads, its softmax, values, and whose errors it tells of."""
        if self.own_measure is None:
            error = [0.0] * rows
            for shares, values, far in seen:
                output = shares @ values
                for j in range(len(shares)):
                    if far[j]:
                        error[j] += float(shares[j] ** 2 * (values[j] - output).square().sum())
            return [each / len(seen) for each in error]
        by_heads = [seen[i] for h in range(self.group) for i in range(h, len(seen), self.group)]
        told = torch.stack([pad(shares * far, (0, rows - len(shares))) for shares, _, far in by_heads])
        outputs = torch.stack([shares @ values for shares, values, _ in by_heads])
        values = max((values for _, values, _ in by_heads), key=len)
        return self.own_measure(told[None, None], values[None, None], outputs[None, None])[0, 0].tolist()

    def joined(self, before: Tensor, new: Tensor) -> Tensor:
        """A row's evidence after one more chunk, which says (a, m, n)."""
        after = self.spec.decay * before[:3] + new
        if self.spec.aggregate == "max":
            after[0] = after[2] * max(self.spec.decay * mean(before[:3])[0], new[0])
        return torch.cat((after, before[3:]))

    def ask_again(self, asked: Iterable[tuple[Tensor, Tensor]], tokens: range) -> None:
        """Each row's evidence once readers have read the text again: the most that any such readers said of it.

        asked: of each of them the softmax over slots and tokens, and the values there.
        """
        seen = [(shares, values, torch.ones(len(shares), dtype=torch.bool)) for shares, values in asked]
        error = self.missed(seen, len(self.slots) + len(tokens))
        of_slots, of_tokens = error[: len(self.slots)], error[len(self.slots) :]
        self.slots = [_at_least(before, new) for before, new in zip(self.slots, of_slots, strict=True)]
        for at, new in zip(tokens, of_tokens, strict=True):
            self.tokens[at] = _at_least(self.tokens[at], new)

    # As a memory holds it

    def held(self, origin: int, count: int) -> Tensor:
        """Evidence of `count` tokens from `origin` on, [count, e]; zeros for those that left."""
        zero = self.nothing
        return torch.stack([self.tokens.get(origin + i, zero) for i in range(count)]) if count else zero[None][:0]

    def slots_filled(self, most: int) -> Tensor:
        """Evidence of the slots, [most, e], zeros past the last."""
        rows = self.slots + [self.nothing] * (most - len(self.slots))
        return torch.stack(rows) if rows else self.nothing[None][:0]

    def waiting(self, begin: int) -> Tensor:
        """Queries that wait of the incomplete chunk at `begin`, [group, n, d]; zeros for those to come."""
        zero = torch.zeros(self.width, dtype=torch.float64)
        return torch.stack(
            [
                torch.stack([self.heard.get((begin + offset, h), zero) for offset in self.waits()])
                for h in range(self.first, self.first + self.group)
            ]
        )


def _at_least(before: Tensor, error: float) -> Tensor:
    """A row's evidence after readers who read again told its error."""
    return torch.cat((before[:3], before.new_tensor([max(float(before[3]), error)])))


def mean(evidence: Tensor) -> Tensor:
    """(a/n, m/n), 0 where nobody judged; and on top of the first what readers told who read again."""
    means = evidence[:2] / evidence[2] if evidence[2] > 0 else torch.zeros(2, dtype=torch.float64)
    return torch.stack((means[0] + evidence[3:].sum(), means[1]))


def compete(
    rules: Rules,
    chunk: list[Token],
    slots: list[Slot],
    new_slots: int,
    assigned: list[Assigned] | None,
    observing: Observing | None,
) -> list[Slot]:
    """The slots after a chunk has left, where slots compete with tokens or rows are weighed by what readers told.

    Every row is a slot here, a token a slot of its own. Those that stay keep their order; each other one joins one that
    stays: with μ = m/n + 1e-9 (of one that joins at most `merging.cap` times the slot's) and T = Σ μ over a slot and
    those that join it, its values become Σ μ v / T, and its share m·T/μ.
    """
    sinks, total = rules.spec.sinks, len(slots) + new_slots
    weights = rules.weights(chunk)
    fresh = [rules.alone(token, weight, founds=True) for token, weight in zip(chunk, weights, strict=True)]
    nothing = torch.zeros(3, dtype=torch.float64) if observing is None else observing.nothing
    of_tokens = [nothing if observing is None else observing.tokens.pop(token.position) for token in chunk]
    of_slots = [nothing] * len(slots) if observing is None else observing.slots
    if rules.policy.competes:
        kept = min(len(slots), sinks)
        candidates, told = [*slots[kept:], *fresh], [*of_slots[kept:], *of_tokens]
        keys = [*(slot.compared for slot in slots[kept:]), *(token.memory_key for token in chunk)]
        sink_tokens = min(max(sinks - chunk[0].position, 0), len(chunk))
        known = None if observing is None else [mean(each) for each in told]
        shown = candidates_context(rules, slots[:kept], candidates, keys, known, total - kept, sink_tokens)
        founders = staying(rules, candidates, keys, [mean(each) for each in told], shown)
        home = {j: kept + i for i, j in enumerate(founders)}
        joins: list[int] = [-1] * len(candidates)
        if rules.policy.merging.joins:
            if isinstance(rules.spec.routing, SegmentSpec):
                # The newest slot before it that is no sink, or the first one after it.
                newest = [max((home[i] for i in home if i <= j), default=kept - 1) for j in range(len(candidates))]
                joins = [max(slot, sinks) for slot in newest]
            elif isinstance(rules.spec.routing, NearestSpec):
                open_to = {slot: candidates[j] for j, slot in home.items() if slot >= sinks}
                joins = [nearest_of(rules, key.detach(), open_to) for key in keys]
            else:
                founded = torch.tensor([j in home for j in range(len(candidates))])[None, None]
                joins = rules.policy.routing.targets(shown, founded).expand(shown.shape)[0, 0].tolist()
    else:
        kept, candidates, told = len(slots), fresh, of_tokens
        assert assigned is not None
        home = {j: slot for j, (slot, founds) in enumerate(assigned) if founds}
        joins = [slot for slot, _ in assigned]
    rows, evidence = [*slots[:kept]], [*of_slots[:kept]]
    for j in sorted(home, key=lambda j: home[j]):
        rows.append(candidates[j])
        evidence.append(told[j])
    rates = [mean(each)[1] + LEAST_SHARE for each in evidence]
    totals = list(rates)
    by_share = rules.policy.merging.by_share
    for index, rate in enumerate(rates):
        joining = [j for j in range(len(candidates)) if j not in home and joins[j] == index]
        if joining and by_share:
            rows[index] = rows[index].weighing(rate)
        for j in joining:
            weight = mean(told[j])[1] + LEAST_SHARE
            if rules.policy.merging.cap is not None:
                weight = min(weight, rules.policy.merging.cap * rate)
            one = candidates[j]
            if (at := j - (len(candidates) - len(chunk))) >= 0:  # a token that founds nothing has its own weight
                one = rules.alone(chunk[at], weights[at], founds=False)
            rows[index] = rows[index].plus(one.weighing(weight) if by_share else one)
            totals[index] = totals[index] + weight
    if observing is not None:
        observing.slots = [
            torch.cat((each[:1], each[1:2] * whole / rate, each[2:]))
            for each, rate, whole in zip(evidence, rates, totals, strict=True)
        ]
    return rows


def candidates_context(
    rules: Rules,
    kept: list[Slot],
    candidates: list[Slot],
    keys: list[Tensor],
    told: list[Tensor] | None,
    places: int,
    sink_tokens: int,
) -> ChunkContext:
    """Slots and tokens that compete for `places`, as a user's own piece is shown them; kept: slots that are none."""
    alone = compared(candidates, keys[0])[None, None]
    return ChunkContext(
        keys=torch.stack(keys).detach()[None, None],
        slots=compared(kept, keys[0])[None, None],
        slots_before=len(kept),
        sinks=rules.spec.sinks,
        sink_tokens=sink_tokens,
        new_slots=places,
        joins=rules.policy.merging.joins,
        alone=lambda: alone,
        read_values=lambda: torch.stack([row.answer.detach() for row in candidates])[None, None],
        evidence=evidence_of(told),
        similarity=rules.policy.routing.similarity,
    )


def staying(
    rules: Rules, candidates: list[Slot], keys: list[Tensor], told: list[Tensor], shown: ChunkContext
) -> list[int]:
    """Which candidates have a slot afterwards: the first ones that are sinks, then the highest ratings, ties to the
    earliest."""
    places, sink_tokens = int(shown.new_slots), int(shown.sink_tokens)
    if places == len(candidates):
        return list(range(places))
    scores = ratings(rules, candidates, keys, told, shown)
    free = sorted(range(sink_tokens, len(candidates)), key=lambda j: -scores[j])
    return [*range(sink_tokens), *sorted(free[: places - sink_tokens])]
