"""`memkit bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from memkit.catalog import load_policy, policy_names
from memkit.commands.options import (
    ImportOption,
    SetOption,
    check_plot,
    check_writable,
    parse_overrides,
    write_and_show,
)

__all__ = ["bench"]


def bench(
    policies: Annotated[
        list[str] | None, typer.Argument(metavar="POLICY", help="Names or YAML files; left out: every shipped one.")
    ] = None,
    tokens: Annotated[list[int], typer.Option(metavar="N", help="A length; may be repeated.")] = [4096],  # noqa: B006
    mode: Annotated[
        list[str], typer.Option(help="forward, train or decode; may be repeated; left out: all three.")
    ] = [],  # noqa: B006
    heads: Annotated[int, typer.Option(metavar="N", help="Query heads.")] = 6,
    kv_heads: Annotated[int | None, typer.Option(metavar="N", help="Key/value heads; left out: as many.")] = None,
    head_width: Annotated[int, typer.Option(metavar="N", help="Channels of a head.")] = 64,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows of the batch.")] = 1,
    repeats: Annotated[int, typer.Option(metavar="N", help="Timed repeats, of which the median counts.")] = 5,
    peak: Annotated[bool, typer.Option("--peak", help="Also measure the most memory of a training step.")] = False,
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the results to a JSON file.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(metavar="OUT", help="Also draw them to a PNG, SVG or PDF.")] = None,
) -> None:
    """Time policies against PyTorch's own fused attention.

    Prefill, training step and decoding, as factors measured in one run.
    """
    overrides = parse_overrides(changes)
    check_writable("--json", json_file)
    check_plot(figure, "--figure")
    from memkit import benchmark
    from memkit.viz.benchmark import save

    result = benchmark.bench(
        [load_policy(name, overrides) for name in policies or _read_once()],
        tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        rows=rows,
        modes=mode or benchmark.MODES,  # type: ignore[arg-type]
        repeats=repeats,
        peak=peak,
        progress=lambda line: typer.echo(line, err=True) if sys.stderr.isatty() else None,
    )
    write_and_show(json_file, result.to_json() + "\n", result.table())
    if figure is not None:
        save(result, figure)


def _read_once() -> list[str]:
    """The shipped policies whose calls are all that reading takes: a second reading is a model's, not `attend`'s."""
    return [name for name in policy_names() if not load_policy(name).observe.again]
