"""Models in words, by `memkit list` and `memkit show`."""

import pytest
from typer.testing import CliRunner

from memkit import model_names
from memkit.cli import app


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_names_every_model():
    lines = run("list").splitlines()
    for name in model_names():
        assert any(line.split()[:1] == [name] for line in lines), name


@pytest.mark.parametrize("name", model_names())
def test_show_tells_what_a_model_is(name):
    text = run("show", name)
    assert text.startswith(name)
    for said in ("parameters: vocabulary", "layers:", "4k", "16k", "64k", "256k", "1M"):
        assert said in text


def test_show_a_hybrid():
    text = run("show", "kvm-rwkv7-120m")
    assert "165,315,144 parameters" in text
    assert "rwkv7: 0, 2, 4, 6, 8, 10" in text
    assert "kvm-sqrt-16: 1, 3, 5, 7, 9, 11" in text


def test_show_takes_changes_and_files(tmp_path):
    assert "6 layers" in run("show", "tiny-full", "--set", "depth=6")
    path = tmp_path / "mine.yaml"
    path.write_text("vocabulary: 9\nwidth: 8\ndepth: 1\nheads: 2\nlayers: {default: {kind: attention, policy: full}}\n")
    assert run("show", str(path)).startswith("mine")
