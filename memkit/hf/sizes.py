"""The policies of a model's layers, with as many rows as a budget gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memkit.budgets import Budget, alike, check_bounded, has_rows, held_at_most, least_rows, most_rows, sized
from memkit.catalog import load_policy
from memkit.errors import InputError
from memkit.holding import Shape
from memkit.layers import KEEP, AnyLayers, LayerFunction, LayerPoliciesSpec, as_layers, layer_policies
from memkit.pieces.growth import NoGrowthSpec
from memkit.pieces.heads import HeadsSpec
from memkit.profiles import warn_of_even_shares

if TYPE_CHECKING:
    from memkit.hf.probe import LayerFacts
    from memkit.policy import Policy

__all__ = ["Sizes"]


class Sizes:
    """What was asked for, and what each number of rows makes of it.

    policy, profile: as for `attach`; layers, kv_heads: of the model; model: what its config says; facts: of its layers.
    Raises `InputError` for a budget or a profile that no policy has a use for, `PolicyError` as `layer_policies`.
    """

    def __init__(
        self,
        policy: AnyLayers | LayerFunction,
        budget: Budget,
        profile: str | Path | None,
        layers: int,
        kv_heads: int,
        model: Mapping[str, Any],
        facts: Mapping[int, LayerFacts],
    ) -> None:
        self.budget, self.layers, self.kv_heads, self.model, self.facts = budget, layers, kv_heads, model, facts
        self._made: dict[int | None, dict[int, Policy]] = {}
        if callable(policy):
            each = {str(layer): policy(layer) for layer in range(layers)}
            self.asked = LayerPoliciesSpec(default=KEEP, at=each)
        else:
            self.asked = as_layers(policy)
        if profile is not None:
            self.asked = _with_profile(self.asked, profile)
        self.numbered = [spec for spec in self.asked.policies if has_rows(spec)]
        if budget and not self.numbered:
            raise InputError(
                f"rows, share and bytes are for policies with a number of slots or a sliding window, got "
                f"{self.asked.label}; leave them out, or use another policy"
            )
        warn_of_even_shares(self.asked.policies, model)

    def policies(self, rows: int | None) -> dict[int, Policy]:
        """Of each attending layer, by number; rows: None for what the policies say themselves."""
        if rows not in self._made:
            windows = [self.facts[layer].window if layer in self.facts else None for layer in range(self.layers)]
            asked = self.asked if rows is None else sized(self.asked, rows)
            chosen = layer_policies(asked, self.layers, self.kv_heads, self.model, windows)
            self._made[rows] = {layer: chosen[layer] for layer in self.facts}
        return self._made[rows]

    def rows(self, dtype: torch.dtype) -> int | None:
        """What the budget comes to for every text; None where it is none, or a share. dtype: of keys and values."""
        if self.budget.bytes is None:
            return self.budget.rows
        least = least_rows(self.numbered)
        check_bounded(self.policies(least).values())

        def held(rows: int) -> int:
            policies, total = self.policies(rows), 0
            shapes: dict[Shape, list[Policy]] = {}
            for layer, facts in self.facts.items():
                name = str(dtype).removeprefix("torch.")
                shape = Shape(facts.heads, facts.kv_heads, *facts.widths, name, layers=1, rows=1)
                shapes.setdefault(shape, []).append(policies[layer])
            for shape, each in shapes.items():
                total += held_at_most(each, shape, rows)
            return total

        return most_rows(self.budget.bytes, held, least)

    def of_prompt(self, tokens: int) -> dict[int, Policy]:
        """The policies of a cache whose prompt has so many tokens."""
        rows, least = self.budget.rows_of(tokens), least_rows(self.numbered)
        assert rows is not None
        if rows < least:
            raise InputError(
                f"share {self.budget.share:g} of a prompt of {tokens} tokens is {rows} rows, and these policies have "
                f"{least} at least; raise it, give rows, or make their window smaller"
            )
        return self.policies(rows)

    def same(self, one: Policy, other: Policy) -> bool:
        """Whether a cache's policy is the attached one: equal, but for the rows where these are a share."""
        if one is other or one.spec == other.spec:
            return True
        return self.budget.share is not None and alike(one.spec, other.spec)


def _with_profile(asked: LayerPoliciesSpec, profile: str | Path) -> LayerPoliciesSpec:
    """The same policies, slots shared among heads as a profile says, wherever a policy grows."""
    if all(isinstance(spec.growth, NoGrowthSpec) for spec in asked.policies):
        raise InputError(f"profile shares slots among heads, and {asked.label} has none; leave it out")
    heads = HeadsSpec(profile=str(profile.resolve() if isinstance(profile, Path) else profile))
    return asked.mapped(
        lambda spec: spec if isinstance(spec.growth, NoGrowthSpec) else load_policy(spec, {"heads": heads})
    )
