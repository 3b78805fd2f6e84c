"""Head profiles: how many slots each layer and head of one model needs, as ratios of an even share.

A profile is calibration, not training: measured once on a model by `memkit profile`, and shipped as a small YAML file.
It belongs to that model. Which policies use one is theirs to say: `heads: {profile: NAME}`, or `auto`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from memkit import yaml12
from memkit.catalog import Catalog, as_policy
from memkit.errors import EvenSharesWarning, PolicyError, short, warn
from memkit.pieces.heads import AUTO, MOST_RATIO
from memkit.pieces.registry import NamedSpec
from memkit.policy import Policy, PolicySpec

__all__ = ["HeadProfile", "load_profile", "per_layer", "profile_names"]

MEAN_ERROR = 0.01
"""By how much the mean of a profile's ratios may differ from 1: they may be rounded."""


class HeadProfile(NamedSpec):
    """One model's ratios.

    model: what a model's config must say for the profile to be its own; readers: whom the memory is for, as in
    `observe.readers`; measured: on what, and with what settings; ratios: a row per layer, a number per key/value head,
    1 on average.
    """

    model: dict[str, int | str] = Field(description="what the config of the model says")
    readers: Literal["next", "repeat", "mixed", "asked"] = Field(
        default="next",
        description="whom the memory is for: who goes on with the text, who reads it again, both, or who answers",
    )
    measured: dict[str, Any] = Field(default_factory=dict, description="how the ratios were measured")
    ratios: tuple[tuple[float, ...], ...] = Field(description="a row per layer, a number per key/value head")

    @field_validator("ratios", mode="before")
    @classmethod
    def _from_lists(cls, rows: object) -> object:
        if not isinstance(rows, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in rows):
            return rows
        return tuple(tuple(float(each) if type(each) is int else each for each in row) for row in rows)

    @model_validator(mode="after")
    def _even_rows(self) -> HeadProfile:
        if not self.ratios or len({len(row) for row in self.ratios}) != 1 or not self.ratios[0]:
            raise ValueError("ratios must have a row per layer, all of as many numbers as there are key/value heads")
        if not all(0 < ratio <= MOST_RATIO for row in self.ratios for ratio in row):
            raise ValueError(f"ratios must be above 0 and at most {MOST_RATIO:g}")
        mean = statistics.fmean(ratio for row in self.ratios for ratio in row)
        if abs(mean - 1) > MEAN_ERROR:
            raise ValueError(
                f"ratios must have the mean 1, so that heads have as many rows in all as evenly, got {mean:.4g}; "
                "divide them by it"
            )
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and key/value heads of each."""
        return len(self.ratios), len(self.ratios[0])

    def fits(self, facts: Mapping[str, Any]) -> bool:
        """Whether a model that says this of itself is the one that was measured."""
        return all(facts.get(name) == value for name, value in self.model.items())

    def to_yaml(self) -> str:
        """As a file: what `load_profile` reads."""
        head = yaml12.dump({"model": dict(self.model), "readers": self.readers, "measured": dict(self.measured)})
        rows = "".join(f"  - [{', '.join(f'{ratio:g}' for ratio in row)}]\n" for row in self.ratios)
        return f"{head}ratios: # a row per layer, a number per key/value head\n{rows}"


PROFILES = Catalog(
    what="profile",
    spec=HeadProfile,
    error=PolicyError,
    folder="profiles",
    given="a name, a path or a HeadProfile",
    files="a YAML file",
    looked_for="the path of a profile's YAML or one of",
)


def profile_names() -> list[str]:
    """The names of the shipped profiles, sorted."""
    return PROFILES.names()


def load_profile(profile: str | Path) -> HeadProfile:
    """A profile by its shipped name or its YAML file's path. Raises `PolicyError`: what is wrong."""
    return PROFILES.load(profile)


def profile_of(facts: Mapping[str, Any], asked: bool = False) -> str | None:
    """The name of the shipped profile that was measured on a model that says this of itself; None: there is none.

    asked: whether the memory is for whoever may ask for what was read once; then one that was measured by answers comes
    first. Of several others the one that was measured by who reads again: whoever goes on with a text looks far back by
    the same heads, and of a repeated text much more can be told of them (docs/benchmarks.md).
    """
    profiles = {name: load_profile(name) for name in profile_names()}
    fitting = {profile.readers: name for name, profile in profiles.items() if profile.fits(facts)}
    others = ("repeat", "mixed", "next")
    order = ("asked", *others) if asked else (*others, "asked")
    return next((fitting[readers] for readers in order if readers in fitting), None)


def _profile_for(policy: PolicySpec, facts: Mapping[str, Any]) -> str | None:
    """What `auto` is for a policy, of a model that says this of itself."""
    return profile_of(facts, policy.observe.aggregate == "max")


def warn_of_even_shares(policies: Iterable[PolicySpec], facts: Mapping[str, Any]) -> None:
    """An `EvenSharesWarning` for each policy that asks for a profile where none is shipped for the model."""
    for policy in policies:
        if policy.heads.profile == AUTO and not policy.build().sinks_only and _profile_for(policy, facts) is None:
            layers, heads = facts.get("num_hidden_layers"), facts.get("num_key_value_heads")
            warn(
                f"no head profile is shipped for this model ({facts.get('model_type')}, {layers} layers × {heads} "
                f"key/value heads), so that all its heads have as many slots under {policy.name or 'this policy'}; "
                "measure one (memkit profile MODEL --readers repeat --ablate --out FILE), and name its file in "
                "heads.profile",
                EvenSharesWarning,
            )


def fitting_profile(
    name: str | Path, layers: int, kv_heads: int, facts: Mapping[str, Any] | None = None
) -> HeadProfile:
    """A profile by its shipped name or its path, of a model of this shape that says this of itself.

    Raises `PolicyError` for a profile that is not there or not right, or is of another model.
    """
    profile, name = load_profile(name), short(str(name))
    if profile.shape != (layers, kv_heads):
        raise PolicyError(
            f"head profile {name} is of a model of {profile.shape[0]} layers × {profile.shape[1]} key/value "
            f"heads, got {layers} × {kv_heads}; measure one with memkit profile, or leave it out"
        )
    if facts is not None and not profile.fits(facts):
        other = {each: facts.get(each) for each, value in profile.model.items() if facts.get(each) != value}
        raise PolicyError(
            f"head profile {name} was measured on another model, got {other} instead of "
            f"{ {each: profile.model[each] for each in other} }; measure one with memkit profile, or leave it out"
        )
    return profile


def shape_of_shares(policy: PolicySpec) -> tuple[int, int] | None:
    """The layers and key/value heads that a policy's shares are of; None: of any number.

    Raises `PolicyError` for a profile that is not there or not right.
    """
    profile, uneven = policy.heads.profile, policy.heads.uneven
    if profile is not None and profile != AUTO:
        return load_profile(profile).shape
    return (1, len(uneven)) if uneven is not None else None


def per_layer(
    policy: str | Path | PolicySpec | Policy,
    layers: int,
    kv_heads: int,
    facts: Mapping[str, Any] | None = None,
) -> list[Policy]:
    """The policy of each layer of a model: its profile's ratios put in, where it names one.

    layers, kv_heads: of the model. facts: what its config says, by which `auto` finds a profile; without a fitting one
    the shares are even. Raises `PolicyError` for a profile that is not there or not right, or is of another model.
    """
    policy = as_policy(policy)
    wanted = policy.spec.heads.profile
    name = _profile_for(policy.spec, facts or {}) if wanted == AUTO else wanted
    if wanted is None or policy.sinks_only:
        return [policy] * layers
    if name is None:
        even = policy.spec.with_ratios(1.0).build()
        return [even] * layers
    profile = fitting_profile(name, layers, kv_heads, facts)
    built = {row: policy.spec.with_ratios(*row).build() for row in profile.ratios}
    return [built[row] for row in profile.ratios]
