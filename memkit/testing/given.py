"""Specs for pieces that have none: a rule can be tried in a policy before it has a name in YAML."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PrivateAttr

from memkit.pieces.admission import Admission, AdmissionSpec
from memkit.pieces.merging import Merging, MergingSpec
from memkit.pieces.registry import FamilySpec
from memkit.pieces.routing import Routing, RoutingSpec

__all__ = ["as_spec"]


class GivenMergingSpec(MergingSpec):
    """A merge rule as it is."""

    kind: Literal["given"] = "given"
    _piece: Merging = PrivateAttr()

    def build(self) -> Merging:
        return self._piece


class GivenAdmissionSpec(AdmissionSpec):
    """An admission as it is."""

    kind: Literal["given"] = "given"
    _piece: Admission = PrivateAttr()

    def build(self) -> Admission:
        return self._piece


class GivenRoutingSpec(RoutingSpec):
    """A routing as it is."""

    kind: Literal["given"] = "given"
    _piece: Routing = PrivateAttr()

    def build(self) -> Routing:
        return self._piece


def as_spec(piece: Merging | Admission | Routing) -> Any:
    """A spec that builds this very piece: `PolicySpec(merging=as_spec(MyMerge()), …)`. It cannot be written to YAML."""
    for family, spec in ((Merging, GivenMergingSpec), (Admission, GivenAdmissionSpec), (Routing, GivenRoutingSpec)):
        if isinstance(piece, family):
            made: FamilySpec = spec()
            object.__setattr__(made, "__pydantic_private__", {"_piece": piece})
            return made
    raise TypeError(f"a piece is a Merging, an Admission or a Routing, got {type(piece).__name__}")
