"""`memkit eval`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from memkit.commands.models import tokenizer_of
from memkit.commands.options import ImportOption, check_writable, write
from memkit.plain_json import as_json

__all__ = ["evaluate"]

NEWLINE = 10
"""The byte before a text that has no context, for models over bytes."""


def evaluate(
    tasks: Annotated[list[str], typer.Option(metavar="TASK", help="A task of lm-evaluation-harness; repeat it.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A memkit model, a Hugging Face folder or GGUF file; left out: SmolLM2-135M."
        ),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(metavar="POLICY", help="Read under this policy; left out: the model as it is.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own, as YAML for the harness.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Documents of each task at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of what a task draws.")] = 0,
    modules: ImportOption = [],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Also write them to a file.")] = None,
) -> None:
    """Judge a model under a policy by tasks of lm-evaluation-harness."""
    check_writable("--json", json_file)
    from memkit.catalog import load_policy
    from memkit.evals.harness import run_harness
    from memkit.lm import is_model, load_model
    from memkit.subject import check_stock_models

    chosen = None if policy is None else load_policy(policy)
    given: dict[str, Any] = {"include": include, "limit": limit, "seed": seed}
    if model is not None and is_model(model):
        found = run_harness(load_model(model, policy=chosen), tokenizer_of(model), tasks, prefix_id=NEWLINE, **given)
    else:
        check_stock_models()
        from memkit import hf
        from memkit.training.tokenizers import HuggingFaceTokenizer

        loaded = hf.load(model)
        tokenizer = loaded.tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        with nullcontext() if chosen is None else hf.attach(loaded.model, chosen):
            found = run_harness(loaded.model, HuggingFaceTokenizer(tokenizer), tasks, prefix_id=prefix or 0, **given)
    for task, metrics in found.items():
        for name, value in metrics.items():
            if isinstance(value, float | int) and not isinstance(value, bool):
                typer.echo(f"{task:24} {name.split(',')[0]:20} {value:.4f}")
    if json_file is not None:
        write(json_file, as_json(found) + "\n")
