"""RWKV-7 (arXiv 2503.14456): a mixer whose whole memory is one matrix per head.

Per head, with state S [key, value], a_t = −κ_t and b_t = κ_t ⊙ rate_t:

    S_t = diag(w_t) S_{t−1} + b_t (a_tᵀ S_{t−1}) + k_t v_tᵀ,    o_t = S_tᵀ r_t
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, softplus

from memkit.lm.mixer import Mixer
from memkit.lm.parts import Linear, LowRank, Span, State, TokenShift, centred, rank, tensor
from memkit.lm.spec import MOST_WIDTH, MixerSpec, ModelSpec
from memkit.pieces.registry import register

__all__ = ["CHUNK", "RWKV7Mixer", "RWKV7MixerSpec", "scan"]

CHUNK = 32
"""Tokens solved together. log w ≥ −e^(−½) a token, so 1/decay stays below e^(32·0.61) ≈ 3·10⁸: safe in float32."""

NORM_EPS = 64e-5
SHIFTS = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
"""What is computed from shifted inputs, and the power its shift starts with."""


@register
class RWKV7MixerSpec(MixerSpec):
    """RWKV-7 time mixing. Ranks left out are the usual ones for the width."""

    kind: Literal["rwkv7"] = "rwkv7"
    token_shift: bool = Field(
        default=True, description="whether inputs are shifted towards the previous token's, which is 0 for the first"
    )
    decay_rank: int | None = Field(
        default=None, ge=1, le=MOST_WIDTH, description="left out: 1.8·√width to a multiple of 32"
    )
    rate_rank: int | None = Field(
        default=None, ge=1, le=MOST_WIDTH, description="left out: 1.8·√width to a multiple of 32"
    )
    value_rank: int | None = Field(
        default=None, ge=1, le=MOST_WIDTH, description="left out: 1.3·√width to a multiple of 32"
    )
    gate_rank: int | None = Field(
        default=None, ge=1, le=MOST_WIDTH, description="left out: 0.6·width^0.8 to a multiple of 32"
    )

    def build(self, model: ModelSpec, layer: int) -> RWKV7Mixer:
        return RWKV7Mixer(self, model)

    def memory_bytes(self, model: ModelSpec, lengths: Sequence[int], dtype: torch.dtype, rows: int) -> list[int]:
        state = model.heads * (model.width // model.heads) ** 2 * torch.promote_types(dtype, torch.float32).itemsize
        return [rows * state + self.first_memory_bytes(model, dtype, rows)] * len(lengths)

    def first_memory_bytes(self, model: ModelSpec, dtype: torch.dtype, rows: int) -> int:
        """One more last token: the first layer shifts the embeddings too."""
        return rows * model.width * dtype.itemsize if self.token_shift else 0

    def check(self, model: ModelSpec) -> None:
        if model.width % model.heads:
            raise ValueError(
                f"width must be a multiple of heads where a mixer is rwkv7, whatever head_width says, "
                f"got {model.width} and {model.heads}"
            )


class RWKV7Mixer(Mixer):
    """RWKV-7 time mixing with heads of width / heads channels."""

    def __init__(self, spec: RWKV7MixerSpec, model: ModelSpec) -> None:
        super().__init__()
        width, self.heads = model.width, model.heads
        self.receptance, self.key, self.value, self.output = (Linear(width, width) for _ in range(4))
        self.decay = LowRank(width, spec.decay_rank or rank(width, 1.8, 0.5), width, torch.tanh)
        self.rate = LowRank(width, spec.rate_rank or rank(width, 1.8, 0.5), width, None)
        self.residual = LowRank(width, spec.value_rank or rank(width, 1.3, 0.5), width, None)
        self.gate = LowRank(width, spec.gate_rank or rank(width, 0.6, 0.8), width, torch.sigmoid, bias=False)
        self.removal = nn.Parameter(torch.zeros(width))
        self.replacement = nn.Parameter(torch.zeros(width))
        self.bonus = nn.Parameter(torch.zeros(self.heads, width // self.heads))
        self.norm = nn.GroupNorm(self.heads, width, eps=NORM_EPS)
        self.shift = nn.ModuleDict({name: TokenShift(width) for name in SHIFTS}) if spec.token_shift else None

    def first_values(self, x: Tensor, state: State, span: Span) -> tuple[Tensor | None, State]:
        shifted, carried = self._shifted(x, ("value",), "first", state, span)
        return self.value(shifted["value"]), carried

    def forward(self, x: Tensor, first: Tensor | None, state: State, span: Span) -> tuple[Tensor, State]:
        assert first is not None
        inputs, carried = self._shifted(x, tuple(SHIFTS), "last", state, span)
        r, k, v = (getattr(self, name)(inputs[name]) for name in ("receptance", "key", "value"))
        v = v + (first.to(v.dtype) - v) * torch.sigmoid(self.residual(inputs["value"]))
        log_w = self._log_decay(inputs["decay"])
        rate = torch.sigmoid(self.rate(inputs["rate"]))
        direction = normalize(self._heads(k * self.removal), dim=-1, eps=1e-12)
        k = k * (1 + (rate - 1) * self.replacement)
        r, log_w, k, v, rate = (self._heads(each) for each in (r, log_w, k, v, rate))
        valid = span.valid(x.shape[1])
        if valid is not None:  # padding leaves the state as it is
            padding = ~valid[:, None]
            log_w, k, direction = (each.masked_fill(padding, 0) for each in (log_w, k, direction))
        out, carried["state"] = scan(r, log_w, k, v, -direction, direction * rate, tensor(state, "state"))
        out = self.norm(rearrange(out, "b h t d -> (b t) (h d)")).view_as(x)
        bonus = (r * k * self.bonus[:, None]).sum(-1, keepdim=True) * v
        out = out + rearrange(bonus, "b h t d -> b t (h d)")
        return self.output(out * self.gate(inputs["gate"])), carried

    def _log_decay(self, x: Tensor) -> Tensor:
        """log w = −exp(−softplus(−logits) − ½), between −0.61 and 0, in float32 or better: its products are long."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.decay(x.to(self.decay.down.weight.dtype))
            return -torch.exp(-softplus(-_wide(logits)) - 0.5)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.heads)

    def _shifted(
        self, x: Tensor, names: tuple[str, ...], key: str, state: State, span: Span
    ) -> tuple[dict[str, Tensor], State]:
        """x as every one of `names` sees it, and the last token to carry on as `key`."""
        if self.shift is None:
            return dict.fromkeys(names, x), {}
        last = tensor(state, key)
        previous = span.previous(x, last, "zero")
        return {name: self.shift[name](x, previous) for name in names}, {key: span.last(x, last)}

    @torch.no_grad()
    def initialise(self, layer: int, depth: int) -> None:
        """RWKV-7's own start: decays spread over the channels of a head and, in later layers, towards slow ones."""
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        self.output.weight.zero_()
        assert self.decay.bias is not None and self.rate.bias is not None and self.residual.bias is not None
        for low_rank in (self.decay, self.rate, self.residual, self.gate):
            low_rank.initialise()
        width, head = self.decay.bias.numel(), self.bonus.shape[1]
        device = self.decay.bias.device
        channel = torch.arange(width, device=device)
        within = (channel % head) / max(head - 1, 1) * 2 - 1
        zigzag = within * within.abs()
        depth_share = layer / max(depth - 1, 1)
        self.decay.bias.copy_(-5.5 + 6 * (channel / max(width - 1, 1)) ** (1 + depth_share**0.3) + 2.5 * zigzag)
        self.rate.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * centred(self.rate.bias))
        self.residual.bias.copy_(0.73 - 0.4 * centred(self.residual.bias))
        self.removal.copy_(0.71 - 0.1 * centred(self.removal))
        self.replacement.fill_(1.02)
        self.bonus.fill_(-0.04)
        self.norm.weight.fill_(((layer + 1) / depth) ** 0.7)
        self.norm.bias.zero_()
        if self.shift is not None:
            for name, power in SHIFTS.items():
                shift = self.shift[name]
                assert isinstance(shift, TokenShift)
                shift.initialise(layer, depth, power)


def scan(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence over a whole call: outputs [b, h, t, d] in r's dtype, and the state after it, [b, h, d, d].

    All inputs [b, h, t, d]; state: in float32 or better, from the call before, None for zeros. On CUDA
    flash-linear-attention's kernel does it where that is installed; elsewhere `scan_in_chunks`.
    """
    kernel = _kernel() if r.is_cuda else None
    with torch.autocast(r.device.type, enabled=False):
        if kernel is None:
            given = [_wide(each) for each in (r, log_w, k, v, a, b)]
            out, after = scan_in_chunks(*given, state=state)
            return out.to(r.dtype), after
        given = [rearrange(each, "b h t d -> b t h d") for each in (r, log_w.to(r.dtype), k, v, a, b)]
        out, after = kernel(*(each.contiguous() for each in given), initial_state=state, output_final_state=True)
        return rearrange(out, "b t h d -> b h t d"), after


def scan_in_chunks(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The recurrence without a loop over tokens.

    Within a chunk that starts from S₀, let P_t be the product of w up to t, ã_t = a_t ⊙ P_{t−1}, r̃_t = r_t ⊙ P_t,
    b̃_t = b_t / P_t, k̃_t = k_t / P_t, and u_t = a_tᵀ S_{t−1}. Then S_t = diag(P_t) (S₀ + Σ_{s≤t} b̃_s u_sᵀ + k̃_s v_sᵀ),
    so U solves a triangular system: (I − tril(ÃB̃ᵀ, −1)) U = Ã S₀ + tril(ÃK̃ᵀ, −1) V. All chunks do this at once; only
    S₀ is carried from chunk to chunk, by one matrix product each.
    """
    rows, heads, tokens, width = r.shape
    carried: Tensor = r.new_zeros(rows, heads, width, v.shape[-1]) if state is None else state
    if not tokens:
        return r.new_zeros(rows, heads, 0, v.shape[-1]), carried
    if tokens == 1:
        r, log_w, k, v, a, b = (each[:, :, 0] for each in (r, log_w, k, v, a, b))
        return _step(r, log_w, k, v, a, b, carried)
    chunk = min(chunk, tokens)
    padding = -tokens % chunk
    r, log_w, k, v, a, b = (
        rearrange(pad(each, (0, 0, 0, padding)), "b h (n c) d -> b h n c d", c=chunk) for each in (r, log_w, k, v, a, b)
    )
    log_p = log_w.cumsum(-2)
    p, inverse = log_p.exp(), (-log_p).exp()
    a, r, b, k = a * (log_p - log_w).exp(), r * p, b * inverse, k * inverse
    earlier = (a @ k.mT).tril(-1) @ v
    system = torch.eye(chunk, dtype=r.dtype, device=r.device) - (a @ b.mT).tril(-1)
    solved = torch.linalg.solve_triangular(system, torch.cat((a, earlier), -1), upper=False, unitriangular=True)
    by_state, constant = solved.split((width, v.shape[-1]), dim=-1)  # U = by_state S₀ + constant
    last = p[..., -1, :].unsqueeze(-1)
    turn = last * (torch.eye(width, dtype=r.dtype, device=r.device) + b.mT @ by_state)
    add = last * (b.mT @ constant + k.mT @ v)
    starts: list[Tensor] = []
    for index in range(r.shape[2]):
        starts.append(carried)
        carried = turn[:, :, index] @ carried + add[:, :, index]
    through_b = (r @ b.mT).tril()
    out = (r + through_b @ by_state) @ torch.stack(starts, dim=2) + through_b @ constant + (r @ k.mT).tril() @ v
    return rearrange(out, "b h n c d -> b h (n c) d")[:, :, :tokens], carried


def _step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token, [b, h, d] each, by the recurrence as it is written: decoding has nothing to solve."""
    removed = a.unsqueeze(-2) @ state
    state = log_w.exp().unsqueeze(-1) * state + b.unsqueeze(-1) * removed + k.unsqueeze(-1) * v.unsqueeze(-2)
    return r.unsqueeze(-2) @ state, state


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.cache
def _kernel() -> Any | None:
    try:
        from fla.ops.rwkv7 import chunk_rwkv7  # type: ignore[import-not-found]
    except ImportError:
        return None
    return chunk_rwkv7
