"""Law 5, conservation in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.memory import HeadsMemory, Memory
from memkit.pieces.statistics import MASS
from memkit.policy import Policy
from memkit.testing.agreement import agree, show, size
from memkit.testing.cases import Case, Inputs
from memkit.testing.law import Broken, law
from memkit.testing.laws.policy.definitions import SUMS_EPS, sums_eps, sums_of_tokens, tokens_left

__all__ = ["conservation_in_memory"]


@law("conservation in memory", "policy", claim="conserves")
def conservation_in_memory(policy: Policy, case: Case) -> None:
    """Counts sum to the tokens absorbed and not dropped, masses to their weights, sums to Σ weight·key and ·value.

    Σ_i K_i = Σ_j w_j k̄_j over the tokens j that a slot took, and likewise V, mass and count; where values alone are
    merged, K are the founders' keys. Where slots compete, or heads share them unequally, no plan says who founded:
    counts are compared then, and V (and K, where both are merged) where all tokens weigh 1. What is lost here, the
    model can never read again; what is counted twice drowns the rest.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    if not policy.plans_ahead:
        memory = inputs.attend(policy)[1]
        _counts(policy, case, inputs, memory)
        if not policy.weighted and not _may_drop(policy):
            _sums(policy, case, inputs, memory)
        return
    plan = inputs.plan(policy)
    memory = inputs.attend(policy, plan=plan)[1]
    for row, length in enumerate(case.lengths):
        left = tokens_left(policy, inputs, row, length)
        left = left if not policy.sinks_only else min(left, policy.sinks)
        taken = plan.slot[row, :, :left] >= 0
        founded = plan.founded[row, :, :left]
        if left and not bool((taken | _may_drop(policy)).all()):
            raise Broken(f"row {row}: every token joins, but these have no slot:\n{show(plan.slot[row, :, :left])}")
        keys, values, mass = sums_of_tokens(policy, inputs, row, founded)
        expected = {
            "key_sum": _total(keys, taken),
            "value_sum": _total(values, taken),
            "count": taken.double().sum(-1),
            "mass": (mass * taken).sum(-1),
        }
        slots = int(memory.slots[row])
        sums = memory.sums[row, :, :slots].double()
        got = {"key_sum": sums[..., : case.width].sum(1), "value_sum": sums[..., case.width :].sum(1)}
        got["count"] = memory.counts[row].double().sum(-1)
        if MASS in policy.statistics:
            got["mass"] = memory.number(MASS)[row, :, :slots].sum(-1)
        scales = {
            "key_sum": size(keys) * max(left, 1),
            "value_sum": size(values) * max(left, 1),
            "count": 0.0,
            "mass": size(mass) * max(left, 1),
        }
        agree(
            got,
            {name: expected[name] for name in got},
            scales=scales,
            eps=max(SUMS_EPS, sums_eps(policy, inputs.keys.dtype)),
            what=f"row {row}: ",
        )


def _counts(policy: Policy, case: Case, inputs: Inputs, memory: Memory) -> None:
    """Where slots compete: no token is counted twice, and none is lost unless it may be dropped."""
    may_drop = _may_drop(policy)
    for row, length in enumerate(case.lengths):
        left, counts = tokens_left(policy, inputs, row, length), memory.counts[row].sum(-1)
        if bool((counts > left).any()) or (not may_drop and bool((counts < left).any())):
            raise Broken(f"row {row}: {left} tokens left the window, the slots count {counts.tolist()}")


def _sums(policy: Policy, case: Case, inputs: Inputs, memory: Memory) -> None:
    """Where every token weighs 1 and joins, whatever became of its slot: nothing is lost, and nothing counts twice."""
    parts, first = memory.parts if isinstance(memory, HeadsMemory) else (memory,), 0
    for part in parts:
        heads = slice(first, first + part.keys.shape[1])
        first = heads.stop
        for row, length in enumerate(case.lengths):
            left, slots = tokens_left(policy, inputs, row, length), int(part.slots[row])
            everyone = torch.ones(inputs.keys.shape[1], left, dtype=torch.bool)
            keys, values, _ = (tensor[heads] for tensor in sums_of_tokens(policy, inputs, row, everyone))
            sums = part.sums[row, :, :slots].double()
            got, expected = {"value_sum": sums[..., case.width :].sum(1)}, {"value_sum": values.sum(1)}
            if policy.merging.of == "both":
                got["key_sum"], expected["key_sum"] = sums[..., : case.width].sum(1), keys.sum(1)
            scales = {"value_sum": size(values) * max(left, 1), "key_sum": size(keys) * max(left, 1)}
            eps = max(SUMS_EPS, sums_eps(policy, inputs.keys.dtype)) * max(
                left, 1
            )  # slots are held, and taken up again
            agree(got, expected, scales=scales, eps=eps, what=f"row {row}: ")


def _may_drop(policy: Policy) -> bool:
    return policy.routing.drops or not policy.merging.joins


def _total(vectors: Tensor, taken: Tensor) -> Tensor:
    return (vectors * taken.unsqueeze(-1)).sum(1)
