"""What a policy does to one vector: the rotary treatment, and the LayerNorm of memory keys.

Equations of arXiv 2104.09864 (rotation) and 2605.09877 (the LayerNorm of a key sum).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memkit.pieces.rotary import Rotation, ZeroSpec
from memkit.policy import Policy

__all__ = ["LAYER_NORM_EPS", "Treatment"]

LAYER_NORM_EPS = 1e-5


class Treatment:
    """A policy's rotary treatment and LayerNorm, for one vector at a time.

    norm_weight, norm_bias: of the LayerNorm, [d] float64; None for 1 and 0.
    """

    def __init__(
        self, policy: Policy, rotation: Rotation | None, norm_weight: Tensor | None, norm_bias: Tensor | None
    ) -> None:
        self.policy, self.spec, self.rotation = policy, policy.spec, rotation
        self.norm_weight, self.norm_bias = norm_weight, norm_bias

    @property
    def norm(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of the LayerNorm, as a user's readout is told; None for 1 and 0."""
        if self.norm_weight is None or self.norm_bias is None:
            return None
        return self.norm_weight, self.norm_bias

    def treated(self, key: Tensor, place: Tensor | None) -> Tensor:
        """A key as the rotary treatment leaves it."""
        rotary = self.spec.rotary
        match rotary.kind:
            case "keep":
                return key
            case "zero":
                assert isinstance(rotary, ZeroSpec)
                width = rotary.width if rotary.width is not None else int((rotary.share or 0) * len(key))
                return torch.cat((torch.zeros_like(key[:width]), key[width:]))
            case "unrotate" | "rerotate":
                assert place is not None
                return self.rotated(key, place, -1)
            case _:
                at = None if place is None else place[None, None, None]
                return self.policy.rotary.memory_keys(key[None, None, None], self.rotation, at)[0, 0, 0]

    def memory_query(self, query: Tensor, place: Tensor | None) -> Tensor:
        """A query as it meets the slots, before its scale."""
        match self.spec.rotary.kind:
            case "keep" | "zero" | "rerotate":
                return query
            case "unrotate":
                assert place is not None
                return self.rotated(query, place, -1)
            case _:
                at = None if place is None else place[None, None, None]
                return self.policy.rotary.memory_queries(query[None, None, None], self.rotation, at)[0, 0, 0]

    def rotated(self, vector: Tensor, position: Tensor, sense: int) -> Tensor:
        """Pair i of channels turned by sense · position · frequency_i."""
        rotation = self.rotation
        assert rotation is not None
        half = rotation.width // 2
        if rotation.pairing == "adjacent":
            first, second = list(range(0, rotation.width, 2)), list(range(1, rotation.width, 2))
        else:
            first, second = list(range(half)), list(range(half, rotation.width))
        angle = sense * position * rotation.frequencies.to(vector.device).double()
        x, y = vector[first], vector[second]
        turned = vector.clone()
        turned[first] = x * angle.cos() - y * angle.sin()
        turned[second] = y * angle.cos() + x * angle.sin()
        return turned

    def layer_norm(self, vector: Tensor) -> Tensor:
        """(x − mean) / √(variance + eps) · weight + bias."""
        centred = vector - vector.mean()
        normed = centred / (centred.square().mean() + LAYER_NORM_EPS).sqrt()
        if self.norm_weight is not None:
            normed = normed * self.norm_weight
        return normed if self.norm_bias is None else normed + self.norm_bias
