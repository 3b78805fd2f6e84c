"""`memkit cost`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from memkit.commands.options import (
    DarkOption,
    ImportOption,
    PlotOption,
    SetOption,
    check_plot,
    parse_overrides,
    plot_to,
)
from memkit.layers import as_layers

__all__ = ["cost"]


def cost(
    policies: Annotated[list[str], typer.Argument(metavar="POLICY", help="A shipped policy's name, or a YAML file.")],
    tokens: Annotated[
        list[int], typer.Option("--tokens", metavar="N", help="Tokens read; repeat it for several lengths.")
    ] = [4096, 65_536, 1_048_576],  # noqa: B006
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads; left out: as many as query heads.")] = None,
    head_width: Annotated[int, typer.Option(help="Channels of a key.")] = 64,
    value_width: Annotated[int | None, typer.Option(help="Channels of a value; left out: as a key.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    layers: Annotated[int, typer.Option(help="Layers.")] = 1,
    rows: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: PlotOption = None,
    dark: DarkOption = False,
) -> None:
    """Say what policies cost before anything runs.

    Slots, bytes, operations of a prefill and of one more token, and how the prefill grows.
    """
    from memkit import costing

    overrides = parse_overrides(changes)
    check_plot(plot)

    def costs_at(lengths: Sequence[int]) -> list[costing.Cost]:
        return [
            entry
            for policy in policies
            for entry in costing.cost(
                as_layers(policy, overrides),
                lengths,
                heads=heads,
                kv_heads=kv_heads,
                head_width=head_width,
                value_width=value_width,
                dtype=dtype,
                layers=layers,
                rows=rows,
            )
        ]

    costs = costs_at(tokens)
    if as_json:
        typer.echo(json.dumps([entry.to_dict() for entry in costs], indent=2, ensure_ascii=False))
    else:
        from memkit import viz
        from memkit.viz.costs import table

        viz.show(table(costs))
    if plot is not None:
        from memkit.viz.costs import DRAWN_LENGTHS, figure

        plot_to(plot, dark, figure, costs_at(DRAWN_LENGTHS))
