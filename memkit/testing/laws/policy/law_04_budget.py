"""Law 4, budget."""

from __future__ import annotations

from memkit.catalog import as_policy
from memkit.policy import Policy
from memkit.testing.agreement import show
from memkit.testing.cases import Case
from memkit.testing.law import Broken, law
from memkit.testing.laws.policy.comparing import in_pieces
from memkit.testing.laws.policy.definitions import slots_allowed, tokens_left

__all__ = ["budget"]


@law("budget", "policy")
def budget(policy: Policy, case: Case) -> None:
    """slots ≤ max(budget, C if the first chunk founds whole), and room for slots ≤ 2 × that + one chunk.

    m ← m + min(C, max(0, min(max(S, budget(n)), b + C) − m)) as the chunk at b leaves, so slots never shrink either.
    A memory that outgrows its budget fails at the length where it was needed.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    for stop, _, memory in in_pieces(policy, inputs, case.cuts()):
        for row, seen in enumerate(memory.seen.tolist()):
            left = tokens_left(policy, inputs, row, seen)
            allowed, most = slots_allowed(policy, inputs, row, left)
            slots = int(memory.slots[row])
            if slots != allowed:
                raise Broken(
                    f"row {row} has {slots} slots after {seen} tokens, of which {left} left; granted {allowed}"
                )
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
