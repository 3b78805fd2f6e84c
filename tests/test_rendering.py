"""Records ask for a form; the module named for their class draws it."""

import importlib
import sys

import pytest

from memkit import rendering


class Weather:
    """A record of this test's own."""


class Storm(Weather):
    pass


def sketch(record: object, *arguments: object) -> tuple[object, ...]:
    return (record, *arguments)


def test_a_record_is_rendered_by_the_module_named_for_its_class_or_its_base(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "_MODULES", {"Weather": __name__})
    monkeypatch.setattr(importlib, "import_module", {__name__: sys.modules[sketch.__module__]}.__getitem__)
    for record in (Weather(), Storm()):
        assert rendering.render(record, "sketch", 1, 2) == (record, 1, 2)


def test_a_record_that_nobody_renders():
    with pytest.raises(LookupError, match="no module is known to render a Weather"):
        rendering.render(Weather(), "table")


FORMS = {"Bench": ["table", "plot"], "Comparison": ["table", "plot"]}
"""What records ask for besides `html`."""


@pytest.mark.parametrize(("record", "forms"), [(name, [*FORMS.get(name, []), "html"]) for name in rendering._MODULES])
def test_the_renderers_that_memkit_names_have_the_forms_that_records_ask_for(record: str, forms: list[str]):
    module = importlib.import_module(rendering._MODULES[record])
    assert [form for form in forms if not callable(getattr(module, form, None))] == []
