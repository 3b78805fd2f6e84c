"""`compare`: arguments are checked, and each policy is measured on the same tokens."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from memkit.budgets import Budget
from memkit.comparison.against import STREAMING, Measured, against_others
from memkit.comparison.measure import Progress, measure
from memkit.comparison.record import Comparison
from memkit.errors import InputError, shown
from memkit.layers import AnyLayers, LayerPoliciesSpec, as_layers
from memkit.machine import machine_facts
from memkit.subject import Subject, reading, subject, text_and_source
from memkit.texts import second_text
from memkit.whole import SEEDS, whole_number

if TYPE_CHECKING:
    from memkit.hf import LoadedModel

__all__ = ["DEFAULT_POLICIES", "compare"]

DEFAULT_POLICIES = (
    "full",
    "untrained-observed-sqrt",
    "untrained-observed",
    "caote-512",
    "streaming-4-512",
)

LENGTHS = {"policy": (4096, 1024), "full": (2304, 2048)}
"""Tokens, and the first that counts, where neither is given."""


def compare(
    policies: AnyLayers | Iterable[AnyLayers] | None = None,
    *,
    model: str | Path | LoadedModel | None = None,
    text: str | Path | None = None,
    second: str | Path | None = None,
    tokens: int | None = None,
    skip: int | None = None,
    prefill: Literal["policy", "full"] = "policy",
    rows: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    decoded: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Let a stock language model read `tokens` tokens of a text under each policy, and measure cost and loss.

    policies: names, files, specs or policies, or mappings of a policy per layer (`hf.attach`); left out,
        `DEFAULT_POLICIES`. overrides: fields to change in every one (`default.growth.slots` where layers differ).
    model: a Hugging Face folder, a GGUF file, or what `memkit.hf.load` gave; left out, SmolLM2-135M-Instruct.
    text: a path to read from, or the text itself; left out, `default_text()`. Its first tokens are read, then
    `decoded` more are decoded greedily for their time alone.
    second: another text, of which the loss alone is measured, over the same positions; left out where `text` is, too:
        `second_text()`, on which no shipped policy was chosen.
    tokens: left out, 4,096, or 2,304 where the prompt is read in full. skip: the loss is the mean of
        −ln p(token i | tokens before i) over i = skip … tokens − 1, the same for all; left out, 1,024 or 2,048.
    prefill: `policy`: bounded from the first chunk on; `full`: the first `skip` tokens are read exactly and then
        compressed at once, and the others are read from there (`hf.attach`).
    rows: slots and window that each head has at most, on average: put into every policy with a fixed number of slots
        or a sliding window; the others stay as they are. Left out: as the policies say. share: the same as a share of
        the `skip` tokens that `prefill="full"` compresses; bytes: as many as take no more bytes, for policies none of
        whose layers grows. One of the three at most.
    seed: for torch, set while this runs; nothing here draws at random unless a policy of yours does.
    progress: called with (policy, tokens done, tokens in all) as each policy is measured.

    Raises `InputError` for numbers that do not fit, `PolicyError` and `ModelError` as `load_policy`, `hf.load` and
    `hf.attach` do.
    """
    if prefill not in LENGTHS:
        raise InputError(f"prefill must be 'policy' or 'full', got {shown(prefill)}")
    tokens, skip = LENGTHS[prefill][0] if tokens is None else tokens, LENGTHS[prefill][1] if skip is None else skip
    skip, decoded = whole_number("skip", skip, 1), whole_number("decoded", decoded, 1)
    tokens = whole_number("tokens", tokens, 1)
    budget = Budget.of(rows, share, bytes, prefill)
    if tokens <= skip:
        raise InputError(
            f"tokens must be a whole number, at least {skip + 1} (skip + 1: something must be scored), got {tokens}"
        )
    seed = whole_number("seed", seed, *SEEDS)
    other_source, other = _second(text, second)
    asked = subject(DEFAULT_POLICIES if policies is None else policies, overrides, budget, skip, model, text)
    loaded, source, text = asked.loaded, asked.source, asked.text
    ids = _token_ids(loaded, source, text, tokens)
    if second is None and other is not None and len(_tokenized(loaded, other)) < tokens:
        other = None  # nobody has asked for it
    other_ids = None if other is None else _token_ids(loaded, other_source, other, tokens)

    streaming = _fitting(asked)  # said now, not once all has been read
    measured: list[Measured] = []
    with reading(loaded, seed):
        for label, layers in asked.policies:
            report = progress or _say_nothing
            measured.append(measure(loaded, layers, label, ids, other_ids, skip, decoded, prefill, report))

    settings = {
        "model": loaded.name,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "context": getattr(loaded.model.config, "max_position_embeddings", None),
        "text": source,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "second_text": None if other is None else other_source,
        "second_text_sha256": None if other is None else hashlib.sha256(other.encode()).hexdigest(),
        "tokens": tokens,
        "skip": skip,
        "prefill": prefill,
        "rows": rows,
        "share": share,
        "bytes": bytes,
        "scored": tokens - skip,
        "decoded": decoded,
        "overrides": dict(overrides or {}),
        "seed": seed,
        "load_seconds": loaded.seconds,
        **machine_facts(loaded.model.device),
    }
    return Comparison(settings, against_others(measured, streaming))


def _fitting(asked: Subject) -> LayerPoliciesSpec | None:
    """StreamingLLM with as many rows as the others, by which gaps are told; None where it cannot have so few."""
    try:
        return asked.also(as_layers(STREAMING))
    except InputError:
        return None


def _second(text: str | Path | None, second: str | Path | None) -> tuple[str, str | None]:
    """Where the second text comes from, and the text; None where there is none."""
    if second is not None:
        return text_and_source(second)
    return (
        f"IDLE's news to 2.7, Python {platform.python_version()} (no choice was made on it)",
        second_text() if text is None else None,
    )


def _tokenized(loaded: LoadedModel, text: str) -> list[int]:
    return loaded.tokenizer(text, verbose=False)["input_ids"]


def _token_ids(loaded: LoadedModel, source: str, text: str, tokens: int) -> Tensor:
    ids = _tokenized(loaded, text)
    if len(ids) < 2:
        raise InputError(f"{source} has no token to predict, got {len(ids)} tokens; give a longer text")
    if len(ids) < tokens:
        raise InputError(
            f"tokens must be at most {len(ids)}, the length of {source}, got {tokens}; lower it or give a longer text"
        )
    return torch.tensor([ids[:tokens]], device=loaded.model.device)


def _say_nothing(policy: str, done: int, total: int) -> None:
    """No progress."""
