"""Tables of policies and costs, as text of a given width."""

import pytest
import yaml
from rich.console import Console, RenderableType

import memkit
from memkit import viz
from memkit.catalog import policy_header
from memkit.costing import cost
from memkit.viz.costs import table
from memkit.viz.policies import declaration, details, growth, listing


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_costs_fit_a_terminal_uncut():
    costs = [entry for name in memkit.policy_names() for entry in cost(name, [4096, 1_000_000])]
    text = printed(table(costs))
    assert "…" not in text
    assert text.count("full ") == 4
    lines = [line for line in printed(table([cost("full", 1_000_000)])).splitlines() if line.startswith(" full")]
    costs, held = (line.split() for line in lines)
    assert costs == ["full", "0", "1,000,000", "4.10", "GB", "1.02", "P", "2.05", "G", "N^2.00"]
    assert held == ["full", "1,000,000", "4.10", "GB", "4.35", "GB", "4.35", "GB", "1.06"]


@pytest.mark.parametrize("name", memkit.policy_names())
def test_details_fit_a_terminal_uncut(name: str):
    text = printed(details(memkit.load_policy(name), policy_header(name)))
    assert "…" not in text.replace("token 0 …", "")
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


@pytest.mark.parametrize("name", memkit.policy_names())
def test_declarations_load_to_the_same_policy(name: str):
    spec = memkit.load_policy(name)
    assert memkit.PolicySpec(**yaml.safe_load(declaration(spec).plain)) == spec


def test_declarations_leave_defaults_out():
    assert declaration(memkit.PolicySpec()).plain.splitlines() == [
        "chunker: {kind: fixed}",
        "window: {kind: all}",
        "growth: {kind: none}",
        "admission: {kind: novelty}",
        "routing: {kind: nearest}",
        "merging: {kind: mean}",
        "rotary: {kind: keep}",
    ]


def test_growth_in_a_word():
    said = {name: growth(memkit.load_policy(name)) for name in memkit.policy_names()}
    assert said["full"] == "none"
    assert said["kvm-sqrt-16"] == "sqrt factor=16"
    assert said["kvm-log-256"] == "log per_doubling=256 start=256"
    assert said["kvm-power-075"] == "power factor=1 exponent=0.75"


def test_details_say_what_must_be_learned():
    assert "must have learned merge weights, a memory-key LayerNorm and query scales." in printed(
        details(memkit.load_policy("kvm-sqrt-16"), ""), width=120
    )
    assert "Nothing is learned." in printed(details(memkit.load_policy("untrained-kvm-log"), ""))


def test_listing_wraps_prose_and_no_name():
    text = printed(listing((memkit.load_policy(name), policy_header(name)) for name in memkit.policy_names()))
    assert [name for name in memkit.policy_names() if f" {name} " not in text] == []
    assert "…" not in text


def test_what_is_no_terminal_is_wide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    viz.show("x" * 150)
    assert capsys.readouterr().out == "x" * 150 + "\n"
    monkeypatch.setenv("COLUMNS", "100")
    viz.show("x" * 150)
    assert capsys.readouterr().out == "x" * 100 + "\n" + "x" * 50 + "\n"
