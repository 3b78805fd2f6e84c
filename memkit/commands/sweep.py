"""`memkit sweep`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memkit.commands.options import ImportOption
from memkit.errors import InputError

__all__ = ["sweep"]


def sweep(
    declared: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep's YAML; sweeps/ has examples.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write to; what is in it is not done again.")],
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Processes of one thread each; left out: a core each.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to draw accuracy against bytes; left out: DIR/sweep.png.")
    ] = None,
    modules: ImportOption = [],  # noqa: B006
) -> None:
    """Train and judge policies × learning rates × seeds on one task.

    Run it again to go on after a stop. Writes sweep.csv, one line per run and setting, and a figure.
    """
    try:
        from memkit import training
    except ImportError as error:
        raise InputError(
            f"memkit sweep needs transformers and accelerate, got: {error}; pip install 'memkit-attention[train]'"
        ) from None
    from memkit.viz import figures, style

    drawing = out / "sweep.png" if figure is None else figure
    style.check_ending("--figure", drawing)
    style.check_installed()

    def say(done: int, every: int, name: str) -> None:
        if sys.stderr.isatty():
            typer.echo(f"{done}/{every} {name}", err=True)

    found = training.sweep(declared, out, jobs=jobs, modules=modules, progress=say)
    points = found.points()
    setting = found.rows[-1].setting
    held = [(point.policy, point.bytes, point.accuracy) for point in points]
    with style.theme():
        (axes,), whole = style.panels(1)
        figures.accuracy(held, axes, what=f"accuracy at {setting}, %", spreads=[point.spread for point in points])
        style.save(whole, drawing)
    width = max(len(point.policy) for point in points)
    typer.echo(f"{'policy':{width}}  {'kB held':>8}  accuracy at {setting} (mean ± standard deviation over seeds)")
    for point in sorted(points, key=lambda each: each.bytes):
        seeds = ", ".join(f"{each:.2f}" for each in point.each)
        typer.echo(
            f"{point.policy:{width}}  {point.bytes / 1e3:8.1f}  {point.accuracy:.3f} ± {point.spread:.3f}  "
            f"({seeds}) at learning rate {point.learning_rate:g}"
        )
    typer.echo(f"{out / 'sweep.csv'}: {len(found.rows)} lines")
