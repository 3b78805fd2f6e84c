"""What a long read takes at its peak: no tensor of tokens by tokens, and for observing a chunk's scores at most."""

from __future__ import annotations

import pytest
import torch

import memkit
from tests.counting import BytesHeld

TOKENS, HEADS, WIDTH, CHUNK = 32_768, 2, 8, 64
UNOBSERVED = {
    "observe": {},
    "admission": {"kind": "key-norm"},
    "merging": {"kind": "weighted-mean", "of": "values", "weight": "key-norm"},
    "readout": {"bias": "count"},
}


def held_while_reading(policy: memkit.PolicySpec, tokens: int) -> BytesHeld:
    made = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, heads, tokens, WIDTH, generator=made) for heads in (HEADS, 1, 1))
    rotation = memkit.Rotation("half-split", WIDTH, 10000.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2)))
    with torch.no_grad(), BytesHeld() as held:
        memkit.attend(policy, queries, keys, values, rotation=rotation)
    return held


@pytest.mark.parametrize("name", ["untrained-observed", "untrained-recall"])
def test_observing_takes_a_chunks_scores_and_no_more(name: str):
    policy = memkit.load_policy(name, {"heads": {}})
    observed = held_while_reading(policy, TOKENS)
    without = held_while_reading(memkit.load_policy(policy, UNOBSERVED), TOKENS)
    rows = 384 + 3 * CHUNK  # slots, window, and the chunk that leaves
    scores = HEADS * CHUNK * rows * torch.float32.itemsize
    assert observed.most <= without.most + 4 * scores  # scores, shares, and two of their kind while they are made
    assert observed.largest == HEADS * TOKENS * WIDTH * torch.float32.itemsize  # the outputs


def test_the_peak_grows_as_what_is_read():
    policy = memkit.load_policy("untrained-observed", {"heads": {}})
    short, long = (held_while_reading(policy, tokens).most for tokens in (TOKENS // 4, TOKENS))
    # Of each token: the outputs, queries for the window and for slots, keys and values, positions and evidence.
    per_token = (3 * HEADS * WIDTH + 2 * WIDTH + 3) * torch.float32.itemsize + torch.float64.itemsize
    assert long - short <= 1.01 * per_token * (TOKENS - TOKENS // 4)
