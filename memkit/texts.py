"""Texts to read: the one that every Python brings along, and files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

from memkit.errors import InputError

__all__ = ["default_text", "idle_help", "parts", "read_text", "second_text"]


def default_text() -> str:
    """The topics of Python's own help (`pydoc_data.topics`), sorted by name: 465 kB of English in CPython 3.11."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def second_text() -> str | None:
    """What was new in IDLE up to Python 2.7 (`idlelib/NEWS2x.txt`): 27 kB of English, the same in every Python 3; None
    where Python came without IDLE."""
    return _of_idle("NEWS2x.txt")


def idle_help() -> str | None:
    """The help of IDLE (`idlelib/help.html`) as plain text: 39 kB of English; None where Python came without IDLE."""
    page = _of_idle("help.html")
    return None if page is None else _TextOf(page).text


def _of_idle(name: str) -> str | None:
    """A text file that comes with IDLE."""
    package = find_spec("idlelib")
    path = None if package is None or package.origin is None else Path(package.origin).with_name(name)
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


class _TextOf(HTMLParser):
    """The text of a page of HTML, blank lines between its paragraphs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.inside = False
        self.feed(page)
        self.close()

    @property
    def text(self) -> str:
        """All of it."""
        return re.sub(r"\n\s*\n", "\n\n", "".join(self.pieces)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside |= tag == "body"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.pieces.append(data)


def parts(text: str, number: int) -> list[str]:
    """The same text from `number` places on, evenly spaced, none of them its beginning."""
    return [text[len(text) * (2 * part + 1) // (2 * number) :] for part in range(number)]


def read_text(path: Path) -> str:
    """A file's text. Raises `InputError` where it is none in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be a text file in UTF-8, got: {error}") from None
