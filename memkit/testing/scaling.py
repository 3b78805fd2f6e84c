"""A policy in small: the same declaration with short chunks, so that its laws can be verified in seconds."""

from __future__ import annotations

from typing import Any

from memkit.catalog import load_policy
from memkit.errors import PolicyError
from memkit.pieces.admission import ExpectedAttentionSpec
from memkit.pieces.growth import GrowthSpec, PowerGrowthSpec
from memkit.policy import Policy, PolicySpec

__all__ = ["least_policy", "scaled_down"]


def least_policy(chunk: int, slots: int, **families: Any) -> Policy:
    """The least policy that merges: chunks of so many tokens, a window of one chunk, so many slots."""
    return PolicySpec(
        chunker={"kind": "fixed", "size": chunk},  # type: ignore[arg-type]
        window={"kind": "block", "chunks": 1},  # type: ignore[arg-type]
        growth={"kind": "fixed", "slots": slots},  # type: ignore[arg-type]
        **families,
    ).build()


def scaled_down(spec: PolicySpec, chunk: int = 4) -> PolicySpec:
    """The policy with chunks of `chunk` tokens, and budgets that stand to them as they did before.

    f(n) becomes s·f(n/s) with s = chunk / C: as many slots per chunk as before, after as many chunks; so do the places
    over which readers to come are spread. Sinks and the
    fields of pieces that are not memkit's own stay. Where the result would not be valid, chunks are doubled until it
    is; a policy whose chunks are no longer than `chunk` is returned as it is.
    """
    size = spec.chunker.build().size
    if size <= chunk:
        return spec
    try:
        return load_policy(spec, _changes(spec, chunk, chunk / size))
    except PolicyError:
        return scaled_down(spec, 2 * chunk)


def _changes(spec: PolicySpec, chunk: int, scale: float) -> dict[str, Any]:
    changed: dict[str, Any] = {"chunker.most" if spec.chunker.build().given else "chunker.size": chunk}
    if spec.window.kind == "sliding":
        changed["window.size"] = 2 * chunk
    if isinstance(spec.admission, ExpectedAttentionSpec):
        changed["admission.future"] = max(int(spec.admission.future * scale), 1)
    growth = spec.growth
    if isinstance(growth, GrowthSpec) and type(growth).__module__ == GrowthSpec.__module__:
        exponent = growth.exponent if isinstance(growth, PowerGrowthSpec) else 0.5
        powers = {"slots": 1, "limit": 1, "per_doubling": 1, "start": 1, "factor": 1 - exponent}
        for field, power in powers.items():
            if field in type(growth).model_fields:
                number = getattr(growth, field)
                small = type(number)(number * scale**power)
                changed[f"growth.{field}"] = max(small, 1) if isinstance(small, int) else small
        if growth.floor:
            changed["growth.floor"] = max(int(growth.floor * scale), spec.sinks + 1)
        if growth.cap is not None:
            changed["growth.cap"] = max(int(growth.cap * scale), changed.get("growth.floor", 0))
    return changed
