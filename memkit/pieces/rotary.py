"""Rotary: what happens to rotary position embedding (RoPE, arXiv 2104.09864) in memory.

Queries and keys arrive rotated. In the window they stay so; a *memory key* is what is left for slots to sum.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from memkit.errors import InputError, shown
from memkit.pieces.needs import Need
from memkit.pieces.registry import FamilySpec, register
from memkit.pieces.statistics import MASS, POSITION, Statistic
from memkit.whole import MOST, whole_number

__all__ = ["KeepSpec", "RerotateSpec", "Rotary", "RotarySpec", "Rotation", "UnrotateSpec", "ZeroSpec"]


@dataclass(frozen=True)
class Rotation:
    """How queries and keys were rotated: pair i of the first `width` channels by the angle position·frequencies[i],
    (x, y) → (x cos − y sin, y cos + x sin). A convention that turns the other way has negative frequencies.

    pairing: "adjacent" pairs channels (2i, 2i + 1), "half-split" pairs (i, i + width/2).
    frequencies [width/2]: radians per position. positions [b, t]: those of this call's tokens; None: they continue
    from the memory, from 0 where there is none.
    """

    pairing: Literal["adjacent", "half-split"]
    width: int
    frequencies: Tensor
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pairing, str) or self.pairing not in ("adjacent", "half-split"):
            raise InputError(f"rotation.pairing must be 'adjacent' or 'half-split', got {shown(self.pairing)}")
        width = whole_number("rotation.width", self.width, most=MOST)
        if width < 2 or width % 2:
            raise InputError(f"rotation.width must be an even number of channels, at least 2, got {shown(width)}")
        if not isinstance(self.frequencies, Tensor) or not self.frequencies.is_floating_point():
            raise InputError(f"rotation.frequencies must be a tensor of floats, got {_made_of(self.frequencies)}")
        if self.frequencies.shape != (width // 2,):
            raise InputError(
                f"rotation.frequencies needs one number per pair of channels, shape ({width // 2},), "
                f"got {tuple(self.frequencies.shape)}"
            )
        if self.positions is None:
            return
        if not isinstance(self.positions, Tensor) or self.positions.dtype == torch.bool or self.positions.is_complex():
            raise InputError(f"rotation.positions must be a tensor of numbers [b, t], got {_made_of(self.positions)}")

    def apply(self, vectors: Tensor, positions: Tensor, inverse: bool = False) -> Tensor:
        """Rotate vectors [..., d] to positions [...] (or back, `inverse`)."""
        cos, sin = self.angles(positions)
        return self.turn(vectors, cos, -sin if inverse else sin)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every pair's angle at positions [...], each [..., width/2] float64."""
        angles = positions.double().unsqueeze(-1) * self.frequencies.to(positions.device).double()
        return angles.cos(), angles.sin()

    def turn(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the pairs of vectors [..., d] by angles given as cos and sin [..., width/2]."""
        cos, sin = cos.to(vectors.dtype), sin.to(vectors.dtype)
        vectors = vectors.expand(*torch.broadcast_shapes(vectors.shape[:-1], cos.shape[:-1]), -1)
        return _Turn.apply(vectors, cos, sin, self)

    def pairs(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second channel of each pair, views [..., width/2]."""
        if self.pairing == "adjacent":
            return vectors[..., 0 : self.width : 2], vectors[..., 1 : self.width : 2]
        return vectors[..., : self.width // 2], vectors[..., self.width // 2 : self.width]


class _Turn(torch.autograd.Function):
    """`Rotation.turn` in one pass over a copy, where autograd would keep and return each product."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        ctx.save_for_backward(vectors if any(ctx.needs_input_grad[1:3]) else None, cos, sin)
        return _turned(rotation, vectors, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        vectors, cos, sin = ctx.saved_tensors
        of_cos = of_sin = None
        if vectors is not None:
            (x, y), (of_x, of_y) = ctx.rotation.pairs(vectors), ctx.rotation.pairs(grads[0])
            of_cos = (of_x * x + of_y * y).sum_to_size(cos.shape)
            of_sin = (of_y * x - of_x * y).sum_to_size(sin.shape)
        return _turned(ctx.rotation, grads[0], cos, -sin), of_cos, of_sin, None


def _turned(rotation: Rotation, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = vectors.clone(memory_format=torch.contiguous_format)
    (x, y), (x_turned, y_turned) = rotation.pairs(vectors), rotation.pairs(turned)
    x_turned.mul_(cos).addcmul_(y, sin, value=-1)
    y_turned.mul_(cos).addcmul_(x, sin)
    return turned


def _made_of(given: object) -> str:
    return str(given.dtype) if isinstance(given, Tensor) else shown(given)


class Rotary:
    """`keep`: keys stay as they are."""

    needs: frozenset[Need] = frozenset()
    """What it needs besides queries and keys: `Need.ROTATION` where `attend` must be told how they were rotated."""
    rotates_slots: bool = False
    """Whether slots are rotated to their mean position when read."""
    turns_back: bool = False
    """Whether `slot_keys` undoes `memory_keys` at the same place, and is itself undone by turning the other way."""

    @property
    def reversible(self) -> bool:
        """Whether the key that slots sum can be told from the key that is read."""
        return self.turns_back or not self.rotates_slots

    @property
    def rounds(self) -> bool:
        """Whether memory keys are numbers that a key's own dtype may not have."""
        return type(self).memory_keys is not Rotary.memory_keys

    @property
    def turns_queries(self) -> bool:
        """Whether queries meet slots turned otherwise than they meet the window."""
        return type(self).memory_queries is not Rotary.memory_queries

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The numbers a slot must keep for it."""
        return (MASS, POSITION) if self.rotates_slots else ()

    def memory_keys(self, keys: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        """Keys [b, g, c, d] at positions [b, 1, c] → what slots sum."""
        return keys

    def slot_keys(self, keys: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        """Slots' keys [..., d] of mean positions [...] → as queries meet them."""
        return keys

    def memory_queries(self, queries: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        """Queries [b, h, t, d] at positions [b, 1, t] → as they meet the slots."""
        return queries


class RotarySpec(FamilySpec):
    """Declares a treatment."""

    family: ClassVar[str] = "rotary"

    @abstractmethod
    def build(self) -> Rotary:
        """The treatment."""


@register
class KeepSpec(RotarySpec):
    """Rotated keys are summed as they are."""

    kind: Literal["keep"] = "keep"

    def build(self) -> Rotary:
        return Rotary()


@register
class ZeroSpec(RotarySpec):
    """The rotated channels, the first of each head, are set to 0 (arXiv 2605.09877)."""

    kind: Literal["zero"] = "zero"
    share: float | None = Field(
        default=None, ge=0, le=1, description="share of the head width that is rotated, 1 included"
    )
    width: int | None = Field(default=None, ge=0, le=MOST, description="channels that are rotated")

    @model_validator(mode="after")
    def _one_of_two(self) -> ZeroSpec:
        if (self.share is None) == (self.width is None):
            raise ValueError(
                f"exactly one of share and width says how many channels are rotated, "
                f"got share {self.share} and width {self.width}"
            )
        return self

    def build(self) -> Zero:
        return Zero(self.share, self.width)


class Zero(Rotary):
    """k̄ = k with its first r channels set to 0 (before the memory-key LayerNorm, where slots are read with one)."""

    @property
    def rounds(self) -> bool:
        """No: zeros are exact."""
        return False

    def __init__(self, share: float | None, width: int | None) -> None:
        self.share, self.width = share, width

    def rotated_width(self, head_width: int) -> int:
        """r, the channels set to 0."""
        width = self.width if self.width is not None else int((self.share or 0.0) * head_width)
        if width > head_width:
            raise InputError(f"rotary.width must be at most the head width {head_width}, got {width}")
        return width

    def memory_keys(self, keys: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        kept = torch.ones(keys.shape[-1], dtype=keys.dtype, device=keys.device)
        kept[: self.rotated_width(keys.shape[-1])] = 0
        return keys * kept


@register
class UnrotateSpec(RotarySpec):
    """Keys are un-rotated, merged, and read with un-rotated queries: memory without positions."""

    kind: Literal["unrotate"] = "unrotate"

    def build(self) -> Unrotate:
        return Unrotate()


class Unrotate(Rotary):
    """Slots live where nothing is rotated."""

    needs = frozenset({Need.ROTATION})

    def memory_keys(self, keys: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        assert rotation is not None and positions is not None
        return rotation.apply(keys, positions, inverse=True)

    def memory_queries(self, queries: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        assert rotation is not None and positions is not None
        return rotation.apply(queries, positions, inverse=True)


@register
class RerotateSpec(RotarySpec):
    """Keys are un-rotated and merged; a slot is rotated to the mass-weighted mean position of its tokens."""

    kind: Literal["rerotate"] = "rerotate"

    def build(self) -> Rerotate:
        return Rerotate()


class Rerotate(Rotary):
    """Slots stand at the mean position of their tokens."""

    needs = frozenset({Need.ROTATION})
    rotates_slots = turns_back = True

    def memory_keys(self, keys: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        assert rotation is not None and positions is not None
        return rotation.apply(keys, positions, inverse=True)

    def slot_keys(self, keys: Tensor, rotation: Rotation | None, positions: Tensor | None) -> Tensor:
        assert rotation is not None and positions is not None
        return rotation.apply(keys, positions)
