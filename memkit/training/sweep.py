"""Many runs of one task: policies × learning rates × seeds, each judged alike; on the cores there are, resumable."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationInfo, field_validator

from memkit import yaml12
from memkit.catalog import load_policy
from memkit.errors import InputError, MemkitError
from memkit.evals import TaskSpec, evaluate
from memkit.evals.evaluator import JUDGING_SEED
from memkit.lm import load_model_spec, with_policy
from memkit.pieces.registry import AnyOf, NamedSpec, SpecError
from memkit.training.run import CHECKPOINT, train
from memkit.training.settings import TrainingSpec
from memkit.whole import whole_number

__all__ = ["Point", "Row", "Sweep", "SweepSpec", "load_sweep", "run_folder", "sweep"]

RESULT = "result.json"
TABLE = "sweep.csv"
VALIDATION_SEED = JUDGING_SEED + 1
"""The stream by which learning rates are chosen; results are of another."""


class SweepSpec(NamedSpec):
    """A sweep. All runs have equal data, steps and sizes; policies alone differ, in memory and in what they learn."""

    model: str = Field(description="a shipped model's name, or a file; its policies are replaced")
    overrides: dict[str, Any] = Field(default_factory=dict, description="fields of the model to change")
    task: Annotated[TaskSpec, AnyOf("task")] = Field(description="what is trained on and judged by")
    policies: dict[str, Any] = Field(
        min_length=1, description="label → a policy's name or file, or {from: NAME, field: value, …}"
    )
    learning_rates: tuple[float, ...] = Field(default=(1e-3, 3e-3, 1e-2), min_length=1, description="best of these")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="of initialisation and data")
    settings: TrainingSpec = Field(default=TrainingSpec(), description="the others of the training's settings")
    sequences: int = Field(default=128, ge=2, le=2**20, description="sequences of each of the task's settings, judged")

    @field_validator("learning_rates", "seeds", mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @field_validator("settings", mode="before")
    @classmethod
    def _from_mapping(cls, given: Any) -> Any:
        return TrainingSpec(**given) if isinstance(given, Mapping) else given

    @field_validator("learning_rates", "seeds")
    @classmethod
    def _trainable(cls, given: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        name = "learning_rate" if info.field_name == "learning_rates" else "seed"
        for each in given:
            try:
                TrainingSpec(**{name: each})
            except SpecError as error:
                raise ValueError(str(error).removeprefix(f"{name}: ")) from None
        if len(set(given)) < len(given):
            raise ValueError(f"must all differ, got {list(given)}: a run that is there twice adds no spread")
        return given

    @field_validator("settings")
    @classmethod
    def _one_place_each(cls, given: TrainingSpec) -> TrainingSpec:
        for name, whole in (("learning_rate", "learning_rates"), ("seed", "seeds")):
            if getattr(given, name) != TrainingSpec.model_fields[name].default:
                raise ValueError(f"{name} has no effect here; say {whole} instead, beside settings")
        return given

    @field_validator("policies")
    @classmethod
    def _known(cls, given: dict[str, Any]) -> dict[str, Any]:
        for label, policy in given.items():
            if not re.fullmatch(r"[\w.+-]+", label):
                raise ValueError(f"labels are names of folders, letters, digits and . + - _ alone, got {label!r}")
            try:
                policy_of(policy)
            except MemkitError as error:
                raise ValueError(f"{label}: {error}") from None
        return given


@dataclass(frozen=True)
class Row:
    """One run on one setting of the task.

    policy: its label. validation: mean accuracy over all settings on the stream by which learning rates are chosen;
    accuracy, error, exact, nats, bytes: as in `memkit.evals.Score`. seconds: of the training.
    """

    policy: str
    learning_rate: float
    seed: int
    setting: str
    accuracy: float
    error: float
    exact: float
    nats: float
    bytes: int
    validation: float
    steps: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """One policy: bytes that a sequence's memory holds, accuracy (mean over seeds, standard deviation, each seed's).

    learning_rate: the one that was best.
    """

    policy: str
    bytes: int
    accuracy: float
    spread: float
    each: tuple[float, ...]
    learning_rate: float


@dataclass(frozen=True)
class Sweep:
    """All runs, and where they lie."""

    folder: Path
    rows: tuple[Row, ...]

    def points(self, setting: str | None = None) -> list[Point]:
        """Each policy at its best learning rate: mean and spread over seeds. setting: None: the last, the hardest.

        The best learning rate is the one with the highest mean of `validation` over seeds.
        """
        setting = self.rows[-1].setting if setting is None else setting
        made: list[Point] = []
        for policy in dict.fromkeys(row.policy for row in self.rows):
            mine = [row for row in self.rows if row.policy == policy and row.setting == setting]
            rates = {row.learning_rate for row in mine}
            by_rate = {
                rate: statistics.mean(row.validation for row in mine if row.learning_rate == rate) for rate in rates
            }
            best = max(sorted(rates), key=lambda rate: by_rate[rate])
            chosen = [row for row in mine if row.learning_rate == best]
            accuracies = [row.accuracy for row in chosen]
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            made.append(Point(policy, chosen[0].bytes, statistics.mean(accuracies), spread, tuple(accuracies), best))
        return made

    def to_csv(self) -> str:
        """One line per run and setting, with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class _Cell:
    """One run of a sweep, as plain data that another process can take."""

    spec: dict[str, Any]
    folder: str
    policy: str
    learning_rate: float
    seed: int


def load_sweep(file: str | Path) -> SweepSpec:
    """A sweep's declaration. Raises `InputError`: file, field, what is allowed."""
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a sweep's YAML")
    data = yaml12.read(path, InputError)
    if not isinstance(data, dict):
        raise InputError(f"{path}: a sweep is a mapping of fields, got {type(data).__name__}")
    try:
        return SweepSpec(**data).named(path.stem)
    except SpecError as error:
        raise InputError(f"{path}: {error}") from None


def sweep(
    declared: str | Path | SweepSpec,
    out: str | Path,
    *,
    jobs: int | None = None,
    modules: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> Sweep:
    """Train and judge every combination, and write `sweep.csv`; what is there already is not done again.

    Args:
        declared: a SweepSpec, or its file.
        out: a folder; each run has one of its own in it, and goes on where it stopped.
        jobs: processes, of one thread each; None: as many as this process may use cores.
        modules: Python modules that register pieces of one's own; each process imports them.
        progress: called with (runs done, runs in all, the run's name).

    Raises `InputError`, and what `train` raises.
    """
    _import(tuple(modules))
    spec = declared if isinstance(declared, SweepSpec) else load_sweep(declared)
    jobs = _cores() if jobs is None else whole_number("jobs", jobs, 1, 4096)
    folder = Path(out)
    for policy in spec.policies.values():  # before anything runs
        with_policy(load_model_spec(spec.model, spec.overrides), policy_of(policy))
    cells = list(_cells(spec, folder))
    waiting = [cell for cell in cells if not (Path(cell.folder) / RESULT).is_file()]
    done = len(cells) - len(waiting)
    if len(waiting) > 1 and jobs > 1:
        context, count = get_context("spawn"), min(jobs, len(waiting))
        with ProcessPoolExecutor(count, context, initializer=_import, initargs=(tuple(modules),)) as pool:
            futures = {pool.submit(_run, cell): cell for cell in waiting}
            for future in as_completed(futures):
                future.result()
                done += 1
                _say(progress, done, len(cells), futures[future])
    else:
        for cell in waiting:
            _run(cell)
            done += 1
            _say(progress, done, len(cells), cell)
    found = Sweep(folder, tuple(row for cell in cells for row in _rows(cell)))
    (folder / TABLE).write_text(found.to_csv(), encoding="utf-8")
    return found


def policy_of(given: Any) -> Any:
    """A policy as a sweep has it: a name, a file, or {from: NAME, field: value}."""
    if isinstance(given, Mapping):
        if "from" not in given:
            raise InputError(f"a policy with changes says from which, as in {{from: kvm-sqrt-16}}, got {dict(given)}")
        return load_policy(given["from"], {name: value for name, value in given.items() if name != "from"})
    return load_policy(given)


def run_folder(folder: Path, policy: str, learning_rate: float, seed: int) -> Path:
    """Where a sweep in `folder` keeps one run: its model, and what was found."""
    return folder / "runs" / f"{policy}-lr{learning_rate:g}-seed{seed}"


def _cells(spec: SweepSpec, folder: Path) -> Iterator[_Cell]:
    data = spec.model_dump(mode="json")
    for policy in spec.policies:
        for rate in spec.learning_rates:
            for seed in spec.seeds:
                yield _Cell(data, str(run_folder(folder, policy, rate, seed)), policy, rate, seed)


def _import(modules: tuple[str, ...]) -> None:
    """Import what registers pieces of one's own, in this process."""
    for name in modules:
        importlib.import_module(name)


def _run(cell: _Cell) -> None:
    """Train one model, judge it, and write down what was found; checkpoints then go."""
    torch.set_num_threads(1)
    spec, folder = SweepSpec(**cell.spec), Path(cell.folder)
    model = with_policy(load_model_spec(spec.model, spec.overrides), policy_of(spec.policies[cell.policy]))
    settings = spec.settings.model_copy(update={"learning_rate": cell.learning_rate, "seed": cell.seed})
    begun = time.perf_counter()
    trained = train(model, folder, task=spec.task, settings=settings)
    seconds = time.perf_counter() - begun
    validated = evaluate(trained.model, spec.task, sequences=spec.sequences, seed=VALIDATION_SEED)
    judged = evaluate(trained.model, spec.task, sequences=spec.sequences)
    result = {
        "parameters": trained.model.parameter_count,
        "seconds": seconds,
        "validation": statistics.mean(score.accuracy for score in validated.scores),
        "scores": [asdict(score) for score in judged.scores],
        "settings": settings.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "task": spec.task.model_dump(mode="json"),
        "sequences": spec.sequences,
    }
    temporary = folder / f"{RESULT}.part"
    temporary.write_text(json.dumps(result, indent=2), encoding="utf-8")
    temporary.replace(folder / RESULT)
    for path in folder.iterdir():
        if CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path)


def _rows(cell: _Cell) -> Iterator[Row]:
    """A run's lines. Raises `InputError` where what lies there is of another sweep."""
    path = Path(cell.folder) / RESULT
    found, spec = json.loads(path.read_text(encoding="utf-8")), SweepSpec(**cell.spec)
    model = with_policy(load_model_spec(spec.model, spec.overrides), policy_of(spec.policies[cell.policy]))
    settings = spec.settings.model_copy(update={"learning_rate": cell.learning_rate, "seed": cell.seed})
    wanted = {
        "settings": settings.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "task": spec.task.model_dump(mode="json"),
        "sequences": spec.sequences,
    }
    for name, value in wanted.items():
        if found.get(name) != json.loads(json.dumps(value)):
            raise InputError(f"{path}: is of a sweep with another {name}; name another folder, or remove this one")
    for score in found["scores"]:
        kept = {name: score[name] for name in ("setting", "accuracy", "error", "exact", "nats", "bytes")}
        yield Row(
            policy=cell.policy,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            validation=found["validation"],
            steps=settings.steps,
            parameters=found["parameters"],
            seconds=found["seconds"],
            **kept,
        )


def _say(progress: Callable[[int, int, str], None] | None, done: int, every: int, cell: _Cell) -> None:
    if progress is not None:
        progress(done, every, Path(cell.folder).name)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
