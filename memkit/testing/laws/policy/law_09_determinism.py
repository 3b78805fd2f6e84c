"""Law 9, determinism."""

from __future__ import annotations

from memkit.catalog import as_policy
from memkit.policy import Policy
from memkit.testing.agreement import Results, identical
from memkit.testing.cases import Case
from memkit.testing.law import law
from memkit.testing.laws.policy.comparing import compares_gradients, contents, with_gradients

__all__ = ["determinism"]


@law("determinism", "policy")
def determinism(policy: Policy, case: Case) -> None:
    """Two runs are bitwise equal.

    attend(x) = attend(x), outputs, plan, memory and gradients. Else nobody can find a mistake a second time.
    """
    policy = as_policy(policy)
    runs: list[Results] = []
    for _ in range(2):
        inputs = case.inputs(policy)
        plan = inputs.plan_if_any(policy)
        output, memory = inputs.attend(policy)
        found = {"output": output, **contents(memory)}
        if plan is not None:
            found |= {"plan's slots": plan.slot, "plan's founders": plan.founded}
        if compares_gradients(policy, case, inputs):
            found |= with_gradients(inputs, lambda inputs: inputs.attend(policy))
        runs.append(found)
    for name, first in runs[0].items():
        identical(first, f"{name}, first run", runs[1][name], "second run", nan=True)
