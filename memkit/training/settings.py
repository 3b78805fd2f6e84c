"""How to train: everything that decides the curve of a run, declared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from memkit import yaml12
from memkit.errors import InputError
from memkit.pieces.registry import Spec, SpecError

__all__ = ["TrainingSpec", "load_settings"]

MOST = 2**31 - 1


class TrainingSpec(Spec):
    """The settings of a run; with the model, the data, the machine and the number of processes they fix its curve.

    The defaults are those of small models on tasks: AdamW at 3e-3, warm-up, cosine to a tenth, weight decay on matrices
    alone, gradients clipped at 1.
    """

    steps: int = Field(default=800, ge=1, le=MOST, description="optimiser steps")
    batch: int = Field(default=16, ge=1, le=2**20, description="sequences per step, process and accumulation")
    accumulate: int = Field(default=1, ge=1, le=2**16, description="batches whose gradients make one step")
    length: int = Field(default=512, ge=2, le=2**24, description="tokens of a sequence of text; tasks have their own")
    sequences: Literal["packed", "documents"] = Field(
        default="packed",
        description="packed: all files one after another, cut into equal sequences; documents: none spans two files, "
        "and a file's last sequence is as long as what is left",
    )
    learning_rate: float = Field(default=3e-3, gt=0, le=10, description="the highest, after the warm-up")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="after the warm-up: cosine to a tenth; linear to zero, as in the Key-Value Means paper; constant",
    )
    warmup: int = Field(default=100, ge=0, le=MOST, description="steps in which the learning rate rises from zero")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="AdamW's, on matrices alone")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's")
    clip: float = Field(default=1.0, gt=0, le=1e9, description="the longest gradient, over all parameters")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the layers' arithmetic; parameters and sums stay float32"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="of the initialisation and the order of the data")
    save_every: int = Field(default=200, ge=1, le=MOST, description="steps between checkpoints")
    log_every: int = Field(
        default=10,
        ge=1,
        le=MOST,
        description="steps whose mean loss is one line of the log; a checkpoint, and the last step, end a line too",
    )

    @field_validator("betas", mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _betas(self) -> TrainingSpec:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        return self


def load_settings(file: Path | None, changes: Mapping[str, Any]) -> TrainingSpec:
    """Settings from a YAML file, or the defaults, with fields changed. Raises `InputError`: file, field, the rule."""
    data = {} if file is None else yaml12.read(file, InputError)
    if not isinstance(data, dict):
        raise InputError(f"{file}: training settings are a mapping of fields, got {type(data).__name__}")
    try:
        return TrainingSpec(**{**data, **changes})
    except SpecError as error:
        source = "" if file is None else f"{file}: "
        raise InputError(f"{source}{error}") from None
