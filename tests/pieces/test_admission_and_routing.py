"""Who founds a slot and who joins which, against brute force that reads like the sentences that define them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit.engine.plan import assign
from memkit.errors import PolicyError
from memkit.pieces.admission import (
    Admission,
    AdmissionSpec,
    NoAdmissionSpec,
    NoveltySpec,
    OutputErrorSpec,
    RecencySpec,
    StrideSpec,
)
from memkit.pieces.chunk import Assignment, ChunkContext
from memkit.pieces.evidence import Evidence
from memkit.pieces.routing import NearestSpec, Routing, RoutingSpec, SegmentSpec
from memkit.pieces.similarity import NearestSlots, Similarity, search, similarities

WIDTH = 2


def leaving(
    keys: Tensor,
    slots: Tensor,
    *,
    slots_before: int | Tensor,
    new_slots: int | Tensor,
    sink_tokens: int | Tensor = 0,
    sinks: int = 0,
    joins: bool = True,
) -> ChunkContext:
    """A chunk whose tokens, as slots of their own, are read as they are."""
    return ChunkContext(keys, slots, slots_before, sinks, sink_tokens, new_slots, joins, alone=lambda: keys)


@dataclass(frozen=True)
class Choice:
    """What of a policy decides where tokens go."""

    admission: Admission | None
    routing: Routing


def place(routing: RoutingSpec, admission: AdmissionSpec, chunk: ChunkContext) -> Assignment:
    choice = Choice(admission.build(), routing.build())
    assignment = assign(choice, replace(chunk, similarity=choice.routing.similarity))
    assert assignment.drops or (assignment.slot >= 0).all()
    return assignment


def founders(admission: AdmissionSpec, size: int, grant: int, forced: int = 0) -> list[int]:
    """Offsets of the tokens that found, for keys that tell nothing."""
    keys = torch.zeros(1, 1, size, WIDTH)
    slots = torch.zeros(1, 1, 3, WIDTH)
    chunk = leaving(keys, slots, slots_before=3, new_slots=grant, sink_tokens=forced, joins=False)
    assignment = place(NearestSpec(), admission, chunk)
    offsets = assignment.founded[0, 0].nonzero().flatten().tolist()
    assert assignment.slot[0, 0, offsets].tolist() == list(range(3, 3 + grant))
    assert (assignment.slot[0, 0] >= 0).sum() == grant
    return offsets


SIZES = [(size, grant, forced) for size in range(1, 13) for grant in range(size + 1) for forced in range(grant + 1)]


def test_stride_founds_at_even_offsets():
    for size, grant, forced in SIZES:
        free, chosen = size - forced, grant - forced
        wanted = [*range(forced), *(forced + i * free // chosen for i in range(chosen))]
        assert founders(StrideSpec(), size, grant, forced) == wanted, (size, grant, forced)


def test_recency_founds_with_the_last_tokens():
    for size, grant, forced in SIZES:
        wanted = [*range(forced), *range(size - (grant - forced), size)]
        assert founders(RecencySpec(), size, grant, forced) == wanted, (size, grant, forced)


def test_novelty_breaks_ties_by_the_earliest_token():
    for size, grant, forced in SIZES:
        assert founders(NoveltySpec(), size, grant, forced) == list(range(grant)), (size, grant, forced)


def test_nobody_is_admitted_by_none():
    assert NoAdmissionSpec().build() is None


def test_segment_cuts_the_chunk_into_runs():
    keys = torch.zeros(1, 1, 1, WIDTH)
    for size, grant, forced in SIZES:
        if forced == grant < size:
            continue  # that every token has a slot to join is the policy's promise; see the next test
        chunk = leaving(
            keys.expand(1, 1, size, WIDTH), keys[:, :, :0], slots_before=5, new_slots=grant, sink_tokens=forced
        )
        assignment = place(SegmentSpec(), NoAdmissionSpec(), chunk)
        free, runs = size - forced, grant - forced
        wanted = {offset: (5 + offset, True) for offset in range(forced)}
        for run in range(runs):
            begin, end = run * free // runs, (run + 1) * free // runs
            wanted |= {forced + j: (5 + forced + run, j == begin) for j in range(begin, end)}
        found = zip(assignment.slot[0, 0].tolist(), assignment.founded[0, 0].tolist(), strict=True)
        assert list(found) == [wanted[offset] for offset in range(size)], (size, grant, forced)


@pytest.mark.parametrize("joining", [True, False])
def test_segment_without_a_grant_joins_the_newest_slot(joining: bool):
    keys = torch.zeros(1, 1, 4, WIDTH)
    chunk = leaving(keys, keys[:, :, :0], slots_before=7, new_slots=0, sinks=2, joins=joining)
    assignment = place(SegmentSpec(), NoAdmissionSpec(), chunk)
    assert assignment.slot.flatten().tolist() == [6 if joining else -1] * 4
    assert not assignment.founded.any()


@given(data=st.data())
def test_segment_with_an_admission_starts_a_run_at_each_founder(data: st.DataObject):
    """A token that founds nothing joins the newest slot before it that is no sink, or the first one after it."""
    size, live, sinks = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 3))
    forced = min(max(sinks - live, 0), size)
    grant = data.draw(st.integers(forced, size))
    assume(live + grant > sinks or grant == size)  # the policy promises that there is a slot to join
    admission = data.draw(st.sampled_from([NoveltySpec(), RecencySpec(), StrideSpec()]))
    keys = torch.tensor(data.draw(vectors(size, size)), dtype=torch.float64).reshape(1, 1, -1, WIDTH)
    slots = torch.tensor(data.draw(vectors(live, live)), dtype=torch.float64).reshape(1, 1, -1, WIDTH)
    counts = {"slots_before": live, "new_slots": grant, "sink_tokens": forced, "sinks": sinks}
    assignment = place(SegmentSpec(), admission, leaving(keys, slots, **counts))
    founded = assignment.founded[0, 0].tolist()
    assert sum(founded) == grant
    # Who founds is the admission's choice alone: the same as under another routing.
    assert torch.equal(assignment.founded, place(NearestSpec(), admission, leaving(keys, slots, **counts)).founded)
    newest = live - 1
    for offset in range(size):
        newest += founded[offset]
        wanted = newest if founded[offset] else max(newest, sinks)
        assert assignment.slot[0, 0, offset] == wanted, offset


def vectors(least: int, most: int) -> st.SearchStrategy[list[list[int]]]:
    """Small whole numbers, so that similarities are exact and ties happen."""
    return st.lists(st.lists(st.integers(-3, 3), min_size=WIDTH, max_size=WIDTH), min_size=least, max_size=most)


SIMILARITY: dict[str, Callable[[list[int], list[int]], float]] = {
    "dot": lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)),
    "l2": lambda a, b: -sum((x - y) ** 2 for x, y in zip(a, b, strict=True)),
}


def brute_force(
    keys: list[list[int]],
    slots: list[list[int]],
    grant: int,
    forced: int,
    sinks: int,
    admission: str,
    similarity: Callable[[list[int], list[int]], float],
    new_slots: bool,
    joining: bool,
) -> list[tuple[int, bool]]:
    """Token by token: (slot, founded)."""
    size, live = len(keys), len(slots)
    first = admission == "novelty" and live == 0 and grant > 0  # token 0 founds, and the others are judged against it
    chosen = max(forced, int(first))
    judges = [keys[0]] if first else slots
    if admission == "novelty":
        rest = sorted(range(chosen, size), key=lambda j: max((similarity(keys[j], s) for s in judges), default=0))
        found = sorted([*range(chosen), *rest[: grant - chosen]])
    else:
        found = [*range(forced), *range(size - (grant - forced), size)]
    targets = {slot: key for slot, key in enumerate(slots) if slot >= sinks}
    for slot, offset in enumerate(found, start=live):
        if offset >= forced and (new_slots or (first and offset == 0)):
            targets[slot] = keys[offset]
    placed: list[tuple[int, bool]] = []
    for offset, key in enumerate(keys):
        if offset in found:
            placed.append((live + found.index(offset), True))
        elif not joining:
            placed.append((-1, False))
        else:
            assume(targets)  # the policy promises that there is a slot to join
            best = max(targets, key=lambda slot: (similarity(key, targets[slot]), -slot))
            placed.append((best, False))
    return placed


@given(data=st.data())
def test_nearest_agrees_with_brute_force(data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(SIMILARITY)))
    keys, slots = data.draw(vectors(1, 7)), data.draw(vectors(0, 6))
    grant = data.draw(st.integers(0, len(keys)))
    sinks = data.draw(st.integers(0, 3))
    forced = min(sinks - len(slots), grant) if len(slots) < sinks else 0
    admission = data.draw(st.sampled_from(["novelty", "recency"]))
    new_slots, joining = data.draw(st.booleans()), data.draw(st.booleans())
    options = (admission, SIMILARITY[name], new_slots, joining)
    wanted = brute_force(keys, slots, grant, forced, sinks, *options)

    chunk = leaving(
        torch.tensor(keys, dtype=torch.float64).reshape(1, 1, -1, WIDTH),
        torch.tensor(slots, dtype=torch.float64).reshape(1, 1, -1, WIDTH),
        slots_before=len(slots),
        new_slots=grant,
        sink_tokens=forced,
        sinks=sinks,
        joins=joining,
    )
    spec = NoveltySpec() if admission == "novelty" else RecencySpec()
    assignment = place(NearestSpec(similarity=name, new_slots=new_slots), spec, chunk)
    found = list(zip(assignment.slot[0, 0].tolist(), assignment.founded[0, 0].tolist(), strict=True))
    assert found == wanted


def test_cosine_ignores_how_long_keys_are():
    keys = torch.tensor([[0.1, 1.0], [5.0, 0.2]])[None, None]
    slots = torch.tensor([[100.0, 90.0], [0.0, 0.01], [0.02, 0.0]])[None, None]
    placed = {}
    for similarity in ("dot", "cosine"):
        chunk = leaving(keys, slots, slots_before=3, new_slots=0)
        placed[similarity] = place(NearestSpec(similarity=similarity), NoveltySpec(), chunk).slot.flatten()
    assert placed["dot"].tolist() == [0, 0]
    assert placed["cosine"].tolist() == [1, 2]


@pytest.mark.parametrize("routing", [NearestSpec(), NearestSpec(new_slots=False, similarity="l2"), SegmentSpec()])
@pytest.mark.parametrize("admission", [NoveltySpec(), RecencySpec(), StrideSpec(), NoAdmissionSpec()])
def test_rows_with_numbers_of_their_own_are_placed_as_if_alone(routing, admission):
    if isinstance(admission, NoAdmissionSpec) and not routing.build().founds:
        pytest.skip("somebody must say who founds")
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-3, 4, (4, 2, 6, WIDTH), generator=generator).double()
    slots = torch.randint(-3, 4, (4, 2, 5, WIDTH), generator=generator).double()
    empty = not (isinstance(routing, NearestSpec) and not routing.new_slots)  # else there may be no slot to join
    live, grant, forced = [5, 3, 2, 0 if empty else 4], [0, 6, 2, 3], [0, 0, 0, int(empty)]
    rows = [torch.tensor(numbers).view(-1, 1, 1) for numbers in (live, grant, forced)]
    chunks = leaving(keys, slots, slots_before=rows[0], new_slots=rows[1], sink_tokens=rows[2], sinks=1)
    together = place(routing, admission, chunks)
    for row in range(4):
        chunk = leaving(
            keys[row : row + 1],
            slots[row : row + 1, :, : live[row]],
            slots_before=live[row],
            new_slots=grant[row],
            sink_tokens=forced[row],
            sinks=1,
        )
        alone = place(routing, admission, chunk)
        assert torch.equal(together.slot[row], alone.slot[0]), row
        assert torch.equal(together.founded[row], alone.founded[0]), row


def test_novelty_under_l2_is_distance_whatever_the_norms():
    # The longest key is the nearest to its slot: a score without the keys' own norms would call another one known.
    keys = torch.tensor([[10.0, 0.0], [0.0, 2.0]])[None, None]
    slots = torch.tensor([[10.0, 1.0]])[None, None]
    assignment = place(NearestSpec(similarity="l2"), NoveltySpec(), leaving(keys, slots, slots_before=1, new_slots=1))
    assert assignment.founded.flatten().tolist() == [False, True]
    far = torch.tensor([[-10.0, 0.0], [0.0, 2.0]])[None, None]
    near = torch.tensor([[-9.0, 0.0], [0.0, 0.0]])[None, None]
    assignment = place(NearestSpec(similarity="l2"), NoveltySpec(), leaving(far, near, slots_before=2, new_slots=1))
    assert assignment.founded.flatten().tolist() == [False, True]


@pytest.mark.parametrize("count", [1000, 1023, 1024, 1025, 1087, 1088, 1200])
@pytest.mark.parametrize("sinks", [0, 1, 70])
def test_among_many_slots_the_lowest_of_the_nearest(count: int, sinks: int):
    """Many slots are searched run by run; ties across runs, within them and in the odd last one change nothing."""
    generator = torch.Generator().manual_seed(count + sinks)
    slots = torch.randint(-3, 4, (1, 1, count, WIDTH), generator=generator).float()
    slots[0, 0, -1] = 9  # the nearest of all to a key with positive channels
    slots[0, 0, 71::64] = torch.tensor([3.0, -3.0])
    keys = torch.randint(-2, 3, (1, 1, 40, WIDTH), generator=generator).float()
    keys[0, 0, :3] = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    chunk = leaving(keys.repeat(2, 3, 1, 1), slots.repeat(2, 3, 1, 1), slots_before=count, new_slots=0, sinks=sinks)
    assignment = place(NearestSpec(), NoveltySpec(), chunk)
    assert (assignment.slot == assignment.slot[:1, :1]).all()
    for key, found in zip(keys[0, 0].tolist(), assignment.slot[0, 0].tolist(), strict=True):
        scores = [key[0] * slot[0] + key[1] * slot[1] for slot in slots[0, 0, sinks:].tolist()]
        assert found == sinks + scores.index(max(scores))
    assert assignment.slot[0, 0, 0] == count - 1
    assert assignment.slot[0, 0, 2] == sinks


@pytest.mark.parametrize("grant", [0, 3])
def test_searching_run_by_run_changes_nothing(grant: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(grant)
    keys, slots = (torch.randn(2, 2, count, 8, generator=generator) for count in (40, 1100))
    chunk = leaving(keys, slots, slots_before=1100, new_slots=grant, sinks=4)
    by_runs = place(NearestSpec(), NoveltySpec(), chunk)
    monkeypatch.setattr("memkit.pieces.similarity.MANY", 10**9)
    at_once = place(NearestSpec(), NoveltySpec(), chunk)

    assert torch.equal(by_runs.slot, at_once.slot)
    assert torch.equal(by_runs.founded, at_once.founded)


@pytest.mark.parametrize("admission", [NoveltySpec(), RecencySpec(), NoAdmissionSpec()], ids=lambda spec: spec.kind)
def test_similarities_are_for_an_admission_that_compares(admission: AdmissionSpec, monkeypatch: pytest.MonkeyPatch):
    """Where neither admission nor routing looks at the slots, nothing is compared with them."""
    searches: list[Tensor] = []

    def counting(kind: Similarity, keys: Tensor, *rest: Any) -> NearestSlots:
        searches.append(keys)
        return search(kind, keys, *rest)

    monkeypatch.setattr("memkit.pieces.chunk.search", counting)
    keys = torch.ones(1, 1, 4, WIDTH)
    place(SegmentSpec(), admission, leaving(keys, keys, slots_before=4, new_slots=1))
    assert len(searches) == int(admission == NoveltySpec())


@pytest.mark.parametrize("admission", [NoveltySpec(), RecencySpec()], ids=lambda spec: spec.kind)
def test_a_chunk_is_compared_once(admission: AdmissionSpec, monkeypatch: pytest.MonkeyPatch):
    """Who founds and where the others go is one search."""
    searches: list[Tensor] = []

    def counting(kind: Similarity, keys: Tensor, *rest: Any) -> NearestSlots:
        searches.append(keys)
        return search(kind, keys, *rest)

    monkeypatch.setattr("memkit.pieces.chunk.search", counting)
    keys = torch.ones(1, 1, 4, WIDTH)
    place(NearestSpec(), admission, leaving(keys, keys, slots_before=4, new_slots=1))
    assert len(searches) == 1


@pytest.mark.parametrize("kind", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("sinks", [0, 2, 70])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_how_many_slots_are_searched_at_once_changes_nothing(
    kind: Similarity, sinks: int, count: int, monkeypatch: pytest.MonkeyPatch
):
    """Blocks of 64 slots against all at once, and against the definition; whole numbers, so that there are ties."""
    generator = torch.Generator().manual_seed(0)
    keys, slots = (torch.randint(-2, 3, (2, 3, size, 2), generator=generator).float() for size in (7, count))
    live = torch.tensor([count, count // 2])[:, None, None]
    expected = search(kind, keys, slots, live, sinks)
    monkeypatch.setattr("memkit.pieces.similarity.AT_ONCE", {"cpu": 1})
    found = search(kind, keys, slots, live, sinks)

    assert torch.equal(found.score, expected.score)
    assert torch.equal(found.best, expected.best)
    assert torch.equal(found.slot, expected.slot)
    scores = similarities(kind, keys, slots)
    scores[torch.arange(count).expand_as(scores) >= live.unsqueeze(-1)] = -torch.inf
    for row, there in enumerate((count, count // 2)):
        assert torch.equal(found.best[row], scores[row].amax(-1) if there else torch.full((3, 7), -torch.inf))
        if there > sinks:
            assert torch.equal(found.score[row], scores[row, :, :, sinks:].amax(-1))
            first_best = (scores[row, :, :, sinks:] == found.score[row].unsqueeze(-1)).long().argmax(-1) + sinks
            assert torch.equal(found.slot[row], first_best)


@pytest.mark.parametrize("at_once", [1, 7 * 5, 2 * 7 * 5, 10**9])
@pytest.mark.parametrize("grant", [0, 2])
def test_how_much_is_searched_at_once_changes_nothing(at_once: int, grant: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    keys, slots = (torch.randn(2, 3, count, WIDTH, generator=generator) for count in (7, 5))
    live = torch.tensor([5, 3])[:, None, None]
    chunk = leaving(keys, slots, slots_before=live, new_slots=grant, sinks=2)
    expected = place(NearestSpec(), NoveltySpec(), chunk)
    monkeypatch.setattr("memkit.pieces.similarity.AT_ONCE", {"cpu": at_once})
    assignment = place(NearestSpec(), NoveltySpec(), chunk)

    assert torch.equal(assignment.slot, expected.slot)
    assert torch.equal(assignment.founded, expected.founded)
    for row, count in enumerate((5, 3)):
        alone = leaving(
            keys[row : row + 1], slots[row : row + 1, :, :count], slots_before=count, new_slots=grant, sinks=2
        )
        assert torch.equal(place(NearestSpec(), NoveltySpec(), alone).slot[0], assignment.slot[row])


def test_rows_with_and_without_slots_at_once():
    """One row's memory is empty, so that its token 0 founds whatever it looks like; the other's is not."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).repeat(2, 1, 1, 1)
    slots = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(2, 1, 1, 1)
    counts = {"slots_before": torch.tensor([0, 2])[:, None, None], "new_slots": torch.tensor([2, 1])[:, None, None]}
    assignment = place(NearestSpec(), NoveltySpec(), leaving(keys, slots, **counts))

    assert assignment.founded[:, 0].tolist() == [[True, False, True], [False, False, True]]
    assert assignment.slot[:, 0].tolist() == [[0, 0, 1], [1, 0, 2]]


def test_neighbours_have_the_mean_of_their_errors_roots():
    error = torch.tensor([4.0, 0.0, 1.0, 9.0])
    told = torch.stack((error, torch.zeros(4), torch.ones(4)), dim=-1)
    keys = torch.zeros(1, 1, 4, WIDTH)
    chunk = leaving(keys, keys[:, :, :0], slots_before=0, new_slots=2)
    chunk = replace(chunk, evidence=Evidence.of(told[None, None]))

    score = OutputErrorSpec(pool=3).build().score(chunk)[0, 0]

    # As many neighbours as there are: two at the ends.
    assert score.tolist() == pytest.approx([1.0, 1.0, 4 / 3, 2.0], rel=4 * torch.finfo(torch.float32).eps)
    assert torch.equal(OutputErrorSpec().build().score(chunk)[0, 0], error)


def test_rows_that_differ_from_the_others_count_for_more():
    keys = torch.zeros(1, 1, 4, WIDTH)
    keys[0, 0, :, 0] = torch.tensor([2.0, 1.0, 0.0, 3.0])
    keys[0, 0, 2, 1] = 5.0
    values = torch.tensor([0.0, 0.0, 0.0, 8.0])[None, None, :, None].expand_as(keys)
    chunk = leaving(keys, keys[:, :, :0], slots_before=0, new_slots=2)
    told = torch.stack((torch.full((4,), 9.0), torch.zeros(4), torch.ones(4)), dim=-1)
    chunk = replace(chunk, evidence=Evidence.of(told[None, None]), read_values=lambda: values)

    score = OutputErrorSpec(difference=2).build().score(chunk)[0, 0]

    # The mean direction is (3, 1)/√10; values lie 2, 2, 2 and 6 from their mean in each channel.
    likeness = torch.tensor([3.0, 3.0, 1.0, 3.0]) / 10**0.5
    apart = torch.tensor([2.0, 2.0, 2.0, 6.0]) * WIDTH**0.5
    expected = 3 * ((1 - likeness) * apart) ** 2
    assert score.tolist() == pytest.approx(expected.tolist(), rel=128 * torch.finfo(torch.float32).eps)


def test_rows_that_are_not_there_are_none_of_the_others():
    torch.manual_seed(0)
    keys, values, error = torch.randn(2, 1, 6, WIDTH), torch.randn(2, 1, 6, WIDTH), torch.rand(2, 1, 6)
    told = torch.stack((error, error, torch.ones_like(error)), dim=-1)
    admission = OutputErrorSpec(pool=3, difference=1.5).build()

    def score(count: int, **more: Any) -> torch.Tensor:
        chunk = leaving(keys[:, :, :count], keys[:, :, :0], slots_before=0, new_slots=2)
        evidence = Evidence.of(told[:, :, :count])
        return admission.score(replace(chunk, evidence=evidence, read_values=lambda: values[:, :, :count], **more))

    some = score(6, present=torch.tensor([6, 4])[:, None, None])

    close = {"rtol": 128 * torch.finfo(torch.float32).eps, "atol": 0.0}
    torch.testing.assert_close(some[:1], score(6)[:1], **close)
    torch.testing.assert_close(some[1:, :, :4], score(4)[1:], **close)


def test_neighbours_are_an_odd_number():
    with pytest.raises(PolicyError, match="pool must be odd"):
        memkit.load_policy("untrained-observed", {"admission.pool": 2})


@pytest.mark.parametrize("admission", [NoveltySpec(), RecencySpec()])
def test_who_is_like_nobody_joins_no_slot(admission: AdmissionSpec):
    """The best of the slots there were and those founded in this step counts; as much as `least` is enough."""
    founder, old = [0.0, 3.0], [1.0, 0.0]
    others = {0: old, 1: [0.0, 1 / 3], -1: [0.5, 0.0]}  # whom each is like: the old slot, the founder, nobody enough
    order = [founder, *others.values()] if isinstance(admission, NoveltySpec) else [*others.values(), founder]
    keys, slots = torch.tensor([[order]]), torch.tensor([[[old]]])
    chunk = leaving(keys, slots, slots_before=1, new_slots=1)
    assignment = place(NearestSpec(least=1.0), admission, chunk)
    expected = [1, *others] if isinstance(admission, NoveltySpec) else [*others, 1]
    assert assignment.slot[0, 0].tolist() == expected
    nobody = place(NearestSpec(least=1.0), admission, leaving(keys, slots, slots_before=1, new_slots=0))
    assert nobody.slot[0, 0].tolist() == [0 if key == old else -1 for key in order]
