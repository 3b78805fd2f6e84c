"""Where chunks of tokens end, as a model is told: which tokens are boundaries, or which ids are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkit.errors import InputError, shown

__all__ = ["UNWANTED", "checked"]

UNWANTED = (
    "are given, but no layer of this model takes boundaries; leave them out, or declare a policy with "
    "chunker: {kind: boundaries, most: 256}"
)


def checked(boundaries: Any, ids: Tensor, wanted: bool) -> Tensor | None:
    """boundaries [b, t] bool of ids [b, t], on the CPU, once for all layers; None where no token is one.

    wanted: whether any layer takes them. Raises `InputError` where they do not fit.
    """
    if boundaries is None:
        return None
    if not wanted:
        raise InputError(f"boundaries {UNWANTED}")
    if not isinstance(boundaries, Tensor) or boundaries.dtype != torch.bool or boundaries.shape != ids.shape:
        got = f"{boundaries.dtype} {tuple(boundaries.shape)}" if isinstance(boundaries, Tensor) else shown(boundaries)
        raise InputError(f"boundaries must be true or false for each of ids, {tuple(ids.shape)}, got {got}")
    there = boundaries.cpu()
    return there if bool(there.any()) else None
