"""Law 4, budget."""

from __future__ import annotations

from memkit.catalog import as_policy
from memkit.memory import HeadsMemory, Memory
from memkit.policy import Policy
from memkit.testing.agreement import show
from memkit.testing.cases import Case, Inputs
from memkit.testing.law import Broken, law
from memkit.testing.laws.policy.comparing import in_pieces, policy_of_head
from memkit.testing.laws.policy.definitions import slots_allowed, tokens_left

__all__ = ["budget"]


@law("budget", "policy")
def budget(policy: Policy, case: Case) -> None:
    """slots ≤ max(budget, C if the first chunk founds whole), and room for slots ≤ 2 × that + one chunk.

    m ← m + min(C, max(0, min(max(S, budget(n)), b + C) − m)) as the chunk at b leaves, so slots never shrink either.
    A memory that outgrows its budget fails at the length where it was needed. Where heads share slots unequally, each
    has its share of the budget, and all of them what even shares would be.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    for stop, _, memory in in_pieces(policy, inputs, case.cuts()):
        if not isinstance(memory, HeadsMemory):
            _of_alike_heads(policy, inputs, memory, stop)
            continue
        first = 0
        for part, heads in zip(memory.parts, memory.heads_of_parts, strict=True):
            _of_alike_heads(policy_of_head(policy, first), inputs, part, stop)
            first += heads
        _in_total(policy, inputs, memory)


def _in_total(policy: Policy, inputs: Inputs, memory: HeadsMemory) -> None:
    """Heads that share slots unequally have as many in all as even shares would be: budgets are rounded by half a slot
    for each head, and no head has less than one that is no sink."""
    assert policy.growth is not None and policy.head_ratios is not None
    evenly = policy.spec.with_ratios(sum(policy.head_ratios) / len(policy.head_ratios)).build()
    for row, seen in enumerate(memory.seen.tolist()):
        even = slots_allowed(evenly, inputs, row, tokens_left(policy, inputs, row, seen))[1]
        total, most = int(memory.slots[row].sum()), memory.heads * (even + 1)
        if total > most:
            raise Broken(f"row {row}: {memory.slots[row].tolist()} slots after {seen} tokens, {most} in all at most")


def _of_alike_heads(policy: Policy, inputs: Inputs, memory: Memory, stop: int) -> None:
    """One memory's slots, of heads that have equally many."""
    for row, seen in enumerate(memory.seen.tolist()):
        left = tokens_left(policy, inputs, row, seen)
        allowed, most = slots_allowed(policy, inputs, row, left)
        slots = int(memory.slots[row])
        if slots != allowed:
            raise Broken(f"row {row} has {slots} slots after {seen} tokens, of which {left} left; granted {allowed}")
        if slots > most:
            raise Broken(f"row {row} has {slots} slots after {seen} tokens; the budget is {most}")
        filled = memory.counts[row]
        if filled.shape[-1] and (bool((filled[:, :slots] < 1).any()) or bool((filled[:, slots:] != 0).any())):
            raise Broken(f"row {row}: {slots} slots hold these counts of tokens:\n{show(filled)}")
    budgets = [
        slots_allowed(policy, inputs, row, tokens_left(policy, inputs, row, seen))[1]
        for row, seen in enumerate(memory.seen.tolist())
    ]
    room, bound = memory.sums.shape[2], 2 * max(budgets)
    if room > bound + policy.chunk:
        raise Broken(f"room for {room} slots after {stop} tokens; the bound is {bound} + {policy.chunk}")
