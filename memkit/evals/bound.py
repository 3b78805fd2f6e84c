"""How wrong can reading slots be? A bound on what merging does to an attention output; proof in docs/results.md."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["error_bound", "read_merged"]


def read_merged(
    queries: Tensor, exact: tuple[Tensor, Tensor], slots: tuple[Tensor, Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """One head's attention over exact tokens and slots, and each slot's share of the softmax.

    Args:
        queries: [t, d].
        exact: keys [n, d] and values [n, v] of tokens that every query sees exactly.
        slots: keys [m, d], values [m, v] and biases [m], as they are read.
        scale: of the scores.

    Returns outputs [t, v] and shares [t, m].
    """
    keys, values, bias = slots
    scores = torch.cat((scale * queries @ exact[0].T, scale * queries @ keys.T + bias), dim=1)
    shares = scores.softmax(-1)
    return shares @ torch.cat((exact[1], values)), shares[:, len(exact[0]) :]


def error_bound(
    queries: Tensor,
    exact: tuple[Tensor, Tensor],
    merged: tuple[Tensor, Tensor, Tensor],
    slots: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Tensor:
    """An upper bound on ‖ô − o‖ for every query, [t].

    o is attention over all tokens, exact and merged alike; ô reads each merged token's slot instead. With

        r_j, s_j   the farthest that a token of slot j lies from the slot's key, and from its value
        δ          max_j scale·‖q‖·r_j + |bias_j − ln n_j|,   n_j tokens in slot j
        P_j        slot j's share of ô's softmax;  P = Σ P_j over slots that are not their token itself
        R          the farthest that a token's value lies from the mean of all values

        ‖ô − o‖ ≤ Σ_j P_j s_j + 2 R · min(tanh(δ/2), P·(e^δ − 1))

    Args:
        queries: [t, d].
        exact: keys [n, d] and values [n, v] of the tokens that are seen exactly.
        merged: keys [k, d] and values [k, v] of the others, and the slot [k] of each.
        slots: keys [m, d], values [m, v] and biases [m], as they are read; each has a token at least.
        scale: of the scores.
    """
    keys, values, slot = merged
    slot_keys, slot_values, bias = slots
    many = len(slot_keys)
    counts = torch.bincount(slot, minlength=many).to(queries.dtype)
    radius = _farthest((keys - slot_keys[slot]).norm(dim=-1), slot, many)
    spread = _farthest((values - slot_values[slot]).norm(dim=-1), slot, many)
    _, shares = read_merged(queries, exact, slots, scale)
    off = scale * queries.norm(dim=-1, keepdim=True) * radius + (bias - counts.log()).abs()
    farthest = off.amax(-1)
    merged_share = torch.where(off > 0, shares, 0).sum(-1)
    every = torch.cat((exact[1], values))
    reach = (every - every.mean(0)).norm(dim=-1).amax()
    moved = torch.minimum((farthest / 2).tanh(), merged_share * farthest.expm1())
    return shares @ spread + 2 * reach * moved


def _farthest(distances: Tensor, slot: Tensor, many: int) -> Tensor:
    """The largest distance in each slot, [m]."""
    return torch.zeros(many, dtype=distances.dtype).scatter_reduce(0, slot, distances, "amax")
