"""What notebooks show is what a terminal shows."""

import re
from html import unescape
from typing import Any

import pytest
import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

import memkit
from memkit.errors import InputError
from memkit.testing import examine
from memkit.viz import checks, costs, html, memories, models, plans, policies
from tests.viz.test_figures import comparison


def words(renderable) -> str:
    """What a terminal shows, word by word."""
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return " ".join(console.export_text().replace("─", " ").split())


def plain(page: str) -> list[str]:
    """What a page says, word by word, sorted."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub(r"</?(th|td|p|pre|tr|table|br)\b[^>]*>", " ", page)
    return sorted(unescape(re.sub(r"<[^>]*>", "", page)).split())


def shown(record: Any) -> str:
    """What a notebook asks for."""
    return record._repr_html_()


def memory() -> memkit.Memory:
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 700, 16)
    with torch.no_grad():
        return memkit.attend("ovq-1024", torch.randn(2, 4, 700, 16), keys, keys)[1]


SHOWN = {
    "policy": lambda: (memkit.load_policy("kvm-sqrt-16"), policies.details(memkit.load_policy("kvm-sqrt-16"), "")),
    "model": lambda: (memkit.load_model("tiny-window"), models.details(memkit.load_model("tiny-window").spec, "")),
    "cost": lambda: (memkit.cost("full", 4096), costs.table([memkit.cost("full", 4096)])),
    "comparison": lambda: (given := full_comparison(), given.table()),
    "plan": lambda: (given := memkit.plan("ovq-1024", torch.ones(2, 2, 900, 8)), plans.table(given)),
    "memory": lambda: (given := memory(), memories.table(given)),
    "report": lambda: (given := examine(memkit.load_policy("full"), 1), checks.report(given)),
}


def full_comparison() -> memkit.Comparison:
    settings = {
        "model": "<b>tiny</b>", "parameters": 10, "dtype": "float32", "tokens": 9, "scored": 8, "skip": 1, "text": "&",
        "machine": "m", "device": "cpu", "cores": 1, "threads": 1, "versions": {"torch": "2"}, "load_seconds": 1.0,
        "decoded": 1, "seed": 0, "overrides": {}, "context": None,
    }  # fmt: skip
    return memkit.Comparison(settings, comparison().policies)


@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_shows_what_a_terminal_shows(name: str):
    record, table = SHOWN[name]()
    page = shown(record)
    assert plain(page) == sorted(words(table).split())
    assert "<script" not in page
    assert "http" not in page
    assert page.count("<table") == page.count("</table>")


@pytest.mark.parametrize(
    ("device", "numba", "said"), [("cpu", {}, True), ("cpu", {"numba": "1"}, False), ("cuda", {}, False)]
)
def test_a_comparison_says_what_would_make_it_faster(device: str, numba: dict[str, str], said: bool):
    given = full_comparison()
    settings = {**given.settings, "device": device, "versions": {"torch": "2", **numba}}
    page = shown(memkit.Comparison(settings, given.policies))
    assert ("memkit-attention[fast]" in page) == said


def test_letters_that_mean_something_to_a_browser_are_escaped():
    page = shown(full_comparison())
    assert "<b>tiny</b>" not in page
    assert "&lt;b&gt;tiny&lt;/b&gt;" in page


def test_styles_are_classes_and_other_things_are_refused():
    text = Text("a b").append(" c", style="bold red")
    assert html.markup(Group(text)) == '<p>a b<span class="bold red"> c</span></p>'
    with pytest.raises(InputError, match="only texts, tables and groups have an HTML form, got Panel"):
        html.markup(Panel("x"))


def test_a_memory_that_is_gone_says_so():
    before = memory()
    key = torch.randn(2, 2, 1, 16)
    with torch.no_grad():
        memkit.attend("ovq-1024", torch.randn(2, 4, 1, 16), key, key, memory=before)
    assert "taken over by a later call" in shown(before)


def test_a_plan_of_many_chunks_is_cut():
    plan = memkit.plan("kvm-sqrt-16", torch.ones(1, 1, 256 * 22, 8))
    page = shown(plan)
    assert page.count("<tr>") == 1 + 11 + 1 + 1, "heads, the first chunks, a gap, the last"
    assert "…" in page
