"""The command line. Exit code 0; 1: a check failed; 2: bad input, said in one line on standard error."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from memkit.commands.bench import bench
from memkit.commands.check import check
from memkit.commands.compare import compare, report
from memkit.commands.cost import cost
from memkit.commands.evaluate import evaluate
from memkit.commands.generate import generate
from memkit.commands.import_kvm import import_kvm
from memkit.commands.profile import profile
from memkit.commands.schema import schema
from memkit.commands.shipped import list_shipped, show
from memkit.commands.sweep import sweep
from memkit.commands.train import train
from memkit.errors import EvenSharesWarning, MemkitError, RenamedWarning, SlowPathWarning, short
from memkit.version import __version__

__all__ = ["app"]

NOTICES = (RenamedWarning, EvenSharesWarning, SlowPathWarning)
"""Warnings that are one line of text here."""


# Where click is, as a package of its own or within typer, depends on typer's version.
UsageError: Any = typer.BadParameter.__mro__[1]


@contextmanager
def _bad_input_is_one_line() -> Generator[None]:
    try:
        yield
    except MemkitError as error:
        said = str(error)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        command = "memkit" if error.ctx is None else error.ctx.command_path
        problem = " ".join(short(word) for word in error.format_message().split())
        said = f"{command}: {problem} See {command} --help"
    else:
        return
    typer.echo(" ".join(said.split()), err=True)
    raise typer.Exit(2)


@contextmanager
def _notices_are_one_line() -> Generator[None]:
    """What memkit warns of is said once, in one line on stderr, without the line of code it came from."""
    said: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if not issubclass(category, NOTICES):
            shown(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            typer.echo(f"memkit: {message}", err=True)

    with warnings.catch_warnings():
        for category in NOTICES:
            warnings.simplefilter("always", category)
        shown, warnings.showwarning = warnings.showwarning, say
        yield


def _take_any_text() -> None:
    """Print what the encoding of standard output has no sign for as a question mark, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class _Commands(TyperGroup):
    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        _take_any_text()
        with _bad_input_is_one_line():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _bad_input_is_one_line(), _notices_are_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="How an attention layer remembers, as a configuration choice.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memkit {__version__}")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
]


@app.callback()
def _memkit(version: VersionOption = False) -> None:
    pass


COMMANDS = {
    "list": list_shipped,
    "show": show,
    "cost": cost,
    "profile": profile,
    "bench": bench,
    "check": check,
    "schema": schema,
    "import-kvm": import_kvm,
    "generate": generate,
    "compare": compare,
    "report": report,
    "train": train,
    "sweep": sweep,
    "eval": evaluate,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
