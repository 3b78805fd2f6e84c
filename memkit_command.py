"""What the command `memkit` starts: what must be settled before PyTorch is imported, and then `memkit.cli`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

__all__ = ["keep_freed_memory", "let_waiting_threads_sleep", "main"]

SPINS = "1000"
"""How often an OpenMP thread that waits looks again before it sleeps. Left alone, threads spin for a millisecond or
more at each of thousands of small operations: with another process on the same cores, most of the time goes there.
With this number little is lost on quiet cores either (docs/benchmarks.md)."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's numbers of two settings (mallopt(3)): how many bytes at the heap's end may be free before they go back to
the system; how large a block must be to have a mapping of its own."""
FREE_AT_MOST, LARGEST_OF_HEAP = 2**29, 32 * 2**20
"""What these are set to. Left alone, each training step of a small model gets its memory from the system anew, page by
page (docs/results.md): the second is what glibc comes to by itself, once a block of that size has been freed; the first
would be twice of it then, which is less than such a step frees."""


def main() -> None:
    """Run the command line."""
    let_waiting_threads_sleep()
    keep_freed_memory()
    from memkit.cli import app

    app()


def let_waiting_threads_sleep() -> None:
    """See `SPINS`; never over what the user has set."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def keep_freed_memory() -> None:
    """See `LARGEST_OF_HEAP`; never over what the user has set, and not where there is no glibc."""
    if any(name.startswith("MALLOC_") or name in {"GLIBC_TUNABLES", "LD_PRELOAD"} for name in os.environ):
        return
    set_option = _mallopt()
    if set_option is not None:
        set_option(MMAP_THRESHOLD, LARGEST_OF_HEAP)
        set_option(TRIM_THRESHOLD, FREE_AT_MOST)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function; None where this process has another C library."""
    try:
        return ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another library; one that cannot be asked; Windows
        return None
