"""Heads with unequal numbers of slots: a call of each run of heads that are alike, on a memory of its own.

Heads never read each other's keys or slots, so a layer's attention is that of its heads side by side. A run of equal
heads is a call like any other; here tensors are cut by heads, and outputs put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from memkit.engine.checks import check
from memkit.engine.inputs import AttendInputs
from memkit.memory import HeadsMemory, Memory

__all__ = ["attend_by_heads", "by_heads"]

Call = Callable[[AttendInputs], tuple[Tensor, Memory]]


def attend_by_heads(given: AttendInputs, call: Call) -> tuple[Tensor, Memory]:
    """`call` for each run of alike heads: outputs [b, h, t, v] of all of them, and their memories as one.

    Everything is checked before the first of them begins, so that none has gone on where another is refused.
    """
    policy, memory = given.policy, given.memory
    if not _one_more_token(given):
        check(given)
    outputs: list[Tensor] = []
    memories: list[Memory] = []
    for _, part in by_heads(given):
        try:
            output, after = call(part)
        except BaseException as error:
            if isinstance(memory, HeadsMemory) and memory.taken and memories:  # the heads before these have gone on
                memory.call_failed(error)
            raise
        outputs.append(output)
        memories.append(after)
    return torch.cat(outputs, dim=1), HeadsMemory(policy, memories)


def by_heads(given: AttendInputs) -> Iterator[tuple[slice, AttendInputs]]:
    """The arguments of each run of alike heads, and which query heads these are."""
    memory, begin = given.memory, 0
    assert given.queries is not None and given.values is not None
    assert memory is None or isinstance(memory, HeadsMemory)
    group = given.queries.shape[1] // given.keys.shape[1]
    for index, (heads, one) in enumerate(given.policy.head_policies):
        end = begin + heads
        queries = slice(begin * group, end * group)
        yield (
            queries,
            dataclasses.replace(
                given,
                policy=one,
                queries=given.queries[:, queries],
                keys=given.keys[:, begin:end],
                values=given.values[:, begin:end],
                weights=None if given.weights is None else given.weights[:, begin:end],
                parameters=None if given.parameters is None else given.parameters.of_heads(queries),
                memory=None if memory is None else memory.parts[index],
            ),
        )
        begin = end


def _one_more_token(given: AttendInputs) -> bool:
    """Whether this is a decoding step like any other, of which each part looks at what it needs."""
    queries, keys, memory = given.queries, given.keys, given.memory
    if not isinstance(memory, HeadsMemory) or memory.policy is not given.policy or given.weights is not None:
        return False
    if not all(isinstance(tensor, Tensor) and tensor.ndim == 4 for tensor in (queries, keys, given.values)):
        return False
    assert queries is not None and given.values is not None
    heads = len(given.policy.head_ratios or ())
    alike = keys.shape[2] == 1 and keys.shape[1] == given.values.shape[1] == heads and queries.shape[1] % heads == 0
    return alike and all(each is None for each in (given.lengths, given.plan, given.boundaries, memory.lost))
