"""`memkit profile`."""

from __future__ import annotations

import platform
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from memkit.commands.options import check_writable, write_and_show

__all__ = ["profile"]

DOCUMENTS = 4
"""Parts of the default text on which a profile is measured."""


def profile(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A Hugging Face folder or a GGUF file; left out: SmolLM2-135M-Instruct."),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="A UTF-8 text; repeat it. Left out: four parts of Python's help."),
    ] = None,
    tokens: Annotated[
        list[int],
        typer.Option(
            metavar="N",
            help="Tokens read of each text, about as many as the memory is for; repeat it: ratios are the mean. "
            "repeat and mixed need twice as many positions.",
        ),
    ] = [2048],  # noqa: B006
    readers: Annotated[
        str,
        typer.Option(
            help="Who says what rows are worth: next, who goes on; repeat, who reads again; mixed; asked, who answers "
            "questions about hidden facts."
        ),
    ] = "next",
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate", help="Weigh errors by what the loss rises by with one head blind: a reading more per head."
        ),
    ] = False,
    beside: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another profile of the model: take the mean of both.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the profile, as YAML.")] = None,
) -> None:
    """Measure how many slots each layer and head of a model needs.

    Policies use it by `heads: {profile: FILE}`. Minutes on a laptop for a small model.
    """
    check_writable("--out", out)
    from memkit.subject import check_stock_models

    check_stock_models()
    from memkit import hf, texts
    from memkit.hf.profiling import check_settings
    from memkit.viz.comparison import progress_bar
    from memkit.viz.profiles import table

    check_settings(tokens, readers, ablate=ablate, beside=beside)

    if files:
        documents, names = [texts.read_text(file) for file in files], [file.name for file in files]
    else:
        documents = texts.parts(texts.default_text(), DOCUMENTS)
        names = [f"pydoc_data.topics of Python {platform.python_version()}, part {part}" for part in range(DOCUMENTS)]
    with progress_bar(1) if sys.stderr.isatty() else nullcontext() as progress:
        loaded = hf.load(model)
        measured = hf.measure_profile(
            loaded,
            documents,
            tokens=tokens,
            names=names,
            readers=readers,  # type: ignore[arg-type]
            ablate=ablate,
            beside=beside,
            progress=progress,
        )
    shown = table(measured.profile, measured.stability if len(documents) > 1 else None)
    write_and_show(out, measured.profile.to_yaml(), shown)
