"""`memkit list` and `memkit show`."""

from __future__ import annotations

from typing import Annotated

import typer

from memkit.catalog import load_policy, policy_header, policy_names
from memkit.commands.options import (
    DarkOption,
    ImportOption,
    PlotOption,
    SetOption,
    check_plot,
    parse_overrides,
    plot_to,
)

__all__ = ["list_shipped", "show"]


def list_shipped() -> None:
    """List the shipped policies and models.

    How each policy grows, how many parameters each model has, and what it is.
    """
    from memkit import viz
    from memkit.lm import load_model_spec, model_header, model_names
    from memkit.viz import models, policies

    viz.show(
        policies.listing((load_policy(name), policy_header(name)) for name in policy_names()),
        models.listing((load_model_spec(name), model_header(name)) for name in model_names()),
    )


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped policy or model, or a YAML file.")],
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
    plot: PlotOption = None,
    dark: DarkOption = False,
) -> None:
    """Show one policy or model.

    A policy: what it is, its declaration, its growth from 1k to 1M tokens, and who sees what.
    A model: what it is, its parameters, its layers, and its memory from 4k to 1M tokens.
    """
    from memkit import viz
    from memkit.lm import is_model, load_model_spec, model_header
    from memkit.viz import models, policies

    check_plot(plot)
    if is_model(name):
        model = load_model_spec(name, parse_overrides(changes))
        viz.show(models.details(model, model_header(name)))
        plot_to(plot, dark, models.figure, model)
    else:
        policy = load_policy(name, parse_overrides(changes))
        viz.show(policies.details(policy, policy_header(name)))
        plot_to(plot, dark, policies.figure, policy)
