"""An attention layer that remembers as a policy says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import elu, layer_norm

from memkit.catalog import as_policy
from memkit.engine import attend
from memkit.engine.inputs import Lengths
from memkit.errors import InputError, shown
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.needs import Need
from memkit.pieces.registry import Spec
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy, PolicySpec
from memkit.processes import HeadExchange, local
from memkit.whole import MOST, whole_number

__all__ = ["MemoryAttention", "QueryKeyNorm", "RotaryEmbedding", "RotaryEmbeddingSpec"]

QueryKeyNorm = Literal["none", "layer-norm", "unit"]

UNIT_EPS = 1e-5


class RotaryEmbeddingSpec(Spec):
    """How a layer rotates queries and keys (RoPE, arXiv 2104.09864); the first channels of each head turn.

    Pair i of `width`/2 turns by position · frequency_i, from position 0 on.
    """

    width: int | None = Field(
        default=None, ge=0, le=MOST, description="channels of each head that turn, even; 0: none; left out: all"
    )
    theta: float = Field(default=10_000.0, gt=1, description="base of the frequencies; more than 1")
    pairing: Literal["adjacent", "half-split"] = Field(
        default="half-split", description="whether channels (2i, 2i + 1) or (i, i + width/2) are a pair"
    )
    spacing: Literal["open", "closed"] = Field(
        default="open",
        description="open: frequency_i = theta^(−2i/width), which stops short of 1/theta; "
        "closed: theta^(−i/(width/2 − 1)), the last one being 1/theta",
    )
    clockwise: bool = Field(
        default=False, description="whether pairs turn the other way: (x, y) → (x cos + y sin, y cos − x sin)"
    )

    @model_validator(mode="after")
    def _even(self) -> RotaryEmbeddingSpec:
        if self.width is not None and self.width % 2:
            raise ValueError(f"rotary.width must be even, for channels turn in pairs, got {self.width}")
        return self

    def turned_width(self, head_width: int) -> int:
        """Channels that turn, of heads this wide. Raises `InputError` where they do not fit."""
        width = head_width if self.width is None else self.width
        if width > head_width or width % 2:
            raise InputError(
                f"rotary.width must be even and at most the head width {head_width}, got {width}; set rotary.width"
            )
        return width

    def frequencies(self, head_width: int) -> Tensor:
        """Radians per position of each pair, [width/2] float64; negative where pairs turn clockwise."""
        pairs = self.turned_width(head_width) // 2
        steps = pairs if self.spacing == "open" else max(pairs - 1, 1)
        frequencies = self.theta ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / steps)
        return -frequencies if self.clockwise else frequencies

    def build(self, head_width: int) -> RotaryEmbedding:
        """The embedding for heads this wide."""
        return RotaryEmbedding(self, head_width)


class RotaryEmbedding(nn.Module):
    """Turns the first channels of queries and keys by their positions. Has no parameters and no buffers.

    rounding: where given, cos and sin are rounded to this dtype before they are used; some models were trained so.
    """

    def __init__(self, spec: RotaryEmbeddingSpec, head_width: int, rounding: torch.dtype | None = None) -> None:
        super().__init__()
        self.rounding = rounding
        width = spec.turned_width(head_width)
        # Not a buffer: module.to(torch.bfloat16) would round the frequencies, and long positions would go astray.
        self.rotation = Rotation(spec.pairing, width, spec.frequencies(head_width)) if width else None

    def forward(self, positions: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Each of `vectors` [b, h, t, d] at positions [b, t], or [1, t] where all rows have the same."""
        rotation = self.rotation
        if rotation is None:
            return vectors
        cos, sin = rotation.angles(positions[:, None])
        if self.rounding is not None:
            cos, sin = cos.to(self.rounding), sin.to(self.rounding)
        return tuple(rotation.turn(each, cos, sin) for each in vectors)

    def extra_repr(self) -> str:
        rounding = "" if self.rounding is None else f", rounding={self.rounding}"
        return f"{self.rotation.width if self.rotation else 0} channels{rounding}"


class MemoryAttention(nn.Module):
    """Causal self-attention under a memory policy: y = (attention of x W_q over memory and x W_k, x W_v) W_o.

    ```python
    layer = memkit.MemoryAttention("kvm-sqrt-16", width=768, heads=6)
    y, memory = layer(x)            # x [b, t, width]
    y, memory = layer(more, memory)  # goes on where it stopped
    ```

    policy: a name, a PolicySpec or a Policy. width: of x and y. heads, kv_heads: query heads, and key/value heads that
    groups of them share (as many where left out). head_width: of queries and keys (width / heads where left out);
    value_width: of values (as wide as keys where left out).
    qk_norm: `layer-norm` norms every head's query and key (weight and bias, shared by heads); `unit` divides them by
    ‖·‖ + 1e-5, and scores are β·√d·q·k with β learned per head (arXiv 2602.03922).
    rotary: how queries and keys are rotated, a RotaryEmbeddingSpec or its fields; left out: all channels, θ = 10,000.

    Projections have no bias. The policy's learned parts (memory-key LayerNorm, query scales) are in `learned`; merge
    weights are 1 + ELU(x W_gate), one per token and key/value head. Works under `torch.autocast`: projections in its
    dtype, routing and sums in float32.

    Raises `InputError` where sizes do not fit, or the policy un-rotates what is not rotated.
    """

    def __init__(
        self,
        policy: str | Path | PolicySpec | Policy,
        *,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        value_width: int | None = None,
        qk_norm: QueryKeyNorm = "none",
        rotary: RotaryEmbeddingSpec | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.policy = as_policy(policy)
        self.width, self.heads = whole_number("width", width, 1, MOST), whole_number("heads", heads, 1, MOST)
        self.kv_heads = whole_number("kv_heads", heads if kv_heads is None else kv_heads, 1, MOST)
        head_width = _head_width(width, heads) if head_width is None else head_width
        self.head_width = whole_number("head_width", head_width, 1, MOST)
        self.value_width = whole_number("value_width", head_width if value_width is None else value_width, 1, MOST)
        if heads % self.kv_heads:
            raise InputError(f"heads must be a multiple of kv_heads, got {heads} and {self.kv_heads}")
        if not isinstance(qk_norm, str) or qk_norm not in ("none", "layer-norm", "unit"):
            raise InputError(f"qk_norm must be 'none', 'layer-norm' or 'unit', got {shown(qk_norm)}")
        self.qk_norm = qk_norm

        self.query = nn.Linear(width, heads * self.head_width, bias=False)
        self.key = nn.Linear(width, self.kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, self.kv_heads * self.value_width, bias=False)
        self.output = nn.Linear(heads * self.value_width, width, bias=False)
        norms = qk_norm == "layer-norm"
        self.query_norm = nn.LayerNorm(self.head_width) if norms else None
        self.key_norm = nn.LayerNorm(self.head_width) if norms else None
        self.query_scale = nn.Parameter(torch.ones(heads)) if qk_norm == "unit" else None

        if not isinstance(rotary, RotaryEmbeddingSpec):
            if not isinstance(rotary, dict | None) or not all(isinstance(name, str) for name in rotary or ()):
                raise InputError(f"rotary must be a RotaryEmbeddingSpec or a dict of its fields, got {shown(rotary)}")
            rotary = RotaryEmbeddingSpec(**(rotary or {}))
        self.rotary = rotary.build(self.head_width)
        if Need.ROTATION in self.policy.needs and self.rotary.rotation is None:
            raise InputError(
                f"{self.policy.turning}, but this layer rotates none (rotary.width 0); "
                "use a policy with rotary: {kind: keep} and no expected-attention"
            )
        self.learned = PolicyParameters(self.policy, heads, self.head_width)
        weighed = Need.MERGE_WEIGHTS in self.policy.needs
        self.gate = nn.Linear(width, self.kv_heads, bias=False) if weighed else None
        self.exchange: HeadExchange | None = None
        """Where a text is split over processes: heads for tokens, before attention and after it."""
        self.listener: Callable[[dict[str, Any]], None] | None = None
        """Told what each call asks `attend`, memory, lengths and boundaries apart; for those who measure."""

    def forward(
        self,
        x: Tensor,
        memory: Memory | None = None,
        lengths: Lengths | None = None,
        boundaries: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """x [b, t, width] → y [b, t, width] and the memory to go on with.

        memory: what an earlier call returned (without gradients this call takes it over, see `memkit.attend`);
        lengths [b]: valid tokens of this call per row, the rest padding on the right, whose y is 0;
        boundaries [b, t] bool: which tokens are the last of their chunk, only with `chunker: boundaries`.
        """
        return self.remember(x, self.query(x), self.key(x), self.value(x), memory, lengths, boundaries)

    def remember(
        self,
        x: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        memory: Memory | None = None,
        lengths: Lengths | None = None,
        boundaries: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """What follows the projections, for layers that do something of their own to them.

        x [b, t, width] for the merge weights; queries, keys, values [b, t, heads · d]: projected, not yet normed or
        rotated.
        """
        # Heads are as many as came: all of the layer's, or one process's share of them.
        queries = rearrange(queries, "b t (h d) -> b h t d", d=self.head_width)
        keys = rearrange(keys, "b t (g d) -> b g t d", d=self.head_width)
        values = rearrange(values, "b t (g d) -> b g t d", d=self.value_width)
        queries, keys, scale = self._normed(queries, keys)
        weights = None
        if self.gate is not None:
            gate = self.gate(x)
            weights = (1 + elu(gate.to(torch.promote_types(gate.dtype, torch.float32)))).transpose(1, 2)
        learned, exchange = self.learned.here(), self.exchange
        if exchange is not None:
            queries, keys, values = exchange.to_heads(queries), exchange.to_heads(keys), exchange.to_heads(values)
            weights = None if weights is None else exchange.to_heads(weights)
            learned = learned.of_heads(exchange.heads_of(self.heads))
        queries, keys = self.rotary(self._positions(keys, memory), queries, keys)
        # Under autocast a norm may return float32 where the projections are bfloat16.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        given: dict[str, Any] = {
            "queries": queries,
            "keys": keys,
            "values": values,
            "weights": weights,
            "parameters": learned,
            "rotation": self.rotary.rotation if Need.ROTATION in self.policy.needs else None,
            "scale": scale,
        }
        if self.listener is not None:
            self.listener(given)
        output, memory = attend(self.policy, **given, memory=memory, lengths=lengths, boundaries=boundaries)
        if exchange is not None:
            output = exchange.to_tokens(output)
        return self.output(rearrange(output, "b h t d -> b t (h d)")), memory

    def _normed(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Normed queries and keys, and the scale of their scores; None for 1/√d."""
        if self.query_norm is not None and self.key_norm is not None:
            return _layer_normed(self.query_norm, queries), _layer_normed(self.key_norm, keys), None
        if self.query_scale is None:
            return queries, keys, None
        queries, keys = (each / (each.norm(dim=-1, keepdim=True) + UNIT_EPS) for each in (queries, keys))
        return queries * local(self.query_scale).to(queries.dtype)[:, None, None], keys, self.head_width**0.5

    @staticmethod
    def _positions(keys: Tensor, memory: Memory | None) -> Tensor:
        """Positions of this call's tokens, [b, t], or [1, t]: they continue from the memory. What is none of these rows
        is refused by `attend`, which says why."""
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        if not isinstance(memory, Memory) or len(memory.seen_rows) != keys.shape[0]:
            return positions
        return positions + memory.seen.to(keys.device)[:, None]

    def extra_repr(self) -> str:
        groups = "" if self.kv_heads == self.heads else f", kv_heads={self.kv_heads}"
        return f"{self.policy.name or 'policy'}, heads={self.heads}{groups}, head_width={self.head_width}"


def _layer_normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, norm.normalized_shape, local(norm.weight), local(norm.bias), norm.eps)


def _head_width(width: int, heads: int) -> int:
    if width % heads:
        raise InputError(f"width must be a multiple of heads, got {width} and {heads}; or give head_width")
    return width // heads
