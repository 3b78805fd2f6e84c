"""What the command `memkit` starts: what must be settled before PyTorch is imported, and then `memkit.cli`."""

from __future__ import annotations

import os

__all__ = ["main"]

SPINS = "1000"
"""How often an OpenMP thread that waits looks again before it sleeps. Left alone, threads spin for a millisecond or
more at each of thousands of small operations: with another process on the same cores, most of the time goes there.
With this number little is lost on quiet cores either (docs/benchmarks.md)."""


def main() -> None:
    """Run the command line."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:  # never over what the user has set
        os.environ["GOMP_SPINCOUNT"] = SPINS
    from memkit.cli import app

    app()
