"""FOLD: the sums per slot. Linear given the plan, hence parallel within a chunk and cheap to differentiate.

A token contributes one row: w·k̄ and w·v to its slot's sums, and its weight, count, norms and position to the slot's
scalars. An additive rule adds all rows of a chunk at once; another takes them one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy

__all__ = ["Chunk", "Slots", "contributions", "read_keys", "scalars_by_name"]


@dataclass
class Chunk:
    """Tokens that leave the window together.

    keys [b, g, c, d] as they arrived; memory_keys [b, g, c, d] in the sums' dtype; values [b, g, c, v], None in a plan;
    weights [b, g, c]; positions [b, 1, c]; first: whether it is the row's first chunk, or a bool per row [b, 1, 1].
    """

    keys: Tensor
    memory_keys: Tensor
    values: Tensor | None
    weights: Tensor | None
    positions: Tensor | None
    first: bool | Tensor


@dataclass
class Slots:
    """What slots sum: sums [b, g, m, d + v] and scalars [b, g, m, s], with room past the live ones, all zero there.

    in_place: whether `fold` may write into these tensors (no gradient is wanted), or makes new ones.
    """

    sums: Tensor
    scalars: Tensor
    in_place: bool

    def fold(self, policy: Policy, slot: Tensor, founded: Tensor, rows: Tensor, scalars: Tensor) -> None:
        """Take a chunk in. slot, founded [b, g, c]; rows [b, g, c, d + v]; scalars [b, g, c, s]. Dropped: slot −1."""
        stored = slot >= 0
        target = self.flat(slot.clamp(min=0))
        if policy.merging.additive or policy.exact_slots:
            dropped = ~stored.unsqueeze(-1)
            self.sums = self._add(self.sums, target, rows.masked_fill(dropped, 0))
            self.scalars = self._add(self.scalars, target, scalars.masked_fill(dropped, 0))
        else:
            self._fold_in_turn(policy, target.view(slot.shape), stored, founded, rows, scalars)

    def flat(self, slot: Tensor) -> Tensor:
        """Slot numbers [b, g, c] → rows of the tensors seen as [b·g·m, …], flat."""
        rows, heads, room = self.sums.shape[:3]
        base = torch.arange(rows * heads, device=slot.device).view(rows, heads, 1) * room
        return (slot + base).flatten()

    def _add(self, sums: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        flat = sums.flatten(0, 2)
        if self.in_place:
            flat.index_add_(0, target, rows.flatten(0, 2))
            return sums
        return flat.index_add(0, target, rows.flatten(0, 2)).view_as(sums)

    def _fold_in_turn(
        self, policy: Policy, target: Tensor, stored: Tensor, founded: Tensor, rows: Tensor, scalars: Tensor
    ) -> None:
        """A rule that is not additive: token after token, over all rows and heads at once.

        The rule combines sums, mass, norms and positions alike; counts are added and radii kept, whatever the rule.
        """
        columns = policy.columns
        plain = torch.tensor([name in ("count", "radius") for name in columns], device=target.device)
        width = self.sums.shape[-1]
        state = torch.cat((self.sums.to(self.scalars.dtype), self.scalars), dim=-1).flatten(0, 2)
        tokens = torch.cat((rows.to(scalars.dtype), scalars), dim=-1)
        for index in range(tokens.shape[2]):
            where = target[:, :, index].flatten()
            token, held = tokens[:, :, index].flatten(0, 1), state[where]
            both = policy.merging.combine(held, token)
            both = torch.cat((both[:, :width], torch.where(plain, (held + token)[:, width:], both[:, width:])), dim=-1)
            new = torch.where(founded[:, :, index].reshape(-1, 1), token, both)
            new = torch.where(stored[:, :, index].reshape(-1, 1), new, held)
            state = state.index_copy(0, where, new)
        sums, numbers = state[:, :width].to(self.sums.dtype), state[:, width:]
        self.sums, self.scalars = sums.view_as(self.sums), numbers.view_as(self.scalars)

    def grow(self, room: int) -> None:
        """Make room for at least so many slots."""
        missing = room - self.sums.shape[2]
        if missing > 0:
            self.sums, self.scalars = (
                torch.cat((tensor, tensor.new_zeros(*tensor.shape[:2], missing, tensor.shape[-1])), dim=2)
                for tensor in (self.sums, self.scalars)
            )


def contributions(policy: Policy, chunk: Chunk, founded: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's row of sums [b, g, c, d + v] and of scalars [b, g, c, s], founders weighed as the rule says."""
    keys, dtype = chunk.memory_keys, chunk.memory_keys.dtype
    values = None if chunk.values is None else chunk.values.to(dtype)
    weight = None if policy.exact_slots else policy.merging.weight(chunk.keys, chunk.weights)
    weighs = policy.merging.weighs
    for_keys = for_values = for_radius = None
    if weight is not None:
        weight = weight.to(dtype)
        plain = founded & ~(_either(chunk.first, weighs.first_chunk, weighs.founders, founded))
        weight = torch.where(plain, 1, weight)
        for_keys = weight if weighs.keys else None
        for_values = weight if weighs.values else None
        # In the first chunk the radius stays that of the plain value, even where its sums are weighed.
        for_radius = torch.where(_tensor(chunk.first, founded), 1, weight) if weighs.values else None
    mass = for_keys if for_keys is not None else for_values
    columns: list[Tensor] = []
    for name in policy.columns:
        match name:
            case "count":
                column = torch.ones_like(keys[..., 0])
            case "mass":
                column = torch.ones_like(keys[..., 0]) if mass is None else mass
            case "key_norm":
                column = _weighed(keys.norm(dim=-1), for_keys)
            case "value_norm":
                column = torch.zeros_like(keys[..., 0]) if values is None else _weighed(values.norm(dim=-1), for_values)
            case "radius":
                column = torch.zeros_like(keys[..., 0])
                if values is not None:
                    column = torch.where(founded, _weighed(values.norm(dim=-1), for_radius), column)
            case _:
                assert name == "position" and chunk.positions is not None
                column = _weighed(chunk.positions.expand(keys.shape[:3]), None if mass is None else mass.double())
        columns.append(column.double())
    row = _weighed(keys, None if for_keys is None else for_keys.unsqueeze(-1))
    if values is not None:
        row = torch.cat((row, _weighed(values, None if for_values is None else for_values.unsqueeze(-1))), dim=-1)
    scalars = torch.stack(columns, dim=-1) if columns else row.new_zeros(*row.shape[:3], 0, dtype=torch.float64)
    return row, scalars


def scalars_by_name(policy: Policy, scalars: Tensor) -> dict[str, Tensor]:
    """A slot's numbers by name; mass is the count where every token weighs 1."""
    named = dict(zip(policy.columns, scalars.unbind(-1), strict=True))
    if "mass" not in named and "count" in named:
        named["mass"] = named["count"]
    return named


def read_keys(
    policy: Policy,
    key_sums: Tensor,
    scalars: dict[str, Tensor],
    parameters: PolicyParameters | None,
    rotation: Rotation | None,
) -> tuple[Tensor, Tensor]:
    """Slots' keys [..., m, d]: as routing compares them, and as queries meet them."""
    if policy.exact_slots:
        return key_sums, key_sums
    route = policy.readout.key(key_sums, scalars, None if parameters is None else parameters.key_norm)
    if not policy.rotary.rotates_slots:
        return route, route
    mass = scalars["mass"]
    mean = scalars["position"] / torch.where(mass > 0, mass, 1)
    return route, policy.rotary.slot_keys(route, rotation, mean)


def _weighed(tensor: Tensor, weight: Tensor | None) -> Tensor:
    return tensor if weight is None else tensor * weight


def _tensor(condition: bool | Tensor, like: Tensor) -> Tensor:
    return condition if isinstance(condition, Tensor) else torch.tensor(condition, device=like.device)


def _either(first: bool | Tensor, in_first: bool, later: bool, like: Tensor) -> Tensor:
    """`in_first` where it is the first chunk, `later` elsewhere."""
    return torch.where(_tensor(first, like), _tensor(in_first, like), _tensor(later, like))
