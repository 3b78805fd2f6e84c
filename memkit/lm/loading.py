"""Models by name: their declaration, with their weights where there are any."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memkit.catalog import load_policy
from memkit.errors import ModelError
from memkit.lm.catalog import is_shipped, load_model_spec, weights_file
from memkit.lm.model import MemoryLM
from memkit.lm.spec import MixerSpec, ModelSpec
from memkit.policy import PolicySpec
from memkit.whole import SEEDS, whole_number

__all__ = ["from_pretrained", "load_model", "save_pretrained", "with_policy"]

save_pretrained = MemoryLM.save_pretrained
from_pretrained = MemoryLM.from_pretrained


def load_model(
    model: str | Path,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    *,
    policy: str | Path | PolicySpec | None = None,
    dtype: torch.dtype | None = None,
) -> MemoryLM:
    """A model by shipped name, YAML file or folder: with its weights where they lie beside it, else initialised.

    Args:
        model: a name, a path.
        overrides: fields to change, by dotted path. Weights are kept where policies alone change, and layers go on
            mixing in the first values they were trained with; a shipped model with other sizes is another one, and
            initialised.
        seed: of the initialisation; torch's own generator is left as it was.
        policy: every attention layer remembers as this one says, whatever it was trained with. What only the former
            policy learned is left out, and what this one could learn is as it starts: LayerNorm 1 and 0, query scales
            1, weights 1.
        dtype: of the parameters. None: as they are stored; those of shipped models, which are stored in bfloat16 to
            save room, in torch's default dtype.

    Raises `ModelError`, and `PolicyError` as `load_policy` does.
    """
    seed = whole_number("seed", seed, *SEEDS)
    spec, weights = with_its_weights(model, overrides, policy)
    if weights is not None:
        made = MemoryLM.with_weights(spec, weights, other_policies=spec != load_model_spec(model))
        dtype = torch.get_default_dtype() if dtype is None and is_shipped(model) else dtype
        return made if dtype is None else made.to(dtype)
    with torch.device("meta"):
        _check_room(model, MemoryLM(spec).parameter_count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MemoryLM(spec).eval()
    return made if dtype is None else made.to(dtype)


def with_its_weights(
    model: str | Path, overrides: Mapping[str, Any] | None = None, policy: str | Path | PolicySpec | None = None
) -> tuple[ModelSpec, Path | None]:
    """A model's declaration as `load_model` has it, and the file whose weights it takes.

    None instead of a file: there is none beside the declaration, or the model is a shipped one with other sizes.
    """
    declared = load_model_spec(model)
    spec = load_model_spec(model, overrides) if overrides else declared
    weights = weights_file(model)
    if is_shipped(model) and _but_for_policies(spec) != _but_for_policies(declared):
        weights = None
    if weights is not None:
        spec = spec.valued_as(declared)
    return spec if policy is None else with_policy(spec, policy), weights


def with_policy(model: ModelSpec, policy: str | Path | PolicySpec) -> ModelSpec:
    """The same model, its attention layers under another policy; its name, and where first values come from, stay."""
    spec, layers = load_policy(policy), model.layers
    overrides = tuple(each.model_copy(update={"mixer": each.mixer.under(spec)}) for each in layers.overrides)
    fields: dict[str, Any] = {name: getattr(model, name) for name in ModelSpec.model_fields}
    fields["layers"] = layers.model_copy(update={"default": layers.default.under(spec), "overrides": overrides})
    return ModelSpec(**fields).valued_as(model).named(model.name)


def _but_for_policies(model: ModelSpec) -> tuple[dict[str, Any], list[MixerSpec]]:
    """What two declarations have in common where weights of one fit the other."""
    full = load_policy("full")
    return model.model_dump(exclude={"layers", "first_values"}), [mixer.under(full) for mixer in model.mixers]


def _check_room(model: str | Path, parameters: int) -> None:
    """Raise where a model's parameters are more than this machine's memory holds (where the system tells)."""
    needed = parameters * torch.get_default_dtype().itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise ModelError(
            f"{model}: its {parameters:,} parameters take {needed / 1e9:,.0f} GB, and this machine has "
            f"{there / 1e9:,.0f}; lower width, depth or vocabulary"
        )
