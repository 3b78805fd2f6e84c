"""What is measured, whoever measures: policies by any name, a text, and a stock model that reads it."""

from __future__ import annotations

import platform
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from memkit.catalog import load_policy
from memkit.errors import InputError, ModelError
from memkit.layers import AnyLayers, LayerPoliciesSpec, as_layers
from memkit.pieces.growth import FixedGrowthSpec
from memkit.pieces.window import SlidingWindowSpec
from memkit.policy import Policy, PolicySpec
from memkit.texts import default_text, read_text

if TYPE_CHECKING:
    from memkit.hf import LoadedModel

__all__ = ["Subject", "reading", "subject", "text_and_source", "with_rows"]


@dataclass(frozen=True)
class Subject:
    """Policies of layers, each with a name of its own; the text, and where it comes from; the model that reads it."""

    policies: list[tuple[str, LayerPoliciesSpec]]
    source: str
    text: str
    loaded: LoadedModel


def subject(
    policies: AnyLayers | Iterable[AnyLayers],
    overrides: Mapping[str, Any] | None,
    rows: int | None,
    model: str | Path | LoadedModel | None,
    text: str | Path | None,
) -> Subject:
    """What `memkit.compare` says of these arguments, checked, the cheapest first, and then loaded.

    Raises `InputError`, `PolicyError` and `ModelError`.
    """
    try:
        from memkit import hf
    except ImportError as error:
        raise ModelError(
            f"comparing needs transformers, accelerate and gguf, got: {error}; run: pip install 'memkit-attention[hf]'"
        ) from None
    chosen = _chosen(policies, overrides, rows)
    for each in chosen:
        for policy in each.policies:
            hf.check_policy(policy.build())
    source, text = text_and_source(text)
    loaded = model if isinstance(model, hf.LoadedModel) else hf.load(model)
    return Subject(list(_labelled(chosen)), source, text, loaded)


@contextmanager
def reading(loaded: LoadedModel, seed: int) -> Generator[None]:
    """In the `with` block the model only reads, torch draws from `seed`; afterwards both are as they were."""
    devices = [loaded.model.device] if loaded.model.device.type == "cuda" else []
    training = loaded.model.training
    loaded.model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        loaded.model.train(training)


def with_rows(spec: PolicySpec, rows: int) -> PolicySpec:
    """The policy with so many rows a head, slots and window together, where its rows are a number; else as it is."""
    if isinstance(spec.window, SlidingWindowSpec):
        least, changed = spec.sinks + 1, {"window.size": rows - spec.sinks}
    elif isinstance(spec.growth, FixedGrowthSpec):
        window = spec.build().window.capacity or 0
        least, changed = window + spec.sinks + 1, {"growth.slots": rows - window}
    else:
        return spec
    if rows < least:
        raise InputError(f"rows must be at least {least} for {spec.name or 'this policy'}, got {rows}")
    return load_policy(spec, changed)


def _chosen(
    policies: AnyLayers | Iterable[AnyLayers], overrides: Mapping[str, Any] | None, rows: int | None
) -> list[LayerPoliciesSpec]:
    """The policies asked for, one or several, with these fields changed and so many rows a head (see `compare`)."""
    if isinstance(policies, (str, Path, PolicySpec, Policy, LayerPoliciesSpec, Mapping)):
        return _chosen([cast("AnyLayers", policies)], overrides, rows)
    chosen = [as_layers(each, overrides) for each in policies]
    return chosen if rows is None else [each.mapped(partial(with_rows, rows=rows)) for each in chosen]


def _labelled(chosen: list[LayerPoliciesSpec]) -> Iterator[tuple[str, LayerPoliciesSpec]]:
    """Each with a name of its own: a second one of the same name gets a number."""
    used: dict[str, int] = {}
    for each in chosen:
        used[each.label] = used.get(each.label, 0) + 1
        yield (each.label if used[each.label] == 1 else f"{each.label} ({used[each.label]})"), each


def text_and_source(text: str | Path | None) -> tuple[str, str]:
    """Where the text comes from, and the text."""
    if text is None:
        return f"pydoc_data.topics of Python {platform.python_version()}", default_text()
    if isinstance(text, str):
        return "given text", text
    return text.name, read_text(text)
