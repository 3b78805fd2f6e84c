"""`memkit generate`."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from memkit.commands.models import tokenizer_of
from memkit.errors import InputError, short, shown

__all__ = ["generate"]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A shipped model's name, a YAML file, or a folder.")],
    prompt_ids: Annotated[
        list[str], typer.Option(metavar="IDS", help="Token ids, as in 1,2,3; repeated: a batch of prompts.")
    ] = [],  # noqa: B006
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Instead of ids: a text, to which its continuation is printed.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")] = 32,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest that hold this probability.")] = None,
    stop_ids: Annotated[str, typer.Option(metavar="IDS", help="A prompt ends with any of these.")] = "",
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
) -> None:
    """Generate token ids, one line of new ids per prompt; or text, after --prompt.

    A model without weights beside its YAML is one that has learned nothing.
    """
    from memkit.lm import load_model
    from memkit.lm.catalog import weights_file

    if bool(prompt_ids) == (prompt is not None):
        raise InputError(f"give --prompt-ids or --prompt, got {'both' if prompt_ids else 'neither'}")
    if prompt == "":
        raise InputError("--prompt must have at least one character, got ''")
    tokenizer = None if prompt is None else tokenizer_of(model)
    prompts = [_ids("--prompt-ids", given) for given in prompt_ids]
    if prompt is not None and tokenizer is not None:
        prompts = [tokenizer.encode(prompt)]
    stops = _ids("--stop-ids", stop_ids) if stop_ids else []
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    new = load_model(model).generate(
        prompts, max_new_tokens=max_new_tokens, stop_ids=stops, seed=seed, pad_id=0, **settings
    )
    if weights_file(model) is None:
        typer.echo(f"{short(model)} has no weights: freshly initialised", err=True)
    for row in new.tolist():
        end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
        typer.echo(",".join(str(token) for token in row[:end]) if tokenizer is None else tokenizer.decode(row[:end]))


def _ids(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?[0-9]{1,18}", part, re.ASCII) for part in parts):
        raise InputError(f"{option} {shown(text)[1:-1]}: must be token ids with commas between them, as in 1,2,3")
    return [int(part) for part in parts]
