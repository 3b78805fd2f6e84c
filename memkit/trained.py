"""A trained `MemoryLM` beside itself: it reads one text under its own policy and under others.

What `memkit compare --model tiny-kvm-sqrt` does. Nothing but memkit is needed for it.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memkit.catalog import load_policy
from memkit.comparison import Comparison, Measurement, Progress
from memkit.comparison.against import Measured, against_others
from memkit.comparison.measure import SEGMENT, SLICE
from memkit.errors import InputError, ModelError, shown
from memkit.layers import as_layers
from memkit.lm import AttentionMixerSpec, ByteTokenizer, MemoryLM, ModelMemory, load_model, load_model_spec
from memkit.lm.catalog import weights_file
from memkit.machine import machine_facts
from memkit.memory import Memory
from memkit.policy import Policy, PolicySpec
from memkit.subject import text_and_source
from memkit.texts import idle_help
from memkit.whole import SEEDS, whole_number

__all__ = ["compare_trained"]

OWN, DELETED = "as trained", "slots deleted"


def compare_trained(
    model: str | Path,
    policies: Iterable[str | Path | PolicySpec] | None = None,
    *,
    text: str | Path | None = None,
    tokens: int = 4096,
    skip: int = 1024,
    overrides: Mapping[str, Any] | None = None,
    decoded: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Let a model with weights read a text under its own policy and under others, and measure cost and loss.

    Args:
        model: a shipped model's name, a YAML file or a folder, with weights beside it, over bytes.
        policies: besides its own. None: the same with its slots deleted, and full attention.
        text: a path, or the text itself; None: IDLE's help, which no shipped model was trained on.
        tokens: read; skip: the loss is that of tokens skip … tokens − 1; decoded: tokens decoded for their time.
        overrides: fields to change in `policies`; refused where these are None, for they would change nothing.
        seed: for torch while this runs.
        progress: called as `compare` calls it.

    Raises `InputError`, `ModelError`, `PolicyError`.
    """
    skip, tokens = whole_number("skip", skip, 1), whole_number("tokens", tokens, 1)
    decoded, seed = whole_number("decoded", decoded, 1), whole_number("seed", seed, *SEEDS)
    if tokens <= skip:
        raise InputError(f"tokens must be at least skip + 1, {skip + 1}, got {tokens}")
    if policies is None and overrides:
        raise InputError(
            f"overrides (--set) change the policies that are named besides the model's own, got {shown(overrides)} and "
            "no policy; name one, or leave them out"
        )
    spec = load_model_spec(model)
    if weights_file(model) is None:
        raise ModelError(f"{model}: no weights beside it, so there is nothing to compare; train it with memkit train")
    if spec.vocabulary != ByteTokenizer.vocabulary:
        raise ModelError(f"{model}: must read bytes, 256 token ids, got {spec.vocabulary}")
    kinds = [mixer.policy for mixer in spec.mixers if isinstance(mixer, AttentionMixerSpec)]
    if not kinds:
        raise ModelError(
            f"{model}: has no attention layer, so that there is no policy to compare under; name a model that has some"
        )
    if any(policy != kinds[0] for policy in kinds):
        raise ModelError(f"{model}: must have one policy in all its attention layers, got {len(set(kinds))}")
    source, words = _text(text)
    ids = torch.tensor([ByteTokenizer().encode(words)[:tokens]])
    if ids.shape[1] < tokens:
        raise InputError(
            f"tokens must be at most {ids.shape[1]}, the bytes of {source}, got {tokens}; "
            "lower it or give a longer text"
        )
    chosen = [(OWN, kinds[0]), *_others(policies, kinds[0], overrides)]
    begun = time.perf_counter()
    measured: list[Measured] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for label, policy in chosen:
            made = load_model(model, policy=policy)
            measured.append(_measure(made, label, policy.build(), ids, skip, decoded, progress or _say_nothing))
    settings = {
        "model": str(model),
        "parameters": made.parameter_count,  # type: ignore[possibly-undefined]
        "dtype": str(made.head.weight.dtype).removeprefix("torch."),  # type: ignore[possibly-undefined]
        "context": None,
        "text": source,
        "text_sha256": hashlib.sha256(words.encode()).hexdigest(),
        "second_text": None,
        "second_text_sha256": None,
        "tokens": tokens,
        "skip": skip,
        "prefill": "policy",
        "rows": None,
        "share": None,
        "bytes": None,
        "scored": tokens - skip,
        "decoded": decoded,
        "overrides": dict(overrides or {}),
        "seed": seed,
        "load_seconds": time.perf_counter() - begun - sum(each.entry.read_seconds for each in measured),
        **machine_facts(ids.device),
    }
    return Comparison(settings, against_others(measured))


def _text(text: str | Path | None) -> tuple[str, str]:
    """Where the text comes from, and the text."""
    if text is not None:
        return text_and_source(text)
    other = idle_help()
    if other is None:
        raise InputError("this Python came without IDLE's help, the text that is read by default; give one with --text")
    return f"IDLE's help, Python {platform.python_version()}", other


def _others(
    policies: Iterable[str | Path | PolicySpec] | None, own: PolicySpec, overrides: Mapping[str, Any] | None
) -> list[tuple[str, PolicySpec]]:
    """The other policies, each with a name."""
    if policies is not None:
        specs = [load_policy(policy, overrides) for policy in policies]
        return [(spec.name or f"policy {number}", spec) for number, spec in enumerate(specs, 1)]
    full = load_policy("full")
    found = [] if own.growth.kind == "none" else [(DELETED, load_policy(own, {"growth.kind": "none"}))]
    return found if own == full else [*found, ("full", full)]


def _measure(
    model: MemoryLM, label: str, policy: Policy, ids: Tensor, skip: int, decoded: int, progress: Progress
) -> Measured:
    """Read ids [1, n], then decode."""
    tokens, losses, seconds = ids.shape[1], list[Tensor](), 0.0
    memory: ModelMemory | None = None
    states = ids.new_empty(0)
    model.read(ids[:, :SLICE])  # the first call allocates; not counted
    for begin, end in pairwise([*range(0, tokens, SEGMENT), tokens]):
        start = time.perf_counter()
        states, memory = model.read(ids[:, begin:end], memory)
        seconds += time.perf_counter() - start
        first = max(0, skip - 1 - begin)  # the state of token i predicts token i + 1
        wanted = ids[0, begin + first + 1 : end + 1]
        logits = model.head(states[0, first : first + len(wanted)]).float()
        losses.append(nn.functional.cross_entropy(logits, wanted, reduction="none").double())
        progress(label, end, tokens + decoded)
    assert memory is not None
    held = peak = memory.bytes
    layers = [each for each in memory.memories if isinstance(each, Memory)]
    slots = round(statistics.mean(float(each.slots[0]) for each in layers))
    window, times = int(layers[0].held_rows[0]), list[float]()
    token = model.head(states[:, -1]).argmax(-1, keepdim=True)
    for step in range(decoded):
        start = time.perf_counter()
        states, memory = model.read(token, memory)
        token = model.head(states[:, -1]).argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
        peak = max(peak, memory.bytes)
        progress(label, tokens + step + 1, tokens + decoded)
    every = torch.cat(losses)
    entry = Measurement(
        policy=label,
        loss=float(every.mean()),
        difference=None,
        difference_error=None,
        slots=slots,
        window=window,
        held_share=None,
        bytes=held,
        bytes_share=None,
        read_seconds=seconds,
        decode_ms=1000 * statistics.median(times),
        peak_bytes=peak,
        tokens_per_second=tokens / seconds,
    )
    return Measured(as_layers(policy), entry, every, None)


def _say_nothing(policy: str, done: int, total: int) -> None:
    """No progress."""
