"""A rule that is not additive: a slot forgets its older tokens."""

from typing import Literal

from memkit.pieces import Merging, MergingSpec


class Ema(Merging):
    additive = False
    convex = True

    def combine(self, slot, token):
        return 0.75 * slot + 0.25 * token


class EmaSpec(MergingSpec):
    """Not registered, so that it stands in nobody's way."""

    kind: Literal["test-ema"] = "test-ema"

    def build(self) -> Ema:
        return Ema()
