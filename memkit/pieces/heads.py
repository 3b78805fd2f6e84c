"""Heads: how the slots of a layer are shared among its key/value heads.

Heads need very different numbers of rows: some look at the newest tokens alone, a few look far back. Ratios say how
many times the even share of slots each key/value head gets. The window and the sinks are the same for all.
"""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from memkit.pieces.registry import Spec

__all__ = ["AUTO", "HeadsSpec", "share_of"]

AUTO = "auto"
"""The profile that was measured on the model at hand, if one is shipped."""

MOST_RATIO = 1024.0


class HeadsSpec(Spec):
    """Declares how slots are shared among heads. Evenly by default."""

    ratios: tuple[float, ...] | None = Field(
        default=None,
        description="one per key/value head of a layer: how many times the growth's slots it gets, sinks apart; a "
        "single one is for every head",
    )
    profile: str | None = Field(
        default=None,
        description="ratios for every layer and head of a model: the name of a shipped profile, or a YAML file's path; "
        "auto: the shipped one that was measured on the model (of several the one by who reads again, or with "
        "observe.aggregate max by answers), even shares where there is none",
    )

    @field_validator("ratios", mode="before")
    @classmethod
    def _from_list(cls, ratios: object) -> object:
        if not isinstance(ratios, (list, tuple)):
            return ratios
        return tuple(float(ratio) if type(ratio) is int else ratio for ratio in ratios)

    @model_validator(mode="after")
    def _one_way(self) -> HeadsSpec:
        if self.ratios is not None and self.profile is not None:
            raise ValueError("ratios and profile are two ways to say the same; leave one out")
        if self.ratios is not None and not self.ratios:
            raise ValueError("ratios must have one number per key/value head of a layer, got none")
        for ratio in self.ratios or ():
            if not 0 < ratio <= MOST_RATIO:
                raise ValueError(f"ratios must be above 0 and at most {MOST_RATIO:g}, got {ratio:g}")
        if self.profile is not None and not self.profile.strip():
            raise ValueError("profile must be a name, a file's path or auto, got nothing")
        return self

    @property
    def uneven(self) -> tuple[float, ...] | None:
        """The ratios of a layer's heads, where two of them differ."""
        return self.ratios if self.ratios is not None and len(set(self.ratios)) > 1 else None

    @property
    def ratio(self) -> float:
        """What every head gets; the mean where they differ."""
        if self.uneven is not None:
            return sum(self.uneven) / len(self.uneven)
        return 1.0 if self.ratios is None else self.ratios[0]


def share_of(ratio: float, slots: int, sinks: int) -> int:
    """A head's slots where the growth grants `slots`, sinks counted: the sinks, and `ratio` times the others.

    One that is no sink is left wherever the growth grants one, so that a token has a slot to join.
    """
    if ratio == 1 or slots <= sinks:
        return slots
    return sinks + max(1, int(ratio * (slots - sinks) + 0.5))
