"""What the documents say, run."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import memkit
from memkit.cli import app
from memkit.lm import load_model_spec
from memkit.pieces import MergingSpec, kinds

ROOT = Path(__file__).parents[2]


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language in a Markdown file."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_readme_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "readme"}
    for block in blocks("README.md", "python"):
        exec(compile(block, "README.md", "exec", dont_inherit=True), scope)
    assert "Memory(policy 'ovq-1024'" in capsys.readouterr().out


def test_training_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("docs/training.md", "python"):
        exec(compile(block, "training.md", "exec", dont_inherit=True), {"__name__": "training"})
    assert "of the answers" in capsys.readouterr().out
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for line in re.findall(r"^memkit .*", page, flags=re.MULTILINE):
        _, *given = line.split("#")[0].split()
        options = {option.split("=")[0] for option in given if option.startswith("--")}
        known = CliRunner().invoke(app, [given[0], "--help"]).output
        assert all(option in known for option in options), line


def test_readme_merge_rule_works_in_yaml(tmp_path: Path) -> None:
    block = blocks("README.md", "python")[-1]
    exec(compile(block, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    assert issubclass(kinds("merging")["recent"], MergingSpec)
    spec = memkit.load_policy("untrained-kvm-fixed", {"merging.kind": "recent", "merging.rate": 0.2})
    path = tmp_path / "recent.yaml"
    path.write_text(spec.to_yaml(), encoding="utf-8")
    assert memkit.load_policy(path) == spec


def test_readme_policy_file_is_the_shipped_one() -> None:
    block, _ = blocks("README.md", "yaml")
    assert memkit.PolicySpec(**yaml.safe_load(block)) == memkit.load_policy("kvm-sqrt-16")


def test_readme_model_file_is_the_shipped_one() -> None:
    _, block = blocks("README.md", "yaml")
    assert memkit.ModelSpec(**yaml.safe_load(block)) == load_model_spec("tiny-kvm-rwkv7")


def test_readme_error_is_what_a_typo_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = (ROOT / "policies" / "kvm-sqrt-16.yaml").read_text(encoding="utf-8")
    Path("mine.yaml").write_text(shipped.replace("factor:", "fctor:"), encoding="utf-8")
    with pytest.raises(memkit.PolicyError) as caught:
        memkit.load_policy("mine.yaml")
    assert str(caught.value).startswith("mine.yaml: growth.fctor: unknown field; did you mean 'factor'?")
    assert str(caught.value).split(";")[0] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_default_policy() -> None:
    from memkit.comparison import DEFAULT_POLICIES

    table = blocks("README.md", "")[1]
    assert all(name in table for name in DEFAULT_POLICIES)


def test_stock_models_block_runs_and_names_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memkit import hf

    text = (ROOT / "docs" / "stock-models.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`((?:untrained|streaming|caote|h2o|tova|snapkv|expected|keydiff|knorm|full)[a-z0-9-]*)`", text)
    )
    assert named >= {"untrained-observed", "untrained-observed-sqrt", "keydiff-512"}
    for name in named:
        memkit.load_policy(name)
    try:
        loaded = hf.load()
    except memkit.ModelError as error:
        if os.environ.get("CI"):  # there the package is always installed: its absence is a fault
            raise
        pytest.skip(str(error))  # elsewhere a developer may do without the 100 MB model
    monkeypatch.setattr(hf, "load", lambda: loaded)  # which takes half a minute each time
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/stock-models.md", "python"):
        exec(compile(block, "stock-models.md", "exec", dont_inherit=True), {"__name__": "stock-models"})
