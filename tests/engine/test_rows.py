"""Batch invariance: a row's result depends on its own tokens alone, whatever stands beside or behind them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import memkit
from tests.engine.cases import Case, assert_close, cotangent, make_case, slots_of, small, tolerance

NAMES = memkit.policy_names()
LIMIT = tolerance(torch.float64, 2048)

# Tokens of each of four rows in each of five calls, of at most 21 columns.
CALLS = [[5, 0, 21, 8], [9, 3, 9, 8], [1, 21, 0, 8], [1, 1, 1, 1], [20, 13, 7, 8]]
COLUMNS = 21


def ragged(case: Case, garbage: float) -> tuple[list[Tensor], memkit.Memory, list[int]]:
    """Each row's outputs when rows arrive as `CALLS` says, `garbage` standing where a row has no token."""
    rows = len(CALLS[0])
    taken = [0] * rows
    outputs: list[list[Tensor]] = [[] for _ in range(rows)]
    memory = None
    for lengths in CALLS:
        tensors: dict[str, Tensor] = {}
        for name, tensor in case.tensors.items():
            own = [
                torch.nn.functional.pad(
                    tensor[r, :, taken[r] : taken[r] + lengths[r]].movedim(1, -1),
                    (0, COLUMNS - lengths[r]),
                    value=garbage,
                ).movedim(-1, 1)
                for r in range(rows)
            ]
            tensors[name] = torch.stack(own)
        output, memory = dataclasses.replace(case, tensors=tensors).attend(memory=memory, lengths=torch.tensor(lengths))
        for r in range(rows):
            outputs[r].append(output[r, :, : lengths[r]])
            assert (output[r, :, lengths[r] :] == 0).all()
            taken[r] += lengths[r]
    assert memory is not None
    return [torch.cat(parts, dim=1) for parts in outputs], memory, taken


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_ragged_rows_are_rows_alone(name: str):
    case = make_case(small(name), 80, rows=4)
    outputs, memory, taken = ragged(case, garbage=float("nan"))
    assert memory.seen.tolist() == taken
    for r, output in enumerate(outputs):
        expected, alone = case.row(r, taken[r]).attend()
        assert_close(output[None], expected, LIMIT, f"row {r}")
        assert memory.slots[r] == alone.slots[0]
        live = int(alone.slots[0])
        assert torch.equal(memory.counts[r, :, :live], alone.counts[0])
        for one, other, what in zip(slots_of(memory), slots_of(alone), ("sums", "numbers"), strict=True):
            assert_close(one[r : r + 1, :, :live], other, LIMIT, f"{what} of row {r}")


@pytest.mark.parametrize("name", NAMES)
def test_ragged_gradients_are_those_of_rows_alone(name: str):
    case, direction = make_case(small(name), 80, rows=4), cotangent(make_case(small(name), 80, rows=4))
    leaves = case.leaves()
    outputs, _, taken = ragged(leaves, garbage=1e3)
    loss = sum((output * direction[r, :, : taken[r]]).sum() for r, output in enumerate(outputs))
    everything = leaves.tensors | leaves.learned
    found = dict(zip(everything, torch.autograd.grad(loss, list(everything.values())), strict=True))
    shared = {name_: torch.zeros_like(tensor) for name_, tensor in case.learned.items()}
    for r in range(4):
        _, _, alone = case.row(r, taken[r]).gradients(direction[r : r + 1, :, : taken[r]])
        for name_ in case.tensors:
            assert_close(found[name_][r : r + 1, :, : taken[r]], alone[name_], LIMIT, f"gradient of {name_}, row {r}")
        for name_ in shared:
            shared[name_] += alone[name_]
    for name_, expected in shared.items():
        assert_close(found[name_], expected, LIMIT, f"gradient of {name_}")


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_pads_alike(name: str):
    case = make_case(small(name), 45, rows=3, heads=2, kv_heads=1)
    direction, lengths = cotangent(case), torch.tensor([45, 0, 18])
    expected, _, gradients = case.gradients(direction, lengths=lengths, backend="reference")
    output, _, found = case.gradients(direction, lengths=lengths)
    assert_close(output, expected, LIMIT, "output")
    for name_, gradient in gradients.items():
        assert_close(found[name_], gradient, LIMIT, f"gradient of {name_}")


@pytest.mark.parametrize("grad", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_a_row_stays_there(name: str, grad: bool):
    case = make_case(small(name), 60)
    expected, expected_memory = (case.leaves() if grad else case).attend()
    for tensor in case.tensors.values():
        tensor[1, :, 17:40] = torch.nan
    leaves = case.leaves() if grad else case
    output, memory = leaves.attend()
    assert output[1].isnan().any()
    assert torch.equal(output[0], expected[0])
    assert torch.equal(memory.sums[0], expected_memory.sums[0])
    if grad:
        (gradient,) = torch.autograd.grad(output[0].sum(), [leaves.tensors["keys"]])
        assert gradient[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_may_hold_anything(name: str):
    case = make_case(small(name), 60)
    lengths = torch.tensor([60, 33])
    direction = cotangent(case)
    expected, expected_memory, gradients = case.gradients(direction, lengths=lengths)
    for tensor in case.tensors.values():
        tensor[1, :, 33:] = torch.nan
    output, memory, found = case.gradients(direction, lengths=lengths)
    assert torch.equal(output, expected)
    assert torch.equal(memory.sums, expected_memory.sums)
    for name_, gradient in gradients.items():
        own = (slice(None), slice(None), slice(0, 33)) if name_ in case.tensors else ()
        assert torch.equal(found[name_][own], gradient[own]), f"gradient of {name_}"


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_rows_changes_nothing(name: str):
    case, order = make_case(small(name), 60, rows=3), [2, 0, 1]
    output, memory = case.attend()
    turned = dataclasses.replace(case, tensors={name_: tensor[order] for name_, tensor in case.tensors.items()})
    other, other_memory = turned.attend()
    assert_close(other, output[order], LIMIT, "output")
    assert torch.equal(other_memory.counts, memory.counts[order])


@pytest.mark.parametrize("name", NAMES)
def test_heads_do_not_depend_on_each_other_either(name: str):
    case = make_case(small(name), 60)
    output, memory = case.attend()
    # Key/value head 1 serves query heads 2 and 3.
    alone = dataclasses.replace(
        case,
        tensors={name_: tensor[:, tensor.shape[1] // 2 :] for name_, tensor in case.tensors.items()},
        learned={name_: tensor[2:] if "query_scale" in name_ else tensor for name_, tensor in case.learned.items()},
    )
    half, half_memory = alone.attend()
    assert_close(half, output[:, 2:], LIMIT, "output")
    assert torch.equal(half_memory.counts, memory.counts[:, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_causality(name: str):
    case, other = make_case(small(name), 60), make_case(small(name), 60, seed=5)
    output, _ = case.attend()
    for tokens in (1, 8, 31, 59):
        later = {
            name_: torch.cat((tensor[:, :, :tokens], other.tensors[name_][:, :, tokens:]), dim=2)
            for name_, tensor in case.tensors.items()
        }
        changed, _ = dataclasses.replace(case, tensors=later).attend()
        assert torch.equal(changed[:, :, :tokens], output[:, :, :tokens])
