"""The page of a comparison: in a browser it sorts, logs no error, and asks nobody for anything."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memkit import comparison, passkey
from memkit.cli import app
from memkit.comparison import Comparison
from memkit.errors import InputError
from memkit.passkey import Passkeys, Retrieval
from memkit.viz.report import page
from tests.viz.test_html import full_comparison

# Clicks on the head of the losses twice, and writes what it saw into the page.
PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
document.addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
const names = () => [...document.querySelectorAll("tbody tr")].map(row => row.cells[0].textContent);
addEventListener("load", () => {
  const before = names(), head = document.querySelectorAll("th")[4].querySelector("button");
  head.click(); const up = names(); head.click(); const down = names();
  const asked = performance.getEntriesByType("resource")
    .map(entry => entry.name).filter(name => !name.startsWith("data:"));
  const pictures = [...document.images].map(image => image.naturalWidth);
  const seen = document.createElement("pre");
  seen.id = "seen"; seen.textContent = JSON.stringify({before, up, down, asked, errors, pictures});
  document.body.append(seen);
});
</script>
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "comparison.json").write_text(full_comparison().to_json(), encoding="utf-8")
    done = CliRunner().invoke(
        app, ["report", str(folder / "out.html"), "--comparison", str(folder / "comparison.json"), "--title", "A & B"]
    )
    assert done.exit_code == 0, done.output
    return folder / "out.html"


def test_the_page_stands_by_itself(written: Path):
    page = written.read_text(encoding="utf-8")
    assert "<title>A &amp; B</title>" in page
    for outside in re.findall(r"(?:src|href)=['\"]([^'\"]*)", page):
        assert outside.startswith("data:")
    assert "http://" not in re.sub(r"base64,[^']*", "", page)
    assert all(entry.policy in page for entry in full_comparison().policies)
    assert "memkit compare streaming-4-512 full h2o-512 caote-512 block-mean-8 --model" in page
    assert "<b>tiny</b>" not in page


def test_in_a_browser_it_sorts_and_asks_for_nothing(written: Path, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("there is no chromium here; apt-get install chromium")
    probed = tmp_path / "probed.html"
    probed.write_text(written.read_text(encoding="utf-8").replace("<body>", "<body>" + PROBE), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(unescape(found[1]))
    by_loss = [entry.policy for entry in sorted(full_comparison().policies, key=lambda entry: entry.loss)]
    assert seen["before"] == ["streaming-4-512", "full", "caote-512", "h2o-512", "block-mean-8"]
    assert seen["up"] == by_loss
    assert seen["down"] == by_loss[::-1]
    assert seen["errors"] == seen["asked"] == []
    assert len(seen["pictures"]) == 4
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_a_comparison_comes_back_from_its_json():
    assert Comparison.from_json(full_comparison().to_json()) == full_comparison()
    for text in ("", "[]", "{}", '{"settings": {}, "policies": []}', '{"settings": {}, "policies": [{"x": 1}]}'):
        with pytest.raises(InputError, match="a comparison must be the JSON that memkit compare --json writes"):
            Comparison.from_json(text)


def again(labels: tuple[str, ...], **settings: object) -> str:
    """The command by which the page of such a comparison says to measure it again."""
    known = full_comparison()
    policies = tuple(replace(known.policies[0], policy=label) for label in labels)
    found = re.search(
        r"\nmemkit compare (.*) --json comparison.json\n", page(Comparison(known.settings | settings, policies))
    )
    assert found is not None
    return unescape(found[1])


def test_the_command_that_measures_it_again_is_one_that_can_be_run():
    stock = {"model": "SmolLM2-135M-Instruct.Q4_1", "text": "pydoc_data.topics of Python 3.11.7", "second_text": None}
    length = "--tokens 9 --skip 1"
    assert again(("full", "untrained-kvm-log", "full (2)"), **stock) == f"full untrained-kvm-log full {length}"
    assert again(("mine",), **stock | {"text": "my text.txt"}) == f"mine.yaml --text 'my text.txt' {length}"
    assert again(("full",), **stock | {"second_text": "IDLE's help, Python 3.11.7 (no …)"}) == f"full {length}"
    assert again(("full",), **stock | {"second_text": "IDLE's news to 2.7, Python 3.11.7 (no …)"}) == f"full {length}"
    assert again(("full",), **stock | {"second_text": "b.txt"}) == f"full --second b.txt {length}"
    changed = {"overrides": {"growth": {"kind": "none"}, "growth.cap": None}}
    assert again(("full",), **stock | changed) == f"full {length} --set 'growth={{kind: none}}' --set growth.cap=null"
    trained = {"model": "tiny-kvm-sqrt", "text": "IDLE's help, Python 3.11.7", "second_text": None}
    assert again(("as trained", "slots deleted", "full"), **trained) == f"--model tiny-kvm-sqrt {length}"
    assert again(("as trained", "ovq-1024"), **trained) == f"ovq-1024 --model tiny-kvm-sqrt {length}"


def test_what_a_page_cannot_be_made_of_is_refused():
    whole = full_comparison().to_dict()
    for name in ("versions", "scored"):
        cut = {**whole, "settings": {key: value for key, value in whole["settings"].items() if key != name}}
        with pytest.raises(InputError, match=f"got KeyError: '{name}'"):
            Comparison.from_json(json.dumps(cut))
    with pytest.raises(InputError, match="got ValueError: no policies"):
        Comparison.from_json(json.dumps({**whole, "policies": []}))


def test_what_is_measured_already_is_not_measured_again(written: Path):
    given = ["report", str(written), "--comparison", str(written.with_name("comparison.json"))]
    done = CliRunner().invoke(app, [*given, "--tokens", "9"])
    assert done.exit_code == 2
    assert done.stderr.startswith("--comparison is measured already; leave policies")
    done = CliRunner().invoke(app, ["report", str(written), "--comparison", str(written)])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1


def test_compare_draws_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: full_comparison())
    found = Retrieval("full", 3, 4, 0.5, 0.1, 10**7, ())
    hidden = Passkeys(
        {"placements": 4, "tokens": 9, "text": "t", "model": "m", "prefill": "policy", "rows": None, "seed": 0,
         "overrides": {}},
        (found,),
    )  # fmt: skip
    monkeypatch.setattr(passkey, "find_passkeys", lambda *_, **__: hidden)
    for name, options in {"front.png": [], "dark.svg": ["--dark"], "found.pdf": ["--passkey"]}.items():
        done = CliRunner().invoke(app, ["compare", "full", *options, "--plot", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        assert (tmp_path / name).stat().st_size > 1000
    assert "#14161a" in (tmp_path / "dark.svg").read_text(encoding="utf-8")
