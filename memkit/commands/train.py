"""`memkit train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from memkit.commands.options import ImportOption, SetOption, parse_overrides
from memkit.errors import InputError

__all__ = ["train"]


def train(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A shipped model's name, a YAML file, or a folder; before the texts.")
    ],
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="More texts, as in --text *.txt.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A UTF-8 text, or the word default (Python's own help); may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder to write to; a run in it is gone on with. Left out: runs/MODEL."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Instead of text: a task's kind, as mqar, or a YAML file that declares one.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A Hugging Face tokenizer's folder; left out: bytes.")
    ] = None,
    from_weights: Annotated[
        bool, typer.Option("--from-weights", help="Begin with the weights beside MODEL; else initialise.")
    ] = False,
    settings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Training settings as YAML; the options below override it.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimiser steps; left out: 800.")] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences per step and process; left out: 16.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(metavar="N", help="Batches per step; left out: 1.")] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a sequence of text; left out: 512.")
    ] = None,
    sequences: Annotated[str | None, typer.Option(help="packed (the default), or documents: none spans files.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; left out: 0.003.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine (the default), linear or constant.")] = None,
    warmup: Annotated[int | None, typer.Option(metavar="N", help="Steps of warm-up; left out: 100.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16 or float16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Left out: 0.")] = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between checkpoints; left out: 200.")
    ] = None,
    log_every: Annotated[int | None, typer.Option(metavar="N", help="Steps per line of the log; left out: 10.")] = None,
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
) -> None:
    """Train a model on text or on a task.

    Run it again to go on after a stop or a kill: the loss curve is the one it would have been. On several processes:
    accelerate launch -m memkit train …
    """
    fields = {
        "steps": steps, "batch": batch, "accumulate": accumulate, "length": length, "sequences": sequences,
        "learning_rate": learning_rate, "schedule": schedule, "warmup": warmup, "precision": precision, "seed": seed,
        "save_every": save_every, "log_every": log_every,
    }  # fmt: skip
    overrides = parse_overrides(changes)
    if more and not text:
        raise InputError(f"texts are given with --text, got {more[0]} without it; write --text {more[0]}")
    try:
        from memkit import training
        from memkit.training.run import first_process
    except ImportError as error:
        raise InputError(
            f"memkit train needs transformers and accelerate, got: {error}; pip install 'memkit-attention[train]'"
        ) from None
    given = {name: value for name, value in fields.items() if value is not None}
    trained = training.train(
        model,
        folder_of(model) if out is None else out,
        text=[*(text or ()), *(more or ())],
        task=None if task is None else declared(task),
        settings=training.load_settings(settings, given),
        overrides=overrides,
        tokenizer=tokenizer,
        from_weights=from_weights,
        progress=sys.stderr.isatty(),
    )
    if not first_process():
        return
    step, loss = trained.losses[-1]
    began = f", gone on from step {trained.resumed}" if trained.resumed else ""
    typer.echo(f"{trained.folder}: {trained.model.parameter_count:,} parameters, loss {loss:.4f} at step {step}{began}")


def folder_of(model: str) -> Path:
    """Where a run of this model is written to: runs/, and the model's name."""
    folder = Path("runs") / Path(model).resolve().name.removesuffix(".yml").removesuffix(".yaml")
    if folder.resolve() == Path(model).resolve():
        raise InputError(f"{folder}: is the model itself; say with --out where to write to")
    return folder


def declared(task: str) -> Any:
    """A task as the command line has it: a kind, or a YAML file."""
    from memkit import yaml12

    if task.endswith((".yaml", ".yml")) or "/" in task:
        return yaml12.read(Path(task), InputError)
    return {"kind": task}
