"""Which policies a stock model can run: those without learned parts, that turn keys back only where it is known how."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memkit.errors import ModelError
from memkit.hf.cache import named
from memkit.hf.decoder import Decoder
from memkit.hf.probe import LayerFacts

if TYPE_CHECKING:
    from memkit.policy import Policy

__all__ = ["check_policy", "check_rotation"]

# Rotary frequencies that change with the length read: a key would be un-rotated by other angles than it was rotated by.
MOVING_FREQUENCIES = ("dynamic", "longrope")


def check_policy(policy: Policy) -> None:
    """Raise `ModelError` where a policy needs what no stock model has learned."""
    if policy.learned:
        raise ModelError(
            f"a stock model runs policies without learned parts, got {named(policy)}, which needs "
            f"{', '.join(need.phrase for need in policy.learned)}; use an untrained-* policy, or train a "
            "model with this one"
        )


def check_rotation(decoder: Decoder, layer: int, facts: LayerFacts) -> None:
    """Raise `ModelError` where it is not known how a layer's keys were turned, at any length of the text."""
    for module in decoder.module.modules():
        kinds = getattr(module, "rope_type", None) or ()
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in MOVING_FREQUENCIES:
                raise ModelError(
                    f"un-rotating keys needs fixed rotary frequencies, got rope type {kind}; "
                    "use a policy with rotary: {kind: keep} and no expected-attention"
                )
    if facts.rotation is None:
        raise ModelError(
            f"un-rotating keys needs to know how positions turn them, and those of layer {layer} of "
            f"{decoder.config.model_type} are not turned by the model's rotary frequencies alone; "
            "use a policy with rotary: {kind: keep} and no expected-attention"
        )
