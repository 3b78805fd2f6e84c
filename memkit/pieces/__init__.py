"""The pieces a policy is made of, one module per family, and how to add one's own."""

from memkit.pieces.admission import Admission, AdmissionSpec
from memkit.pieces.chunking import Chunker, ChunkerSpec
from memkit.pieces.growth import Growth, GrowthSpec
from memkit.pieces.merging import Merging, MergingSpec, Weigh
from memkit.pieces.needs import Need
from memkit.pieces.readout import Readout, ReadoutSpec
from memkit.pieces.registry import Spec, SpecError, kinds, register
from memkit.pieces.rotary import Rotary, RotarySpec, Rotation
from memkit.pieces.routing import Leaving, Placement, Routing, RoutingSpec
from memkit.pieces.window import Window, WindowSpec

__all__ = [
    "Admission",
    "AdmissionSpec",
    "Chunker",
    "ChunkerSpec",
    "Growth",
    "GrowthSpec",
    "Leaving",
    "Merging",
    "MergingSpec",
    "Need",
    "Placement",
    "Readout",
    "ReadoutSpec",
    "Rotary",
    "RotarySpec",
    "Rotation",
    "Routing",
    "RoutingSpec",
    "Spec",
    "SpecError",
    "Weigh",
    "Window",
    "WindowSpec",
    "kinds",
    "register",
]
