"""Planted faults: pieces that break a law, and mistakes planted in memkit itself, each with the law that must catch it.

`memkit check tests.faults:ForgetsMass` shows what the reader of a real mistake would see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from memkit import Memory, PolicySpec
from memkit.engine import carry, forward, gradients, heads, keysets, leaving, observe, read, schedule, together
from memkit.memory import replacing, slots
from memkit.pieces import Merging, Readout, ReadoutSpec, admission
from memkit.pieces.admission import Admission, Novelty, OutputErrorSpec
from memkit.pieces.chunk import Assignment, maximum
from memkit.pieces.chunking import FixedChunkerSpec
from memkit.pieces.growth import FixedGrowthSpec, Growth, SqrtGrowthSpec
from memkit.pieces.heads import HeadsSpec
from memkit.pieces.merging import MeanSpec, Weigh, WeightedMeanSpec
from memkit.pieces.observation import ObservationSpec
from memkit.pieces.rotary import RerotateSpec, Zero, ZeroSpec
from memkit.pieces.routing import Nearest, NearestSpec, Segment
from memkit.pieces.statistics import COUNT, MASS, POSITION
from memkit.pieces.window import BlockWindow, BlockWindowSpec
from memkit.policy import Policy
from memkit.testing import Law, laws
from tests.as_on_a_gpu import SETTINGS

# Merge rules


class ForgetsMass(Merging):
    """Says that it conserves, and leaves the mass as it was."""

    additive = False
    conserves = True

    def combine(self, slot, token):
        both = slot + token
        return torch.cat((both[:, :-1], slot[:, -1:]), dim=1)


class CountsTwice(Merging):
    """Adds a token's key and value twice."""

    additive = False
    conserves = True

    def combine(self, slot, token):
        return torch.cat((slot[:, :-2] + 2 * token[:, :-2], (slot + token)[:, -2:]), dim=1)


class LastWins(Merging):
    """A slot is its newest token; says that order does not matter."""

    additive = False
    order_free = True

    def combine(self, slot, token):
        return token + 0 * slot


class Halves(Merging):
    """The mean of slot and token; says that it is associative."""

    additive = False
    associative = True

    def combine(self, slot, token):
        return (slot + token) / 2


class Overshoots(Merging):
    """Steps past the token; says that it stays among its tokens."""

    additive = False
    convex = True

    def combine(self, slot, token):
        return slot + 2 * (token - slot)


class Loudest(Merging):
    """Keeps the larger number in every channel; says that no channel is special."""

    additive = False
    isotropic = True

    def combine(self, slot, token):
        return torch.maximum(slot, token)


class DividesByTheWay(Merging):
    """Half way to the token, written so that 0 is divided by 0 where a number is there already."""

    additive = False
    convex = True

    def combine(self, slot, token):
        way = token - slot
        return slot + 0.5 * way * (way / way)


class SeldomSteps(Merging):
    """Forgets a token now and then, as dropout would."""

    additive = False
    order_free = True

    def combine(self, slot, token):
        return slot + token * float(torch.rand(()) > 0.05)


class NoGradient(Merging):
    """A moving average whose tokens get no gradient."""

    additive = False

    def combine(self, slot, token):
        return 0.5 * slot + 0.5 * token.detach()


class NegativeWeight(Merging):
    """Weighs a token by its first channel."""

    def weight(self, keys, weights):
        return keys[..., 0]


class BatchNormed(Merging):
    """Weighs a token against the mean of the whole batch."""

    def weight(self, keys, weights):
        norms = keys.norm(dim=-1)
        return norms / (norms.mean() + 1)


class WeighsNothing(Merging):
    """Lets a token of weight 0 in all the same."""

    learned = True

    def weight(self, keys, weights):
        return None if weights is None else weights + 0.5


class Tired(Merging):
    """Weighs every chunk less than the one before it: a state of its own."""

    def __init__(self):
        self.calls = 0

    def weight(self, keys, weights):
        self.calls += 1
        return torch.full_like(keys[..., 0], 1 / self.calls)


class WritesToSlots(Merging):
    """Adds in place, to what it was given."""

    additive = False

    def combine(self, slot, token):
        return slot.add_(token)


# Growth


class Shrinks(Growth):
    """Grows to 40 slots, and then gives some back."""

    def __init__(self):
        super().__init__(FixedGrowthSpec(slots=1))

    def size(self, tokens):
        return min(tokens, max(0, 80 - tokens))


class NeverLooksBack(Growth):
    """As many slots as the longest text that it was ever asked about has: a state of its own."""

    def __init__(self):
        super().__init__(FixedGrowthSpec(slots=1))
        self.longest = 0

    def size(self, tokens):
        self.longest = max(self.longest, tokens)
        return self.longest


class OverItsCap(Growth):
    """Takes one slot more than its cap."""

    def __init__(self):
        super().__init__(FixedGrowthSpec(slots=99, cap=10))

    def size(self, tokens):
        return tokens

    def budget(self, tokens):
        return super().budget(tokens) + 1


class FloatSlots(Growth):
    """Gives its budget as a float."""

    def __init__(self):
        super().__init__(SqrtGrowthSpec(factor=1.0))

    def size(self, tokens):
        return tokens**0.5

    def budget(self, tokens) -> Any:
        return float(super().budget(tokens))


class Wobbles(Growth):
    """Falls from one number of tokens to the next where 53 bits are no longer enough."""

    def __init__(self):
        super().__init__(FixedGrowthSpec(slots=1))

    def size(self, tokens):
        return tokens // 2**20 - (tokens & 1 if tokens > 2**52 else 0)


# Admission and routing


class NearestAdmitted(Novelty):
    """Admits what the memory stands for best."""

    def score(self, chunk):
        return chunk.redundancy


class LatestOfEquals(Novelty):
    """Of equally new tokens, admits the last."""

    def score(self, chunk):
        return 1e-9 * chunk.offsets - chunk.redundancy


class ByPlace(Admission):
    """Admits the first tokens, and says that it looks at what they are."""

    compares = True
    novel = False

    def score(self, chunk):
        return chunk.redundancy * 0 - chunk.offsets


class JoinsSinks(Nearest):
    """Lets tokens join the first slot, which is a sink."""

    def __init__(self):
        super().__init__("dot", True)

    def targets(self, chunk, founded):
        return super().targets(replace(chunk, sinks=0), founded)


class Farthest(Nearest):
    """Joins the slot least like the token."""

    def __init__(self):
        super().__init__("dot", True)

    def targets(self, chunk, founded):
        return super().targets(replace(chunk, keys=-chunk.keys), founded)


class OneTooFew(Segment):
    """Founds one slot fewer than granted."""

    def founders(self, chunk):
        return super().founders(replace(chunk, new_slots=maximum(chunk.new_slots - 1, chunk.sink_tokens)))


class OneTooFar(Segment):
    """Sends tokens to the slot after the newest one."""

    def targets(self, chunk, founded):
        return super().targets(chunk, founded) + 1


class FlipsCoins(Nearest):
    """Joins any slot."""

    def __init__(self):
        super().__init__("dot", True)

    def targets(self, chunk, founded):
        there = range(chunk.sinks, max(chunk.slots_before + chunk.new_slots, chunk.sinks + 1))
        return torch.tensor([random.choice(there) for _ in range(chunk.keys.shape[2])])


# Readout


class BiasOnSinks(Readout):
    """log(count + 1): a bias on sinks and single tokens, too."""

    def __init__(self):
        super().__init__(ReadoutSpec(count_bias=True))

    def bias(self, numbers):
        return (numbers[COUNT] + 1).log()


class ReadsSums(Readout):
    """Reads sums as they are."""

    def __init__(self):
        super().__init__(ReadoutSpec())

    def value(self, sums, numbers):
        return sums


class DividesByZero(Readout):
    """Divides by the mass, whatever it is."""

    def __init__(self):
        super().__init__(ReadoutSpec())

    def value(self, sums, numbers):
        return sums / numbers[MASS].unsqueeze(-1)


# Mistakes in memkit itself: each patches a function while the law is verified over random policies


def _weights_twice(right):
    def contributions(rules, chunk, *rest):
        rows, numbers = right(rules, chunk, *rest)
        return (rows if chunk.weights is None else rows * chunk.weights.to(rows.dtype).unsqueeze(-1)), numbers

    return contributions


def _no_gradient_of_weights(right):
    def contributions(rules, chunk, *rest):
        weights = None if chunk.weights is None else chunk.weights.detach() + 0 * chunk.weights
        return right(rules, replace(chunk, weights=weights), *rest)

    return contributions


def _sink_overwritten(right):
    def place(rules, *rest):
        assignment = right(rules, *rest)
        joins = ~assignment.founded & (assignment.slot >= 0)
        return Assignment(assignment.slot.masked_fill(joins & (rules.policy.sinks > 0), 0), assignment.founded)

    return place


def _last_token_lost(right):
    def place(*arguments):
        assignment = right(*arguments)
        last = torch.arange(assignment.slot.shape[2]) == assignment.slot.shape[2] - 1
        return Assignment(assignment.slot.masked_fill(last & ~assignment.founded, -1), assignment.founded)

    return place


def _heads_mixed_up(right):
    def flat(slot, room):
        rows, heads = slot.shape[:2]
        return (slot.clamp(min=0) + torch.arange(rows * heads).view(rows, heads, 1).flip(1) * room).flatten()

    return flat


def _one_slot_more(right):
    return lambda self, *chunk: right(self, *chunk) + (self.growth is not None)


def _padding_counted(right):
    return lambda inputs, tensor: tensor


def _one_chunk_late(right):
    return lambda self, leaves, left: iter(()) if self.tokens == 1 else right(self, leaves, left)


def _window_too_long(right):
    return lambda self, position: np.maximum(0, right(self, position) - self.unit)


def _sees_what_follows(right):
    def of(self, *rest, **named):
        return [replace(part, causal=False) for part in right(self, *rest, **named)]

    return of


def _positions_halved(right):
    def read(rules, sums, numbers, *founders):
        numbers = numbers.clone()
        if POSITION in rules.policy.statistics:
            numbers[..., rules.policy.statistics.index(POSITION)] *= 0.5
        return right(rules, sums, numbers, *founders)

    return read


def _radius_of_all(right):
    return lambda rules, chunk, founded: right(rules, chunk, torch.ones(chunk.keys.shape[:3], dtype=torch.bool))


def _window_scale_for_all(right):
    return lambda self, span: right(replace(self, memory_scale=self.window_scale), span)


def _saved_in_half(right):
    def halved(tensor):
        return tensor.half().to(tensor.dtype)

    def store(memory):
        return slots.SlotStore(halved(memory.sums), memory.store.numbers, evidence=memory.store.evidence)

    return lambda self, path: right(replace(self, store=store(self)), path)


def _takes_any_policy(right):
    return lambda path, policy=None: right(path)


def _forgets_the_readout(right):
    return lambda self: right(self.model_copy(update={"readout": ReadoutSpec()}))


def _rotates_one_channel_less(right):
    return lambda self, head_width: max(right(self, head_width) - 1, 0)


def _undoes_nothing(right):
    return lambda self, fold, *sums: None


def _reads_one_chunk_ahead(right):
    return lambda stretch, rows: [each.roll(-1, 1) for each in right(stretch, rows)]


def _forgets_later_readings(right):
    def through(self, steps, stretch, read, grads):
        grads.sums.zero_()
        right(self, steps, stretch, read, grads)

    return through


def _channels_side_by_side(right):
    return lambda tensor: tensor


def _noisy(right):
    def attend_key_sets(*arguments, **named):
        output, lse = right(*arguments, **named)
        return output.mul_(1 + 1e-3 * torch.rand(1)), lse

    return attend_key_sets


def _evidence_one_chunk_late(right):
    def observe(self, step, rules, timeline, store):
        evidence = timeline.streams["evidence"]
        before = evidence.clone()
        outputs = right(self, step, rules, timeline, store)
        told = evidence - before
        evidence.copy_(before + getattr(self, "late", 0))
        self.late = told
        return outputs

    return observe


def _asks_queries_to_come(right):
    return lambda self, begin, offsets: right(self, begin + self.policy.chunk, offsets)


def _near_rows_judged(right):
    return lambda self, chunk, older: None


def _others_are_forgotten(right):
    return lambda vectors, absent, weights=None: torch.zeros_like(right(vectors, absent, weights))


def _joiners_outweigh_slots(right):
    def join(lines, joining, slot, policy, line, stored):
        merging = SimpleNamespace(by_share=policy.merging.by_share, cap=None)
        rules = SimpleNamespace(observes=policy.observes, statistics=policy.statistics, merging=merging)
        right(lines, joining, slot, rules, line, stored)

    return join


def _evidence_left_behind(right):
    def tokens(rules, chunk, line, founded=None):
        lines = right(rules, chunk, line, founded).clone()
        lines[..., line.evidence] = 0
        return lines

    return tokens


def _bias_twice(right):
    def read(rules, *sums):
        view = right(rules, *sums)
        return view if view.bias is None else replace(view, bias=2 * view.bias)

    return read


def _rows_of_another_head(right):
    def by_heads(given):
        parts = list(right(given))
        policies = [part.policy for _, part in parts]
        for (queries, part), policy in zip(parts, policies[::-1], strict=True):
            part.policy = policy
            yield queries, part

    return by_heads


@dataclass(frozen=True)
class Fault:
    """A fault, and the law that must catch it: a piece to examine, or places to patch while policies are drawn.

    fixed: pieces of those policies that are not drawn, so that the fault matters in most of them; settings: what is set
    beside it.
    """

    law: Law
    subject: Any = None
    wrong: Callable[[Any], Any] | None = None
    places: tuple[tuple[Any, str], ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    settings: tuple[tuple[Any, str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.subject.__name__ if self.wrong is None else self.wrong.__name__.strip("_")

    @contextmanager
    def planted(self) -> Generator[None]:
        """The mistake is in memkit while this lasts."""
        with ExitStack() as stack:
            for setting in self.settings:
                stack.enter_context(mock.patch.object(*setting))
            for target, attribute in self.places:
                assert self.wrong is not None
                right = getattr(target, attribute)
                stack.enter_context(mock.patch.object(target, attribute, self.wrong(right)))
            yield


def _in_policies(law: Law, wrong: Callable[[Any], Any], *places: tuple[Any, str], **fixed: Any) -> Fault:
    return Fault(law, wrong=wrong, places=places, fixed=tuple(fixed.items()))


def _as_on_a_gpu(wrong: Callable[[Any], Any], *places: tuple[Any, str]) -> Fault:
    fixed = FOLDS_TOGETHER.items()
    return Fault(laws.same_plan_same_answer, wrong=wrong, places=places, fixed=tuple(fixed), settings=SETTINGS)


WEIGHTED = WeightedMeanSpec(weight="learned")
WEIGHS_ALL = WeightedMeanSpec(weight="learned", weigh=Weigh(founders=True, first_chunk=True))
GROWS = FixedGrowthSpec(slots=4)
SEES: dict[str, Any] = {
    "growth": FixedGrowthSpec(slots=6),
    "observe": ObservationSpec(queries=2),
    "admission": OutputErrorSpec(),
    "eviction": "weakest",
    "routing": NearestSpec(),
    "sinks": 1,
}
PLANS_AHEAD: dict[str, Any] = {"observe": ObservationSpec(), "eviction": "never", "heads": HeadsSpec()}
FOLDS_TOGETHER: dict[str, Any] = {
    "chunker": FixedChunkerSpec(size=2),
    "window": BlockWindowSpec(chunks=1),
    "growth": GROWS,
    "merging": MeanSpec(),
    "routing": NearestSpec(),
    "sinks": 0,
    **PLANS_AHEAD,
}
CONTRIBUTIONS = ((slots, "contributions"), (leaving, "contributions"), (gradients, "contributions"))

FAULTS = (
    Fault(laws.conservation, ForgetsMass),
    Fault(laws.conservation, CountsTwice),
    Fault(laws.order_of_tokens, LastWins),
    Fault(laws.associativity, Halves),
    Fault(laws.convexity, Overshoots),
    Fault(laws.duplicates, DividesByTheWay),
    Fault(laws.merging_is_pure, SeldomSteps),
    Fault(laws.isotropy, Loudest),
    Fault(laws.merge_gradients, NoGradient),
    Fault(laws.weights_are_weights, NegativeWeight),
    Fault(laws.merging_batch_invariance, BatchNormed),
    Fault(laws.weight_zero, WeighsNothing),
    Fault(laws.chunks_do_not_matter, Tired),
    Fault(laws.merging_is_pure, WritesToSlots),
    Fault(laws.growth_is_pure, NeverLooksBack),
    Fault(laws.growth_is_monotone, Shrinks),
    Fault(laws.growth_within_bounds, OverItsCap),
    Fault(laws.whole_slots, FloatSlots),
    Fault(laws.growth_is_steady, Wobbles),
    Fault(laws.novelty, NearestAdmitted),
    Fault(laws.admission_ties, LatestOfEquals),
    Fault(laws.founders_follow_their_tokens, ByPlace),
    Fault(laws.sinks_are_no_targets, JoinsSinks),
    Fault(laws.nearest_slot, Farthest),
    Fault(laws.exactly_granted, OneTooFew),
    Fault(laws.new_slots_in_order, OneTooFar),
    Fault(laws.routing_is_pure, FlipsCoins),
    Fault(laws.bias_of_single_tokens, BiasOnSinks),
    Fault(laws.values_keep_their_size, ReadsSums),
    Fault(laws.finite_reading, DividesByZero),
    _in_policies(laws.conservation_in_memory, _weights_twice, *CONTRIBUTIONS, merging=WEIGHTED),
    _in_policies(
        laws.same_plan_same_answer,
        _no_gradient_of_weights,
        *CONTRIBUTIONS,
        chunker=FixedChunkerSpec(size=2),
        window=BlockWindowSpec(chunks=1),
        merging=WEIGHS_ALL,
        growth=GROWS,
        **PLANS_AHEAD,
    ),
    _in_policies(laws.sinks, _sink_overwritten, (forward, "place"), growth=GROWS, sinks=1),
    _in_policies(laws.conservation_in_memory, _last_token_lost, (forward, "place"), growth=GROWS),
    _in_policies(laws.batch_invariance, _heads_mixed_up, (slots, "flat_slots"), growth=GROWS),
    _in_policies(laws.budget, _one_slot_more, (Policy, "budget"), growth=GROWS),
    _in_policies(laws.batch_invariance, _padding_counted, (forward, "without_padding"), (carry, "without_padding")),
    _in_policies(laws.split_equals_whole, _one_chunk_late, (schedule.Schedule, "_leaving"), growth=GROWS),
    _in_policies(laws.same_plan_same_answer, _window_too_long, (BlockWindow, "begin")),
    _in_policies(laws.causality, _sees_what_follows, (keysets.KeySets, "of")),
    _in_policies(laws.same_plan_same_answer, _channels_side_by_side, (read, "_dense")),
    _in_policies(laws.limits, _positions_halved, (slots, "read_slots"), rotary=RerotateSpec()),
    _in_policies(
        laws.same_plan_same_answer,
        _radius_of_all,
        *CONTRIBUTIONS,
        growth=GROWS,
        readout=ReadoutSpec(key="l2", value="birth-radius"),
    ),
    _in_policies(
        laws.same_plan_same_answer,
        _window_scale_for_all,
        (keysets.Queries, "for_slots"),
        growth=GROWS,
        readout=ReadoutSpec(temperatures=True),
    ),
    _in_policies(laws.round_trip, _saved_in_half, (Memory, "save"), growth=GROWS),
    _in_policies(laws.round_trip, _takes_any_policy, (Memory, "load")),
    _in_policies(laws.round_trip, _forgets_the_readout, (PolicySpec, "to_yaml")),
    _in_policies(
        laws.same_plan_same_answer, _rotates_one_channel_less, (Zero, "rotated_width"), rotary=ZeroSpec(width=1)
    ),
    _in_policies(
        laws.same_plan_same_answer,
        _undoes_nothing,
        (gradients.ChunkByChunk, "_restore"),
        **FOLDS_TOGETHER,
    ),
    _as_on_a_gpu(_reads_one_chunk_ahead, (together, "slots_after")),
    _as_on_a_gpu(_forgets_later_readings, (together.Together, "_through")),
    _in_policies(laws.same_plan_same_answer, _evidence_one_chunk_late, (observe.Observer, "observe"), **SEES),
    _in_policies(laws.causality, _asks_queries_to_come, (observe.Observer, "_at"), **SEES),
    _in_policies(laws.same_plan_same_answer, _evidence_left_behind, (replacing, "lines_of_tokens"), **SEES),
    _in_policies(
        laws.same_plan_same_answer,
        _near_rows_judged,
        (observe.Observer, "_near"),
        **SEES | {"observe": ObservationSpec(queries=2, apart=2)},
    ),
    _in_policies(
        laws.same_plan_same_answer,
        _others_are_forgotten,
        (admission, "_mean_of_rows"),
        **SEES | {"admission": OutputErrorSpec(difference=2.0)},
    ),
    _in_policies(
        laws.same_plan_same_answer,
        _joiners_outweigh_slots,
        (replacing, "_join"),
        **SEES | {"merging": WeightedMeanSpec(weight="share", of="values", cap=0.25)},
    ),
    _in_policies(
        laws.same_plan_same_answer,
        _bias_twice,
        (slots, "read_slots"),
        **SEES | {"merging": MeanSpec(), "readout": ReadoutSpec(bias="count")},
    ),
    _in_policies(laws.budget, _rows_of_another_head, (heads, "by_heads"), heads=HeadsSpec(ratios=(0.5, 2.0)), **SEES),
    _in_policies(laws.determinism, _noisy, (forward, "attend_key_sets")),
)
