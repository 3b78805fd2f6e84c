"""What makes a CPU go the ways of a GPU: chunks are read together, with unequal numbers of slots too, and folded so."""

from __future__ import annotations

from typing import Any

from memkit.engine import forward, together

__all__ = ["SETTINGS"]

SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (forward, "TOGETHER", {"cpu": 48}),
    (forward, "UNEQUAL_SLOTS", {"cpu"}),
    (together, "FOLDED_TOGETHER", {"cpu"}),
)
