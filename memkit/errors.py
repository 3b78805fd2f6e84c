"""What memkit raises: one line that states the rule, the value and the remedy.

Every kind is a `MemkitError` and also a `ValueError`, so callers may catch either.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "MemkitError", "MemoryStateError", "ModelError", "PolicyError"]


class MemkitError(ValueError):
    """Anything that memkit refuses."""


class PolicyError(MemkitError):
    """A policy, or one of its pieces, is declared wrongly."""


class InputError(MemkitError):
    """Tensors that do not fit each other, the policy or the memory."""


class MemoryStateError(MemkitError):
    """A memory that cannot be used here: taken over, of another policy, of another shape."""


class ModelError(MemkitError):
    """A model that cannot be found, read or run."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that nobody knows: the name, the nearest one, and all known ones."""
    names = sorted(known)
    return f"unknown {what} '{name}'{nearest_name(name, names) or ';'} known: {', '.join(names)}"
