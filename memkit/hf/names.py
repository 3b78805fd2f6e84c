"""What the installed transformers calls the cache: `cache` from 5.24 on, `past_key_values` before.

Both are read off signatures and fields, never off a version, and nothing else in memkit knows that they differ: calls
take either name, and everything else asks here.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from memkit.errors import InputError, ModelError

__all__ = ["CACHE", "NAMES", "cache_argument", "returned_cache", "take_cache", "with_cache", "without_cache"]

# Newest first: releases that take both only warn of the older one, or drop it.
NAMES = ("cache", "past_key_values")


def _name_among(known: Any, where: str) -> str:
    for name in NAMES:
        if name in known:
            return name
    raise ModelError(
        f"{where} must have a cache, named {' or '.join(NAMES)}, got none in transformers {transformers.__version__}; "
        "install a release that memkit's hf extra allows"
    )


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument by which a `forward` takes its cache."""
    return _name_among(inspect.signature(forward).parameters, getattr(forward, "__qualname__", "forward"))


def _field(output: type) -> str:
    return _name_among({field.name for field in dataclasses.fields(output)}, output.__name__)


# What a causal language model's output calls it, and so what users know it as.
CACHE = _field(CausalLMOutputWithPast)


def returned_cache(output: Any) -> Any:
    """The cache in what a model, or its `generate` with `return_dict_in_generate=True`, returned."""
    return getattr(output, _field(type(output)))


def with_cache(module: Any, cache: Any) -> dict[str, Any]:
    """Keyword arguments that hand a cache to a model or a decoder: `model(ids, **with_cache(model, cache))`."""
    return {cache_argument(type(module).forward): cache}


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of a call's arguments, whichever name it has; None where there is none."""
    given = [(name, cache) for name in NAMES if (cache := arguments.pop(name, None)) is not None]
    if len(given) > 1:
        raise InputError(f"a call takes one cache, got both {' and '.join(NAMES)}; leave out {NAMES[-1]}")
    return given[0][1] if given else None


def without_cache(output: Any, cache: Any) -> Any:
    """What a decoder returned, without this cache: as it returns where none is asked for."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: each for name, each in output.items() if each is not cache})
    return type(output)(each for each in output if each is not cache)
