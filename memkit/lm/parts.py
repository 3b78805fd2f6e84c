"""What mixers and blocks share: token shift, low-rank maps, the value residual, the MLP, and a call's span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from memkit.memory import Memory
from memkit.pieces.registry import Spec
from memkit.processes import HeadExchange, local

__all__ = ["Linear", "LowRank", "Mlp", "MlpSpec", "Span", "State", "TokenShift", "ValueResidual", "rank"]

State = dict[str, Tensor | Memory]
"""What one layer carries from one call to the next, by name; every tensor's first axis is the batch."""


class Linear(nn.Linear):
    """A projection without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)


@dataclass(frozen=True)
class Span:
    """The tokens of one call.

    lengths [b]: valid tokens per row, the rest padding on the right; None where every token is valid.
    begun [b]: whether a row had tokens before; None where no row had.
    boundaries [b, t] bool: which are the last of their chunk, on the CPU; None where none is said to be.
    exchange: where the text is split over processes; the tokens are this process's stretch.
    """

    lengths: Tensor | None
    begun: Tensor | None
    boundaries: Tensor | None = None
    exchange: HeadExchange | None = None

    def valid(self, tokens: int) -> Tensor | None:
        """[b, t, 1]: whether a token is valid; None where all are."""
        if self.lengths is None:
            return None
        return (torch.arange(tokens, device=self.lengths.device) < self.lengths[:, None]).unsqueeze(-1)

    def previous(self, x: Tensor, last: Tensor | None, first: Literal["itself", "zero"]) -> Tensor:
        """x_{t−1} of every token, [b, t, c]. A row's first token has itself or zero before it; `last` [b, 1, c]."""
        if not x.shape[1]:
            return x
        before = x[:, :1] if first == "itself" else torch.zeros_like(x[:, :1])
        if last is not None and self.begun is not None:
            before = torch.where(self.begun[:, None, None], last.to(x.dtype), before)
        if self.exchange is not None:
            newest = self.exchange.newest(x)  # on every process, though the first has no use for it: all take part
            before = newest[self.exchange.rank - 1] if self.exchange.rank else before + 0 * newest[0]
        return torch.cat((before, x[:, :-1]), dim=1)

    def last(self, x: Tensor, last: Tensor | None) -> Tensor:
        """Every row's last token of x [b, t, c], [b, 1, c]; what it was before where the row brings none."""
        if last is None:
            last = x.new_zeros(x.shape[0], 1, x.shape[2])
        if not x.shape[1]:
            return last
        if self.exchange is not None:
            return self.exchange.newest(x)[-1]
        if self.lengths is None:
            return x[:, -1:].clone()  # a view would keep all of x in memory
        newest = x.gather(1, (self.lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2]))
        return torch.where((self.lengths > 0)[:, None, None], newest, last.to(x.dtype))


class TokenShift(nn.Module):
    """a_t + α ⊙ (a_{t−1} − a_t), α learned per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        factor = local(self.factor)
        dtype = torch.promote_types(x.dtype, factor.dtype)
        return torch.lerp(x.to(dtype), previous.to(dtype), factor.to(dtype))

    @torch.no_grad()
    def initialise(self, layer: int, depth: int, power: float) -> None:
        """α_i = 1 − (i / channels)^(power·(1 − layer/depth)): the first channels look back most (RWKV-7's start)."""
        ramp = torch.arange(len(self.factor), device=self.factor.device) / len(self.factor)
        self.factor.copy_(1 - ramp ** (power * (1 - layer / depth)))


class LowRank(nn.Module):
    """bias + up(activation(down(x))), of a rank well below the width."""

    def __init__(
        self, inputs: int, rank: int, outputs: int, activation: Callable[[Tensor], Tensor] | None, bias: bool = True
    ) -> None:
        super().__init__()
        self.down, self.up = Linear(inputs, rank), Linear(rank, outputs)
        self.activation = activation
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        x = self.up(x if self.activation is None else self.activation(x))
        return x if self.bias is None else x + local(self.bias)

    @torch.no_grad()
    def initialise(self) -> None:
        """down starts at zero, so that at first only the bias speaks; up at 0.1 × an orthogonal matrix."""
        self.down.weight.zero_()
        nn.init.orthogonal_(self.up.weight, gain=0.1 * max(1.0, self.up.in_features / self.up.out_features) ** 0.5)


class ValueResidual(nn.Module):
    """Mixes a layer's values with those of the first layer of its kind, v_first.

    gated: v + (v_first − v) ⊙ sigmoid(b + W₂ W₁ x); linear: (1 − λ)·v + λ·v_first with one learned λ.
    """

    def __init__(self, mode: Literal["gated", "linear"], width: int, channels: int, rank: int) -> None:
        super().__init__()
        self.gate = LowRank(width, rank, channels, None) if mode == "gated" else None
        self.share = nn.Parameter(torch.tensor(0.5)) if mode == "linear" else None

    def forward(self, values: Tensor, first: Tensor, x: Tensor) -> Tensor:
        first = first.to(values.dtype)
        if self.gate is not None:
            return values + (first - values) * torch.sigmoid(self.gate(x)).to(values.dtype)
        assert self.share is not None
        share = local(self.share)
        return (1 - share) * values + share * first

    @torch.no_grad()
    def initialise(self) -> None:
        """gated: biases from 0.93 down to 0.53, so that first values weigh about two thirds; linear: a half."""
        if self.gate is not None and self.gate.bias is not None:
            self.gate.initialise()
            self.gate.bias.copy_(0.73 - 0.4 * centred(self.gate.bias))
        if self.share is not None:
            self.share.fill_(0.5)


class _SquaredReLU(torch.autograd.Function):
    """ReLU(x)², with half as many passes over what is the largest tensor of a block as autograd takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        positive = x.relu()
        return positive.mul_(positive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return torch.addcmul(grads[0].new_zeros(()), grads[0], x.relu(), value=2)


class MlpSpec(Spec):
    """The block's MLP: W₂ · ReLU(W₁ x)²."""

    expansion: float = Field(default=4.0, gt=0, le=2**10, description="hidden width per width, before rounding down")
    multiple_of: int = Field(
        default=32, ge=1, le=2**20, description="the hidden width is rounded down to a multiple of this"
    )
    token_shift: bool = Field(
        default=True, description="whether its input is shifted towards the previous token's, which is 0 for the first"
    )

    def hidden(self, width: int) -> int:
        """The hidden width."""
        return int(self.expansion * width) // self.multiple_of * self.multiple_of


class Mlp(nn.Module):
    """The block's MLP."""

    def __init__(self, spec: MlpSpec, width: int) -> None:
        super().__init__()
        hidden = spec.hidden(width)
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)
        self.shift = TokenShift(width) if spec.token_shift else None

    def forward(self, x: Tensor, state: State, span: Span) -> tuple[Tensor, State]:
        carried: State = {}
        if self.shift is not None:
            last = tensor(state, "mlp")
            carried["mlp"] = span.last(x, last)
            x = self.shift(x, span.previous(x, last, "zero"))
        return self.down(_SquaredReLU.apply(self.up(x))), carried

    @torch.no_grad()
    def initialise(self, layer: int, depth: int) -> None:
        nn.init.orthogonal_(self.up.weight)
        self.down.weight.zero_()
        if self.shift is not None:
            self.shift.initialise(layer, depth, (1 - layer / depth) ** 3)


def rank(width: int, factor: float, power: float) -> int:
    """The usual rank of a low-rank map: factor · width^power to the nearest multiple of 32, at least 32 (RWKV-7)."""
    return max(32, round(factor * width**power / 32) * 32)


def centred(like: Tensor) -> Tensor:
    """Even steps from −½ to ½ over the channels of a vector."""
    return torch.linspace(-0.5, 0.5, like.numel(), device=like.device).view_as(like)


def tensor(state: State, name: str) -> Tensor | None:
    """A layer's carried tensor; None at the beginning."""
    found = state.get(name)
    assert not isinstance(found, Memory)
    return found
