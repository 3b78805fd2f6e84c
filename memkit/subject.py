"""What is measured, whoever measures: policies by any name, a text, and a stock model that reads it."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from memkit.budgets import Budget, bounded, sized
from memkit.errors import ModelError
from memkit.layers import AnyLayers, LayerPoliciesSpec, as_layers
from memkit.policy import Policy, PolicySpec
from memkit.texts import default_text, read_text

if TYPE_CHECKING:
    from memkit.hf import LoadedModel

__all__ = ["Subject", "check_stock_models", "reading", "subject", "text_and_source"]


@dataclass(frozen=True)
class Subject:
    """Policies of layers, each with a name of its own; the text, and where it comes from; the model that reads it; and
    how other policies would be given the same budget."""

    policies: list[tuple[str, LayerPoliciesSpec]]
    source: str
    text: str
    loaded: LoadedModel
    also: Callable[[LayerPoliciesSpec], LayerPoliciesSpec]


def subject(
    policies: AnyLayers | Iterable[AnyLayers],
    overrides: Mapping[str, Any] | None,
    budget: Budget,
    prompt: int,
    model: str | Path | LoadedModel | None,
    text: str | Path | None,
) -> Subject:
    """What `memkit.compare` says of these arguments, checked, the cheapest first, and then loaded.

    prompt: tokens of which a budget's share is taken.
    Raises `InputError`, `PolicyError` and `ModelError`.
    """
    check_stock_models()
    from memkit import hf

    rows, chosen = budget.rows_of(prompt), _chosen(policies, overrides)
    if rows is not None:
        chosen = [sized(each, rows) for each in chosen]
    for each in chosen:
        for policy in each.policies:
            hf.check_policy(policy.build())
    source, text = text_and_source(text)
    loaded = model if isinstance(model, hf.LoadedModel) else hf.load(model)

    def also(layers: LayerPoliciesSpec) -> LayerPoliciesSpec:
        if budget.bytes is not None:
            return _with_bytes(layers, budget.bytes, loaded)
        return layers if rows is None else sized(layers, rows)

    if budget.bytes is not None:
        chosen = [also(each) for each in chosen]
    return Subject(list(_labelled(chosen)), source, text, loaded, also)


def check_stock_models() -> None:
    """Raise `ModelError` where what `memkit.hf` needs is not installed."""
    try:
        importlib.import_module("memkit.hf")
    except ImportError as error:
        raise ModelError(
            f"stock models need transformers, accelerate and gguf, got: {error}; run: "
            "pip install 'memkit-attention[hf]'"
        ) from None


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


def _chosen(policies: AnyLayers | Iterable[AnyLayers], overrides: Mapping[str, Any] | None) -> list[LayerPoliciesSpec]:
    """The policies asked for, one or several, with these fields changed (see `compare`)."""
    if isinstance(policies, (str, Path, PolicySpec, Policy, LayerPoliciesSpec, Mapping)):
        return _chosen([cast("AnyLayers", policies)], overrides)
    return [as_layers(each, overrides) for each in policies]


def _with_bytes(chosen: LayerPoliciesSpec, bytes: int, loaded: LoadedModel) -> LayerPoliciesSpec:
    """As many rows as so many bytes take, where policies have a number of rows and all stop growing; else as it is."""
    from memkit import hf

    if not bounded(chosen):
        return chosen
    handle = hf.attach(loaded.model, chosen, bytes=bytes)
    handle.detach()
    assert handle.rows is not None
    return sized(chosen, handle.rows)


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
