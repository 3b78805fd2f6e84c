"""Law 1, split = whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from memkit.catalog import as_policy
from memkit.engine.inputs import Plan
from memkit.memory import Memory
from memkit.policy import Policy
from memkit.testing.agreement import Results
from memkit.testing.cases import Case, Inputs
from memkit.testing.law import law
from memkit.testing.laws.policy.comparing import (
    Way,
    compare,
    decides_alike,
    equal_plans,
    has_margin,
    results_of,
)

__all__ = ["split_equals_whole"]


@law("split = whole", "policy")
def split_equals_whole(policy: Policy, case: Case) -> None:
    """attend(a ++ b) = attend(a), then attend(b, memory), for every split.

    Outputs, the memory at the end and (where the case asks) gradients; one token at a time is a split, too, and rows
    may get out of step. A model is trained on whole texts and used one token at a time: where the two differ, it is
    used as something it never learned.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan_if_any(policy)
    if plan is None and not decides_alike(case):
        return
    if plan is not None and has_margin(case):
        _same_plans(policy, case, inputs, plan)

    def whole(inputs: Inputs) -> tuple[Tensor, Memory]:
        return inputs.attend(policy, plan=plan)

    def parts(inputs: Inputs) -> tuple[Tensor, Memory]:
        outputs: list[list[Tensor]] = [[] for _ in case.lengths]
        memory = None
        for spans in case.pieces_of_rows():
            output, memory = inputs.parts(spans).attend(policy, memory=memory, plan=plan)
            for row, (start, stop) in enumerate(spans):
                outputs[row].append(output[row, :, : stop - start])
        assert memory is not None
        rows = [torch.cat(row, dim=1) for row in outputs]
        longest = inputs.keys.shape[2]
        return torch.stack([pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows]), memory

    def results(inputs: Inputs, way: Way = whole) -> Results:
        return results_of(policy, case, inputs, way)

    compare(policy, case, inputs, results(inputs, parts), results(inputs), results)


def _same_plans(policy: Policy, case: Case, inputs: Inputs, plan: Plan) -> None:
    """The plans of the pieces, put together, are the plan of the whole."""
    memory = None
    slot, founded = torch.full_like(plan.slot, -1), torch.zeros_like(plan.founded)
    for spans in case.pieces_of_rows():
        part = inputs.parts(spans)
        now = part.plan(policy, memory=memory)
        for row in range(len(case.lengths)):
            first, many = int(now.begin[row]), int(now.length[row])
            slot[row, :, first : first + many] = now.slot[row, :, :many]
            founded[row, :, first : first + many] = now.founded[row, :, :many]
        memory = part.attend(policy, memory=memory)[1]
    equal_plans("plan of the pieces", (slot, founded), "of the whole", (plan.slot, plan.founded))
