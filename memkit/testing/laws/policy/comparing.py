"""How two results of a policy are compared: outputs, gradients, plans, and what a memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from memkit.memory import HeadsMemory, Memory
from memkit.policy import Policy
from memkit.testing.agreement import Results, agree, eps_of, identical, size
from memkit.testing.cases import Case, Inputs

__all__ = [
    "Way",
    "compare",
    "compares_gradients",
    "contents",
    "decides_alike",
    "equal_plans",
    "has_margin",
    "in_pieces",
    "policy_of_head",
    "results_of",
    "with_gradients",
]


Way = Callable[[Inputs], tuple[Tensor, Memory]]


def contents(memory: Memory, only: int | None = None) -> Results:
    """What a memory holds, row by row: sums, numbers and evidence of live slots, and the window.

    With `only`, that row's alone, named as the first. Where heads have unequally many slots, 0 stands past a head's.
    """
    found: Results = {}
    parts = memory.parts if isinstance(memory, HeadsMemory) else (memory,)
    rows = range(len(memory.seen_rows)) if only is None else [only]
    for name_of_row, row in enumerate(rows):
        each = [_of_row(part, row) for part in parts]
        for name in each[0]:
            tensors = [part[name] for part in each]
            found[f"{name} of row {name_of_row}"] = tensors[0] if name == "window_positions" else _side_by_side(tensors)
    return found


def _of_row(memory: Memory, row: int) -> Results:
    slots, held = int(memory.slots[row]), int(memory.held_rows[row])
    tensors = {"sums": memory.sums[row, :, :slots], "numbers": memory.store.numbers[row, :, :slots]}
    if memory.store.evidence is not None:
        tensors["evidence"] = memory.store.evidence[row, :, :slots]
    for name, stream in memory.window.last(held).items():
        # Positions are the row's own, and no head's.
        tensors[f"window_{name}"] = stream[row, 0] if name == "positions" else stream[row]
    return tensors


def _side_by_side(heads: list[Tensor]) -> Tensor:
    """[g, n, …] of some heads each, n of each its own: all heads, with 0 up to the largest n."""
    most = max(tensor.shape[1] for tensor in heads)
    filled = [torch.cat((each, each.new_zeros(len(each), most - each.shape[1], *each.shape[2:])), 1) for each in heads]
    return torch.cat(filled)


def policy_of_head(policy: Policy, head: int) -> Policy:
    """What one key/value head follows."""
    begin = 0
    for heads, of_heads in policy.head_policies:
        if begin <= head < begin + heads:
            return of_heads
        begin += heads
    return policy


def in_pieces(policy: Policy, inputs: Inputs, cuts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, Tensor, Memory]]:
    """A call in pieces (start, stop), one after another: for each its stop, its outputs and the memory after it."""
    memory = None
    for start, stop in cuts:
        output, memory = inputs.part(start, stop).attend(policy, memory=memory)
        yield stop, output, memory


def results_of(policy: Policy, case: Case, inputs: Inputs, way: Way) -> Results:
    """Outputs, and the gradients where they are to be compared, else what the memory holds."""
    if compares_gradients(policy, case, inputs):
        return with_gradients(inputs, way)
    output, memory = way(inputs)
    return {"output": output, **contents(memory)}


def with_gradients(inputs: Inputs, way: Way) -> Results:
    """Outputs, and the gradients of a fixed random weighing of them."""
    leaves = inputs.differentiable()
    output = way(leaves)[0]
    generator = torch.Generator().manual_seed(1)
    weighing = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    if not output.requires_grad:
        return {"output": output.detach()}
    named = leaves.leaves
    found = torch.autograd.grad(output, list(named.values()), weighing, allow_unused=True)
    return {
        "output": output.detach(),
        **{
            f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(named.items(), found, strict=True)
        },
    }


def compare(
    policy: Policy,
    case: Case,
    inputs: Inputs,
    got: Results,
    expected: Results,
    again: Callable[[Inputs], Results] | None,
    what: str = "",
) -> None:
    """Outputs, gradients and memories agree; `again`: inputs → results, the computation of `expected`."""
    keys, score = _key_and_score(policy, inputs)
    values, queries = size(inputs.values), size(inputs.queries)
    many = inputs.keys.shape[2] * (inputs.queries.shape[1] // max(inputs.keys.shape[1], 1))
    weight = 1.0 if inputs.weights is None else max(1.0, size(inputs.weights))
    sums = many * weight * (max(keys, 1) if policy.merging.learned or not policy.weighted else max(keys, 1) ** 2)
    scales = {
        "output": (1 + score) * values,
        "gradient": (1 + score) * max(1.0, values) * max(1.0, queries, keys) * many,
        "sums": sums * max(keys, values),
        "numbers": sums * max(keys, values, inputs.keys.shape[2]),
        **dict.fromkeys(("evidence", "window_evidence"), (1 + score) * max(1.0, values**2) * many),
    }
    eps = eps_of(inputs.keys.dtype)
    moved = None if again is None else (lambda change: again(inputs.mapped(change)))
    agree(got, expected, scales=scales, eps=eps, moved=moved, what=what)


def _key_and_score(policy: Policy, inputs: Inputs) -> tuple[float, float]:
    """Bounds of what a key and a score can be."""
    keys = max(size(inputs.keys), 4 * inputs.keys.shape[-1] ** 0.5 if policy.readout.layer_norm else 0)
    return keys, size(inputs.queries) * keys * inputs.keys.shape[-1] ** 0.5 * 2


def compares_gradients(policy: Policy, case: Case, inputs: Inputs) -> bool:
    """Whether the case asks for gradients, and scores are small enough to have some.

    Scores near 1/eps have no digit left behind the point: a softmax over them is a guess, its gradient more so.
    """
    return case.gradients and _key_and_score(policy, inputs)[1] * eps_of(inputs.keys.dtype) < 1


def decides_alike(case: Case) -> bool:
    """Whether decisions that wait for what was read, and so cannot be given as a plan, hardly hang on rounding."""
    return case.dtype == "float64" and case.keys == case.values == "normal"


def has_margin(case: Case) -> bool:
    """Whether no two decisions are so close that rounding decides."""
    return case.keys == "normal" and case.width > 2 and case.dtype != "bfloat16"


def equal_plans(what: str, got: tuple[Tensor, Tensor], other: str, expected: tuple[Tensor, Tensor]) -> None:
    """Two plans, each as (slots, founders), are the same."""
    for name, mine, right in zip(("slots", "founders"), got, expected, strict=True):
        identical(mine, f"{name} in the {what}", right, other)
