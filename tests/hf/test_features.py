"""The tables of docs/stock-models.md are what tools/families.py prints, and name tests that exist."""

import ast
from pathlib import Path

import pytest

from tests.hf.features import FEATURES
from tools import families

HERE = Path(__file__).parent


def test_the_page_holds_what_the_tool_prints():
    page = families.PAGE.read_text(encoding="utf-8")
    part = "\n".join(families.lines()) + "\n"
    assert families.page_with(part, page) == page, "run: python tools/families.py --write"
    assert families.page_with(part + "more\n", page) != page


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_names_a_test_that_exists(feature: str):
    file, _, name = FEATURES[feature].partition("::")
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    found = [each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name]
    assert len(found) == 1
    marks = [part for each in found[0].decorator_list for part in ast.walk(each)]
    assert not {"skip", "skipif", "xfail"} & {part.attr for part in marks if isinstance(part, ast.Attribute)}


def test_the_tool_prints_every_family(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["families.py"])
    families.main()
    printed = capsys.readouterr().out
    for family in ("llama", "gemma3", "gpt2", "qwen3_next", "gemma2", "gpt_oss"):
        assert family in printed
    assert "| gpt2 | plain | yes | refused |" in printed
