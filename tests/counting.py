"""How much work a call is, in numbers that are the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["calls_made"]


def calls_made(do: Callable[[], Any]) -> int:
    """How many functions `do` calls, those of C included: a loop over a million tokens makes a million."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(before)
    return made
