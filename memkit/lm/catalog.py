"""Names ↔ files: the shipped models, and models from anybody's YAML or folder.

A model is a YAML file, and perhaps weights beside it: `NAME.safetensors` beside `NAME.yaml`, or in a folder
`model.yaml` and `model.safetensors`, as `save_pretrained` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from memkit.catalog import Catalog, is_file
from memkit.errors import ModelError
from memkit.lm.spec import ModelSpec
from memkit.processes import whole_tensors

__all__ = [
    "is_model",
    "is_shipped",
    "load_model_spec",
    "model_header",
    "model_names",
    "weights_file",
    "write_model",
]

MODELS = Catalog(
    what="model",
    spec=ModelSpec,
    error=ModelError,
    folder="models",
    given="a name, or the path of a YAML file or a folder",
    files="a YAML file or a folder",
    looked_for="a model's YAML or folder, or one of",
    inside="model.yaml",
)


def models_folder() -> Path:
    """Where the shipped models lie: beside the policies."""
    return MODELS.shipped_folder()


def model_names() -> list[str]:
    """The names of the shipped models, sorted."""
    return MODELS.names()


def model_header(name: str) -> str:
    """The comment at the head of a shipped model's file."""
    return MODELS.header(name)


def is_model(name: str | Path) -> bool:
    """Whether a name, file or folder is a model's: shipped, or a YAML file that has `layers:`."""
    try:
        return "layers" in MODELS.read(MODELS.path(name))
    except ModelError:
        return False


def is_shipped(model: str | Path) -> bool:
    """Whether a name or path is a shipped model's. Raises `ModelError` for unknown models."""
    return MODELS.path(model).parent == models_folder()


def load_model_spec(model: str | Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """A model's declaration by shipped name, YAML file or folder, with fields overridden by dotted path.

    `load_model_spec("kvm-120m", {"depth": 2})`. Raises `ModelError` naming the file, the field and what is allowed.
    """
    return MODELS.load(model, overrides)


def weights_file(model: str | Path) -> Path | None:
    """The safetensors file beside a model's YAML; None where there is none. Raises `ModelError` for unknown models."""
    file = MODELS.path(model).with_suffix(".safetensors")
    return file if is_file(file) else None


def write_model(folder: str | Path, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder that `load_model_spec` and `weights_file` read: `model.yaml` and `model.safetensors`.

    Where tensors are split over processes (DTensor) each of these calls it; the first writes, and all wait for that.
    Raises `ModelError` for tensors that share memory.
    """
    with whole_tensors(tensors) as own:
        if own is None:
            return
        held: dict[int, str] = {}
        for name, tensor in own.items():
            former = held.setdefault(tensor.data_ptr(), name)
            if former != name and tensor.numel():
                raise ModelError(
                    f"weights must each have memory of their own to be written, got {name} in that of {former}; "
                    "give it a copy"
                )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.yaml").write_text(spec.to_yaml(), encoding="utf-8")
        save_file(own, str(folder / "model.safetensors"), metadata={"format": "pt"})
