"""What a piece claims. Claims are checked; what is not claimed is not asked.

A piece claims by an attribute: `convex = True` in the class of a merge rule. Left out, a rule that is `additive` claims
all of the claims on merge rules that follow from its sums, and any other rule claims none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memkit.pieces.merging import Merging
from memkit.pieces.routing import Nearest

__all__ = ["CLAIMS", "claimed"]


def _additive(rule: Any) -> bool:
    return bool(getattr(rule, "additive", False))


def _means(rule: Any) -> bool:
    """Additive, and a mean of its tokens: keys and values weighed alike."""
    weighs = getattr(rule, "weighs", Merging.weighs)
    return _additive(rule) and weighs.keys == weighs.values


def _compares(piece: Any) -> bool:
    return bool(getattr(piece, "compares", False))


CLAIMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "conserves": ("a slot's sums, mass and count are those of its tokens", _additive),
    "order_free": ("the order of tokens within a chunk does not matter", _additive),
    "associative": ("combine(combine(a, b), c) = combine(a, combine(b, c))", _additive),
    "convex": ("a slot, divided by its mass, lies among its tokens", _means),
    "isotropic": ("rotating all keys rotates the slots' keys", _additive),
    "weightless": ("a token of weight 0 changes neither the sums it weighs in nor the mass", _additive),
    "novel": ("those found a slot that the memory stands for least", _compares),
    "order_blind": ("which tokens found does not depend on their order, ties apart", _compares),
    "nearest": (
        "a token joins the most similar slot, by its own `similarity`",
        lambda piece: isinstance(piece, Nearest),
    ),
}
"""Every claim: what it says, and whether a piece that does not say claims it."""


def claimed(piece: Any, claim: str | None) -> bool:
    """Whether the piece makes the claim; a law without a claim is everybody's."""
    if claim is None:
        return True
    said = getattr(piece, claim, None)
    return CLAIMS[claim][1](piece) if said is None or callable(said) else bool(said)
