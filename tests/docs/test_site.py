"""The documentation site: its commands and code run, its pictures are there, and nothing is left out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import yaml
from typer.testing import CliRunner

import memkit
from memkit.cli import app
from memkit.pieces import kinds

mpl.use("agg")

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md"))
OWN_TESTS = {"README.md", "stock-models.md", "testing.md", "write-a-merge-rule.md", "write-an-admission.md"}
"""Whose code other tests run."""


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of one language, indented ones too."""
    # All of them, so that the end of one is never taken for the beginning of another.
    found = re.findall(r"^( *)```(.*?)\n(.*?)^\1```$", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, named, block in found if named.strip() == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own, to write figures and files into."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = [path for path in PAGES if path.name not in OWN_TESTS and blocks(path, "python")]


@pytest.mark.parametrize("path", RUN, ids=lambda path: path.name)
def test_code_runs(path: Path, folder: Path):
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "page"}
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec", dont_inherit=True), scope)


GROWS = """
import memkit
policy = memkit.load_policy("kvm-sqrt-16", {"growth": {"kind": "cube-root", "factor": 30.0}}).build()
print(policy.growth.budget(0), policy.growth.budget(1), policy.growth.budget(9000), policy.slots_after(9000))
"""


def test_the_growth_schedule_of_contributing_grows(tmp_path: Path):
    """In a copy of the package, where CONTRIBUTING.md says that it goes."""
    package = tmp_path / "memkit"
    shutil.copytree(Path(memkit.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "policies", tmp_path / "policies")
    with (package / "pieces" / "growth.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{blocks(ROOT / 'CONTRIBUTING.md', 'python')[0]}")

    run = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, cwd=tmp_path, check=False)

    assert run.returncode == 0, run.stderr
    # 30 · 8960^(1/3): the last chunk to leave did so at token 8960.
    assert run.stdout.split() == ["0", "30", "624", "623"]


def test_commands_of_the_first_five_minutes_run(folder: Path):
    page = DOCS / "start.md"
    Path("mine.yaml").write_text(blocks(page, "yaml")[0], encoding="utf-8")
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    assert len(commands) == 6
    for command in commands:
        done = CliRunner().invoke(app, command.split()[1:])
        assert done.exit_code == 0, f"{command}\n{done.output}"
    assert Path("cost.png").read_bytes().startswith(b"\x89PNG")


def test_policies_in_pages_load():
    for path in PAGES:
        for block in blocks(path, "yaml"):
            if not re.search("kind: (ema|between)", block):  # kinds that those pages have their reader write
                memkit.PolicySpec(**yaml.safe_load(block))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_pictures_are_there_for_white_and_for_black(path: Path):
    linked = re.findall(r"!\[[^]]*\]\(([^)#]+)(#only-\w+)?\)", path.read_text(encoding="utf-8"))
    for name, theme in linked:
        assert (path.parent / name).is_file(), name
        twin = name.replace("-dark.png", ".png") if theme == "#only-dark" else name.replace(".png", "-dark.png")
        assert not theme or twin in {other for other, _ in linked}, name


@pytest.mark.parametrize(
    "family", ["growth", "admission", "routing", "rotary", "window", "merging"],
)  # fmt: skip
def test_a_familys_page_names_all_its_kinds(family: str):
    text = (DOCS / "families" / f"{family}.md").read_text(encoding="utf-8")
    shipped = [kind for kind, spec in kinds(family).items() if spec.__module__.startswith("memkit.pieces.")]
    assert [kind for kind in shipped if not re.search(rf"(^|\W){re.escape(kind)}(\W|$)", text, re.MULTILINE)] == []


def test_every_listed_policy_stands_side_by_side_with_the_others():
    table = (DOCS / "policies.md").read_text(encoding="utf-8")
    assert [name for name in memkit.policy_names() if f"`{name}`" not in table] == []


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {str(path.relative_to(DOCS)) for path in PAGES} | {f"{path.stem}.md" for path in DOCS.glob("*.ipynb")}
    assert named == pages


def test_the_vocabulary_is_that_of_the_families():
    words = (DOCS / "vocabulary.md").read_text(encoding="utf-8")
    fields = set(memkit.PolicySpec.model_fields) - {"chunker", "sinks", "heads", "observe", "rotary"}
    assert [field for field in fields if f"| {field}" not in words] == []


@pytest.mark.slow
def test_a_comparison_and_its_report_as_the_first_five_minutes_say(folder: Path):
    if os.environ.get("CI") is None:
        pytest.importorskip("transformers")
    block = next(block for block in blocks(DOCS / "start.md", "") if "memkit compare" in block)
    for command in block.splitlines():
        done = CliRunner().invoke(app, command.split()[1:])
        assert done.exit_code == 0, done.output
    assert Path("front.png").is_file()
    assert "untrained-observed" in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path):
    own = ROOT / "build" / "envs" / "docs" / "bin" / "mkdocs"
    mkdocs = str(own) if own.is_file() else shutil.which("mkdocs")
    if mkdocs is None:
        pytest.skip("there is no mkdocs here; make docs installs it")
    command = [mkdocs, "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?://[^\"]*)", page.read_text("utf-8"))
        assert loaded == [], page
