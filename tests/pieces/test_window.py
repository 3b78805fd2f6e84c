"""Windows: the first position that a query sees exactly, against the sentences that define them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memkit.pieces.window import AllWindowSpec, BlockWindowSpec, SlidingWindowSpec


@given(chunk=st.integers(1, 9), chunks=st.integers(1, 4), position=st.integers(0, 200))
def test_block_window_sees_its_own_chunk_and_those_before_it(chunk: int, chunks: int, position: int):
    window = BlockWindowSpec(chunks=chunks).build(chunk)
    seen = [p for p in range(position + 1) if p // chunk > position // chunk - chunks]
    assert window.begin(position) == seen[0]
    assert window.capacity == chunk * chunks >= len(seen)
    assert window.unit == chunk


@given(size=st.integers(1, 9), position=st.integers(0, 50))
def test_sliding_window_sees_the_last_tokens_the_query_included(size: int, position: int):
    window = SlidingWindowSpec(size=size).build(256)
    seen = list(range(position + 1))[-size:]
    assert window.begin(position) == seen[0]
    assert (window.capacity, window.band, window.unit) == (size, size, 1)


def test_a_window_of_all_tokens_begins_at_the_first():
    window = AllWindowSpec().build(256)
    assert [window.begin(position) for position in (0, 1, 10**9)] == [0, 0, 0]
    assert (window.capacity, window.unit) == (None, None)


def test_many_positions_at_once():
    positions = np.arange(50)
    for window in (BlockWindowSpec(chunks=2).build(8), SlidingWindowSpec(size=7).build(8), AllWindowSpec().build(8)):
        begins = window.begin(positions)
        assert begins.tolist() == [window.begin(int(position)) for position in positions]
        assert (np.diff(begins) >= 0).all()
