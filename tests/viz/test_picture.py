"""Who sees what: the picture agrees with itself, and scaled-down policies keep the shape of the real ones."""

import pytest

import memkit
from memkit.viz.picture import DROPPED, EXACT, FOUNDED, JOINED, SINK, TOKENS, UNSEEN, draw, picture


def drawn(name: str, overrides: dict[str, object] | None = None):
    made = picture(memkit.load_policy(name, overrides).build())
    assert made is not None
    return made


PLANNED = [name for name in memkit.policy_names() if memkit.load_policy(name).build().plans_ahead]


@pytest.mark.parametrize("name", PLANNED)
def test_every_row_adds_up(name: str):
    made = drawn(name)
    for query, cells, slots, window in zip(made.queries, made.cells, made.slots, made.window, strict=True):
        assert len(cells) == TOKENS
        assert cells.count(EXACT) == window
        assert cells.count(SINK) + cells.count(FOUNDED) == slots, "a token founded each slot"
        assert cells[query + 1 :] == UNSEEN * (TOKENS - query - 1)
        assert cells[query + 1 - window : query + 1] == EXACT * window
        assert UNSEEN not in cells[: query + 1]
        assert (JOINED in cells) <= (slots > 0)


def test_full_attention_sees_everything():
    made = drawn("full")
    assert made.scale == 1
    assert all(cells.rstrip() == EXACT * (query + 1) for query, cells in zip(made.queries, made.cells, strict=True))


def test_a_sliding_window_with_sinks():
    made = drawn("streaming-4-512")
    assert made.cells[-1] == SINK + DROPPED * (TOKENS - 13) + EXACT * 12
    assert made.scale == pytest.approx(508 / 12)
    assert set(drawn("window-512").cells[-1]) == {DROPPED, EXACT}


def test_a_block_window():
    made = drawn("block-window-3x256")
    assert made.cells[-1] == DROPPED * (TOKENS - 12) + EXACT * 12
    assert made.scale == 64


def test_pooled_blocks_stand_for_as_many_tokens_as_the_real_ones():
    made = drawn("block-mean-8")
    assert made.cells[-1] == ((FOUNDED + JOINED * 7) * 8)[: TOKENS - 16] + EXACT * 16


def test_the_first_chunk_founds_whole_and_sinks_are_sinks():
    cells = drawn("kvm-fixed-256").cells[-1]
    assert cells == SINK + FOUNDED * 3 + JOINED * (TOKENS - 12) + EXACT * 8


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("kvm-sqrt-16", {"sinks": 255}),
        ("kvm-sqrt-16", {"sinks": 256, "growth.floor": 400}),
        ("kvm-sqrt-16", {"chunker.size": 1}),
        ("kvm-sqrt-16", {"chunker.size": 3, "window.chunks": 1}),
        ("kvm-sqrt-16", {"window.chunks": 100}),
        ("kvm-sqrt-16", {"merging": {"kind": "drop"}}),
        ("untrained-kvm-fixed", {"growth.slots": 5}),
        ("streaming-4-512", {"window.size": 5, "sinks": 100}),
        ("full", {"window": {"kind": "block", "chunks": 1}, "sinks": 300}),
    ],
)
def test_unusual_policies_are_drawn_too(name: str, overrides: dict[str, object]):
    made = drawn(name, overrides)
    for cells, slots in zip(made.cells, made.slots, strict=True):
        assert cells.count(SINK) + cells.count(FOUNDED) == slots
    if overrides.get("merging"):
        assert DROPPED in made.cells[-1]
        assert JOINED not in made.cells[-1]


def test_a_policy_that_does_not_fit_the_keys_has_no_picture():
    assert picture(memkit.load_policy("kvm-sqrt-16", {"rotary": {"kind": "zero", "width": 1000}}).build()) is None


def test_pictures_are_the_same_every_time():
    assert drawn("untrained-kvm-log") == drawn("untrained-kvm-log")


def test_the_drawing_fits_a_terminal_and_explains_its_marks():
    text = draw(drawn("kvm-sqrt-16")).plain
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.splitlines()[-1].split("  ")[-4:] == [
        f"{EXACT} seen exactly",
        f"{SINK} sink",
        f"{FOUNDED} founded a slot",
        f"{JOINED} joined a slot",
    ]


def test_there_is_no_picture_where_slots_compete_by_what_was_read():
    assert picture(memkit.load_policy("untrained-observed").build()) is None
