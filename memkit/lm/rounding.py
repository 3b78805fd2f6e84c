"""Rounding that a model was trained with, as a property of the policy that its layers are built on."""

from __future__ import annotations

from torch import Tensor

from memkit.pieces.readout import Readout
from memkit.pieces.statistics import Numbers
from memkit.policy import Policy

__all__ = ["rounded"]


class RoundedReadout(Readout):
    """Reads slot values through bfloat16; the sums themselves stay as they are."""

    def value(self, sums: Tensor, numbers: Numbers) -> Tensor:
        return super().value(sums, numbers).bfloat16().to(sums.dtype)


def rounded(policy: Policy) -> Policy:
    """The same policy, its slot values rounded to bfloat16 at reading where they are read by their birth radius.

    The published Key-Value Means code rounds ρ·V/‖V‖ and leaves V/count alone, and its checkpoints learned with that.
    """
    if policy.spec.readout.value != "birth-radius" or policy.sinks_only:
        return policy
    copy = Policy(policy.spec)
    copy.readout = RoundedReadout(policy.spec.readout)
    return copy
