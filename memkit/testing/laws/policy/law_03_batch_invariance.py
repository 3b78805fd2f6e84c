"""Law 3, batch invariance."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine.inputs import Plan
from memkit.policy import Policy
from memkit.testing.agreement import Results, identical
from memkit.testing.cases import Case, Inputs, part_of_plan
from memkit.testing.law import law
from memkit.testing.laws.policy.comparing import (
    compare,
    contents,
    decides_alike,
    equal_plans,
    has_margin,
    policy_of_head,
)

__all__ = ["batch_invariance"]


@law("batch invariance", "policy")
def batch_invariance(policy: Policy, case: Case) -> None:
    """A row's result does not depend on its neighbours in the batch, their lengths, padding, or other heads.

    attend(batch)[row] = attend(row alone), for each row and each key/value head; a NaN in one row stays there; whatever
    stands in padding changes nothing. Else the same text gets another answer in another batch.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan_if_any(policy)
    if plan is None and not decides_alike(case):
        return
    output, memory = inputs.attend(policy, plan=plan)
    for row, length in enumerate(case.lengths):
        alone, rows = inputs.row(row), slice(row, row + 1)
        for heads in (slice(None), *(slice(g, g + 1) for g in range(case.kv_heads) if case.kv_heads > 1)):
            one = alone if heads.start is None else alone.head(heads.start)
            queries = slice(None) if heads.start is None else slice(heads.start * case.group, heads.stop * case.group)
            mine = None if plan is None else part_of_plan(plan, rows=rows, heads=heads)
            if plan is not None and mine is not None and has_margin(case):
                planned, length_left = one.plan(policy), int(plan.length[row])
                equal_plans(
                    f"plan of row {row} alone",
                    (planned.slot[0], planned.founded[0]),
                    "in the batch",
                    (mine.slot[0, :, :length_left], mine.founded[0, :, :length_left]),
                )

            own = policy if heads.start is None else policy_of_head(policy, heads.start)

            def results(inputs: Inputs, own: Policy = own, mine: Plan | None = mine) -> Results:
                output, memory = inputs.attend(own, plan=mine)
                return {"output": output, **contents(memory)}

            expected = results(one)
            in_batch = {"output": output[rows, queries, :length]}
            for name, tensor in contents(memory, row).items():
                # Past its slots a head of unequal ones has zeros.
                in_batch[name] = tensor[heads, : expected[name].shape[1]] if tensor.ndim > 1 else tensor
            compare(own, case, one, in_batch, expected, results, f"row {row}: ")
    _nothing_leaks(policy, case, inputs)


def _nothing_leaks(policy: Policy, case: Case, inputs: Inputs) -> None:
    """NaN in padding and in the last row change no other row."""
    output = inputs.attend(policy)[0]

    def poisoned(name: str, tensor: Tensor) -> Tensor:
        if name == "weights" or tensor.ndim < 4:
            return tensor
        return tensor.masked_fill(~inputs.valid, torch.nan)

    padded = inputs.mapped(poisoned).attend(policy)[0]
    identical(padded, "outputs with NaN in the padding", output, "with numbers in it")
    if len(case.lengths) > 1:
        ill = inputs.mapped(
            lambda name, t: t if t.ndim < 4 else torch.cat((t[:-1], torch.full_like(t[-1:], torch.nan)))
        )
        found = ill.attend(policy)[0][:-1]
        identical(found, "outputs beside a row of NaN", output[:-1], "beside a row of numbers")
