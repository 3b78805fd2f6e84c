"""Tokens that merge, and the slots they merge into.

Every law of merge rules folds a few tokens into slots through the engine, on a plan that says where each goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit.memory import Memory
from memkit.pieces.merging import Merging
from memkit.plan import Plan
from memkit.testing.agreement import Results, agree, eps_of, size
from memkit.testing.cases import DATA, Data, make
from memkit.testing.given import as_spec
from memkit.testing.laws.weights import weights_in_sums
from memkit.testing.scaling import least_policy

__all__ = ["Merge", "Tokens", "agree_on", "by_slot", "fold", "merges", "sums"]


@dataclass(frozen=True)
class Merge:
    """Tokens that leave together, and the slot that each founds or joins.

    slots: each token's slot, −1 for one that is dropped; the first token of a slot founds it (its last, with `behind`);
    heads, width, value_width; keys, values: kinds of data; seed; dtype; weights: whether tokens have weights other than
    1, and whether some are 0.
    """

    slots: tuple[int, ...] = (0, 0)
    behind: bool = False
    heads: int = 1
    width: int = 2
    value_width: int = 2
    keys: Data = "integers"
    values: Data = "integers"
    seed: int = 0
    dtype: str = "float64"
    weights: str = "none"

    @property
    def founders(self) -> set[int]:
        """The tokens that found."""
        order = range(len(self.slots))
        place = {self.slots[j]: j for j in (order if self.behind else reversed(order))}
        return {j for slot, j in place.items() if slot >= 0}

    def tokens(self, rule: Merging) -> Tokens:
        """The tensors."""
        generator, dtype = torch.Generator().manual_seed(self.seed), getattr(torch, self.dtype)
        many = len(self.slots)
        keys = make(self.keys, (1, self.heads, many, self.width), generator).to(dtype)
        values = make(self.values, (1, self.heads, many, self.value_width), generator).to(dtype)
        weights = None
        if rule.learned and self.weights != "none":
            weights = torch.randint(1, 9, (1, self.heads, many), generator=generator).to(dtype) / 4
            if self.weights == "some-zero":
                weights = weights * (torch.randint(0, 2, weights.shape, generator=generator) > 0)
        slots = torch.tensor(self.slots).expand(1, self.heads, many)
        founded = torch.zeros_like(slots, dtype=torch.bool)
        founded[..., list(self.founders)] = True
        return Tokens(keys, values, weights, slots, founded)


@dataclass(frozen=True)
class Tokens:
    """keys [b, g, n, d], values [b, g, n, v], weights [b, g, n]; slot and founded [b, g, n]."""

    keys: Tensor
    values: Tensor
    weights: Tensor | None
    slot: Tensor
    founded: Tensor

    def taken(self, index: Tensor) -> Tokens:
        """Some tokens, in another order."""
        weights = None if self.weights is None else self.weights[:, :, index]
        return Tokens(
            self.keys[:, :, index], self.values[:, :, index], weights, self.slot[:, :, index], self.founded[:, :, index]
        )

    def weighed(self, rule: Merging) -> tuple[Tensor, Tensor, Tensor]:
        """Each token's weight in the key sum, in the value sum and in the mass, from the definition; each [b, g, n]."""
        first = torch.ones_like(self.founded)  # all tokens of an example leave in one chunk
        return weights_in_sums(rule, self.keys, self.weights, self.founded, first)


@st.composite
def merges(
    draw: st.DrawFn,
    rule: Merging,
    data: tuple[str, ...] = DATA,
    dtypes: tuple[str, ...] = ("float64", "float32"),
    drops: bool = True,
) -> Merge:
    """Merges for a rule: up to eight tokens in up to three slots, every slot founded by one of them."""
    slots = draw(st.integers(1, 3))
    rest = draw(st.lists(st.integers(-1 if drops else 0, slots - 1), max_size=5))
    order = [*range(slots), *(slot if rule.joins else -1 for slot in rest)]
    return Merge(
        slots=tuple(order),
        behind=draw(st.booleans()),
        heads=draw(st.integers(1, 2)),
        width=draw(st.integers(1, 3)),
        value_width=draw(st.integers(1, 3)),
        keys=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        values=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        seed=draw(st.integers(0, 999)),
        dtype=draw(st.sampled_from(dtypes)),
        weights=draw(st.sampled_from(("none", "positive", "some-zero"))) if rule.learned else "none",
    )


def fold(rule: Merging, tokens: Tokens, chunk: int | None = None) -> tuple[Memory, Tensor]:
    """The memory after these tokens have left in chunks of `chunk` (all at once by default), and one output after that.

    All slots are founded in the first chunk.
    """
    many, dtype = tokens.keys.shape[2], tokens.keys.dtype
    chunk = chunk or many
    slots = int(tokens.slot.max()) + 1
    alike = rule.weighs.keys == rule.weighs.values
    readout = {} if alike else {"key": "l2", "value": "count-mean"}
    policy = least_policy(chunk, slots, merging=as_spec(rule), readout=readout)
    rows, heads = tokens.keys.shape[:2]

    def after(tensor: Tensor) -> Tensor:  # one more token, whose arrival makes the last chunk leave
        return torch.cat((tensor, torch.ones_like(tensor[:, :, :1])), dim=2)

    plan = Plan(
        tokens.slot,
        tokens.founded,
        np.zeros(rows, dtype=np.int64),
        np.full(rows, many, dtype=np.int64),
        np.full((rows, many // chunk), slots, dtype=np.int64),
    )
    output, memory = memkit.attend(
        policy,
        torch.ones(rows, heads, many + 1, tokens.keys.shape[-1], dtype=dtype),
        after(tokens.keys),
        after(tokens.values),
        weights=None if tokens.weights is None else after(tokens.weights),
        plan=plan,
    )
    return memory, output[:, :, -1:]


def sums(rule: Merging, tokens: Tokens, chunk: int | None = None) -> Results:
    """What the slots hold: key and value sums [b, g, m, ·], count and (where it is stored) mass [b, g, m]."""
    memory, _ = fold(rule, tokens, chunk)
    slots, width = int(tokens.slot.max()) + 1, tokens.keys.shape[-1]
    held = memory.sums[:, :, :slots]
    found = {"key_sum": held[..., :width], "value_sum": held[..., width:]}
    found["count"] = memory.counts[:, :, :slots].double()
    if "mass" in memory.policy.columns or not memory.policy.weighted:
        found["mass"] = memory.scalar("mass")[:, :, :slots]
    return found


def agree_on(
    rule: Merging,
    example: Merge,
    got: Results,
    expected: Results,
    scales: dict[str, float] | None,
    what: str = "",
) -> None:
    """Slots agree to rounding. scales: what a sum's terms can be, by name; None: from the tokens' keys and values."""
    tokens = example.tokens(rule)
    if scales is None:
        weight = float(tokens.weighed(rule)[0].abs().max()) + float(tokens.weighed(rule)[1].abs().max())
        scales = {"key_sum": size(tokens.keys) * weight, "value_sum": size(tokens.values) * weight, "mass": weight}
    scales = {name: scale * len(example.slots) for name, scale in scales.items()}
    stored = {name: tensor for name, tensor in expected.items() if name in got}
    agree(got, stored, scales=scales, eps=eps_of(tokens.keys.dtype), what=what)


def by_slot(rows: Tensor, slot: Tensor) -> Tensor:
    """Σ over each slot's tokens: rows [b, g, n(, d)] → [b, g, m(, d)]."""
    slots = int(slot.max()) + 1
    members = (slot.unsqueeze(-2) == torch.arange(slots).unsqueeze(-1)).to(rows.dtype)
    return (members @ (rows if rows.ndim == 4 else rows.unsqueeze(-1))).view(*slot.shape[:2], slots, *rows.shape[3:])
