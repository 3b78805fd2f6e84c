"""Law 8, same plan, same answer."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine.inputs import Plan
from memkit.memory import Memory
from memkit.policy import Policy
from memkit.testing.agreement import Results, show
from memkit.testing.cases import Case, Inputs
from memkit.testing.law import Broken, law
from memkit.testing.laws.policy.comparing import compare, decides_alike, has_margin, results_of

__all__ = ["same_plan_same_answer"]


@law("same plan, same answer", "policy")
def same_plan_same_answer(policy: Policy, case: Case) -> None:
    """Given a plan, every backend agrees with the reference: outputs, memory and gradients.

    On data whose decisions have a margin the reference, asked to decide itself, decides alike. The reference is written
    token by token from the definitions and shares nothing with the fast engine, so that one mistake is not made twice.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    plan = inputs.plan_if_any(policy)
    if plan is None and not decides_alike(case):
        return

    def results(inputs: Inputs, backend: str = "reference", plan: Plan | None = plan) -> Results:
        def way(inputs: Inputs) -> tuple[Tensor, Memory]:
            return inputs.attend(policy, plan=plan, backend=backend)

        return results_of(policy, case, inputs, way)

    expected = results(inputs)
    compare(policy, case, inputs, results(inputs, "torch"), expected, results)
    if has_margin(case) and case.dtype == "float64":
        own = inputs.attend(policy, backend="reference")[1]
        if policy.statistics and not torch.equal(own.counts, inputs.attend(policy)[1].counts):
            raise Broken(
                f"tokens per slot, as the reference decides:\n{show(own.counts)}\n"
                f"as the plan does:\n{show(inputs.attend(policy)[1].counts)}"
            )
        compare(policy, case, inputs, results(inputs, "torch", None), expected, results, "each with its own plan: ")
