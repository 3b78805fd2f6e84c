"""Models by name: their declaration, with their weights where there are any."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memkit.errors import ModelError
from memkit.lm.catalog import load_model_spec, weights_file
from memkit.lm.model import MemoryLM
from memkit.whole import SEEDS, whole_number

__all__ = ["from_pretrained", "load_model", "save_pretrained"]

save_pretrained = MemoryLM.save_pretrained
from_pretrained = MemoryLM.from_pretrained


def load_model(model: str | Path, overrides: Mapping[str, Any] | None = None, seed: int = 0) -> MemoryLM:
    """A model by shipped name, YAML file or folder: with its weights where they lie beside it, else initialised.

    seed: of the initialisation; torch's own generator is left as it was. `overrides` only where there are no weights
    that they would not fit. Raises `ModelError`.
    """
    seed = whole_number("seed", seed, *SEEDS)
    spec = load_model_spec(model, overrides)
    weights = weights_file(model)
    if weights is not None:
        return MemoryLM.with_weights(spec, weights)
    with torch.device("meta"):
        _check_room(model, MemoryLM(spec).parameter_count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MemoryLM(spec).eval()


def _check_room(model: str | Path, parameters: int) -> None:
    """Raise where a model's parameters are more than this machine's memory holds (where the system tells)."""
    needed = parameters * torch.get_default_dtype().itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise ModelError(
            f"{model}: its {parameters:,} parameters take {needed / 1e9:,.0f} GB, and this machine has "
            f"{there / 1e9:,.0f}; lower width, depth or vocabulary"
        )
