"""What a token contributes to a slot, and how a slot is read: the equations of FOLD and READ, as the pieces say them.

A token contributes one row: w·k̄ and w·v to its slot's sums, and what its slot's statistics ask for. Nothing here holds
anything; `slots.py` does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit.memory.window import Columns, Streams, columns
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.pieces.statistics import COUNT, MASS, POSITION, Numbers, Tokens
from memkit.policy import Policy

__all__ = [
    "Chunk",
    "Contributions",
    "SlotRules",
    "SlotView",
    "by_statistic",
    "constant",
    "contributions",
    "key_mass",
    "mean_position",
    "memory_keys",
    "on_device",
    "parameter_versions",
    "read_slots",
    "read_tokens",
    "read_values",
]


Contributions = tuple[Tensor, Tensor]
"""What tokens add to a slot: sums [b, g, c, d + v] and numbers [b, g, c, s]."""


@dataclass
class Chunk:
    """Tokens that leave the window together.

    keys [b, g, c, d] as they arrived; values [b, g, c, v], None in a plan; weights [b, g, c]; positions [b, 1, c];
    first: whether it is the row's first chunk, or a bool per row [b, 1, 1]; where: its columns of the timeline;
    memory_keys [b, g, c, d]: what slots sum of the keys, None where not taken yet; evidence [b, g, c, e]: what observed
    queries have told of them; ahead: `contributions` as if every token founded (None where none does), and as if
    none did, where these were made for many chunks at once.
    """

    keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    positions: Tensor | None
    first: bool | Tensor
    where: Columns
    memory_keys: Tensor | None = None
    evidence: Tensor | None = None
    ahead: tuple[Contributions | None, Contributions] | None = None

    @classmethod
    def of(cls, streams: Streams, where: Columns, first: bool | Tensor) -> Chunk:
        """The tokens at some columns of the timeline's streams."""
        some = {name: columns(stream, where) for name, stream in streams.items()}
        return cls(
            keys=some["keys"],
            values=some.get("values"),
            weights=some.get("weights"),
            positions=some.get("positions"),
            evidence=some.get("evidence"),
            first=first,
            where=where,
        )

    def of_rows(self, rows: Tensor) -> Chunk:
        """The tokens of some rows of the batch."""
        first = self.first[rows] if isinstance(self.first, Tensor) else self.first
        where = self.where[rows] if isinstance(self.where, Tensor) else self.where
        tensors = (self.keys, self.values, self.weights, self.positions, self.memory_keys, self.evidence)
        keys, values, weights, positions, memory_keys, evidence = (
            None if tensor is None else tensor[rows] for tensor in tensors
        )
        assert keys is not None
        return Chunk(keys, values, weights, positions, first, where, memory_keys, evidence)


@dataclass(frozen=True)
class SlotRules:
    """How one call's slots sum tokens, and how they are read.

    width: channels of a key; dtype: what slots are read in; key_norm: weight and bias of the memory-key LayerNorm, None
    for 1 and 0; valued: whether there are values (a plan does without).
    """

    policy: Policy
    width: int
    dtype: torch.dtype
    key_norm: tuple[Tensor, Tensor] | None
    rotation: Rotation | None
    valued: bool


@dataclass
class SlotView:
    """Slots as they are read: a working copy, which nothing depends on.

    route [b, g, M, d]: keys as routing compares them, float32 or float64; keys [b, g, M, d], values [b, g, M, v]: as
    queries meet them, in the window's dtype; bias [b, g, M]: added to the scores, or None; made_with: the versions of
    the parameters that they were read with.
    """

    route: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    made_with: tuple[int, ...] = ()

    def first(self, count: int) -> SlotView:
        """The first slots."""
        bias = None if self.bias is None else self.bias[:, :, :count]
        return SlotView(self.route[:, :, :count], self.keys[:, :, :count], self.values[:, :, :count], bias)


def memory_keys(rules: SlotRules, chunk: Chunk) -> Tensor:
    """What slots sum of a chunk's keys: [b, g, c, d], float32 or float64."""
    keys = chunk.keys.to(torch.promote_types(chunk.keys.dtype, torch.float32))
    keys = rules.policy.rotary.memory_keys(keys, rules.rotation, chunk.positions)
    return rules.policy.readout.key(keys, {}, rules.key_norm) if rules.policy.readout.layer_norm else keys


def contributions(rules: SlotRules, chunk: Chunk, founded: Tensor | None) -> Contributions:
    """Each token's row of sums [b, g, c, d + v] and of numbers [b, g, c, s], founders weighed as the rule says.

    founded [b, g, c]; None where no token founds.
    """
    policy = rules.policy
    if chunk.ahead is not None:
        alone, joining = chunk.ahead
        if founded is None or alone is joining:
            return joining
        if alone is not None:
            chosen = founded.unsqueeze(-1)
            rows = joining[0] if alone[0] is joining[0] else torch.where(chosen, alone[0], joining[0])
            return rows, torch.where(chosen, alone[1], joining[1])
    keys = memory_keys(rules, chunk) if chunk.memory_keys is None else chunk.memory_keys
    dtype, ones = keys.dtype, torch.ones_like(keys[..., 0])
    values = keys[..., :0] if chunk.values is None else chunk.values.to(dtype)
    for_keys = for_values = for_radius = ones
    weighs = policy.merging.weighs
    weight = policy.merging.weight(chunk.keys, chunk.weights)
    if weight is not None:
        weight = weight.to(dtype)
        if founded is not None and not (weighs.founders and weighs.first_chunk):
            first = _tensor(chunk.first, founded)
            weighed = torch.where(first, _tensor(weighs.first_chunk, founded), _tensor(weighs.founders, founded))
            weight = torch.where(founded & ~weighed, 1, weight)
        for_keys, for_values = weight if weighs.keys else ones, weight if weighs.values else ones
        # In the first chunk the radius stays that of the plain value, even where its sums are weighed.
        for_radius = for_values if chunk.first is False else torch.where(_tensor(chunk.first, ones), 1, for_values)
    mass = for_values if weighs.values else for_keys
    if policy.merging.of == "values":
        for_keys = torch.zeros_like(ones) if founded is None else founded.to(dtype)
    over = for_keys if policy.merging.of == "values" else mass
    tokens = Tokens(keys, values, founded, chunk.positions, for_keys, for_values, for_radius, mass, over)
    numbers = torch.stack([statistic.of(tokens).double() for statistic in policy.statistics], dim=-1)
    if for_keys is for_values:
        rows = torch.cat((keys, values), dim=-1)
        return rows if weight is None else rows * for_keys.unsqueeze(-1), numbers
    return torch.cat((keys * for_keys.unsqueeze(-1), values * for_values.unsqueeze(-1)), dim=-1), numbers


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; the host does not wait for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@functools.lru_cache(maxsize=64)
def constant(numbers: tuple[bool, ...], device: torch.device) -> Tensor:
    """A tensor of constants, made once: the host would wait for the device each time."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def read_slots(rules: SlotRules, sums: Tensor, numbers: Tensor, founders_keys: Tensor | None = None) -> SlotView:
    """Sums [..., d + v] and numbers [..., s] as they are read, on any leading axes: K/mass and V/mass under `mean`; the
    readout of Key-Value Means is LN(K) and ρ·V/‖V‖ (`pieces/readout.py` has all).

    founders_keys [..., d]: how queries meet the slots' keys, where these are their founders' and known
    (`Policy.keeps_keys`).
    """
    policy, width, dtype = rules.policy, rules.width, rules.dtype
    keys, values = sums.split((width, sums.shape[-1] - width), dim=-1)  # one operation on the way back
    named = by_statistic(policy, numbers)
    if policy.keeps_keys:
        route = keys = keys if policy.replaces else keys.clone()  # sums may be written into, but where slots are new
    else:
        route = keys = policy.readout.key(keys, {**named, MASS: key_mass(policy, named)}, rules.key_norm)
    if founders_keys is not None:
        keys = founders_keys
    elif policy.rotary.rotates_slots:
        keys = policy.rotary.slot_keys(keys, rules.rotation, mean_position(policy, named))
    if not rules.valued:
        return SlotView(route, route, values, None)
    bias = policy.readout.bias(named)
    values = policy.readout.value(values, named)
    return SlotView(route, keys.to(dtype), values.to(dtype), None if bias is None else bias.detach().to(dtype))


def read_tokens(rules: SlotRules, chunk: Chunk) -> Tensor:
    """The chunk's tokens as slots of their own would be read by routing, [b, g, c, d]."""
    if rules.policy.keeps_keys and chunk.memory_keys is not None:
        return chunk.memory_keys
    everyone = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=chunk.keys.device)
    rows, numbers = contributions(rules, chunk, everyone)
    named = by_statistic(rules.policy, numbers)
    named[MASS] = key_mass(rules.policy, named)
    return rules.policy.readout.key(rows[..., : rules.width], named, rules.key_norm)


def read_values(rules: SlotRules, chunk: Chunk) -> Tensor:
    """The values of the chunk's tokens as those of slots of their own would be read, [b, g, c, v]."""
    everyone = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=chunk.keys.device)
    rows, numbers = contributions(rules, chunk, everyone)
    return rules.policy.readout.value(rows[..., rules.width :], by_statistic(rules.policy, numbers)).to(rules.dtype)


def parameter_versions(parameters: PolicyParameters | None) -> tuple[int, ...]:
    """What the slots as they are read depend on besides their sums: the learned tensors, as they are now."""
    if parameters is None:
        return ()
    # Tensors made in inference mode have no version; `PolicyParameters` says what that means.
    versions = [(id(each), 0 if each.is_inference() else each._version) for each in parameters.tensors()]
    return tuple(number for pair in versions for number in pair)


def key_mass(policy: Policy, numbers: Numbers) -> Tensor:
    """By what key sums and positions are divided: a slot's mass, or 1 where its founder's key alone is in them."""
    return (numbers[COUNT] > 0).to(numbers[COUNT].dtype) if policy.merging.of == "values" else numbers[MASS]


def mean_position(policy: Policy, numbers: Numbers) -> Tensor:
    """Where slots stand, [..., m]."""
    if policy.keeps_keys:
        return numbers[POSITION]
    mass = key_mass(policy, numbers)
    return numbers[POSITION] / torch.where(mass > 0, mass, 1)


def by_statistic(policy: Policy, numbers: Tensor) -> Numbers:
    """A slot's numbers [..., s] by statistic; the mass is the count where every token weighs 1."""
    named: Numbers = dict(zip(policy.statistics, numbers.unbind(-1), strict=True))
    named.setdefault(MASS, named[COUNT])
    return named


def _tensor(condition: bool | Tensor, like: Tensor) -> Tensor:
    return condition if isinstance(condition, Tensor) else torch.full((), condition, device=like.device)
