"""How a record is shown, for records that know no renderer.

A record's `table()` or `plot()` asks for a form by name. Whoever stands above records and renderers says which module
renders which record (`memkit/__init__.py` does); the module is imported when a record is first shown.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

__all__ = ["render", "set_renderers", "show_in_notebooks"]

_MODULES: dict[str, str] = {}


def set_renderers(modules: Mapping[str, str]) -> None:
    """Say which module renders records of a class: {class name: module}. The module has one function per form."""
    _MODULES.update(modules)


def render(record: object, form: str, *arguments: Any) -> Any:
    """What the record's renderer makes of it: its function `form`, called with the record and `arguments`.

    Raises `LookupError` where no renderer is known for the record's class or a class it inherits from.
    """
    for kind in type(record).__mro__:
        if kind.__name__ in _MODULES:
            return getattr(importlib.import_module(_MODULES[kind.__name__]), form)(record, *arguments)
    raise LookupError(f"no module is known to render a {type(record).__name__}; name one with set_renderers")


def show_in_notebooks(*classes: type) -> None:
    """Give classes the form that notebooks show, `_repr_html_`: what their renderer's `html` makes of an object."""
    for kind in classes:
        kind._repr_html_ = _html  # pyright: ignore[reportAttributeAccessIssue]


def _html(record: object) -> str:
    return render(record, "html")
