"""Weights for a model whose policies are not those it was trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from memkit.parameters import FORMER_NAMES

__all__ = ["adapted"]

LEARNED = re.compile(r"\.mixer\.attention\.(learned\.\w+|gate\.weight)$")
"""Parameters that a layer has because of its policy."""


def adapted(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the parameters of policies that are gone, and with those of new ones as they start.

    wanted: the state of the model to fill, whose shapes alone are looked at. A memory-key LayerNorm starts at weight 1
    and bias 0, query scales at 1, and the merge gate at 0, by which every token weighs 1. All other names stay as they
    are, for `load_state_dict` to judge.
    """
    found = {_name_now(name): tensor for name, tensor in weights.items()}
    kept = {name: tensor for name, tensor in found.items() if name in wanted or not LEARNED.search(name)}
    dtype = next((tensor.dtype for tensor in kept.values()), torch.get_default_dtype())
    for name in wanted.keys() - kept.keys():
        if LEARNED.search(name):
            start = 0.0 if name.endswith(("key_norm_bias", "gate.weight")) else 1.0
            kept[name] = torch.full(wanted[name].shape, start, dtype=dtype)
    return kept


def _name_now(name: str) -> str:
    """A parameter's name, where the file has the one of a former release."""
    module, _, last = name.rpartition(".")
    return f"{module}.{FORMER_NAMES[last]}" if last in FORMER_NAMES else name
