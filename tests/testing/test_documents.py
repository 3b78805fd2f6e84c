"""What docs/write-a-merge-rule.md, docs/write-an-admission.md and docs/testing.md say, run."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memkit import load_policy
from memkit.pieces import Admission, registry
from memkit.testing import CLAIMS, LawBroken, check_admission, check_merge_rule, laws
from tests.faults import FAULTS

ROOT = Path(__file__).parents[2]
RULE, ADMISSION, TESTING = (
    ROOT / "docs" / name for name in ("write-a-merge-rule.md", "write-an-admission.md", "testing.md")
)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def written(folder: Path, document: Path, name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with the module and the policy that a document has its reader write; its kind is known for so long."""
    (folder / f"{name}.py").write_text(blocks(document, "python")[0])
    (folder / f"{name}.yaml").write_text(blocks(document, "yaml")[0])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(registry._REGISTRY, family, dict(registry._REGISTRY[family]))
    yield folder
    sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the page on merge rules has its reader write."""
    (tmp_path / "test_ema.py").write_text(blocks(RULE, "python")[1])
    yield from written(tmp_path, RULE, "ema", "merging", monkeypatch)


@pytest.fixture
def admission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the page on admissions has its reader write."""
    yield from written(tmp_path, ADMISSION, "between", "admission", monkeypatch)


def memkit(*arguments: str) -> str:
    """What the command line prints, from the working folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-c", "from memkit.cli import app; app()", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_the_rule_gets_a_name_that_files_can_use(folder):
    import ema  # type: ignore[import-not-found]

    spec = load_policy("ema.yaml")
    assert spec.merging == ema.EmaSpec(rate=0.2)
    assert "ema" in memkit("show", "ema.yaml", "--import", "ema")
    assert "ema" in memkit("cost", "ema.yaml", "--import", "ema", "--tokens", "1000")


def test_the_rule_is_checked_on_the_command_line(folder):
    [command] = [line for line in blocks(RULE, "sh")[1].splitlines() if line]
    text = memkit(*command.split()[1:], "--examples", "4")

    assert "broken" not in text
    assert text.count("not claimed") == 4 + 1  # the document's four, and conservation in memory
    assert "round trip" in text


def test_the_test_file_of_the_rule_runs(folder):
    lines = [line for line in blocks(RULE, "python")[1].splitlines() if line]
    assert len(lines) - len([line for line in lines if "import" in line]) == 2
    scope: dict[str, object] = {}
    exec(compile(blocks(RULE, "python")[1], "test_ema.py", "exec"), scope)
    check_merge_rule(__import__("ema").EmaSpec(rate=0.2), 5)


def test_a_wrong_claim_is_found_as_the_document_says(folder):
    scope: dict[str, object] = {"Tensor": Tensor}
    exec(compile(blocks(RULE, "python")[2], "eager.py", "exec"), scope)
    eager = scope["Eager"](0.1)  # type: ignore[operator]

    with pytest.raises(LawBroken) as caught:
        check_merge_rule(eager, 10)
    assert str(caught.value).startswith(blocks(RULE, "text")[0].strip())


def test_the_table_of_claims_is_complete():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", RULE.read_text(), flags=re.MULTILINE))
    of_rules = {law.claim for law in laws.MERGING_LAWS if law.claim}

    assert table == {claim: CLAIMS[claim][0] for claim in CLAIMS if claim in of_rules}


def test_an_admission_gets_a_name_and_is_checked(admission):
    import between  # type: ignore[import-not-found]

    assert load_policy("between.yaml").admission == between.BetweenSpec(weight=0.7)
    assert "between" in memkit("show", "between.yaml", "--import", "between")
    for command in [line for line in blocks(ADMISSION, "sh")[1].splitlines() if line]:
        text = memkit(*command.removesuffix("10").split()[1:], "4")
        assert "broken" not in text
        assert "split = whole" in text


def test_an_admission_may_measure_what_is_missed(admission):
    """As the page has it."""
    scope: dict[str, object] = {"Between": __import__("between").Between}
    exec(compile(blocks(ADMISSION, "python")[1], "peak.py", "exec"), scope)
    peak = scope["Peak"](0.5)  # type: ignore[operator]
    shares = torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    assert peak.missed(shares, torch.ones(2, 3), torch.ones(2, 3)).tolist() == pytest.approx([0.6, 0.8])


def test_the_table_of_what_an_admission_says_is_complete():
    said = set(re.findall(r"^\| `(\w+)` \| ", ADMISSION.read_text(), flags=re.MULTILINE))
    flags = {name for name, kind in Admission.__annotations__.items() if "ClassVar" in str(kind)}
    assert flags <= said


@pytest.mark.parametrize("kind", sorted(set(registry._REGISTRY["admission"]) - {"none"}))
def test_every_shipped_admission_can_be_checked_by_itself(kind):
    check_admission(registry._REGISTRY["admission"][kind](), 2)


def test_the_page_on_testing_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    scope: dict[str, object] = {}
    exec(compile(blocks(TESTING, "python")[0], "testing.md", "exec"), scope)
    scope["test_my_policy"]()  # type: ignore[operator]


def test_the_page_on_testing_counts_right():
    assert f"has {len(FAULTS)} of them" in TESTING.read_text()
