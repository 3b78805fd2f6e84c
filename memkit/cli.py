"""The command line. Exit code 0; 1: a check failed; 2: bad input, said in one line on standard error."""

from __future__ import annotations

import io
import json
import platform
import re
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from memkit.catalog import load_policy, policy_header, policy_names
from memkit.commands import compare, evaluate, sweep, train
from memkit.commands.models import tokenizer_of
from memkit.commands.options import (
    DarkOption,
    ImportOption,
    PlotOption,
    SetOption,
    check_plot,
    check_writable,
    import_modules,
    parse_overrides,
    plot_to,
    write,
    write_and_show,
)
from memkit.errors import EvenSharesWarning, InputError, MemkitError, RenamedWarning, short, shown, unknown_name
from memkit.layers import as_layers
from memkit.version import __version__

__all__ = ["app"]

NOTICES = (RenamedWarning, EvenSharesWarning)
"""Warnings that are one line of text here."""
DOCUMENTS = 4
"""Parts of the default text on which a profile is measured."""


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
            show(message, category, *where)
        elif str(message) not in said:
            said.add(str(message))
            typer.echo(f"memkit: {message}", err=True)

    with warnings.catch_warnings():
        for category in NOTICES:
            warnings.simplefilter("always", category)
        show, warnings.showwarning = warnings.showwarning, say
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
Policies = Annotated[list[str], typer.Argument(metavar="POLICY", help="A shipped policy's name, or a YAML file.")]


@app.callback()
def _memkit(version: VersionOption = False) -> None:
    pass


@app.command("list")
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


@app.command()
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


@app.command()
def cost(
    policies: Policies,
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


@app.command()
def profile(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A Hugging Face folder or a GGUF file; left out: SmolLM2-135M-Instruct."),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="A UTF-8 text; repeat it. Left out: four parts of Python's help."),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens read of each text.")] = 2048,
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


@app.command()
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
        [load_policy(name, overrides) for name in policies or policy_names()],
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


@app.command()
def check(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="A policy's name or YAML file, or module:Name of a piece.")
    ],
    examples: Annotated[int, typer.Option(metavar="N", min=1, max=100_000, help="Examples to try each law on.")] = 50,
    changes: SetOption = [],  # noqa: B006
    modules: ImportOption = [],  # noqa: B006
) -> None:
    """Check the laws of a policy, or of a piece of your own.

    Which laws hold, which are broken (with an example as code) and which the piece does not claim. Exit code 1 where
    one is broken.
    """
    try:
        from memkit.testing import examine
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "hypothesis":
            raise
        raise InputError("memkit check needs hypothesis; pip install 'memkit-attention[testing]'") from None
    from memkit import viz
    from memkit.viz.checks import report, watching

    found: Any = _piece(subject, changes) if ":" in subject else load_policy(subject, parse_overrides(changes))
    with watching() if sys.stderr.isatty() else nullcontext() as watch:
        examined = examine(found, examples, watch=watch)
    viz.show(report(examined))
    if examined.broken:
        raise typer.Exit(1)


def _piece(subject: str, changes: list[str]) -> Any:
    """What `module:Name` names."""
    module, _, name = subject.partition(":")
    if changes:
        raise InputError(f"--set changes a policy's fields, and {subject} is a piece; set them where it is made")
    import_modules([module])
    found: Any = sys.modules[module]
    for part in name.split("."):
        if not hasattr(found, part):
            known = [known for known in vars(sys.modules[module]) if not known.startswith("_")]
            raise InputError(f"{subject}: {unknown_name('name', name, known)}")
        found = getattr(found, part)
    return found


@app.command()
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


@app.command("import-kvm")
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


@app.command()
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


for command in (compare, train, sweep, evaluate):
    command.register(app)
