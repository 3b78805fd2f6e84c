"""Policies: `PolicySpec` declares how an attention layer remembers, `Policy` is the pieces put together.

Rules that span several pieces are checked here, before any tensor exists.
"""

from __future__ import annotations

import functools
import itertools
import threading
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator

from memkit.pieces.admission import (
    Admission,
    AdmissionSpec,
    Expectation,
    NoAdmissionSpec,
    NoveltySpec,
)
from memkit.pieces.chunking import ChunkerSpec, FixedChunkerSpec
from memkit.pieces.evidence import Missed, output_errors
from memkit.pieces.growth import AnyGrowthSpec, GrowthSpec, NoGrowthSpec
from memkit.pieces.heads import HeadsSpec, share_of
from memkit.pieces.merging import Drop, MeanSpec, Merging, MergingSpec
from memkit.pieces.needs import Need
from memkit.pieces.observation import ObservationSpec
from memkit.pieces.readout import ReadoutSpec
from memkit.pieces.registry import AnyOf, NamedSpec
from memkit.pieces.rotary import KeepSpec, Rotary, RotarySpec
from memkit.pieces.routing import Discard, NearestSpec, Routing, RoutingSpec
from memkit.pieces.statistics import COUNT, MASS, Statistic
from memkit.pieces.storage import StorageSpec
from memkit.pieces.window import AllWindowSpec, BlockWindowSpec, SlidingWindowSpec, WindowSpec

__all__ = ["Policy", "PolicySpec"]

MOST_SINKS = 2**20
"""Sinks there may be: under a sliding window each of them is a step of its own."""

_BUILDING = threading.RLock()


class PolicySpec(NamedSpec):
    """How an attention layer remembers. Families left out have the neutral default, which is full attention."""

    chunker: Annotated[ChunkerSpec, AnyOf("chunker")] = Field(
        default=FixedChunkerSpec(), description="the unit in which tokens leave"
    )
    window: Annotated[WindowSpec, AnyOf("window")] = Field(
        default=AllWindowSpec(), description="recent tokens seen exactly"
    )
    sinks: int = Field(
        default=0,
        ge=0,
        le=MOST_SINKS,
        description="first tokens that always found the first slots; counted in the budget, never merged into",
    )
    growth: Annotated[AnyGrowthSpec, AnyOf("growth")] = Field(
        default=NoGrowthSpec(), description="slots allowed after n tokens"
    )
    heads: HeadsSpec = Field(default=HeadsSpec(), description="how the slots are shared among a layer's heads")
    admission: Annotated[AdmissionSpec, AnyOf("admission")] = Field(
        default=NoveltySpec(), description="which tokens found a slot"
    )
    observe: ObservationSpec = Field(default=ObservationSpec(), description="which queries tell what rows are worth")
    eviction: Literal["never", "weakest"] = Field(
        default="never",
        description="never: a slot is for ever; weakest: slots and leaving tokens compete for the budget by score, and "
        "a slot that loses is treated like a token that founds nothing",
    )
    routing: Annotated[RoutingSpec, AnyOf("routing")] = Field(
        default=NearestSpec(), description="which slot every other token joins"
    )
    merging: Annotated[MergingSpec, AnyOf("merging")] = Field(
        default=MeanSpec(), description="how a slot takes a token"
    )
    readout: ReadoutSpec = Field(default=ReadoutSpec(), description="how slots enter the softmax")
    rotary: Annotated[RotarySpec, AnyOf("rotary")] = Field(
        default=KeepSpec(), description="what happens to RoPE in memory"
    )
    storage: StorageSpec = Field(default=StorageSpec(), description="in which form slots are held between calls")

    _policy: Policy | None = PrivateAttr(None)

    def named(self, name: str | None) -> Self:
        """The same declaration under a name."""
        copy = super().named(name)
        copy._policy = None
        return copy

    def build(self) -> Policy:
        """The pieces, put together (once, whatever the threads)."""
        policy = self._policy
        if policy is None or policy.spec is not self:  # a changed copy takes private attributes along
            with _BUILDING:
                policy = self._policy
                if policy is None or policy.spec is not self:
                    policy = self._policy = Policy(self)
        return policy

    def with_ratios(self, *ratios: float) -> PolicySpec:
        """The same declaration, of the same name, with these ratios of a layer's heads (see `heads`)."""
        copy = self.model_copy(update={"heads": HeadsSpec(ratios=ratios)})
        copy._policy = None
        return copy

    def __getstate__(self) -> dict[Any, Any]:
        """For pickle: the declaration and its name, without what was built of it."""
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {"_name": self._name, "_policy": None}}

    @model_validator(mode="after")
    def _consistent(self) -> PolicySpec:
        for rule in (
            _boundaries_need_chunks,
            _growth_needs_a_window,
            _founding,
            _joining,
            _weights,
            _mass_bias,
            _radius,
            _observing,
            _expecting,
            _reading_again,
            _competing,
            _heads,
        ):
            rule(self)
        return self


def _boundaries_need_chunks(spec: PolicySpec) -> None:
    if spec.chunker.build().given and not isinstance(spec.window, BlockWindowSpec):
        raise ValueError(
            f"chunker: {spec.chunker.kind} says where chunks end, and a window of kind {spec.window.kind} has no "
            "chunks; use window: {kind: block, chunks: 2}, or leave chunker out"
        )


def _growth_needs_a_window(spec: PolicySpec) -> None:
    if isinstance(spec.growth, NoGrowthSpec):
        return
    if isinstance(spec.window, SlidingWindowSpec):
        raise ValueError(
            f"window: sliding needs growth none, got growth {spec.growth.kind}; "
            "use window: {kind: block, chunks: 2} for a memory that grows"
        )
    if isinstance(spec.window, AllWindowSpec):
        raise ValueError(
            f"window: nothing ever leaves a window of all tokens, so growth must be none, got {spec.growth.kind}; "
            "use window: {kind: block, chunks: 2}"
        )


def _founding(spec: PolicySpec) -> None:
    if isinstance(spec.growth, NoGrowthSpec):
        return
    if isinstance(spec.admission, NoAdmissionSpec) and not spec.routing.build().founds:
        raise ValueError(
            f"admission: none lets nobody found a slot under routing {spec.routing.kind}; "
            "use routing: {kind: segment}, or admission: {kind: novelty}"
        )


def _joining(spec: PolicySpec) -> None:
    """A token that founds nothing must have a slot to join."""
    merging: Merging = spec.merging.build()
    if not isinstance(spec.growth, GrowthSpec) or not merging.joins:
        return
    policy = Policy(spec)
    # Chunks of sinks alone found whole; the budget then decides about the first chunk that has another token, which is
    # the smallest there can be where the caller says where chunks end.
    chunk = 1 if policy.takes_boundaries else policy.chunk
    begin = spec.sinks // chunk * chunk
    window = (policy.window.capacity or 0) // policy.chunk * chunk
    slots = policy.slots_with_chunk(begin, begin, begin + chunk, begin + window)
    if slots <= spec.sinks:
        raise ValueError(
            f"growth: a budget that can equal its sinks needs merging drop, for a token would have no slot to join; "
            f"got {slots} slots with {spec.sinks} sinks when the first token that is no sink leaves the window; "
            f"raise growth.floor above {spec.sinks}, or write merging: {{kind: drop}}"
        )
    if isinstance(spec.routing, NearestSpec) and not spec.routing.new_slots:
        whole = spec.growth.first_chunk == "whole" and chunk > spec.sinks
        if not whole and not (spec.sinks == 0 and isinstance(spec.admission, NoveltySpec)):
            raise ValueError(
                "routing.new_slots: false leaves the first chunk without a slot to join unless it founds whole "
                "(and is longer than the sinks), or sinks are 0 and admission is novelty; "
                f"got sinks {spec.sinks}, admission {spec.admission.kind}, first_chunk {spec.growth.first_chunk}; "
                "set growth.first_chunk: whole"
            )


def _weights(spec: PolicySpec) -> None:
    weighs = spec.merging.build().weighs
    if spec.readout.build().divides_by_mass and weighs.keys != weighs.values:
        raise ValueError(
            f"merging.weigh.keys and merging.weigh.values must be equal where a readout divides by the mass, "
            f"got keys {str(weighs.keys).lower()} and values {str(weighs.values).lower()}; "
            "set both, or use readout: {key: layer-norm, value: birth-radius}"
        )


def _mass_bias(spec: PolicySpec) -> None:
    merging = spec.merging.build()
    weighs = type(merging).weight is not Merging.weight and not merging.by_share
    if spec.readout.bias == "mass" and (weighs or not merging.additive):
        raise ValueError(
            "readout.bias: mass needs weights that no gradient flows through (merging mean, or weight: share), "
            f"got merging {spec.merging.kind}; use bias: count"
        )


def _radius(spec: PolicySpec) -> None:
    if (
        spec.readout.value == "birth-radius"
        and not isinstance(spec.growth, NoGrowthSpec)
        and isinstance(spec.admission, NoAdmissionSpec)
    ):
        raise ValueError(
            "readout.value: birth-radius needs slots founded by one token, and with admission none routing "
            f"{spec.routing.kind} founds them by runs; use value: mean-norm, or admission: {{kind: novelty}}"
        )


def _observing(spec: PolicySpec) -> None:
    admission = spec.admission.build()
    if spec.observe.queries == 0:
        for field, needed in (
            (f"admission: {spec.admission.kind}", admission is not None and admission.needs_evidence),
            ("merging.weight: share", spec.merging.build().by_share),
        ):
            if needed and not isinstance(spec.growth, NoGrowthSpec):
                raise ValueError(
                    f"{field} judges by what queries attend to, but observe.queries is 0; "
                    "set observe: {queries: 16}, or as many as a chunk has tokens"
                )
        return
    if isinstance(spec.growth, NoGrowthSpec):
        raise ValueError("observe: with growth none there is nothing to judge; leave observe out, or choose a growth")
    if not spec.merging.build().additive:
        raise ValueError(
            f"observe: merging {spec.merging.kind} is not additive, and what readers tell of rows could not be kept "
            "with it; use merging mean, weighted-mean or drop"
        )


def _reading_again(spec: PolicySpec) -> None:
    observe, window = spec.observe, spec.window
    if not observe.again:
        return
    policy = Policy(spec)
    if policy.takes_boundaries or not isinstance(window, BlockWindowSpec) or observe.again > window.chunks:
        raise ValueError(
            "observe.again: chunks are read again while they are still in the window, so there may be as many as a "
            f"block window of fixed chunks has, got {observe.again} with window {window.kind} and chunker "
            f"{spec.chunker.kind}; set it to at most window.chunks, or to 0"
        )
    admission = policy.admission
    ranks = admission is not None and admission.needs_evidence and admission.needs_errors
    if not observe.queries or not ranks:
        raise ValueError(
            "observe.again: who reads again tells errors, and nothing here ranks rows by these, got admission "
            f"{spec.admission.kind} and observe.queries {observe.queries}; use admission: {{kind: output-error}}"
        )
    if policy.rotary.turns_queries:
        raise ValueError(
            f"observe.again: who reads again asks from where they stand, and rotary {spec.rotary.kind} turns queries "
            "back before they meet slots; use rotary: {kind: rerotate} or {kind: keep}"
        )


def _expecting(spec: PolicySpec) -> None:
    policy = Policy(spec)
    if policy.expects is None:
        return
    if spec.observe.readers != "next":
        raise ValueError(
            f"admission: {spec.admission.kind} expects readers who go on with the text, got observe.readers "
            f"{spec.observe.readers}; leave readers out, or use admission: {{kind: attention}}"
        )
    if policy.rotary.turns_queries:
        raise ValueError(
            f"admission: {spec.admission.kind} expects queries at places to come, and rotary {spec.rotary.kind} turns "
            "them back before they meet slots; use rotary: {kind: rerotate} or {kind: keep}"
        )


def _competing(spec: PolicySpec) -> None:
    if spec.eviction == "never" or isinstance(spec.growth, NoGrowthSpec):
        return
    admission, merging = spec.admission.build(), spec.merging.build()
    if admission is None or not admission.rates_slots:
        raise ValueError(
            f"eviction: weakest needs an admission that rates slots as it rates tokens, got {spec.admission.kind}; "
            "use admission: {kind: output-error}, attention, expected-attention, key-norm, key-difference or recency"
        )
    if not merging.additive:
        raise ValueError(f"eviction: weakest needs an additive merge rule or drop, got {spec.merging.kind}")
    if merging.joins and isinstance(spec.routing, NearestSpec) and not spec.routing.new_slots:
        raise ValueError(
            "eviction: weakest needs routing.new_slots: true, for rows that lose join rows that stay; "
            "set it, or write merging: {kind: drop}"
        )


def _heads(spec: PolicySpec) -> None:
    if isinstance(spec.growth, NoGrowthSpec) and spec.heads != HeadsSpec():
        raise ValueError("heads: with growth none there are no slots to share; leave heads out, or choose a growth")


class Policy:
    """A policy's pieces, and what follows from them alone. Never changes, so that threads and copies may share it.

    chunk: tokens that leave together (0 where nothing leaves), at most where takes_boundaries: the caller says where
    chunks end; sinks_only: growth is none, so that slots are sinks and nothing else, each a plain token, which queries
    meet as they meet the window; head_ratios: how many times the growth's slots each head gets, where heads differ
    (then each `head_policies` tells what one of them does).
    """

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self.chunker = spec.chunker.build()
        self.window = spec.window.build(self.chunker.size)
        self.chunk = self.window.unit or 0
        self.takes_boundaries = self.chunker.given
        self.sinks = spec.sinks
        self.growth = spec.growth.build()
        self.head_ratios = spec.heads.uneven
        self.sinks_only = self.growth is None
        self.observation = spec.observe.build(self.chunker.size, self.takes_boundaries)
        self.storage = spec.storage.build()
        self.admission: Admission | None = None
        self.routing: Routing = Discard()
        self.merging: Merging = Drop()
        self.readout = ReadoutSpec(temperatures=spec.readout.temperatures).build()
        self.rotary = Rotary()
        if not self.sinks_only:  # else sinks are kept as they came, and nothing else is: by the pieces above
            self.admission = spec.admission.build()
            self.routing = spec.routing.build()
            self.merging = spec.merging.build()
            self.readout = spec.readout.build()
            self.rotary = spec.rotary.build()
        # Slots after each chunk, as far as anybody has asked: entries are only ever added, one thread at a time.
        self._slots: list[int] = [0]
        self._counting = threading.Lock()

    def __copy__(self) -> Policy:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Policy:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the declaration, built again."""
        return PolicySpec.build, (self.spec,)

    @property
    def name(self) -> str | None:
        """The name of its file, if it came from one."""
        return self.spec.name

    @functools.cached_property
    def weighted(self) -> bool:
        """Whether a token's mass can differ from 1, so that slots keep their mass apart from their count."""
        own_weights = type(self.merging).weight is not Merging.weight
        return own_weights or not self.merging.additive

    @functools.cached_property
    def observes(self) -> bool:
        """Whether queries are observed: then the plan waits for what has been read."""
        return self.observation.queries > 0 and not self.sinks_only

    @property
    def expects(self) -> Expectation | None:
        """Readers to come, whose attention is expected from the observed queries; None: what these told counts."""
        return None if self.admission is None else self.admission.expects

    @functools.cached_property
    def plans_ahead(self) -> bool:
        """Whether keys alone say where tokens go, so that `memkit.plan` can be asked."""
        return not (self.observes or self.competes or self.head_ratios)

    @functools.cached_property
    def compares(self) -> bool:
        """Whether admission or routing looks at slots' keys."""
        return self.routing.compares or (self.admission is not None and self.admission.compares)

    @functools.cached_property
    def sequential(self) -> bool:
        """Whether a pass with gradients is recorded operation by operation: what it sums is no plain sum of tokens."""
        return not self.merging.additive or not self.plans_ahead

    @functools.cached_property
    def competes(self) -> bool:
        """Whether slots compete with leaving tokens for the budget."""
        return self.spec.eviction == "weakest" and not self.sinks_only

    @functools.cached_property
    def missed(self) -> Missed:
        """What observed queries would miss without a row: the error in its evidence."""
        if self.admission is None or type(self.admission).missed is Admission.missed:
            return output_errors
        return self.admission.missed

    @functools.cached_property
    def replaces(self) -> bool:
        """Whether a fold may move slots or weigh them anew, so that it writes all of them; else it adds to some."""
        return self.competes or self.observes

    @functools.cached_property
    def fills_up(self) -> bool:
        """Whether rows of the batch with unequal numbers of slots compete at once, those with fewer filled up."""
        return self.competes and self.expects is None and self.admission is not None and self.admission.fills_up

    @functools.cached_property
    def holds_once(self) -> bool:
        """Whether slots are held as they are read, for that tells their sums. Sinks without growth are few, and plain
        sums of one token."""
        return self.storage.once and not self.sinks_only and not self.readout.own

    def holds_once_in(self, dtype: torch.dtype) -> bool:
        """Whether slots are held so from the first call on, for keys of this dtype; else once a token is decoded."""
        return self.holds_once and (self.replaces or self.storage.saves(dtype))

    @functools.cached_property
    def keeps_keys(self) -> bool:
        """Whether a slot's key is its founder's, just as that token brought it."""
        merging = self.merging
        founders = merging.of == "values" or not merging.joins
        reads = self.readout.means_keys and not self.readout.own
        return founders and merging.additive and reads and self.rotary.reversible

    @functools.cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """The numbers that each slot keeps besides its sums: its count, and what its pieces need."""
        wanted = (*self.readout.statistics, *self.rotary.statistics)
        mass = self.weighted and (self.readout.divides_by_mass or self.merging.by_share or MASS in wanted)
        rest = tuple(statistic for statistic in wanted if statistic is not MASS)
        return (COUNT, *((MASS,) if mass else ()), *rest)

    @functools.cached_property
    def streams(self) -> tuple[str, ...]:
        """What each token in the window carries."""
        extra = {
            "weights": Need.MERGE_WEIGHTS in self.needs,
            "positions": Need.ROTATION in self.needs,
            "evidence": self.observes,
        }
        return ("keys", "values", *(name for name, needed in extra.items() if needed))

    @functools.cached_property
    def needs(self) -> frozenset[Need]:
        """What it needs besides queries, keys and values: what its pieces need."""
        turns = frozenset() if self.expects is None else frozenset({Need.ROTATION})
        return self.merging.needs | self.readout.needs | self.rotary.needs | turns

    @property
    def learned(self) -> tuple[Need, ...]:
        """Those of its needs that a layer must have learned; empty where a stock model can run it."""
        return tuple(need for need in Need if need.learned and need in self.needs)

    @functools.cached_property
    def needs_rotation(self) -> bool:
        """Whether `attend` must be given `rotation`."""
        return Need.ROTATION in self.needs

    @property
    def turning(self) -> str:
        """What of it turns back what was rotated, as messages say it, where it needs the rotation."""
        if self.rotary.needs or self.expects is None:
            return f"rotary {self.spec.rotary.kind} un-rotates keys"
        return f"admission {self.spec.admission.kind} un-rotates queries"

    @functools.cached_property
    def head_policies(self) -> tuple[tuple[int, Policy], ...]:
        """Neighbouring heads with equal ratios: how many they are, and the policy that each of them follows.

        Empty where all heads follow this one.
        """
        if self.head_ratios is None:
            return ()
        runs = [(len(list(run)), ratio) for ratio, run in itertools.groupby(self.head_ratios)]
        built = {ratio: self.spec.with_ratios(ratio).build() for _, ratio in runs}
        return tuple((heads, built[ratio]) for heads, ratio in runs)

    def budget(self, begin: int, end: int | None = None, arrives: int | None = None) -> int:
        """Slots allowed once the tokens begin … end − 1 have left the window, as one chunk, sinks counted.

        They leave when the token `arrives` does. Left out: those of a chunk of most tokens, before others as long.
        """
        end = begin + self.chunk if end is None else end
        if self.growth is None:
            return min(self.sinks, end)
        tokens = end
        if self.growth.spec.counts == "seen":
            tokens = begin + (self.window.capacity or 0) if arrives is None else arrives
        budget = self.growth.budget(tokens)
        return min(share_of(self.spec.heads.ratio, max(self.sinks, budget), self.sinks), end)

    def slots_after_chunk(self, index: int) -> int:
        """Slots once chunks 0 … index have left the window; chunk −1 stands for none.

        m ← m + min(C, max(0, budget − m)); the first chunk founds whole where growth says so.
        """
        if self.growth is None:
            return min(self.sinks, (index + 1) * self.chunk)
        if len(self._slots) <= index + 1:
            with self._counting:
                while len(self._slots) <= index + 1:
                    self._slots.append(self._slots_after_next(len(self._slots) - 1, self._slots[-1]))
        return self._slots[index + 1]

    def _slots_after_next(self, index: int, slots: int) -> int:
        """Slots once chunk `index` has left, where there are `slots` before."""
        return self.slots_with_chunk(slots, index * self.chunk, (index + 1) * self.chunk, None)

    def slots_with_chunk(self, slots: int, begin: int, end: int, arrives: int | None) -> int:
        """Slots once tokens begin … end − 1 have left as one chunk, where there are `slots` before; see `budget`."""
        if self.growth is not None and begin == 0 and self.growth.spec.first_chunk == "whole":
            return slots + end
        return slots + min(end - begin, max(0, self.budget(begin, end, arrives) - slots))

    def slots_after(self, tokens: int) -> int:
        """Slots there are to read after `tokens` tokens of one row; where the caller says where chunks end, as long as
        none is said to."""
        if tokens <= 0 or not self.chunk:
            return 0
        return self.slots_after_chunk(int(self.window.begin(tokens - 1)) // self.chunk - 1)

    def __repr__(self) -> str:
        return f"Policy({self.name or self.spec!r})"
