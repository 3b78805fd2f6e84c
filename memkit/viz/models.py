"""Models in words: the list of them, and one of them in full."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from memkit.lm import MemoryLM, MixerSpec, ModelSpec
from memkit.lm.footprint import memory_bytes
from memkit.viz.costs import DRAWN_LENGTHS
from memkit.viz.html import fragment
from memkit.viz.policies import first_sentences, tokens_in_words
from memkit.viz.tables import amount, columns, with_notes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["details", "figure", "html", "listing"]

SHOWN_LENGTHS = tuple(4096 << (2 * index) for index in range(5))


def listing(models: Iterable[tuple[ModelSpec, str]]) -> RenderableType:
    """One line per model: its name, its parameters, what it is."""
    grid = columns("model", "parameters", "what it is", align="lrw")
    for spec, header in models:
        grid.add_row(spec.name, amount(_parameters(spec)), first_sentences(header))
    return grid


def details(spec: ModelSpec, header: str) -> RenderableType:
    """What a model is, its sizes and parameters, its layers, and what its memory takes from 4k to 1M tokens."""
    parts: list[RenderableType] = [Text(spec.name or "model", style="bold")]
    if header:
        parts.append(Text(header))
    groups = spec.kv_heads or spec.heads
    heads = f"{spec.heads} heads" if groups == spec.heads else f"{spec.heads} heads in {groups} groups"
    parts += [
        Text(),
        Text(f"{_parameters(spec):,} parameters: vocabulary {spec.vocabulary:,}, width {spec.width:,}, {heads}"),
        Text(f"{spec.depth} layers:"),
        *(Text(f"  {line}") for line in _layer_map(spec.mixers)),
        _memory_table(spec),
    ]
    return Group(*parts)


def figure(spec: ModelSpec) -> Figure:
    """What a model's memory takes against tokens: a line per kind of layer, and one for all together."""
    from memkit.viz import figures, style

    (ax,), drawn = style.panels(1)
    kinds = list(dict.fromkeys(spec.mixers))
    layers = memory_bytes(spec, DRAWN_LENGTHS)
    lines = {"all layers": [sum(each) for each in layers]} if len(kinds) > 1 else {}
    for kind in kinds:
        of_kind = [sum(size for size, mixer in zip(each, spec.mixers, strict=True) if mixer == kind) for each in layers]
        lines[f"{spec.mixers.count(kind)} × {kind.label}"] = of_kind
    figures.bytes_by_tokens(DRAWN_LENGTHS, lines, ax)
    return drawn


def html(model: ModelSpec | MemoryLM) -> str:
    """What `details` says, for a notebook."""
    return fragment(details(model.spec if isinstance(model, MemoryLM) else model, ""))


def _parameters(spec: ModelSpec) -> int:
    with torch.device("meta"):
        return MemoryLM(spec).parameter_count


def _layer_map(mixers: list[MixerSpec]) -> list[str]:
    """Which layers each mixer has, in the order of their first layers."""
    lines: list[str] = []
    for mixer in dict.fromkeys(mixers):
        layers = [str(number) for number, each in enumerate(mixers) if each == mixer]
        lines.append(f"{mixer.label}: {', '.join(layers)}")
    return lines


def _memory_table(spec: ModelSpec) -> RenderableType:
    kinds = list(dict.fromkeys(spec.mixers))
    grid = columns("tokens", "memory", *(kind.label for kind in kinds if len(kinds) > 1))
    for tokens, layers in zip(SHOWN_LENGTHS, memory_bytes(spec, SHOWN_LENGTHS), strict=True):
        shares = [
            sum(size for size, mixer in zip(layers, spec.mixers, strict=True) if mixer == kind)
            for kind in kinds
            if len(kinds) > 1
        ]
        grid.add_row(tokens_in_words(tokens), *(amount(size, "B") for size in (sum(layers), *shares)))
    return with_notes(grid, ["memory of one row in float32, after one prefill"])
