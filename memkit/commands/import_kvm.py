"""`memkit import-kvm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memkit.errors import InputError

__all__ = ["import_kvm"]


def import_kvm(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Their YAML, or the checkpoint's config.json.")],
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A safetensors file, or a folder of shards.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write the model to.")],
    bf16_rounding: Annotated[
        bool, typer.Option(help="Round cos, sin and slot values to bfloat16, as the released checkpoints were trained.")
    ] = False,
) -> None:
    """Turn a checkpoint of the Key-Value Means authors into a model of ours.

    What cannot be represented is named and refused.
    """
    from memkit.interop import kvm_paper
    from memkit.lm import save_pretrained

    model = kvm_paper.import_files(config, weights, bf16_rounding)
    try:
        save_pretrained(model, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); name a folder of yours") from None
    typer.echo(f"{out}: {model.parameter_count:,} parameters in {model.spec.depth} layers")
