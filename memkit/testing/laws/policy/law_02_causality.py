"""Law 2, causality."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.policy import Policy
from memkit.testing.cases import Case
from memkit.testing.law import law
from memkit.testing.laws.policy.comparing import compare, decides_alike, equal_plans
from memkit.testing.laws.policy.definitions import tokens_left

__all__ = ["causality"]


@law("causality", "policy")
def causality(policy: Policy, case: Case) -> None:
    """Output t depends on tokens ≤ t alone.

    ∂output[t] / ∂token[s] = 0 for s > t: other tokens after t change neither outputs up to t nor the plan of the chunks
    that have left by then. A model that sees what it must predict looks wonderful in training and fails afterwards.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    cut = case.tokens // 2 or 1
    other = dataclasses.replace(case, seed=case.seed + 1000).inputs(policy)

    def changed(name: str, tensor: Tensor) -> Tensor:
        later = other.leaves.get(name)
        if later is None or tensor.ndim < 3:
            return tensor
        return torch.cat((tensor[:, :, :cut], later[:, :, cut:] * (1 if name == "weights" else 3)), dim=2)

    if not policy.plans_ahead:
        if decides_alike(case):
            own, altered = (each.attend(policy)[0][:, :, :cut] for each in (inputs, inputs.mapped(changed)))
            compare(policy, case, inputs, {"output": altered}, {"output": own}, None)
        return
    plan, plan_changed = inputs.plan(policy), inputs.mapped(changed).plan(policy)
    for row, length in enumerate(case.lengths):
        known = tokens_left(policy, inputs, row, min(cut, length)) if length else 0
        equal_plans(
            f"plan of row {row} after other tokens follow",
            (plan_changed.slot[row, :, :known], plan_changed.founded[row, :, :known]),
            "before",
            (plan.slot[row, :, :known], plan.founded[row, :, :known]),
        )
    output, changed_output = inputs.attend(policy)[0][:, :, :cut], inputs.mapped(changed).attend(policy)[0][:, :, :cut]
    compare(policy, case, inputs, {"output": changed_output}, {"output": output}, None)
