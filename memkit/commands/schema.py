"""`memkit schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memkit.commands.options import ImportOption, write

__all__ = ["schema"]


def schema(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a file instead of printing it.")] = None,
    modules: ImportOption = [],  # noqa: B006
) -> None:
    """Print the JSON schema of a policy file.

    Editors complete and check a file that names it: # yaml-language-server: $schema=policy.schema.json
    """
    from memkit.schema import policy_schema

    if out is None:
        typer.echo(policy_schema(), nl=False)
    else:
        write(out, policy_schema())
