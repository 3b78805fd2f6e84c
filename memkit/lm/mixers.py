"""The mixer that is memory attention; see `rwkv7` for the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from memkit.attention import MemoryAttention, QueryKeyNorm, RotaryEmbeddingSpec
from memkit.catalog import load_policy
from memkit.costing import cost
from memkit.lm.mixer import Mixer
from memkit.lm.parts import Span, State, TokenShift, ValueResidual, rank, tensor
from memkit.lm.rounding import rounded
from memkit.lm.spec import MOST_WIDTH, MixerSpec, ModelSpec
from memkit.pieces.registry import register
from memkit.policy import PolicySpec

__all__ = ["AttentionMixer", "AttentionMixerSpec"]


@register
class AttentionMixerSpec(MixerSpec):
    """Attention under any memory policy."""

    kind: Literal["attention"] = "attention"
    policy: PolicySpec = Field(
        description="how the layer remembers: a shipped policy's name, the policy itself, or a shipped one with "
        "changes, {from: ovq-1024, chunker.size: 256}"
    )
    qk_norm: QueryKeyNorm = Field(
        default="layer-norm",
        description="what is done to every head's query and key: layer-norm (with bias), unit (divided by ‖·‖ + 1e-5, "
        "scores β·√d·q·k with β learned per head), or none",
    )
    rotary: RotaryEmbeddingSpec | None = Field(default=None, description="left out: the model's")
    kv_heads: int | None = Field(default=None, ge=1, le=MOST_WIDTH, description="left out: the model's")
    token_shift: bool = Field(
        default=True,
        description="whether projected queries, keys and values are shifted towards the previous token's "
        "(its own for the first)",
    )
    value_residual: Literal["gated", "linear", "none"] = Field(
        default="gated", description="how values are mixed with those of the first layer with an equal mixer"
    )
    value_residual_rank: int | None = Field(
        default=None,
        ge=1,
        le=MOST_WIDTH,
        description="rank of the gate; left out: 1.3·√width to a multiple of 32, at least 32",
    )

    @field_validator("policy", mode="before")
    @classmethod
    def _by_name(cls, policy: Any) -> Any:
        if isinstance(policy, dict) and "from" in policy:
            return load_policy(policy["from"], {field: each for field, each in policy.items() if field != "from"})
        return load_policy(policy) if isinstance(policy, (str, Path)) else policy

    def build(self, model: ModelSpec, layer: int) -> AttentionMixer:
        return AttentionMixer(self, model)

    def memory_bytes(self, model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype, rows: int) -> list[int]:
        width = model.head_width or model.width // model.heads
        kv_heads = self.kv_heads or model.kv_heads or model.heads
        shape = {"heads": model.heads, "kv_heads": kv_heads, "head_width": width, "rows": rows}
        shift = rows * dtype.itemsize * width * (model.heads + 2 * kv_heads) if self.token_shift else 0
        return [entry.bytes + shift for entry in cost(self.policy, lengths, dtype=dtype, **shape)]

    def under(self, policy: PolicySpec) -> AttentionMixerSpec:
        return self.model_copy(update={"policy": policy})

    def takes_values_of(self, other: MixerSpec, model: ModelSpec) -> bool:
        if not isinstance(other, AttentionMixerSpec):
            return False
        usual = model.kv_heads or model.heads
        there = self.value_residual == "none" or other.value_residual != "none"
        return there and (self.kv_heads or usual) == (other.kv_heads or usual)

    @property
    def label(self) -> str:
        return self.policy.name or f"attention over a {self.policy.window.kind} window"

    def check(self, model: ModelSpec) -> None:
        if self.kv_heads is not None and model.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of a mixer's kv_heads, got {model.heads} and {self.kv_heads}")
        head_width = model.head_width or model.width // model.heads
        rotary = self.rotary or model.rotary
        policy = self.policy.build()
        if not rotary.turned_width(head_width) and policy.needs_rotation:
            raise ValueError(
                f"{policy.turning}, but this model rotates none (rotary.width 0); "
                "use a policy with rotary: {kind: keep} and no expected-attention"
            )


class AttentionMixer(Mixer):
    """Memory attention with token shift and value residual around its projections."""

    def __init__(self, spec: AttentionMixerSpec, model: ModelSpec) -> None:
        super().__init__()
        policy = spec.policy.build()
        self.attention = MemoryAttention(
            rounded(policy) if model.rounding == "bfloat16" else policy,
            width=model.width,
            heads=model.heads,
            kv_heads=spec.kv_heads or model.kv_heads,
            head_width=model.head_width,
            qk_norm=spec.qk_norm,
            rotary=spec.rotary or model.rotary,
        )
        if model.rounding == "bfloat16":
            self.attention.rotary.rounding = torch.bfloat16
        self.residual = None
        if spec.value_residual != "none":
            channels = self.attention.value.out_features
            size = spec.value_residual_rank or rank(model.width, 1.3, 0.5)
            self.residual = ValueResidual(spec.value_residual, model.width, channels, size)
        self.shift = None
        if spec.token_shift:
            projections = {name: getattr(self.attention, name) for name in ("query", "key", "value")}
            self.shift = nn.ModuleDict({name: TokenShift(each.out_features) for name, each in projections.items()})

    @property
    def takes_boundaries(self) -> bool:
        return self.attention.policy.takes_boundaries

    def first_values(self, x: Tensor, state: State, span: Span) -> tuple[Tensor | None, State]:
        return (None if self.residual is None else self.attention.value(x)), {}

    def forward(self, x: Tensor, first: Tensor | None, state: State, span: Span) -> tuple[Tensor, State]:
        projected = {name: getattr(self.attention, name)(x) for name in ("query", "key", "value")}
        if self.residual is not None:
            assert first is not None
            projected["value"] = self.residual(projected["value"], first, x)
        carried: State = {}
        if self.shift is not None:
            for name, each in projected.items():
                last = tensor(state, name)
                carried[name] = span.last(each, last)
                projected[name] = self.shift[name](each, span.previous(each, last, "itself"))
        memory = state.get("memory")
        assert not isinstance(memory, Tensor)
        boundaries = span.boundaries if self.takes_boundaries else None
        y, after = self.attention.remember(
            x, projected["query"], projected["key"], projected["value"], memory, span.lengths, boundaries
        )
        carried["memory"] = after
        return y, carried

    @torch.no_grad()
    def initialise(self, layer: int, depth: int) -> None:
        self.attention.output.weight.zero_()
        if self.residual is not None:
            self.residual.initialise()
        if self.shift is not None:
            for name, power in (("query", 0.2), ("key", 0.7), ("value", 0.7)):
                shift = self.shift[name]
                assert isinstance(shift, TokenShift)
                shift.initialise(layer, depth, power)
