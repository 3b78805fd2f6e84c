"""What memkit raises, and what it warns of: one line that states the rule, the value and the remedy.

Every error is a `MemkitError` and also a `ValueError`, so callers may catch either.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

__all__ = [
    "EvenSharesWarning",
    "InputError",
    "MemkitError",
    "MemoryStateError",
    "ModelError",
    "PolicyError",
    "RenamedWarning",
    "SlowPathWarning",
    "warn",
]


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


class RenamedWarning(FutureWarning):
    """A name of a former release, which goes soon."""


class EvenSharesWarning(UserWarning):
    """A policy asks for the head profile of a model for which none is shipped: its heads have even shares."""


class SlowPathWarning(UserWarning):
    """What would be faster is installed and does not run."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called memkit, however deep in memkit this is called."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "memkit":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


MOST_SHOWN = 120
"""Characters of a refused value that a message shows: who gave a megabyte need not read it again."""
LEAST_BEGINNING = 3
"""Characters from which on names that begin with an unknown one are what was meant."""


def shown(value: Any) -> str:
    """A refused value as a message shows it: its `repr` in one line, the middle left out where that is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"{type(value).__name__} with a number of thousands of digits"
    return short(text)


def short(text: str) -> str:
    """A name as a message shows it: the middle left out where it is long."""
    half = MOST_SHOWN // 2
    return text if len(text) <= 2 * MOST_SHOWN else f"{text[:half]} … {text[-half:]}"


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known name begins with this one or is close to it, else nothing."""
    names, name = list(known), name[:MOST_SHOWN]
    longer = [each for each in names if each.startswith(name)] if len(name) >= LEAST_BEGINNING else []
    close = difflib.get_close_matches(name, longer, n=1, cutoff=0) or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that nobody knows: the name, the nearest one, and all known ones."""
    names = sorted(known)
    told = short(name) if name.isprintable() else shown(name)[1:-1]
    return f"unknown {what} '{told}'{nearest_name(name, names) or ';'} known: {', '.join(names)}"
