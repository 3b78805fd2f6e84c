"""Policies in words: the list of them, and one of them in full."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from memkit.catalog import load_policy
from memkit.costing import Cost, cost
from memkit.pieces.growth import GrowthSpec
from memkit.pieces.registry import Spec
from memkit.policy import Policy, PolicySpec
from memkit.profiles import shape_of_shares
from memkit.viz.costs import DRAWN_LENGTHS, cells
from memkit.viz.html import fragment
from memkit.viz.picture import draw, picture
from memkit.viz.tables import columns, with_notes
from memkit.yaml12 import dump

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["details", "figure", "html", "listing", "tokens_in_words"]

SHOWN_LENGTHS = tuple(1024 << (2 * i) for i in range(6))


def listing(policies: Iterable[tuple[PolicySpec, str]]) -> RenderableType:
    """One line per policy: its name, how it grows, what it is."""
    grid = columns("policy", "growth", "what it is", align="lww")
    grid.columns[1].max_width = 22
    for spec, header in policies:
        grid.add_row(spec.name, growth(spec), first_sentences(header))
    return grid


def first_sentences(header: str) -> str:
    """The first line of a file's header, and where a sentence goes on behind it, the rest of that."""
    first, _, others = header.partition("\n")
    rest = re.match(r".*?\.(?= |$)", " ".join(others.split("\n")))
    return first if first.endswith(".") or rest is None else f"{first} {rest[0]}"


def details(spec: PolicySpec, header: str) -> RenderableType:
    """What a policy is, its declaration, how it grows from 1k to 1M tokens, and who sees what."""
    policy = spec.build()
    parts: list[RenderableType] = [Text(spec.name or "policy", style="bold")]
    if header:
        parts.append(Text(header))
    parts += [Text(), declaration(spec), Text()]
    learned = tuple(need.phrase for need in policy.learned)
    parts.append(Text(f"A layer must have learned {_and(learned)}." if learned else "Nothing is learned."))
    parts.append(_growth_table(_costs(spec, SHOWN_LENGTHS, spec)))
    drawn = picture(policy)
    if drawn is not None:
        parts += [Text(), draw(drawn)]
    elif not policy.plans_ahead:
        parts += [
            Text(),
            Text("Who sees what depends on the text and its queries: slots compete by what readers need."),
        ]
    return Group(*parts)


def figure(spec: PolicySpec) -> Figure:
    """Who sees what, where that can be told without a text; memory and operations against tokens, beside `full`'s."""
    from memkit.viz import figures, style

    drawn = picture(spec.build())
    axes, whole = style.panels(3 if drawn is not None else 2)
    compared = [spec] if spec.name == "full" else [load_policy("full"), spec]
    costs = [entry for each in compared for entry in _costs(each, DRAWN_LENGTHS, spec)]
    if drawn is not None:
        figures.who_sees_what(drawn, axes[0])
    figures.growth(costs, axes[-2])
    figures.cost_curves(costs, axes[-1])
    return whole


def html(policy: PolicySpec | Policy) -> str:
    """What `details` says, for a notebook."""
    return fragment(details(policy.spec if isinstance(policy, Policy) else policy, ""))


def declaration(spec: PolicySpec) -> Text:
    """The policy as one would write it; fields at their defaults are left out."""
    text = Text()
    for family, value in spec:
        if isinstance(value, Spec):
            said: Any = _said(value)
        else:
            said = value if value != PolicySpec.model_fields[family].default else None
        if not said:
            continue
        line = dump(said, on_one_line=True)
        text.append(f"{family}: ", style="cyan")
        text.append(line.removesuffix("...\n").strip() + "\n")
    text.rstrip()
    return text


def growth(spec: PolicySpec) -> str:
    """How slots grow, and by which numbers: `sqrt factor=16`. What all schedules have in common is left out."""
    said = _said(spec.growth)
    own = [f"{name}={value}" for name, value in said.items() if name not in GrowthSpec.model_fields]
    return " ".join([said["kind"], *own])


def _said(spec: Spec) -> dict[str, Any]:
    """The fields that are not at their default: the kind, the kind's own, and those that its family shares."""
    fields, own = type(spec).model_fields, vars(type(spec))["__annotations__"]
    dumped = spec.model_dump(mode="json")
    said = {name: _whole(value) for name, value in dumped.items() if getattr(spec, name) != fields[name].default}
    ordered = {name: said[name] for name in sorted(said, key=lambda name: name not in own)}
    return {"kind": dumped["kind"], **ordered} if "kind" in dumped else ordered


def _costs(spec: PolicySpec, lengths: Sequence[int], shares: PolicySpec) -> list[Cost]:
    """What a policy costs at these lengths, for as many layers and heads as the shares of a policy are of."""
    layers, heads = shape_of_shares(shares) or (1, 8)
    return cost(spec, lengths, layers=layers, heads=heads)


def _whole(value: Any) -> Any:
    """16.0 as a person writes it: 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _growth_table(costs: list[Cost]) -> RenderableType:
    grid = columns("tokens", "slots", "window", "memory", "prefill\nFLOPs", "a token\nFLOPs")
    for entry in costs:
        grid.add_row(tokens_in_words(entry.tokens), *cells(entry))
    note = f"for {costs[0].shape}; prefill grows as N^{costs[0].exponent:.2f}"
    return with_notes(grid, [note])


def tokens_in_words(number: int) -> str:
    """A number of tokens in short: 4k, 1M."""
    return f"{number >> 20}M" if number >= 1 << 20 else f"{number >> 10}k"


def _and(parts: tuple[str, ...]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
