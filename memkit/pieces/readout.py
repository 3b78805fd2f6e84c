"""Readout: how slots enter the softmax.

A slot's sums K = Σ w·k̄ and V = Σ w·v become a key and a value. k̄ is a token's key after the rotary treatment, and after
the memory-key LayerNorm where slots are read with one.

    mean        K / mass
    layer-norm  LN(K), of the sum itself (the memory-key LayerNorm; arXiv 2605.09877)
    l2          K / ‖K‖
    mean-norm   K / ‖K‖ · (Σ w·‖k̄‖) / mass, and likewise for values
    count-mean  V / count
    birth-radius  ρ·V / ‖V‖, with ρ the norm of the founder's value (arXiv 2605.09877)
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from memkit.pieces.needs import Need
from memkit.pieces.registry import Spec
from memkit.pieces.statistics import COUNT, FOUNDER_MASS, KEY_NORM, MASS, RADIUS, VALUE_NORM, Numbers, Statistic

__all__ = ["LAYER_NORM_EPS", "TINY", "Readout", "ReadoutSpec"]

LAYER_NORM_EPS = 1e-5

SHORTEST = 1e-12
"""Instead of the length of a value sum that is shorter."""

TINY = 1e-30
"""Instead of a divisor that is 0 in an empty slot."""


class ReadoutSpec(Spec):
    """Declares how slots are read."""

    key: Literal["mean", "layer-norm", "l2", "mean-norm"] = Field(default="mean", description="how a key sum is read")
    value: Literal["mean", "count-mean", "birth-radius", "mean-norm"] = Field(
        default="mean", description="how a value sum is read"
    )
    bias: Literal["none", "count", "mass"] = Field(
        default="none",
        description="what is added to a slot's score: log(tokens in it), or log(its mass / its founder's); 0 for sinks "
        "and single tokens",
    )
    temperatures: bool = Field(
        default=False,
        description="whether queries have learned factors per head, one for the window and one for the memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _count_bias(cls, data: Any) -> Any:
        """`count_bias: true`, as it was written before there were others; it may change a policy that says `bias`."""
        both = isinstance(data, dict) and data.get("bias", "none") in ("none", "count")
        if both and isinstance(data.get("count_bias"), bool):
            rest = {name: value for name, value in data.items() if name != "count_bias"}
            return {**rest, "bias": "count" if data["count_bias"] else "none"}
        return data

    def build(self) -> Readout:
        return Readout(self)


class Readout:
    """Turns sums into keys and values. Acts on any leading axes."""

    def __init__(self, spec: ReadoutSpec) -> None:
        self.spec = spec
        self.layer_norm = spec.key == "layer-norm"
        self.means_keys = spec.key == "mean"
        """Whether a slot's key is its sum over a mass, so that what is read gives the sum back."""
        self.divides_by_mass = spec.key in ("mean", "mean-norm") or spec.value in ("mean", "mean-norm")
        self.divides_by_mass = self.divides_by_mass or spec.bias == "mass"

    @property
    def own(self) -> bool:
        """Whether somebody else's class says how slots are read, of which nothing but its methods is known."""
        return type(self) is not Readout

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs besides a slot's sums."""
        wanted = {Need.KEY_NORM: self.layer_norm, Need.QUERY_SCALES: self.spec.temperatures}
        return frozenset(need for need, needed in wanted.items() if needed)

    @functools.cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """The numbers a slot must keep, besides its sums, its count and its mass."""
        wanted = {
            RADIUS: self.spec.value == "birth-radius",
            KEY_NORM: self.spec.key == "mean-norm",
            VALUE_NORM: self.spec.value == "mean-norm",
            FOUNDER_MASS: self.spec.bias == "mass",
        }
        return tuple(statistic for statistic, needed in wanted.items() if needed)

    def key(self, sums: Tensor, numbers: Numbers, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """The slots' keys, not rotated: sums [..., m, d] → [..., m, d]; norm: the LayerNorm's weight and bias, [d]."""
        match self.spec.key:
            case "layer-norm":
                weight, bias = norm if norm is not None else (None, None)
                return layer_norm(sums, sums.shape[-1:], _like(weight, sums), _like(bias, sums), LAYER_NORM_EPS)
            case "l2":
                return normalize(_mean(sums, numbers[MASS]), dim=-1, eps=1e-12)
            case "mean-norm":
                return _of_mean_norm(sums, numbers[KEY_NORM], numbers[MASS])
            case "mean":
                return _mean(sums, numbers[MASS])

    def value(self, sums: Tensor, numbers: Numbers) -> Tensor:
        """The slots' values: sums [..., m, v] → [..., m, v]."""
        match self.spec.value:
            case "birth-radius":
                return sums * (numbers[RADIUS].to(sums.dtype) / sums.norm(dim=-1).clamp(min=SHORTEST)).unsqueeze(-1)
            case "mean-norm":
                return _of_mean_norm(sums, numbers[VALUE_NORM], numbers[MASS])
            case "count-mean":
                return _mean(sums, numbers[COUNT])
            case "mean":
                return _mean(sums, numbers[MASS])

    def value_mass(self, numbers: Numbers) -> Tensor | None:
        """What value sums are over values as read, [..., m]; None where these are no means."""
        match self.spec.value:
            case "mean":
                return numbers[MASS]
            case "count-mean":
                return numbers[COUNT]
            case "birth-radius" | "mean-norm":
                return None

    def bias(self, numbers: Numbers) -> Tensor | None:
        """What is added to the slots' scores, [..., m]; None for nothing."""
        match self.spec.bias:
            case "count":
                return numbers[COUNT].clamp(min=1).log()
            case "mass":
                # Never less than the founder's own; an empty slot has neither.
                return (numbers[MASS] / numbers[FOUNDER_MASS].clamp(min=TINY)).clamp(min=1).log()
            case "none":
                return None


def _mean(sums: Tensor, mass: Tensor) -> Tensor:
    """sums / mass, 0 where the mass is 0, for then all weights were.

    A division, not a product with 1/mass: n copies of a key read as that key.
    """
    return sums / torch.where(mass > 0, mass, 1).to(sums.dtype).unsqueeze(-1)


def _of_mean_norm(sums: Tensor, norms: Tensor, mass: Tensor) -> Tensor:
    """The mean, stretched to the mean of the tokens' norms; one token, or copies of one, are read as they came."""
    mean = _mean(sums, mass)
    norm = (norms / torch.where(mass > 0, mass, 1)).to(sums.dtype)
    return mean * (norm / mean.norm(dim=-1).clamp(min=1e-12)).unsqueeze(-1)


def _like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.to(like.dtype)
