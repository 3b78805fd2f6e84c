"""What commands share: options, and checks of what they are given."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from memkit import yaml12
from memkit.errors import InputError, PolicyError, short

__all__ = [
    "DarkOption",
    "ImportOption",
    "PlotOption",
    "SetOption",
    "check_plot",
    "check_writable",
    "choice",
    "import_modules",
    "parse_overrides",
    "plot_to",
    "write",
    "write_and_show",
]


def import_modules(names: list[str]) -> list[str]:
    """Import a user's modules, found in the working folder too, so that they register their pieces."""
    if names and "" not in sys.path:
        sys.path.insert(0, "")
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise InputError(
                f"--import {name}: cannot be imported: {cause}; run python -c 'import {name}' to see where"
            ) from None
    return names


SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, as in growth.factor=8; may be repeated."),
]


ImportOption = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a Python module first, which registers pieces of your own; may be repeated.",
        callback=import_modules,
        is_eager=True,
    ),
]


PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it into a PNG, SVG or PDF file.")
]
DarkOption = Annotated[bool, typer.Option("--dark", help="With --plot: on black instead of white.")]


def parse_overrides(changes: list[str]) -> dict[str, Any]:
    """`growth.factor=8` → {"growth.factor": 8}; values are YAML."""
    overrides: dict[str, Any] = {}
    for change in changes:
        field, equals, value = change.partition("=")
        if not equals or not field.strip():
            raise PolicyError(f"--set {short(change)}: must be FIELD=VALUE, as in --set growth.factor=8")
        if (field := field.strip()) in overrides:
            raise PolicyError(f"--set {short(change)}: {short(field)} is given twice; leave one of them out")
        try:
            overrides[field] = yaml12.load(value, f"--set {short(change)}")
        except PolicyError as error:
            raise PolicyError(f"{error}; the value is YAML, as 8 or '{{kind: none}}'") from None
    return overrides


def check_writable(option: str, path: Path | None) -> None:
    """Raise where a file of that name cannot be written, before work is done for it."""
    if path is None:
        return
    try:
        fine = not path.is_dir() and path.absolute().parent.is_dir()
        allowed = os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    except OSError:  # a name longer than a file's may be
        fine = allowed = False
    if not fine:
        raise InputError(f"{option} {short(str(path))}: must be a file in a folder that exists; make the folder first")
    if not allowed:
        raise InputError(f"{option} {short(str(path))}: cannot be written; name a file in a folder of yours")


def write(path: Path, text: str) -> None:
    """Write a text file; raises `InputError` where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file in a folder of yours") from None


def write_and_show(path: Path | None, text: str, table: Any) -> None:
    """Write a file, where one is named, then print a table: a pipe that closes early ends the command, and a file that
    cannot be written keeps no table back."""
    from memkit import viz

    try:
        if path is not None:
            write(path, text)
    finally:
        viz.show(table)


def choice(option: str, given: str, *allowed: str) -> Any:
    """What was given, one of what is allowed."""
    if given not in allowed:
        raise InputError(f"{option} must be one of {', '.join(allowed)}, got {short(given)}")
    return given


def check_plot(path: Path | None, option: str = "--plot") -> None:
    """Raise where a figure cannot be drawn into a file of that name, before work is done for it."""
    if path is None:
        return
    from memkit.viz import style

    check_writable(option, path)
    style.check_ending(option, path)
    style.check_installed()


def plot_to(path: Path | None, dark: bool, draw: Callable[[Any], Any], shown: Any) -> None:
    """Draw what was shown into a file, where one was named."""
    if path is None:
        return
    from memkit.viz import style

    with style.theme(dark):
        style.save(draw(shown), path)
