"""Tables and figures: the only modules that import rich or matplotlib."""

from __future__ import annotations

import os
import sys

from rich.console import Console, RenderableType

__all__ = ["show"]

WIDE = 160


def show(*renderables: RenderableType) -> None:
    """Print to standard output; wide, so that nothing is cut off, where that is no terminal."""
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    console = Console(highlight=False, width=WIDE if wide else None)
    for renderable in renderables:
        console.print(renderable)
