"""What commands share: options, and checks of what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memkit import yaml12
from memkit.errors import InputError, PolicyError, short

__all__ = ["SetOption", "check_writable", "parse_overrides", "write"]

SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, as in growth.factor=8; may be repeated."),
]


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
    except OSError:  # a name longer than a file's may be
        fine = False
    if not fine:
        raise InputError(f"{option} {short(str(path))}: must be a file in a folder that exists; make the folder first")


def write(path: Path, text: str) -> None:
    """Write a text file; raises `InputError` where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); name a file in a folder of yours") from None
