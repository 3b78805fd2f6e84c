"""What founders weigh, in a row's first chunk and later, also where rows are in different chunks."""

from __future__ import annotations

import pytest
import torch

import memkit
from memkit.pieces.statistics import MASS

TOKENS, WIDTH = 21, 4


@pytest.mark.parametrize("founders", [False, True])
@pytest.mark.parametrize("first_chunk", [False, True])
@pytest.mark.parametrize("lengths", [None, [21, 13]])
def test_founders_weigh_as_the_rule_says(founders: bool, first_chunk: bool, lengths: list[int] | None) -> None:
    policy = memkit.PolicySpec.model_validate(
        {
            "chunker": {"kind": "fixed", "size": 4},
            "window": {"kind": "block", "chunks": 1},
            "growth": {"kind": "linear", "fraction": 0.5},
            "merging": {
                "kind": "weighted-mean",
                "weight": "learned",
                "weigh": {"founders": founders, "first_chunk": first_chunk},
            },
        }
    ).build()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-3, 4, (2, 1, TOKENS, WIDTH), generator=generator).double() for _ in range(3)]
    weights = torch.full((2, 1, TOKENS), 3.0)
    given = None if lengths is None else torch.tensor(lengths)
    made = memkit.plan(policy, tensors[1], weights=weights, lengths=given)
    _, memory = memkit.attend(policy, *tensors, weights=weights, lengths=given)

    for row in range(2):
        wanted = torch.zeros(int(memory.slots[row]), dtype=torch.float64)
        for position in range(int(made.length[row])):
            slot, founded = int(made.slot[row, 0, position]), bool(made.founded[row, 0, position])
            weighs = not founded or (first_chunk if position < 4 else founders)
            wanted[slot] += 3 if weighs else 1
        # Small whole numbers: exact.
        assert memory.number(MASS)[row, 0, : len(wanted)].tolist() == wanted.tolist()


def test_rows_that_go_on_in_different_chunks_follow_one_plan_of_the_whole() -> None:
    policy = memkit.load_policy("kvm-sqrt-16", {"chunker.size": 4, "growth.factor": 1, "growth.floor": 1}).build()
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 1, 40, WIDTH, generator=generator).double() for _ in range(3))
    made = memkit.plan(policy, keys)
    whole, _ = memkit.attend(policy, queries, keys, values, plan=made)
    split = [16, 24]  # both between two chunks, so that both rows' next chunks leave at once

    def part(tensor: torch.Tensor, begin: list[int], end: list[int]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [tensor[row, 0, begin[row] : end[row]] for row in range(2)], batch_first=True
        ).unsqueeze(1)

    memory, at = None, [0, 0]
    for until in (split, [split[0] + 12, split[1] + 12]):
        given = [part(tensor, at, until) for tensor in (queries, keys, values)]
        lengths = torch.tensor([stop - start for start, stop in zip(at, until, strict=True)])
        output, memory = memkit.attend(policy, *given, memory=memory, lengths=lengths, plan=made)
        for row in range(2):
            mine = output[row, :, : int(lengths[row])]
            # Sums of 40 products of order 1.
            assert (mine - whole[row, :, at[row] : until[row]]).abs().max() <= 256 * torch.finfo(torch.float64).eps
        at = until
