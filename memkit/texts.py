"""Texts to read: the one that every Python brings along, and files."""

from __future__ import annotations

from pathlib import Path

from memkit.errors import InputError

__all__ = ["default_text", "parts", "read_text"]


def default_text() -> str:
    """The topics of Python's own help (`pydoc_data.topics`), sorted by name: 465 kB of English in CPython 3.11."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def parts(text: str, number: int) -> list[str]:
    """The same text from `number` places on, evenly spaced, none of them its beginning."""
    return [text[len(text) * (2 * part + 1) // (2 * number) :] for part in range(number)]


def read_text(path: Path) -> str:
    """A file's text. Raises `InputError` where it is none in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be a text file in UTF-8, got: {error}") from None
