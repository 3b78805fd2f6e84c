"""What a piece needs from whoever calls `attend`: things a layer has learned, or must say."""

from __future__ import annotations

from enum import Enum

__all__ = ["Need"]


class Need(Enum):
    """One thing a policy needs besides queries, keys and values. Its value is how messages call it."""

    MERGE_WEIGHTS = "merge weights"
    """A weight ≥ 0 for each token: `attend(weights=…)`, or 1 each."""
    KEY_NORM = "a memory-key LayerNorm"
    """Weight and bias of the LayerNorm on memory keys: in `PolicyParameters`, or 1 and 0."""
    QUERY_SCALES = "query scales"
    """A factor on each head's queries, one for the window and one for the memory: in `PolicyParameters`, or 1."""
    ROTATION = "the rotation of queries and keys"
    """How queries and keys were rotated: `attend(rotation=…)`."""

    @property
    def phrase(self) -> str:
        """What messages call it."""
        return self.value

    @property
    def learned(self) -> bool:
        """Whether a layer learns it; no stock model has it then."""
        return self is not Need.ROTATION
