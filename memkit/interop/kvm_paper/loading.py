"""A configuration and its weights → a `MemoryLM`, from mappings or from files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memkit import yaml12
from memkit.errors import ModelError, shown
from memkit.interop.kvm_paper.policies import model_spec
from memkit.interop.kvm_paper.weights import unread_weights, weight_names
from memkit.lm.model import MemoryLM

__all__ = ["import_files", "load_model"]


def load_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], bf16_rounding: bool = False) -> MemoryLM:
    """The authors' model: its configuration (a mapping with their field names, or their YAML's, with a `model:`
    section) and its weights by their names.

    bf16_rounding: round cos, sin and slot values to bfloat16 as the released checkpoints were trained; a property of
    the model that comes back, saved along with it. Raises `ModelError` naming what does not fit.
    """
    ranks = {
        name: int(tensor.shape[0]) for name, tensor in tensors.items() if name.endswith("1.weight") and tensor.ndim
    }
    spec = model_spec(config, bf16_rounding, ranks)
    with torch.device("meta"):
        model = MemoryLM(spec)
    wanted = dict(model.named_parameters())
    names = weight_names(spec)
    assert set(names) == set(wanted)
    missing = sorted(theirs for theirs in names.values() if theirs not in tensors)
    if missing:
        raise ModelError(f"weights: missing {_some(missing)}; they must be those of this configuration")
    spare = set(tensors) - set(names.values()) - unread_weights(config)
    if spare:
        raise ModelError(f"weights: no place for {_some(sorted(spare))}; they must be those of this configuration")
    state: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        given, shape = tensors[theirs], wanted[ours].shape
        if given.numel() != shape.numel() or given.squeeze().shape != torch.Size(n for n in shape if n != 1):
            raise ModelError(f"weights: {theirs} must have shape {tuple(shape)}, got {tuple(given.shape)}")
        if not given.is_floating_point():
            raise ModelError(f"weights: {theirs} must be of a floating-point dtype, got {given.dtype}")
        state[ours] = given.detach().clone().view(shape)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def import_files(config: str | Path, weights: str | Path, bf16_rounding: bool = False) -> MemoryLM:
    """`load_model` from files: their YAML or config.json, and safetensors (one file, or a folder of shards)."""
    return load_model(_read_config(Path(config)), _read_weights(Path(weights)), bf16_rounding)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_config(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        config = yaml12.read(path, ModelError)
    else:
        try:
            config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path}: cannot be read as a configuration: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: a configuration is a mapping of fields, got {type(config).__name__}")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's pairs as a mapping, each name given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice; leave one of them out")
    return found


def _read_weights(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"{path}: no safetensors files in this folder")
    tensors: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for file in files:
        try:
            read = load_file(str(file))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read as safetensors: {error}") from None
        for name in read:
            if name in source:
                raise ModelError(
                    f"{path}: each weight must be in one file, got {name} in {source[name]} and {file.name}; "
                    "give a folder with the files of one model, or one file"
                )
            source[name] = file.name
        tensors |= read
    return tensors
