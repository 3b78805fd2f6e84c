"""Law 6, sinks."""

from __future__ import annotations

import torch

from memkit.catalog import as_policy
from memkit.memory import Memory
from memkit.policy import Policy
from memkit.testing.agreement import agree, identical, show, size
from memkit.testing.cases import Case, Inputs
from memkit.testing.law import Broken, law
from memkit.testing.laws.policy.comparing import contents, in_pieces
from memkit.testing.laws.policy.definitions import SUMS_EPS, sums_eps, sums_of_tokens, tokens_left

__all__ = ["sinks"]


@law("sinks", "policy")
def sinks(policy: Policy, case: Case) -> None:
    """A sink's slot never changes: slot i < S is token i alone, for ever; its numbers bitwise, its sums to rounding.

    The first tokens gather attention that has nowhere else to go (arXiv 2309.17453); once one of them is blurred, every
    later softmax shifts.
    """
    policy = as_policy(policy)
    inputs = case.inputs(policy)
    memory, before = None, None
    for stop, _, memory in in_pieces(policy, inputs, case.cuts()):
        now = contents(memory)
        for row, seen in enumerate(memory.seen.tolist()):
            there = min(policy.sinks, tokens_left(policy, inputs, row, seen))
            counts = memory.counts[row, :, :there]
            if bool((counts != 1).any()):
                raise Broken(f"row {row}: its {there} sinks hold these counts of tokens after {seen}:\n{show(counts)}")
            if before is None:
                continue
            old, new = (
                {name: each[f"{name} of row {row}"][:, : policy.sinks] for name in ("sums", "numbers")}
                for each in (before, now)
            )
            new = {name: each[:, : old[name].shape[1]] for name, each in new.items()}
            identical(new["numbers"], f"numbers of row {row}, sinks after {stop} tokens", old["numbers"], "before")
            # A memory may hold the key as it is read, and turn it back for every fold.
            eps = sums_eps(policy, inputs.keys.dtype)
            scales = {"sums": max(size(old["sums"]), 1e-30)}
            agree(
                {"sums": new["sums"]}, {"sums": old["sums"]}, scales=scales, eps=eps, what=f"row {row}, {stop} tokens: "
            )
        before = {name: tensor.clone() for name, tensor in now.items()}
    _sinks_hold_their_tokens(policy, inputs, memory)


def _sinks_hold_their_tokens(policy: Policy, inputs: Inputs, memory: Memory | None) -> None:
    if memory is None:
        return
    for row, seen in enumerate(memory.seen.tolist()):
        there = min(policy.sinks, tokens_left(policy, inputs, row, seen))
        founded = torch.ones(inputs.keys.shape[1], there, dtype=torch.bool)
        expected = torch.cat(sums_of_tokens(policy, inputs, row, founded)[:2], dim=-1)
        agree(
            {"sink sums": memory.sums[row, :, :there]},
            {"sink sums": expected},
            scales={"sink": max(size(expected), 1e-30)},
            eps=max(SUMS_EPS, sums_eps(policy, inputs.keys.dtype)),
            what=f"row {row}: ",
        )
