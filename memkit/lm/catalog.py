"""Names ↔ files: the shipped models, and models from anybody's YAML or folder.

A model is a YAML file, and perhaps weights beside it: `NAME.safetensors` beside `NAME.yaml`, or in a folder
`model.yaml` and `model.safetensors`, as `save_pretrained` writes them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from memkit import yaml12
from memkit.catalog import checked_overrides, is_file, policies_folder
from memkit.errors import ModelError, short, shown, unknown_name
from memkit.lm.spec import ModelSpec
from memkit.pieces.registry import SpecError

__all__ = [
    "is_model",
    "load_model_spec",
    "model_header",
    "model_names",
    "weights_file",
    "write_model",
]


@functools.cache
def models_folder() -> Path:
    """Where the shipped models lie: beside the policies."""
    return policies_folder().parent / "models"


def model_names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(path.stem for path in models_folder().glob("*.yaml"))


def model_header(name: str) -> str:
    """The comment at the head of a shipped model's file."""
    lines = _path(name).read_text(encoding="utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.lstrip("# ").rstrip() for line in head if "yaml-language-server" not in line)


def is_model(name: str | Path) -> bool:
    """Whether a name, file or folder is a model's: shipped, or a YAML file that has `layers:`."""
    try:
        return "layers" in _read(_path(name))
    except ModelError:
        return False


def load_model_spec(model: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """A model's declaration by shipped name, YAML file or folder, with fields overridden by dotted path.

    `load_model_spec("kvm-120m", {"depth": 2})`. Raises `ModelError` naming the file, the field and what is allowed.
    """
    path = _path(model)
    data = _read(path)
    for field, value in checked_overrides(overrides, ModelError).items():
        *parents, last = field.split(".")
        holder = data
        for parent in parents:
            holder = holder.setdefault(parent, {})
            if not isinstance(holder, dict):
                raise ModelError(
                    f"{model}: {short(field)}: {short(parent)} is a plain value and has no field {short(last)}"
                )
        holder[last] = value
    try:
        spec = ModelSpec(**{str(field): value for field, value in data.items()})
    except SpecError as error:
        problems = (f"{model}: {field}: {text}" if field else f"{model}: {text}" for field, text in error.problems)
        raise ModelError("; ".join(problems)) from None
    return spec.named(path.parent.name if path.name == "model.yaml" else path.stem)


def weights_file(model: str | Path) -> Path | None:
    """The safetensors file beside a model's YAML; None where there is none. Raises `ModelError` for unknown models."""
    file = _path(model).with_suffix(".safetensors")
    return file if is_file(file) else None


def write_model(folder: str | Path, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder that `load_model_spec` and `weights_file` read: `model.yaml` and `model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    own = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(own, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _path(model: str | Path) -> Path:
    if not isinstance(model, (str, Path)):
        raise ModelError(f"a model is a name, or the path of a YAML file or a folder, got {shown(model)}")
    text = str(model)
    if not isinstance(model, Path) and not text.endswith((".yaml", ".yml")) and not {"/", "\\"} & set(text):
        path = models_folder() / f"{model}.yaml"
        if is_file(path):
            return path
        if not is_file(Path(text) / "model.yaml"):
            known = model_names()
            raise ModelError(unknown_name("model", text, known) + "; or give the path of a YAML file or a folder")
    path = Path(model)
    if is_file(path / "model.yaml"):
        path = path / "model.yaml"
    if not is_file(path):
        raise ModelError(
            f"{short(str(path))}: no such file; give a model's YAML or folder, or one of: {', '.join(model_names())}"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    data = yaml12.read(path, ModelError)
    if not isinstance(data, dict):
        raise ModelError(f"{path}: a model file is a mapping of fields, got {type(data).__name__}")
    return data
