"""`memkit check`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from memkit.catalog import load_policy
from memkit.commands.options import ImportOption, SetOption, import_modules, parse_overrides
from memkit.errors import InputError, unknown_name

__all__ = ["check"]


def check(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="A policy's name or YAML file, or module:Name of a piece.")
    ],
    examples: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Examples to try each law on.")] = 50,
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
) -> None:
    """Check the laws of a policy, or of a piece of your own.

    Which laws hold, which are broken (with an example as code) and which the piece does not claim. Exit code 1 where
    one is broken.
    """
    try:
        from memkit.testing import examine
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hypothesis":
            raise
        raise InputError("memkit check needs hypothesis; pip install 'memkit-attention[testing]'") from None
    from memkit import viz
    from memkit.viz.checks import report, watching

    found: Any = _piece(subject, changes) if ":" in subject else load_policy(subject, parse_overrides(changes))
    with watching() if sys.stderr.isatty() else nullcontext() as watch:
        examined = examine(found, examples, watch=watch)
    viz.show(report(examined))
    if examined.broken:
        raise typer.Exit(1)


def _piece(subject: str, changes: list[str]) -> Any:
    """What `module:Name` names."""
    module, _, name = subject.partition(":")
    if changes:
        raise InputError(f"--set changes a policy's fields, and {subject} is a piece; set them where it is made")
    import_modules([module])
    found: Any = sys.modules[module]
    for part in name.split("."):
        if not hasattr(found, part):
            known = [known for known in vars(sys.modules[module]) if not known.startswith("_")]
            raise InputError(f"{subject}: {unknown_name('name', name, known)}")
        found = getattr(found, part)
    return found
