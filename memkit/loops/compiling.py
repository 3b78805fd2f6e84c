"""How loops are compiled: each for the types that it is called with, at the first call, and kept on disk."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import functools
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

__all__ = ["IN_ORDER", "exact", "loop", "no_nan", "numbers"]

REORDERED = {"reassoc", "contract", "nsz"}
"""Sums may be taken in any order, several numbers at a time; nothing is assumed of infinities and NaN."""


IN_ORDER = {"fastmath": {"contract"}, "error_model": "numpy"}
"""Options of a loop in which every operation is as it stands there."""


def loop(function: Any) -> Any:
    """Compile a loop whose sums may be taken in any order; it lets other threads of Python run."""
    return _compiled(function, REORDERED)


def exact(function: Any) -> Any:
    """Compile a loop that does just what it says."""
    return _compiled(function, False)


def no_nan(function: Any) -> Any:
    """Compile a loop over what may be infinite, but is never NaN."""
    return _compiled(function, {*REORDERED, "nnan"})


def numbers(function: Any) -> Any:
    """Compile a loop over what is known to be numbers, none of them NaN or infinite."""
    return _compiled(function, True)


def _compiled(function: Any, fast: set[str] | bool) -> Any:
    options = {"nogil": True, "fastmath": fast, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
        _forget_the_old(compiled.stats.cache_path)
        return compiled
    except RuntimeError:  # no folder to keep it in: compiled anew in each process
        return njit(**options)(function)


class _Notice(event.Listener):
    """Says once in a process that loops are compiled, before which nothing seems to go on for a while."""

    said = False

    def on_start(self, event: event.Event) -> None:
        function = getattr((event.data or {}).get("dispatcher"), "py_func", None)
        ours = (getattr(function, "__module__", None) or "").startswith("memkit.loops.")
        if ours and not self.said:
            self.said = True
            logging.getLogger("memkit").warning("memkit compiles its loops for this machine, once: up to half a minute")

    def on_end(self, event: event.Event) -> None:
        pass


event.register("numba:compile", _Notice())


@functools.cache
def _forget_the_old(folder: str) -> None:
    """Loops call each other across files, and of a loop that it has kept Numba asks only whether its own file is as it
    was: forget what is older than any of the files."""
    changed = max(source.stat().st_mtime for source in Path(__file__).parent.glob("*.py"))
    for index in Path(folder).glob("*.nbi"):
        with suppress(OSError):  # somebody else does, or we may not
            if index.stat().st_mtime < changed:
                index.unlink()
