"""Laws of merge rules: what is summed, and with which weight."""

from __future__ import annotations

import dataclasses

import torch

from memkit.pieces.merging import Merging
from memkit.testing.agreement import show, size
from memkit.testing.law import Broken, law
from memkit.testing.laws.merging.tokens import Merge, Tokens, agree_on, by_slot, sums

__all__ = ["conservation", "weight_zero", "weights_are_weights"]


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
    expected = {name: by_slot(part, tokens.slot) for name, part in parts.items()}
    agree_on(rule, example, found, expected, {name: size(part) for name, part in parts.items()})


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
    agree_on(rule, example, found, {name: expected[name] for name in asked}, None, "one token of weight 0 more: ")
