"""Sweeps: every combination once, nothing twice, and the best learning rate by what is not reported."""

import csv
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from memkit import InputError
from memkit.cli import app
from memkit.training import Sweep, SweepSpec, load_sweep, sweep
from memkit.training import sweep as sweep_function
from memkit.training.sweep import Row, _run

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": "tiny-full",
    "overrides": {"width": 32, "depth": 1, "heads": 2, "rotary.width": 8, "vocabulary": 64},
    "task": {"kind": "mqar", "vocabulary": 64, "settings": [{"tokens": 32, "pairs": 2}, {"tokens": 40, "pairs": 4}]},
    "policies": {"full": "full", "window-8": {"from": "window-512", "window.size": 8}},
    "learning_rates": [0.003],
    "seeds": [0, 1],
    "settings": {"steps": 2, "batch": 2, "warmup": 0, "log_every": 1},
    "sequences": 4,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(SweepSpec(**SMALL), tmp_path_factory.mktemp("sweep"), jobs=1)


def test_every_run_is_a_line_per_setting(done: Sweep):
    with (done.folder / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(each["policy"], each["seed"], each["setting"]) for each in lines] == [
        (policy, seed, setting)
        for policy in ("full", "window-8")
        for seed in ("0", "1")
        for setting in ("32 tokens, 2 pairs", "40 tokens, 4 pairs")
    ]
    assert len({each["parameters"] for each in lines}) == 1
    by_policy = {each["policy"]: int(each["bytes"]) for each in lines if each["setting"].startswith("40")}
    assert by_policy["full"] > 0
    assert not list(done.folder.glob("runs/*/checkpoint-*"))


def test_what_is_there_is_not_run_again(done: Sweep, monkeypatch: pytest.MonkeyPatch):
    def never(cell):
        raise AssertionError(f"{cell} was run again")

    monkeypatch.setitem(sweep_function.__globals__, "_run", never)
    assert sweep(SweepSpec(**SMALL), done.folder, jobs=1).rows == done.rows


def test_only_what_is_missing_is_run(done: Sweep, monkeypatch: pytest.MonkeyPatch):
    missing = next(done.folder.glob("runs/window-8-*-seed1")) / "result.json"
    kept = missing.read_text()
    missing.unlink()
    ran: list[str] = []

    def noting(cell):
        ran.append(cell.policy)
        _run(cell)

    monkeypatch.setitem(sweep_function.__globals__, "_run", noting)
    again = sweep(SweepSpec(**SMALL), done.folder, jobs=1)
    assert ran == ["window-8"]
    assert [row.accuracy for row in again.rows] == [row.accuracy for row in done.rows]
    missing.write_text(kept)


def test_results_of_another_sweep_are_refused(done: Sweep):
    with pytest.raises(InputError, match="is of a sweep with another sequences"):
        sweep(SweepSpec(**{**SMALL, "sequences": 5}), done.folder, jobs=1)


def row(rate: float, seed: int, validation: float, accuracy: float) -> Row:
    return Row("a", rate, seed, "hard", accuracy, 0.0, 0.0, 0.0, 100, validation, 1, 1, 0.0)


def test_the_learning_rate_is_chosen_by_validation_alone():
    rows = (row(0.1, 0, 0.2, 0.9), row(0.1, 1, 0.2, 0.9), row(0.2, 0, 0.3, 0.5), row(0.2, 1, 0.4, 0.7))
    (point,) = Sweep(Path(), rows).points()
    assert (point.learning_rate, point.each) == (0.2, (0.5, 0.7))
    assert point.accuracy == pytest.approx(0.6)
    assert point.spread == pytest.approx(0.02**0.5)


@pytest.mark.parametrize("file", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_sound(file: Path):
    spec = load_sweep(file)
    assert spec.name == file.stem
    assert len(spec.policies) >= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"polices": {}}, "polices: unknown field; did you mean 'policies'"),
        ({"policies": {"a b": "full"}}, "labels are names of folders"),
        ({"policies": {"a": "ful"}}, "a: unknown policy 'ful'"),
        ({"policies": {"a": {"window.size": 3}}}, "says from which"),
        ({"task": {"kind": "mqr"}}, "task.kind: unknown task kind 'mqr'"),
        ({"settings": {"stps": 3}}, "settings.stps: unknown field"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [-1]}, "seeds: must be greater than or equal to 0, got -1"),
        ({"seeds": [0, 1, 0]}, r"seeds: must all differ, got \[0, 1, 0\]"),
        ({"learning_rates": [-1]}, "learning_rates: must be greater than 0"),
        ({"learning_rates": [0.003, 0.003]}, "learning_rates: must all differ"),
        ({"settings": {"learning_rate": 0.5}}, "learning_rate has no effect here; say learning_rates instead"),
        ({"settings": {"seed": 3}}, "seed has no effect here; say seeds instead"),
    ],
)
def test_declarations_that_are_wrong(tmp_path: Path, change, message: str):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump({**SMALL, **change}))
    with pytest.raises(InputError, match=message) as caught:
        load_sweep(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_the_command_draws_and_says(done: Sweep, tmp_path: Path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(done.folder), "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "window-8" in result.stdout
    assert "sweep.csv: 8 lines" in result.stdout
    assert (done.folder / "sweep.png").stat().st_size > 5000


@pytest.mark.slow
def test_processes_side_by_side_find_the_same(done: Sweep, tmp_path: Path):
    again = sweep(SweepSpec(**SMALL), tmp_path / "two", jobs=2)
    assert [(row.accuracy, row.nats) for row in again.rows] == [(row.accuracy, row.nats) for row in done.rows]
