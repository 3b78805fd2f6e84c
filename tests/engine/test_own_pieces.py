"""Pieces of a user's own, registered like ours: the engine and the oracle ask them alike."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import memkit
from memkit.engine.compress import NEIGHBOURS
from memkit.pieces import (
    Admission,
    AdmissionSpec,
    ChunkContext,
    Growth,
    GrowthSpec,
    Merging,
    MergingSpec,
    Need,
    Readout,
    ReadoutSpec,
    Rotary,
    RotarySpec,
    Routing,
    RoutingSpec,
    registry,
)
from memkit.pieces.admission import mean_of_neighbours
from memkit.pieces.statistics import COUNT, Numbers
from tests.engine.cases import CHUNK, Case, assert_close, assert_same_plan, make_case, small, tolerance
from tests.engine.test_again import evidence, run
from tests.engine.test_agreement import assert_agrees


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test registers is gone after it."""
    for family, known in registry._REGISTRY.items():
        monkeypatch.setitem(registry._REGISTRY, family, dict(known))


def own(changes: dict[str, Any], base: str = "kvm-sqrt-16") -> memkit.PolicySpec:
    return memkit.load_policy(small(base), changes)


class Ema(Merging):
    """A slot moves a quarter of the way to each token that joins it. Order matters."""

    additive = False

    def combine(self, slot: Tensor, token: Tensor) -> Tensor:
        return slot + (token - slot) / 4


class EmaSpec(MergingSpec):
    kind: Literal["test-ema"] = "test-ema"

    def build(self) -> Ema:
        return Ema()


class Loud(Merging):
    """The larger a key, the more it weighs."""

    def weight(self, keys: Tensor, weights: Tensor | None) -> Tensor:
        return keys.abs().amax(-1)


class LoudSpec(MergingSpec):
    kind: Literal["test-loud"] = "test-loud"

    def build(self) -> Loud:
        return Loud()


class Cubic(Growth):
    def size(self, tokens: int) -> float:
        return math.cbrt(tokens) * 4


class CubicSpec(GrowthSpec):
    kind: Literal["test-cubic"] = "test-cubic"

    def build(self) -> Cubic:
        return Cubic(self)


class Familiar(Admission):
    """The opposite of novelty."""

    compares = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return chunk.redundancy


class FamiliarSpec(AdmissionSpec):
    kind: Literal["test-familiar"] = "test-familiar"

    def build(self) -> Familiar:
        return Familiar()


class Middle(Admission):
    """The tokens in the middle of those that may be chosen."""

    def score(self, chunk: ChunkContext) -> Tensor:
        size = chunk.keys.shape[2]
        return -(2 * chunk.offsets - chunk.sink_tokens - size + 1).abs()


class MiddleSpec(AdmissionSpec):
    kind: Literal["test-middle"] = "test-middle"

    def build(self) -> Middle:
        return Middle()


class Missed(Admission):
    """What outputs would miss and readers looked at: by evidence, of slots as of tokens."""

    rates_slots = needs_evidence = True

    def score(self, chunk: ChunkContext) -> Tensor:
        assert chunk.evidence is not None
        assert chunk.values is not None
        return chunk.evidence.error * chunk.evidence.share + chunk.values.norm(dim=-1) / 64


class MissedSpec(AdmissionSpec):
    kind: Literal["test-missed"] = "test-missed"

    def build(self) -> Missed:
        return Missed()


class Peak(Admission):
    """Readers miss what any one query of theirs pays most to; the first head of a group counts three times."""

    rates_slots = needs_evidence = True

    def missed(self, shares: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
        assert shares.shape[-2] == outputs.shape[-2]
        assert shares.shape[-1] == values.shape[-2]
        heads = shares.unflatten(-2, (2, -1)).amax(-2)
        return 3 * heads[..., 0, :] + heads[..., 1, :] * (1 + values.norm(dim=-1))

    def score(self, chunk: ChunkContext) -> Tensor:
        assert chunk.evidence is not None
        return chunk.evidence.error


class PeakSpec(AdmissionSpec):
    kind: Literal["test-peak"] = "test-peak"

    def build(self) -> Peak:
        return Peak()


class Eldest(Routing):
    """All that found nothing join the first slot that is no sink."""

    def targets(self, chunk: ChunkContext, founded: Tensor | None) -> Tensor:
        return chunk.offsets * 0 + chunk.sinks


class EldestSpec(RoutingSpec):
    kind: Literal["test-eldest"] = "test-eldest"

    def build(self) -> Eldest:
        return Eldest()


class RoundRobin(Routing):
    """The first tokens found; the others go round the slots that are no sinks."""

    founds = True

    def founders(self, chunk: ChunkContext) -> Tensor:
        return chunk.offsets < chunk.new_slots

    def targets(self, chunk: ChunkContext, founded: Tensor | None) -> Tensor:
        slots = chunk.slots_before + chunk.new_slots - chunk.sinks
        return chunk.sinks + (chunk.offsets - chunk.new_slots) % slots


class RoundRobinSpec(RoutingSpec):
    kind: Literal["test-round-robin"] = "test-round-robin"

    def build(self) -> RoundRobin:
        return RoundRobin()


class Half(Rotary):
    """Memory keys are half as long, and met by queries twice as long."""

    def memory_keys(self, keys: Tensor, rotation: Any, positions: Any) -> Tensor:
        return keys / 2

    def memory_queries(self, queries: Tensor, rotation: Any, positions: Any) -> Tensor:
        return queries * 2


class HalfSpec(RotarySpec):
    kind: Literal["test-half"] = "test-half"

    def build(self) -> Half:
        return Half()


class Ahead(Rotary):
    """Slots stand three positions after their tokens' mean."""

    needs = frozenset({Need.ROTATION})
    rotates_slots = True

    def memory_keys(self, keys: Tensor, rotation: Any, positions: Any) -> Tensor:
        return rotation.apply(keys, positions, inverse=True)

    def slot_keys(self, keys: Tensor, rotation: Any, positions: Any) -> Tensor:
        return rotation.apply(keys, positions + 3)


class AheadSpec(RotarySpec):
    kind: Literal["test-ahead"] = "test-ahead"

    def build(self) -> Ahead:
        return Ahead()


class Mirrored(Readout):
    """What is read tells a slot's sums by no number alone."""

    def key(self, sums: Tensor, numbers: Numbers, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        return super().key(sums, numbers, norm).roll(1, -1)

    def value(self, sums: Tensor, numbers: Numbers) -> Tensor:
        return super().value(sums, numbers).flip(-1).tanh()

    def bias(self, numbers: Numbers) -> Tensor | None:
        return numbers[COUNT].clamp(min=1).log() / 2


class MirroredSpec(ReadoutSpec):
    def build(self) -> Mirrored:
        return Mirrored(self)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("kvm-sqrt-16", {}),
        ("kvm-sqrt-16", {"merging.of": "values", "readout.key": "mean"}),
        ("block-mean-8", {}),
        ("ovq-1024", {}),
        ("untrained-kvm-sqrt", {}),
        ("untrained-kvm-sqrt", {"merging.of": "values"}),
        ("untrained-observed", {"growth.slots": 10}),
        ("caote-512", {"growth.slots": 10}),
    ],
)
def test_a_readout(base: str, changes: dict[str, Any]):
    spec = own(changes, base)
    spec = spec.model_copy(update={"readout": MirroredSpec(**spec.readout.model_dump())})
    case = make_case(spec, 45)
    assert_agrees(case)
    with torch.no_grad():
        (output, memory), outputs = case.part(0, 20).attend(), list[Tensor]()
        outputs.append(output)
        for position in range(20, 45):
            output, memory = case.part(position, position + 1).attend(memory=memory)
            outputs.append(output)
        expected, _ = case.attend(backend="reference")
    assert_close(torch.cat(outputs, 2), expected, tolerance(torch.float64), "decoded")


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param(LoudSpec, {"merging": {"kind": "test-loud"}}, id="merging"),
        pytest.param(CubicSpec, {"growth": {"kind": "test-cubic", "floor": 4}}, id="growth"),
        pytest.param(FamiliarSpec, {"admission": {"kind": "test-familiar"}}, id="admission that compares"),
        pytest.param(MiddleSpec, {"admission": {"kind": "test-middle"}, "sinks": 2}, id="admission"),
        pytest.param(
            RoundRobinSpec,
            {"routing": {"kind": "test-round-robin"}, "admission": {"kind": "none"}, "readout.value": "mean-norm"},
            id="routing",
        ),
        pytest.param(HalfSpec, {"rotary": {"kind": "test-half"}}, id="rotary"),
        pytest.param(AheadSpec, {"rotary": {"kind": "test-ahead"}}, id="rotary that rotates slots"),
    ],
)
def test_engine_and_oracle_agree(spec: type, changes: dict[str, Any]):
    memkit.register(spec)
    case = make_case(own(changes), 75)
    assert_same_plan(case.plan(), case.oracle_plan())
    assert_agrees(case)


@pytest.mark.parametrize("eviction", ["never", "weakest"])
@pytest.mark.parametrize("routing", ["nearest", "test-eldest"])
def test_an_admission_that_sees_evidence(eviction: str, routing: str):
    memkit.register(MissedSpec)
    memkit.register(EldestSpec)
    changes = {"admission": {"kind": "test-missed"}, "routing": {"kind": routing}, "eviction": eviction, "sinks": 2}
    assert_agrees(make_case(own(changes, "untrained-observed"), 75))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="mean"),
        pytest.param({"observe.queries": 3, "observe.apart": 4}, id="three queries that stand apart"),
        pytest.param(
            {"observe.aggregate": "max", "observe.decay": 1.0, "merging.cap": 1.0}, id="the most of any chunk"
        ),
        pytest.param({"observe.again": 2}, id="read again"),
    ],
)
def test_an_admission_that_measures_what_readers_miss(changes: dict[str, Any]):
    memkit.register(PeakSpec)
    assert_agrees(make_case(own({"admission": {"kind": "test-peak"}, **changes}, "untrained-observed"), 75))


@torch.no_grad()
def test_heads_of_unequal_numbers_of_slots_are_asked_by_the_same_measure():
    memkit.register(PeakSpec)
    changes = {"admission": {"kind": "test-peak"}, "heads": {"ratios": (0.5, 1.5)}}
    case = make_case(own(changes, "untrained-observed"), 75)
    found, expected = case.attend()[0], case.attend(backend="reference")[0]
    assert_close(found, expected, tolerance(torch.float64), "outputs")


@torch.no_grad()
def test_who_reads_again_is_asked_by_the_same_measure():
    memkit.register(PeakSpec)
    case = make_case(own({"admission": {"kind": "test-peak"}, "observe.again": 2}, "untrained-observed"), 75)
    output, told = run(case, 2 * CHUNK, 10_000, "reference")
    for split in (10_000, 5):
        found, memory = run(case, 2 * CHUNK, split, "torch")
        assert_close(found, output, tolerance(torch.float64), "output")
        for mine, theirs in zip(evidence(memory), evidence(told), strict=True):
            assert_close(mine, theirs, tolerance(torch.float64), "evidence")


@torch.no_grad()
def test_a_prompt_is_compressed_by_the_same_measure():
    memkit.register(PeakSpec)
    case = make_case(own({"admission": {"kind": "test-peak"}}, "untrained-observed"), 75)
    queries, keys, values = (case.tensors[name] for name in ("queries", "keys", "values"))
    readers, group = queries[:, :, :7], queries.shape[1] // keys.shape[1]
    asked = readers.unflatten(1, (-1, group)).flatten(2, 3)
    shares = (asked @ keys.mT * keys.shape[-1] ** -0.5).softmax(-1)
    worth = mean_of_neighbours(Peak().missed(shares, values, shares @ values).sqrt(), NEIGHBOURS).square()
    memory = memkit.compress(case.spec, queries, keys, values, readers=readers, rotation=case.rotation)
    window = int(memory.held_rows.max())
    told = memory.window.last(window)["evidence"][..., 0]
    assert_close(told, worth[..., -window:], tolerance(torch.float64), "what was missed")


@pytest.mark.parametrize("base", ["kvm-sqrt-16", "untrained-kvm-sqrt", "block-mean-8", "ovq-1024"])
def test_a_rule_that_is_not_additive(base: str):
    memkit.register(EmaSpec)
    changes: dict[str, Any] = {"merging": {"kind": "test-ema"}}
    case = make_case(own(changes, base), 75)
    assert_same_plan(case.plan(), case.oracle_plan())
    assert_agrees(case)


@torch.no_grad()
@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param(EmaSpec, {"merging": {"kind": "test-ema"}}, id="merging that is not additive"),
        pytest.param(HalfSpec, {"rotary": {"kind": "test-half"}}, id="rotary with queries of its own"),
        pytest.param(AheadSpec, {"rotary": {"kind": "test-ahead"}}, id="rotary that rotates slots"),
    ],
)
def test_one_token_at_a_time(spec: type, changes: dict[str, Any]):
    memkit.register(spec)
    case = make_case(own(changes, "untrained-kvm-sqrt"), 60)
    expected, _ = case.attend()
    memory, outputs = None, []
    for position in range(60):
        output, memory = case.part(position, position + 1).attend(memory=memory)
        outputs.append(output)
    assert torch.allclose(torch.cat(outputs, dim=2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_who_joins_a_slot_before_its_founder_comes_is_kept(backend: str):
    # Token 0 joins the slot that token 1, behind it in the chunk, founds: 1, then a quarter of the way to 0.
    memkit.register(EmaSpec)
    spec = memkit.PolicySpec(
        chunker={"kind": "fixed", "size": 2},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": 1},
        admission={"kind": "recency"},
        merging={"kind": "test-ema"},
    )
    keys = torch.tensor([[0.0], [1.0], [0.0]])[None, None]
    _, memory = memkit.attend(spec, keys, keys, keys, backend=backend)
    assert memory.counts.tolist() == [[[2]]]
    assert memory.sums[0, 0, 0].tolist() == [0.75, 0.75]


def test_a_policy_of_own_pieces_saves_what_it_is():
    memkit.register(EmaSpec)
    spec = own({"merging": {"kind": "test-ema"}})
    assert memkit.PolicySpec(**spec.model_dump()) == spec
    assert isinstance(make_case(spec, 3), Case)
