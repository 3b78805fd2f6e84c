"""A checked call of `attend` or `plan`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.plan import Plan
from memkit.policy import Policy

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """A checked call. Tensors as `memkit.attend` takes them; queries and values are None where only a plan is wanted.

    key_norm: weight and bias of the memory-key LayerNorm, None for 1 and 0.
    """

    policy: Policy
    queries: Tensor | None
    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    parameters: PolicyParameters | None
    key_norm: tuple[Tensor, Tensor] | None
    rotation: Rotation | None
    scale: float
    memory: Memory | None
    lengths: np.ndarray
    plan: Plan | None
    differentiable: bool
