"""Laws of merge rules: what a slot is after it has taken its tokens.

Every law folds a few tokens into slots through the engine, on a plan that says where each goes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit.memory import Memory
from memkit.pieces.merging import Merging
from memkit.plan import Plan
from memkit.policy import Policy, PolicySpec
from memkit.testing.agreement import Results, agree, eps_of, show
from memkit.testing.cases import DATA, Data, make
from memkit.testing.given import as_spec
from memkit.testing.law import Broken, law

__all__ = [
    "MERGING_LAWS",
    "Merge",
    "associativity",
    "chunks_do_not_matter",
    "conservation",
    "convexity",
    "duplicates",
    "heads_and_slots_are_strangers",
    "isotropy",
    "merge_gradients",
    "merges",
    "merging_is_pure",
    "order_of_tokens",
    "weight_zero",
    "weights_are_weights",
]


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
        ones = torch.ones(self.slot.shape, dtype=torch.float64)
        learned = self.weights
        if learned is None and rule.learned:
            learned = ones.to(self.keys.dtype)
        found = rule.weight(self.keys, learned)
        if found is None:
            return ones, ones, ones
        weigh = rule.weighs
        weight = torch.where(self.founded & (not weigh.first_chunk), 1.0, found.double())
        mass = weight if weigh.keys or weigh.values else ones
        return weight if weigh.keys else ones, weight if weigh.values else ones, mass


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
    policy = _policy(rule, chunk, slots)
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


def _policy(rule: Merging, chunk: int, slots: int) -> Policy:
    alike = rule.weighs.keys == rule.weighs.values
    return PolicySpec(
        chunker={"kind": "fixed", "size": chunk},  # type: ignore[arg-type]
        window={"kind": "block", "chunks": 1},  # type: ignore[arg-type]
        growth={"kind": "fixed", "slots": slots},  # type: ignore[arg-type]
        merging=as_spec(rule),
        readout={} if alike else {"key": "l2", "value": "count-mean"},  # type: ignore[arg-type]
    ).build()


@law("weights are weights", "merging")
def weights_are_weights(rule: Merging, example: Merge) -> None:
    """weight(keys, weights) is None, or one finite number ≥ 0 per token.

    A negative weight turns a mean into something that lies nowhere among its tokens, and a mass into zero.
    """
    tokens = example.tokens(rule)
    learned = tokens.weights
    if learned is None and rule.learned:
        learned = torch.ones_like(tokens.keys[..., 0])
    found = rule.weight(tokens.keys, learned)
    if found is None:
        return
    if tuple(found.shape) != tuple(tokens.keys.shape[:3]):
        raise Broken(f"weight returns shape {tuple(found.shape)} for keys {tuple(tokens.keys.shape)}")
    if not bool((found >= 0).all() and found.isfinite().all()):
        raise Broken(f"weight returns\n{show(found)}\nfor keys\n{show(tokens.keys)}")


@law("conservation", "merging", claim="conserves")
def conservation(rule: Merging, example: Merge) -> None:
    """Key sum, value sum, mass and count of all slots are Σ w·key, Σ w·value, Σ w and Σ 1 over their tokens.

    Slot by slot. What a rule loses the model can never read again, and what it counts twice drowns the rest.
    """
    tokens = example.tokens(rule)
    for_keys, for_values, mass = tokens.weighed(rule)
    found = sums(rule, tokens)
    parts = {
        "key_sum": tokens.keys.double() * for_keys.unsqueeze(-1),
        "value_sum": tokens.values.double() * for_values.unsqueeze(-1),
        "mass": mass,
        "count": torch.ones_like(mass),
    }
    expected = {name: _by_slot(part, tokens.slot) for name, part in parts.items()}
    _agree(rule, example, found, expected, {name: _scale(part) for name, part in parts.items()})


@law("order of tokens", "merging", claim="order_free")
def order_of_tokens(rule: Merging, example: Merge) -> None:
    """The order of tokens within a chunk does not matter: merge(π tokens) = merge(tokens).

    All of a chunk leaves at once; an engine may add it in any order, and a faster one will.
    """
    tokens = example.tokens(rule)
    turned = torch.arange(len(example.slots)).flip(0)
    _agree(rule, example, sums(rule, tokens.taken(turned)), sums(rule, tokens), None, "tokens in reverse order: ")


@law("associativity", "merging", claim="associative")
def associativity(rule: Merging, example: Merge) -> None:
    """Merging a then b = merging both: combine(combine(s, a), b) = combine(s, combine(a, b)).

    Then slots may themselves be merged, and sums be taken in parallel.
    """
    generator = torch.Generator().manual_seed(example.seed)
    shape = (1, 3, 1, example.width + example.value_width + 2)
    slot, one, other = (make(example.keys, shape, generator)[0, i] for i in range(3))
    left = rule.combine(rule.combine(slot.clone(), one.clone()), other.clone())
    right = rule.combine(slot.clone(), rule.combine(one.clone(), other.clone()))
    scale = float(torch.stack((slot, one, other)).abs().max()) * 3
    agree({"row": left}, {"row": right}, scales={"row": scale}, eps=eps_of(left.dtype), what="a then b, or both: ")


@law("chunks do not matter", "merging")
def chunks_do_not_matter(rule: Merging, example: Merge) -> None:
    """A slot that takes tokens in two chunks is what it would be after taking them in one.

    merge(a ++ b) = merge(merge(a), b). A rule that keeps a state of its own besides the slot breaks this,
    for the engine runs it again on every backward pass, split and beam.
    """
    founders = sorted(example.founders)
    rest = [j for j in range(len(example.slots)) if j not in example.founders]
    tokens = example.tokens(rule)
    half = max(len(founders), (len(example.slots) + 1) // 2)
    order = torch.tensor(founders + rest)
    tokens = tokens.taken(order)
    if 2 * half > len(order):  # fill the second chunk with tokens that go nowhere
        tokens = _with_dropped(tokens, 2 * half - len(order))
    _agree(rule, example, sums(rule, tokens, half), sums(rule, tokens), None, "in two chunks: ")


@law("convexity", "merging", claim="convex")
def convexity(rule: Merging, example: Merge) -> None:
    """A slot divided by its mass lies among its tokens: min_j u·k_j ≤ u·K/mass ≤ max_j u·k_j for every u.

    Keys and values. Then a slot looks like its tokens to every query, and never like something nobody said.
    """
    tokens = example.tokens(rule)
    found = sums(rule, tokens)
    generator = torch.Generator().manual_seed(example.seed)
    for name, vectors in (("key_sum", tokens.keys), ("value_sum", tokens.values)):
        vectors = vectors.double()
        for slot in range(int(tokens.slot.max()) + 1):
            inside, mass = tokens.slot[0, 0] == slot, found["mass"][0, :, slot]
            if not bool((mass > 0).all()):
                continue
            mean = found[name][0, :, slot].double() / mass.unsqueeze(-1)
            for _ in range(3):
                direction = torch.randn(vectors.shape[-1], generator=generator, dtype=torch.float64)
                along, here = vectors[0][:, inside] @ direction, mean @ direction
                slack = 64 * eps_of(tokens.keys.dtype) * _scale(vectors[0][:, inside]) * float(direction.abs().sum())
                out = torch.maximum(along.amin(-1) - here, here - along.amax(-1))
                if not bool((out <= slack).all()):
                    raise Broken(
                        f"{name} / mass of slot {slot} along {direction.tolist()}: {here.tolist()}; its tokens reach "
                        f"from {along.amin(-1).tolist()} to {along.amax(-1).tolist()}"
                    )


@law("duplicates", "merging", claim="convex")
def duplicates(rule: Merging, example: Merge) -> None:
    """A slot of equal tokens reads as that token: n copies of (k, v) give K/mass = k, V/mass = v and count n.

    Text repeats itself; repeating must not move what is remembered.
    """
    tokens = example.tokens(rule)
    same = dataclasses.replace(
        tokens,
        keys=tokens.keys[:, :, :1].expand_as(tokens.keys),
        values=tokens.values[:, :, :1].expand_as(tokens.values),
    )
    found = sums(rule, same)
    sound = found["mass"] > 0
    for name, vector in (("key_sum", same.keys[:, :, :1]), ("value_sum", same.values[:, :, :1])):
        mean = found[name].double() / torch.where(sound, found["mass"], 1).unsqueeze(-1)
        expected = torch.where(sound.unsqueeze(-1), vector.double(), 0).expand_as(mean)
        mean = torch.where(sound.unsqueeze(-1), mean, 0)
        agree({name: mean}, {name: expected}, scales={name: _scale(vector)}, eps=eps_of(tokens.keys.dtype))
    counts = _by_slot(torch.ones_like(tokens.slot, dtype=torch.float64), tokens.slot)
    agree({"count": found["count"]}, {"count": counts}, scales={}, eps=0)


@law("heads and slots are strangers", "merging")
def heads_and_slots_are_strangers(rule: Merging, example: Merge) -> None:
    """Permuting slots, heads or rows permutes the result, and what stands beside a row changes nothing in it.

    merge(π x) = π merge(x). A rule sees many rows at once; one that looks across them (a batch mean, say) makes a
    text's memory depend on who else was in the batch.
    """
    tokens = example.tokens(rule)
    whole = sums(rule, tokens)
    slots = int(tokens.slot.max()) + 1
    turned = dataclasses.replace(tokens, slot=torch.where(tokens.slot >= 0, slots - 1 - tokens.slot, -1))
    flipped = {name: tensor.flip(2) for name, tensor in sums(rule, turned).items()}
    _agree(rule, example, flipped, whole, None, "slots in reverse order: ")
    stranger = dataclasses.replace(example, seed=example.seed + 1).tokens(rule)
    both = Tokens(
        torch.cat((tokens.keys, 7 * stranger.keys)),
        torch.cat((tokens.values, 7 * stranger.values)),
        None if tokens.weights is None or stranger.weights is None else torch.cat((tokens.weights, stranger.weights)),
        torch.cat((tokens.slot, stranger.slot)),
        torch.cat((tokens.founded, stranger.founded)),
    )
    beside = {name: tensor[:1] for name, tensor in sums(rule, both).items()}
    _agree(rule, example, beside, whole, None, "beside another row: ")
    for head in range(example.heads):
        own = slice(head, head + 1)
        weights = None if tokens.weights is None else tokens.weights[:, own]
        alone = Tokens(tokens.keys[:, own], tokens.values[:, own], weights, tokens.slot[:, own], tokens.founded[:, own])
        here = {name: tensor[:, own] for name, tensor in whole.items()}
        _agree(rule, example, here, sums(rule, alone), None, f"head {head} among others: ")


@law("isotropy", "merging", claim="isotropic")
def isotropy(rule: Merging, example: Merge) -> None:
    """Rotating the space rotates the slots: merge(k R) = merge(k) R for orthogonal R, values and mass unchanged.

    Attention sees dot products alone; a rule that treats channels apart depends on a basis nobody chose.
    """
    tokens = example.tokens(rule)
    generator = torch.Generator().manual_seed(example.seed)
    turn = torch.linalg.qr(torch.randn(example.width, example.width, generator=generator, dtype=torch.float64))[0]
    turn = turn.to(tokens.keys.dtype)
    expected = sums(rule, tokens)
    expected["key_sum"] = expected["key_sum"] @ turn
    turned = dataclasses.replace(tokens, keys=tokens.keys @ turn)
    _agree(rule, example, sums(rule, turned), expected, None, "keys rotated first: ")


@law("weight zero", "merging", claim="weightless")
def weight_zero(rule: Merging, example: Merge) -> None:
    """A token that joins with weight 0 changes no sum that it is weighed in, and no mass.

    merge(x ++ (k, v, w = 0)) = merge(x): the layer's way of saying that a token is not worth remembering.
    """
    tokens = example.tokens(rule)
    if not rule.learned or not rule.joins:
        return
    ones = torch.ones_like(tokens.keys[:, :, :1])
    weights = torch.ones_like(tokens.keys[..., 0]) if tokens.weights is None else tokens.weights
    more = Tokens(
        torch.cat((tokens.keys, 3 * ones), dim=2),
        torch.cat((tokens.values, torch.full_like(tokens.values[:, :, :1], 5)), dim=2),
        torch.cat((weights, torch.zeros_like(weights[:, :, :1])), dim=2),
        torch.cat((tokens.slot, torch.zeros_like(tokens.slot[:, :, :1])), dim=2),
        torch.cat((tokens.founded, torch.zeros_like(tokens.founded[:, :, :1])), dim=2),
    )
    weigh = rule.weighs
    asked = [name for name, heavy in (("key_sum", weigh.keys), ("value_sum", weigh.values)) if heavy]
    asked += ["mass"] if (weigh.keys or weigh.values) and weigh.keys == weigh.values else []
    found, expected = sums(rule, more), sums(rule, dataclasses.replace(tokens, weights=weights))
    _agree(rule, example, found, {name: expected[name] for name in asked}, None, "one token of weight 0 more: ")


@law("gradients", "merging")
def merge_gradients(rule: Merging, example: Merge) -> None:
    """The gradient through a slot is finite, and exact: it is the limit of differences.

    d output / d (keys, values, weights) against (f(x + h) − f(x − h)) / 2h in float64, the plan held still. Otherwise
    the layer that makes the keys learns to please another memory than the one it has.
    """
    tokens = example.tokens(rule)
    leaves = [tokens.keys, tokens.values, *([] if tokens.weights is None else [tokens.weights])]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def output(leaves: list[Tensor]) -> Tensor:
        weights = leaves[2] if len(leaves) > 2 else None
        return fold(rule, dataclasses.replace(tokens, keys=leaves[0], values=leaves[1], weights=weights))[1].sum()

    result = output(leaves)
    found = torch.autograd.grad(result, leaves, allow_unused=True)
    for name, leaf, gradient in zip(("keys", "values", "weights"), leaves, found, strict=False):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if not bool(gradient.isfinite().all()):
            raise Broken(f"gradient of {name}:\n{show(gradient)}\nat\n{show(leaf)}")
        if {example.keys, example.values} != {"normal"} or example.dtype != "float64" or example.weights == "some-zero":
            continue
        with torch.no_grad():
            h = 1e-5
            flat = leaf.detach().reshape(-1)
            numeric = torch.zeros_like(flat)
            for i in range(len(flat)):
                ends = []
                for step in (h, -h):
                    moved = flat.clone()
                    moved[i] += step
                    others = [moved.view_as(leaf) if other is leaf else other.detach() for other in leaves]
                    ends.append(float(output(others)))
                numeric[i] = (ends[0] - ends[1]) / (2 * h)
        wrong = (gradient.reshape(-1) - numeric).abs()
        # h² from the difference's own error, eps/h from rounding: 1e-10 and 2e-11 of the second derivatives and values.
        if not bool((wrong <= 1e-6 * (1 + numeric.abs().max())).all()):
            raise Broken(f"gradient of {name}:\n{show(gradient)}\nby differences:\n{show(numeric.view_as(leaf))}")


@law("purity", "merging")
def merging_is_pure(rule: Merging, example: Merge) -> None:
    """The same tokens give the same slots, and what the rule is given stays as it was.

    weight and combine return new tensors. The engine still needs the old ones: for the backward pass, and for forks.
    """
    tokens = example.tokens(rule)
    first, second = sums(rule, tokens), sums(rule, tokens)
    for name, tensor in first.items():
        if not torch.equal(tensor.nan_to_num(), second[name].nan_to_num()):
            raise Broken(f"{name}, first time:\n{show(tensor)}\nsecond time:\n{show(second[name])}")
    slot, token = torch.arange(6.0, dtype=torch.float64)[None], torch.ones(1, 6, dtype=torch.float64)
    before = slot.clone(), token.clone()
    rule.combine(slot, token)
    keys, weights = tokens.keys.clone(), torch.ones_like(tokens.keys[..., 0])
    rule.weight(keys, weights)
    for name, now, then in (("combine's slot", slot, before[0]), ("combine's token", token, before[1])):
        if not torch.equal(now, then):
            raise Broken(f"{name} was written to:\n{show(now)}\nbefore:\n{show(then)}")
    if not torch.equal(keys, tokens.keys) or not bool((weights == 1).all()):
        raise Broken(f"weight wrote to what it was given:\n{show(keys)}\n{show(weights)}")


MERGING_LAWS = (
    weights_are_weights,
    conservation,
    order_of_tokens,
    associativity,
    chunks_do_not_matter,
    convexity,
    duplicates,
    heads_and_slots_are_strangers,
    isotropy,
    weight_zero,
    merge_gradients,
    merging_is_pure,
)


def _agree(
    rule: Merging,
    example: Merge,
    got: Results,
    expected: Results,
    scales: dict[str, float] | None,
    what: str = "",
) -> None:
    tokens = example.tokens(rule)
    if scales is None:
        weight = float(tokens.weighed(rule)[0].abs().max()) + float(tokens.weighed(rule)[1].abs().max())
        scales = {"key_sum": _scale(tokens.keys) * weight, "value_sum": _scale(tokens.values) * weight, "mass": weight}
    scales = {name: scale * len(example.slots) for name, scale in scales.items()}
    stored = {name: tensor for name, tensor in expected.items() if name in got}
    agree(got, stored, scales=scales, eps=eps_of(tokens.keys.dtype), what=what)


def _by_slot(rows: Tensor, slot: Tensor) -> Tensor:
    """Σ over each slot's tokens: rows [b, g, n(, d)] → [b, g, m(, d)]."""
    slots = int(slot.max()) + 1
    members = (slot.unsqueeze(-2) == torch.arange(slots).unsqueeze(-1)).to(rows.dtype)
    return (members @ (rows if rows.ndim == 4 else rows.unsqueeze(-1))).view(*slot.shape[:2], slots, *rows.shape[3:])


def _with_dropped(tokens: Tokens, more: int) -> Tokens:
    def longer(tensor: Tensor, fill: Any) -> Tensor:
        return torch.cat((tensor, torch.full_like(tensor[:, :, :1], fill).repeat_interleave(more, 2)), dim=2)

    return Tokens(
        longer(tokens.keys, 1),
        longer(tokens.values, 1),
        None if tokens.weights is None else longer(tokens.weights, 1),
        longer(tokens.slot, -1),
        longer(tokens.founded, False),
    )


def _scale(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
