"""What makes a CPU go the ways of a GPU: chunks are read and folded together, with unequal numbers of slots too, and a
chunk's rows are summed by a product."""

from __future__ import annotations

from typing import Any

from memkit.engine import forward, keysets, together
from memkit.memory import slots

__all__ = ["SETTINGS"]

SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (forward, "TOGETHER", {"cpu": 48}),
    (forward, "UNEQUAL_SLOTS", {"cpu"}),
    (keysets, "JOINED", {}),
    (together, "FOLDED_TOGETHER", {"cpu"}),
    (slots, "BY_PRODUCT", {"cpu": (512, 2**26)}),
)
