"""A law of readouts: how far from full attention a query can be led by slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from memkit.evals.bound import error_bound, read_merged
from memkit.pieces.readout import Readout
from memkit.pieces.statistics import COUNT, FOUNDER_MASS, KEY_NORM, MASS, RADIUS, VALUE_NORM, Numbers
from memkit.testing.law import Broken, law

__all__ = ["Merged", "merged_tokens", "reading_error_bound"]


@dataclass(frozen=True)
class Merged:
    """Tokens of one head, some of them merged.

    counts: tokens in each slot; exact: tokens beside them; width; seed; spread: how far tokens of a slot lie apart;
    size: of keys, values and queries; queries: how many ask; weighed: whether tokens enter their slots with weights.
    """

    counts: tuple[int, ...] = (2, 1)
    exact: int = 1
    width: int = 2
    seed: int = 0
    spread: float = 1.0
    size: float = 1.0
    queries: int = 3
    weighed: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [q, d]; keys and values [n, d], those of slots first; the slot of each merged token [k]. float64."""
        generator = torch.Generator().manual_seed(self.seed)
        slot = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))

        def vectors(many: int) -> Tensor:
            return self.size * torch.randn(many, self.width, generator=generator, dtype=torch.float64)

        made: list[Tensor] = []
        for _ in range(2):
            centres = vectors(len(self.counts))
            made.append(torch.cat((centres[slot] + self.spread * vectors(len(slot)), vectors(self.exact))))
        return vectors(self.queries), made[0], made[1], slot

    def weights(self) -> Tensor:
        """What each merged token weighs, [k] float64: from 0.1 to 2, or 1."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        some = 0.1 + 1.9 * torch.rand(sum(self.counts), generator=generator, dtype=torch.float64)
        return some if self.weighed else torch.ones_like(some)


@st.composite
def merged_tokens(draw: st.DrawFn) -> Merged:
    """Up to four slots of up to six tokens, near together or far apart, beside up to four exact tokens."""
    return Merged(
        counts=tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))),
        exact=draw(st.integers(0, 4)),
        width=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**16)),
        spread=draw(st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 5.0])),
        size=draw(st.sampled_from([0.1, 1.0, 6.0])),
        weighed=draw(st.booleans()),
    )


@law("error bound", "readout")
def reading_error_bound(readout: Readout, example: Merged) -> None:
    """‖ô − o‖ ≤ Σ_j P_j s_j + 2R·min(tanh(δ/2), P·(e^δ − 1)): reading slots is as wrong as their tokens differ.

    o is attention over all tokens, ô reads slots instead, by the readout's key, value and bias; the terms are those of
    `memkit.evals.bound.error_bound`. So a readout is good where it keeps keys, values and log(count) near its tokens'.
    """
    queries, keys, values, slot = example.tensors()
    many, scale = len(slot), example.width**-0.5
    slots, weights = len(example.counts), example.weights()

    def summed(each: Tensor) -> Tensor:
        return torch.zeros(slots, *each.shape[1:], dtype=torch.float64).index_add(0, slot, each)

    first = torch.tensor([int((slot == each).nonzero()[0]) for each in range(slots)])
    numbers: Numbers = {
        COUNT: torch.tensor(example.counts, dtype=torch.float64),
        MASS: summed(weights),
        FOUNDER_MASS: weights[first],
        RADIUS: values[first].norm(dim=-1),
        KEY_NORM: summed(weights * keys[:many].norm(dim=-1)),
        VALUE_NORM: summed(weights * values[:many].norm(dim=-1)),
    }
    bias = readout.bias(numbers)
    read = (
        readout.key(summed(weights.unsqueeze(-1) * keys[:many]), numbers, None),
        readout.value(summed(weights.unsqueeze(-1) * values[:many]), numbers),
        torch.zeros(slots, dtype=torch.float64) if bias is None else bias.double(),
    )
    exact = (keys[many:], values[many:])
    found, _ = read_merged(queries, exact, read, scale)
    expected = (scale * queries @ keys.T).softmax(-1) @ values
    error = (found - expected).norm(dim=-1)
    bound = error_bound(queries, exact, (keys[:many], values[:many], slot), read, scale)
    slack = 1e-9 * float(values.norm(dim=-1).amax())
    if not bool((error <= bound + slack).all()):
        raise Broken(f"errors {error.tolist()} exceed their bounds {bound.tolist()}")
