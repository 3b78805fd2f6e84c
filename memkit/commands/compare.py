"""`memkit compare` and `memkit report`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from memkit.commands.options import (
    DarkOption,
    ImportOption,
    PlotOption,
    SetOption,
    check_plot,
    check_writable,
    choice,
    parse_overrides,
    plot_to,
    write,
    write_and_show,
)
from memkit.errors import InputError, short

__all__ = ["compare", "report"]


def compare(
    policies: Annotated[
        list[str] | None, typer.Argument(metavar="POLICY", help="Names or YAML files; left out: `make compare`'s.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A Hugging Face folder, a GGUF file, or a trained memkit model; left out: SmolLM2-135M-Instruct.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 text; left out: the topics of Python's own help.")
    ] = None,
    second: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Another text, for its loss alone; without --text: IDLE's old news."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens to read; left out: 4,096, or 2,304 with --prefill full.")
    ] = None,
    skip: Annotated[
        int | None, typer.Option(metavar="N", help="First token whose loss counts; left out: 1,024, or 2,048.")
    ] = None,
    prefill: Annotated[
        str, typer.Option(help="policy; or full: what is skipped is read exactly, and then compressed at once.")
    ] = "policy",
    rows: Annotated[
        int | None, typer.Option(metavar="N", help="Slots and window of each head, for policies with a number of them.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(metavar="S", help="With --prefill full: that share of the prompt's tokens instead of --rows."),
    ] = None,
    bytes: Annotated[
        int | None, typer.Option(metavar="N", help="As many rows as take so many bytes, instead of --rows.")
    ] = None,
    passkey: Annotated[
        bool, typer.Option("--passkey", help="Hide a number in the text (2,048 tokens by default), and ask for it.")
    ] = False,
    placements: Annotated[
        int | None, typer.Option(metavar="N", help="With --passkey: depths at which it is hidden; left out: 8.")
    ] = None,
    mentions: Annotated[
        int | None, typer.Option(metavar="N", help="With --passkey: how often it is said, 1 or 2; left out: 2.")
    ] = None,
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Also write the results to a JSON file.")
    ] = None,
    plot: PlotOption = None,
    dark: DarkOption = False,
) -> None:
    """Let a language model read a text under several policies.

    What each costs, and how well the model then predicts, measured in one run.
    """
    overrides = parse_overrides(changes)
    check_writable("--json", json_file)
    check_plot(plot)
    from memkit import comparison
    from memkit.lm import is_model
    from memkit.viz.comparison import figure, progress_bar

    reading = choice("--prefill", prefill, "policy", "full")
    if placements is not None and not passkey:
        raise InputError("--placements says where --passkey hides a number; give --passkey too, or leave it out")
    if mentions is not None and not passkey:
        raise InputError("--mentions says how often --passkey says a number; give --passkey too, or leave it out")
    chosen: list[str] | None = policies or list(comparison.DEFAULT_POLICIES)
    run: Callable[..., Any] = comparison.compare
    given: dict[str, Any] = {"model": model, "text": text, "overrides": overrides}
    of_stock: dict[str, Any] = {"prefill": reading, "rows": rows, "share": share, "bytes": bytes}
    if model is not None and is_model(model):
        budgets = {"--rows": rows, "--share": share, "--bytes": bytes}
        _check_trained(
            model, {"--second": second, "--prefill full": reading == "full", **budgets, "--passkey": passkey}
        )
        from memkit.trained import compare_trained as run

        given |= {name: each for name, each in (("tokens", tokens), ("skip", skip)) if each is not None}
        chosen = policies  # besides its own; left out, the two that it takes itself
    elif passkey:
        if second is not None or skip is not None:
            raise InputError("--passkey scores a hidden number alone; leave --second and --skip out")
        from memkit.passkey import ASKED_POLICIES
        from memkit.passkey import find_passkeys as run
        from memkit.viz.passkeys import figure

        chosen = policies or list(ASKED_POLICIES)
        hidden = (("tokens", tokens, 2048), ("placements", placements, 8), ("mentions", mentions, 2))
        given |= {name: usual if each is None else each for name, each, usual in hidden} | of_stock
    else:
        given |= {"second": second, "tokens": tokens, "skip": skip} | of_stock
    measured = len(chosen) if chosen else 3
    with progress_bar(measured) if sys.stderr.isatty() else nullcontext() as progress:
        result = run(policies=chosen, progress=progress, **given)
    write_and_show(json_file, result.to_json() + "\n", result.table())
    plot_to(plot, dark, figure, result)


def _check_trained(model: str, options: dict[str, Any]) -> None:
    """Raise where an option is given that a trained memkit model has no use for."""
    for option, each in options.items():
        if each is not None and each is not False:
            raise InputError(f"{option} is for stock models, got {short(model)}; leave it out")


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The HTML file to write.")],
    policies: Annotated[
        list[str] | None, typer.Argument(metavar="POLICY", help="Names or YAML files; left out: `make compare`'s.")
    ] = None,
    comparison_file: Annotated[
        Path | None,
        typer.Option("--comparison", metavar="FILE", help="What compare --json wrote; left out: it is measured now."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A Hugging Face folder or a GGUF file; left out: SmolLM2-135M-Instruct."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 text; left out: the topics of Python's own help.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens to read; left out: 4,096.")] = None,
    skip: Annotated[
        int | None, typer.Option(metavar="N", help="First token whose loss counts; left out: 1,024.")
    ] = None,
    title: Annotated[str, typer.Option(help="What the page is called.")] = "Memory policies compared",
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
) -> None:
    """Write a comparison as one page: a table that sorts, figures, settings, how to run it again.

    The page is a single file that loads nothing. With --comparison nothing runs.
    """
    check_writable("OUT", out)
    from memkit import comparison
    from memkit.viz import style
    from memkit.viz.comparison import progress_bar

    style.check_installed()
    if comparison_file is not None:
        if policies or changes or any(given is not None for given in (model, text, tokens, skip)):
            raise InputError("--comparison is measured already; leave policies and the options of measuring out")
        from memkit.texts import read_text

        compared = comparison.Comparison.from_json(read_text(comparison_file))
    else:
        chosen = policies or list(comparison.DEFAULT_POLICIES)
        with progress_bar(len(chosen)) if sys.stderr.isatty() else nullcontext() as progress:
            compared = comparison.compare(
                chosen,
                model=model,
                text=text,
                tokens=tokens,
                skip=skip,
                overrides=parse_overrides(changes),
                progress=progress,
            )
    from memkit.viz.report import page

    write(out, page(compared, title))
    typer.echo(f"{out}: {len(compared.policies)} policies")
