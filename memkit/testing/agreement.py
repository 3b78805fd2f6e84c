"""When two results agree: to rounding, and no further than the problem's own sensitivity to rounding.

Results may differ by a few eps of the scale of what was summed. Where that is exceeded, the same computation on inputs
moved by a few eps shows how much rounding can matter there (a direction of a sum that nearly cancels, say); the results
agree if they differ by no more than a multiple of that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memkit.testing.law import Broken

__all__ = ["Results", "agree", "by_differences", "eps_of", "identical", "show", "size"]

Results = dict[str, Tensor]

BASE = 32
"""Roundings allowed outright, in eps of the scale: sums of a few dozen terms, two softmaxes, one exp."""
MOVE = 4
"""How far inputs are moved to see the sensitivity, in eps."""
MARGIN = 16
"""How many times the largest of these effects two results may differ."""
DRAWS = 4


def eps_of(dtype: torch.dtype) -> float:
    """The dtype's rounding unit; float32's for sums in anything narrower."""
    return torch.finfo(dtype).eps


def agree(
    got: Results,
    expected: Results,
    *,
    scales: dict[str, float],
    eps: float,
    moved: Callable[[Callable[[str, Tensor], Tensor]], Results] | None = None,
    what: str = "",
) -> None:
    """Raise `Broken` where results differ by more than rounding.

    scales: by the first word of a result's name, the size of what is summed on the way to it; moved: the computation of
    `expected` on inputs changed by a function (name, tensor) → tensor.
    """
    noise: dict[str, float] | None = None
    for name, right in expected.items():
        mine = got[name]
        if mine.shape != right.shape:
            raise Broken(f"{what}{name}: shape {tuple(mine.shape)}, expected {tuple(right.shape)}")
        mine, right = mine.detach().double(), right.detach().double()
        sound = right.isfinite()
        if right.numel() == 0 or not sound.any():
            continue
        difference = torch.where(sound, (mine - right).abs(), 0).nan_to_num(torch.inf, torch.inf)
        allowed = BASE * eps * max(scales.get(name.split()[0], 0.0), float(right[sound].detach().abs().max()))
        if float(difference.max()) <= allowed:
            continue
        if moved is not None and noise is None:
            noise = _noise(expected, moved, eps)
        if noise is not None:
            allowed += MARGIN * noise[name]
        if not float(difference.max()) <= allowed:
            at = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
            raise Broken(
                f"{what}{name}{list(at)}: {float(mine[at]):.9g}, expected {float(right[at]):.9g}; "
                f"they differ by {float(difference[at]):.3g}, rounding explains {allowed:.3g}\n"
                f"{what}{name}:\n{show(mine)}\nexpected:\n{show(right)}"
            )


def _noise(
    expected: Results, moved: Callable[[Callable[[str, Tensor], Tensor]], Results], eps: float
) -> dict[str, float]:
    """How much moving every input by a few eps changes each result."""
    generator = torch.Generator().manual_seed(0)

    def change(_: str, tensor: Tensor) -> Tensor:
        shape, dtype = tensor.shape, torch.promote_types(tensor.dtype, torch.float64)
        return (tensor.to(dtype) * (1 + MOVE * eps * torch.randn(shape, generator=generator, dtype=dtype))).to(dtype)

    worst = dict.fromkeys(expected, 0.0)
    for _ in range(DRAWS):
        for name, tensor in moved(change).items():
            effect = (tensor.detach().double() - expected[name].detach().double()).abs()
            worst[name] = max(
                worst[name], float(effect.nan_to_num(torch.inf, torch.inf).max()) if effect.numel() else 0
            )
    return worst


def identical(got: Tensor, what: str, expected: Tensor, other: str, nan: bool = False) -> None:
    """Raise `Broken` where two tensors are not bitwise equal; with `nan`, NaN equals NaN."""
    alike = torch.equal(got, expected)
    if not alike and nan:
        alike = torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())
    if not alike:
        raise Broken(f"{what}:\n{show(got)}\n{other}:\n{show(expected)}")


def by_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float) -> Tensor:
    """The gradient of a sum at `at` without autograd: (f(x + h) − f(x − h)) / 2h, one number after another."""
    gradient, flat = torch.zeros_like(at), at.detach().reshape(-1)
    for i in range(len(flat)):
        ends: list[float] = []
        for h in (step, -step):
            moved = flat.clone()
            moved[i] += h
            ends.append(float(function(moved.view_as(at)).sum()))
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def size(tensor: Tensor) -> float:
    """The largest magnitude in a tensor, 0 for an empty one."""
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def show(tensor: Tensor) -> str:
    """A small tensor's numbers; of a large one the ends."""
    return repr(torch.as_tensor(tensor).detach())
