"""Who founds a slot and who joins which, against brute force that reads like the sentences that define them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from memkit.pieces.admission import AdmissionSpec, NoAdmissionSpec, NoveltySpec, RecencySpec, StrideSpec
from memkit.pieces.routing import Leaving, NearestSpec, Placement, Routing, SegmentSpec

WIDTH = 2


def leaving(
    keys: Tensor,
    slots: Tensor,
    *,
    live: int | Tensor,
    grant: int | Tensor,
    forced: int | Tensor = 0,
    sinks: int = 0,
    joining: bool = True,
) -> Leaving:
    """A chunk whose tokens, as slots of their own, are read as they are."""
    return Leaving(keys, slots, live, sinks, forced, grant, alone=lambda: keys, joining=joining)


def place(routing: Routing, admission: AdmissionSpec, chunk: Leaving) -> Placement:
    built = admission.build()
    priority, compares = (None, False) if built is None else (built.priority, built.compares)
    placement = routing.place(chunk, priority, compares)
    assert placement.drops or (placement.slot >= 0).all()
    return placement


def founders(admission: AdmissionSpec, size: int, grant: int, forced: int = 0) -> list[int]:
    """Offsets of the tokens that found, for keys that tell nothing."""
    keys = torch.zeros(1, 1, size, WIDTH)
    slots = torch.zeros(1, 1, 3, WIDTH)
    chunk = leaving(keys, slots, live=3, grant=grant, forced=forced, joining=False)
    placement = place(NearestSpec().build(), admission, chunk)
    offsets = placement.founded[0, 0].nonzero().flatten().tolist()
    assert placement.slot[0, 0, offsets].tolist() == list(range(3, 3 + grant))
    assert (placement.slot[0, 0] >= 0).sum() == grant
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
        chunk = leaving(keys.expand(1, 1, size, WIDTH), keys[:, :, :0], live=5, grant=grant, forced=forced)
        placement = place(SegmentSpec().build(), NoAdmissionSpec(), chunk)
        free, runs = size - forced, grant - forced
        wanted = {offset: (5 + offset, True) for offset in range(forced)}
        for run in range(runs):
            begin, end = run * free // runs, (run + 1) * free // runs
            wanted |= {forced + j: (5 + forced + run, j == begin) for j in range(begin, end)}
        found = zip(placement.slot[0, 0].tolist(), placement.founded[0, 0].tolist(), strict=True)
        assert list(found) == [wanted[offset] for offset in range(size)], (size, grant, forced)


@pytest.mark.parametrize("joining", [True, False])
def test_segment_without_a_grant_joins_the_newest_slot(joining: bool):
    keys = torch.zeros(1, 1, 4, WIDTH)
    chunk = leaving(keys, keys[:, :, :0], live=7, grant=0, sinks=2, joining=joining)
    placement = place(SegmentSpec().build(), NoAdmissionSpec(), chunk)
    assert placement.slot.flatten().tolist() == [6 if joining else -1] * 4
    assert not placement.founded.any()


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
        live=len(slots),
        grant=grant,
        forced=forced,
        sinks=sinks,
        joining=joining,
    )
    spec = NoveltySpec() if admission == "novelty" else RecencySpec()
    placement = place(NearestSpec(similarity=name, new_slots=new_slots).build(), spec, chunk)
    found = list(zip(placement.slot[0, 0].tolist(), placement.founded[0, 0].tolist(), strict=True))
    assert found == wanted


def test_cosine_ignores_how_long_keys_are():
    keys = torch.tensor([[0.1, 1.0], [5.0, 0.2]])[None, None]
    slots = torch.tensor([[100.0, 90.0], [0.0, 0.01], [0.02, 0.0]])[None, None]
    placed = {}
    for similarity in ("dot", "cosine"):
        chunk = leaving(keys, slots, live=3, grant=0)
        placed[similarity] = place(NearestSpec(similarity=similarity).build(), NoveltySpec(), chunk).slot.flatten()
    assert placed["dot"].tolist() == [0, 0]
    assert placed["cosine"].tolist() == [1, 2]


@pytest.mark.parametrize("routing", [NearestSpec(), NearestSpec(new_slots=False, similarity="l2"), SegmentSpec()])
@pytest.mark.parametrize("admission", [NoveltySpec(), RecencySpec(), StrideSpec()])
def test_rows_with_numbers_of_their_own_are_placed_as_if_alone(routing, admission):
    admission = NoAdmissionSpec() if isinstance(routing, SegmentSpec) else admission
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-3, 4, (4, 2, 6, WIDTH), generator=generator).double()
    slots = torch.randint(-3, 4, (4, 2, 5, WIDTH), generator=generator).double()
    empty = not (isinstance(routing, NearestSpec) and not routing.new_slots)  # else there may be no slot to join
    live, grant, forced = [5, 3, 2, 0 if empty else 4], [0, 6, 2, 3], [0, 0, 0, int(empty)]
    rows = [torch.tensor(numbers).view(-1, 1, 1) for numbers in (live, grant, forced)]
    chunks = leaving(keys, slots, live=rows[0], grant=rows[1], forced=rows[2], sinks=1)
    together = place(routing.build(), admission, chunks)
    for row in range(4):
        chunk = leaving(
            keys[row : row + 1],
            slots[row : row + 1, :, : live[row]],
            live=live[row],
            grant=grant[row],
            forced=forced[row],
            sinks=1,
        )
        alone = place(routing.build(), admission, chunk)
        assert torch.equal(together.slot[row], alone.slot[0]), row
        assert torch.equal(together.founded[row], alone.founded[0]), row


def test_novelty_under_l2_is_distance_whatever_the_norms():
    # The longest key is the nearest to its slot: a score without the keys' own norms would call another one known.
    keys = torch.tensor([[10.0, 0.0], [0.0, 2.0]])[None, None]
    slots = torch.tensor([[10.0, 1.0]])[None, None]
    placement = place(NearestSpec(similarity="l2").build(), NoveltySpec(), leaving(keys, slots, live=1, grant=1))
    assert placement.founded.flatten().tolist() == [False, True]
    far = torch.tensor([[-10.0, 0.0], [0.0, 2.0]])[None, None]
    near = torch.tensor([[-9.0, 0.0], [0.0, 0.0]])[None, None]
    placement = place(NearestSpec(similarity="l2").build(), NoveltySpec(), leaving(far, near, live=2, grant=1))
    assert placement.founded.flatten().tolist() == [False, True]


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
    chunk = leaving(keys.repeat(2, 3, 1, 1), slots.repeat(2, 3, 1, 1), live=count, grant=0, sinks=sinks)
    placement = place(NearestSpec().build(), NoveltySpec(), chunk)
    assert (placement.slot == placement.slot[:1, :1]).all()
    for key, found in zip(keys[0, 0].tolist(), placement.slot[0, 0].tolist(), strict=True):
        scores = [key[0] * slot[0] + key[1] * slot[1] for slot in slots[0, 0, sinks:].tolist()]
        assert found == sinks + scores.index(max(scores))
    assert placement.slot[0, 0, 0] == count - 1
    assert placement.slot[0, 0, 2] == sinks


@pytest.mark.parametrize("grant", [0, 3])
def test_searching_run_by_run_changes_nothing(grant: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(grant)
    keys, slots = (torch.randn(2, 2, count, 8, generator=generator) for count in (40, 1100))
    chunk = leaving(keys, slots, live=1100, grant=grant, sinks=4)
    by_runs = place(NearestSpec().build(), NoveltySpec(), chunk)
    monkeypatch.setattr("memkit.pieces.routing.MANY", 10**9)
    at_once = place(NearestSpec().build(), NoveltySpec(), chunk)

    assert torch.equal(by_runs.slot, at_once.slot)
    assert torch.equal(by_runs.founded, at_once.founded)


@pytest.mark.parametrize("compares", [False, True])
def test_similarities_are_for_an_admission_that_compares(compares: bool):
    given: list[Tensor | None] = []

    def priority(offsets: Tensor, free: object, grant: object, redundancy: Tensor | None) -> Tensor:
        given.append(redundancy)
        return offsets

    keys = torch.ones(1, 1, 4, WIDTH)
    NearestSpec().build().place(leaving(keys, keys, live=4, grant=1), priority, compares)
    (redundancy,) = given
    assert (redundancy is not None) == compares


@pytest.mark.parametrize("at_once", [1, 7 * 5, 2 * 7 * 5, 10**9])
@pytest.mark.parametrize("grant", [0, 2])
def test_how_much_is_searched_at_once_changes_nothing(at_once: int, grant: int, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    keys, slots = (torch.randn(2, 3, count, WIDTH, generator=generator) for count in (7, 5))
    live = torch.tensor([5, 3])[:, None, None]
    chunk = leaving(keys, slots, live=live, grant=grant, sinks=2)
    expected = place(NearestSpec().build(), NoveltySpec(), chunk)
    monkeypatch.setattr("memkit.pieces.routing.AT_ONCE", {"cpu": at_once})
    placement = place(NearestSpec().build(), NoveltySpec(), chunk)

    assert torch.equal(placement.slot, expected.slot)
    assert torch.equal(placement.founded, expected.founded)
    for row, count in enumerate((5, 3)):
        alone = leaving(keys[row : row + 1], slots[row : row + 1, :, :count], live=count, grant=grant, sinks=2)
        assert torch.equal(place(NearestSpec().build(), NoveltySpec(), alone).slot[0], placement.slot[row])


def test_rows_with_and_without_slots_at_once():
    """One row's memory is empty, so that its token 0 founds whatever it looks like; the other's is not."""
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).repeat(2, 1, 1, 1)
    slots = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(2, 1, 1, 1)
    counts = {"live": torch.tensor([0, 2])[:, None, None], "grant": torch.tensor([2, 1])[:, None, None]}
    placement = place(NearestSpec().build(), NoveltySpec(), leaving(keys, slots, **counts))

    assert placement.founded[:, 0].tolist() == [[True, False, True], [False, False, True]]
    assert placement.slot[:, 0].tolist() == [[0, 0, 1], [1, 0, 2]]
