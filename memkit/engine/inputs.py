"""What `attend` and `plan` are given: made once, checked once, and handed on whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from memkit.errors import InputError
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy

__all__ = ["AttendInputs", "Lengths", "Plan"]


Lengths = Tensor | Sequence[int]
"""One whole number per row."""


@dataclass
class AttendInputs:
    """The arguments of a call, as `memkit.attend` takes them; queries and values are None where only a plan is wanted.

    Known once they are checked: row_lengths [b]: valid tokens of each row; row_boundaries [b, t] bool: which are the
    last of their chunk, None where none is said to be; scale: a number; differentiable: whether
    gradients are wanted; row_policies: the policy of each row, where heads of unequal numbers of slots
    stand as rows.
    """

    policy: Policy
    queries: Tensor | None
    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    parameters: PolicyParameters | None
    rotation: Rotation | None
    scale: float | None
    memory: Memory | None
    lengths: Lengths | None
    plan: Plan | None
    boundaries: Tensor | None = None
    row_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    row_boundaries: np.ndarray | None = None
    differentiable: bool = False
    row_policies: tuple[Policy, ...] | None = None

    @property
    def key_norm(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the memory-key LayerNorm; None for 1 and 0."""
        return None if self.parameters is None else self.parameters.key_norm

    @property
    def checked_scale(self) -> float:
        """What scores are multiplied by, once it is known."""
        assert self.scale is not None
        return self.scale

    @property
    def equal_lengths(self) -> bool:
        """Whether every row has as many tokens as the call has columns."""
        return bool((self.row_lengths == self.keys.shape[2]).all())

    def with_memory(self, memory: Memory | None) -> AttendInputs:
        """The same arguments with another memory."""
        return dataclasses.replace(self, memory=memory)


@dataclass(frozen=True)
class Plan:
    """Where each token that leaves the window during one call goes.

    Column j of row r is the token at position begin[r] + j, for j < length[r]; later columns are padding.

    slot [b, g, n] int64: the slot it founded or joined, −1 for dropped tokens and padding;
    founded [b, g, n] bool: whether it founded that slot;
    begin, length [b] int64: first token that leaves in this call, and how many do;
    slots [b, chunks] int64: slots there are after each chunk that leaves (the last number repeats in shorter rows).
    """

    slot: Tensor
    founded: Tensor
    begin: np.ndarray
    length: np.ndarray
    slots: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.slot, Tensor) or self.slot.dtype != torch.long or self.slot.ndim != 3:
            raise InputError("plan.slot must be a tensor [b, g, n] of int64; make a plan with memkit.plan")
        same = isinstance(self.founded, Tensor) and self.founded.dtype == torch.bool
        if not same or self.founded.shape != self.slot.shape:
            raise InputError("plan.founded must be a tensor of bool as plan.slot; make a plan with memkit.plan")
        rows, _, tokens = self.slot.shape
        for name, axes in (("begin", 1), ("length", 1), ("slots", 2)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != axes or len(array) != rows:
                shape = f"({rows},)" if axes == 1 else f"({rows}, chunks)"
                raise InputError(f"plan.{name} must be an array {shape} of int64; make a plan with memkit.plan")
        if (self.begin < 0).any() or (self.length < 0).any() or (self.length > tokens).any():
            raise InputError(
                f"plan.begin must be at least 0 and plan.length between 0 and its {tokens} tokens, "
                f"got {self.begin.tolist()} and {self.length.tolist()}"
            )

    def to(self, device: torch.device) -> Plan:
        """The plan on a device; this one where it is there already. The host does not wait for the device."""
        if self.slot.device == self.founded.device == device:
            return self
        return dataclasses.replace(self, slot=_there(self.slot, device), founded=_there(self.founded, device))

    def __repr__(self) -> str:
        rows, heads, tokens = self.slot.shape
        return f"Plan({rows} rows × {heads} heads, {tokens} tokens leave, slots after each chunk {self.slots.tolist()})"


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    waits = device.type != "cuda" or tensor.device.type != "cpu"
    return tensor.to(device) if waits else tensor.pin_memory().to(device, non_blocking=True)
