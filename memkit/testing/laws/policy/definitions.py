"""What a memory must hold, worked out from the definitions: how many slots, which weights, which keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from memkit.pieces.readout import LAYER_NORM_EPS
from memkit.pieces.storage import BITS
from memkit.pieces.window import BlockWindow
from memkit.policy import Policy
from memkit.testing.agreement import eps_of
from memkit.testing.cases import Inputs
from memkit.testing.laws.weights import weights_in_sums

__all__ = [
    "SUMS_EPS",
    "memory_keys",
    "slots_allowed",
    "sums_eps",
    "sums_of_tokens",
    "tokens_left",
]


SUMS_EPS = eps_of(torch.float32)
"""Sums are taken in float32 or better, whatever the inputs' dtype."""


def sums_eps(policy: Policy, dtype: torch.dtype) -> float:
    """To what part of it a memory for keys of this dtype tells a sum: to its own rounding, and that of its storage."""
    half = dtype.itemsize == 2 and policy.holds_once
    return torch.finfo(dtype).eps / 2**BITS if half else torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def tokens_left(policy: Policy, inputs: Inputs, row: int, seen: int) -> int:
    """Tokens that have left the window of a row once it has seen so many."""
    if policy.takes_boundaries:
        chunks = inputs.chunks(policy, row, seen)
        return chunks[max(0, len(chunks) - _window(policy))][0] if chunks else 0
    return int(policy.window.begin(seen - 1)) if seen > 0 else 0


def slots_allowed(policy: Policy, inputs: Inputs, row: int, left: int) -> tuple[int, int]:
    """Slots of a row's head once `left` tokens have left, and the most that the budget allows, from the definition."""
    if policy.growth is None:
        return min(policy.sinks, left), policy.sinks
    growth, ratio, chunks = (
        policy.growth.spec,
        policy.spec.heads.ratio,
        inputs.chunks(policy, row, int(inputs.lengths[row])),
    )
    slots = most = 0
    for index, (begin, end) in enumerate(chunks):
        if end > left:
            break
        seen = chunks[index + _window(policy)][0] if policy.takes_boundaries else begin + (policy.window.capacity or 0)
        allowed = max(policy.sinks, policy.growth.budget(seen if growth.counts == "seen" else end))
        if allowed > policy.sinks:  # a head's share, rounded to the nearest, of what is no sink: one at least
            allowed = policy.sinks + max(1, math.floor(ratio * (allowed - policy.sinks) + 0.5))
        allowed = min(allowed, end)
        whole = begin == 0 and growth.first_chunk == "whole"
        slots += end if whole else min(end - begin, max(0, allowed - slots))
        most = max(most, allowed, end if whole else 0)
    return slots, most


def _window(policy: Policy) -> int:
    """Chunks that the window sees."""
    assert isinstance(policy.window, BlockWindow)
    return policy.window.chunks


def memory_keys(policy: Policy, inputs: Inputs, row: int, tokens: int) -> Tensor:
    """What a row's first tokens bring to a key sum, [g, tokens, d] float64.

    The key after the rotary treatment, then the LayerNorm; the key itself where slots are plain tokens.
    """
    keys = inputs.keys[row, :, :tokens].double()
    if policy.sinks_only:
        return keys
    positions = None
    if inputs.rotation is not None:
        given = inputs.rotation.positions
        positions = torch.arange(keys.shape[1]).double() if given is None else given[row, : keys.shape[1]]
        positions = positions[None, None]
    keys = policy.rotary.memory_keys(keys[None], inputs.rotation, positions)[0]
    if policy.readout.layer_norm:
        norm = None if inputs.parameters is None else inputs.parameters.key_norm
        weight, bias = (None, None) if norm is None else (part.detach().double() for part in norm)
        keys = layer_norm(keys, keys.shape[-1:], weight, bias, LAYER_NORM_EPS)
    return keys


def sums_of_tokens(policy: Policy, inputs: Inputs, row: int, founded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each of a row's first tokens adds to key sum [g, n, d], value sum [g, n, v] and mass [g, n], float64.

    founded [g, n] bool: which of them found a slot.
    """
    tokens = founded.shape[1]
    keys, values = memory_keys(policy, inputs, row, tokens), inputs.values[row, :, :tokens].double()
    if policy.sinks_only or tokens == 0:
        return keys, values, torch.ones(founded.shape, dtype=torch.float64)
    for_keys, for_values, mass = weights_in_sums(
        policy.merging,
        inputs.keys[row : row + 1, :, :tokens],
        None if inputs.weights is None else inputs.weights[row : row + 1, :, :tokens],
        founded[None],
        torch.arange(tokens) < inputs.chunks(policy, row, tokens)[0][1],
    )
    if policy.merging.of == "values":  # a slot's key is its founder's, just as that brought it
        for_keys = founded[None].double()
    return keys * for_keys[0].unsqueeze(-1), values * for_values[0].unsqueeze(-1), mass[0]
