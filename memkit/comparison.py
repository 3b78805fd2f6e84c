"""The main job: one stock language model reads one text under several memory policies.

What each policy costs and how well the model then predicts are measured in one run, on the same tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from memkit.budgets import Budget
from memkit.errors import InputError, ModelError, short, shown
from memkit.layers import AnyLayers, LayerPoliciesSpec, as_layers
from memkit.rendering import render
from memkit.subject import reading, subject, text_and_source
from memkit.texts import default_text, second_text
from memkit.version import __version__
from memkit.whole import SEEDS, whole_number

if TYPE_CHECKING:
    import pandas

    from memkit.hf import LoadedModel

__all__ = ["DEFAULT_POLICIES", "Comparison", "Measurement", "Progress", "compare", "default_text", "second_text"]

DEFAULT_POLICIES = (
    "full",
    "untrained-observed-sqrt",
    "untrained-observed",
    "caote-512",
    "streaming-4-512",
)
BASELINE, STREAMING = "full", "streaming-4-512"
# Tokens per forward call, which bounds the activations. Longer ones are not faster: stock SmolLM2-135M read 4,096
# tokens on two cores in 11.6 s as 1 × 4,096 or 2 × 2,048, in 12.1 s as 4 × 1,024, in 12.6 s as 8 × 512.
SEGMENT = 4096
# Positions whose logits are held at once: 256 · 49,152 words · 4 bytes = 50 MB.
SLICE = 256

LENGTHS = {"policy": (4096, 1024), "full": (2304, 2048)}
"""Tokens, and the first that counts, where neither is given."""

SHOWN_SETTINGS = (
    "model", "parameters", "dtype", "context", "text", "tokens", "skip", "scored", "decoded", "overrides", "seed",
    "load_seconds", "device", "machine", "cores", "threads", "versions",
)  # fmt: skip
"""Settings without which a comparison cannot be shown."""

Progress = Callable[[str, int, int], None]
"""Called with (policy, tokens done, tokens in all) as a policy is measured."""
Head = Callable[[Tensor], Tensor]
"""Logits of last hidden states."""


@dataclass(frozen=True)
class Measurement:
    """What one policy cost, and how well the model predicted under it.

    policy: its name.
    loss: nats per token, the mean over the scored positions.
    difference: `loss` minus that of full attention at the same positions; difference_error: its standard error, taking
        positions for independent. Both None where full attention was not compared; so are the shares below.
    gap_closed: how much of the loss between StreamingLLM (`streaming-4-512`) and full attention it saves: 0 as the one,
        1 as the other; gap_error: its standard error, paired by position. None where one of the two was not compared,
        where full attention predicts no better, or where a loss is no finite number.
    second_loss, second_gap_closed, second_gap_error: the same for the second text; None where there is none.
    slots, window: slots, and tokens seen exactly, once the text is read: the mean over layers and heads, rounded.
    held_share: slots + window as a share of full attention's.
    bytes: all that the memories of all layers hold then, room to grow included; bytes_share: of full attention's.
    peak_bytes: the most they held after reading or after any decoded token.
    read_seconds: to read the text, logits excluded; tokens_per_second: tokens read in one of them.
    decode_ms: milliseconds per token decoded after reading, logits included; the median of `settings["decoded"]`.
    front: no other policy holds at most as many bytes and loses at most as much, one of the two strictly; and the loss
        is a finite number.
    """

    policy: str
    loss: float
    difference: float | None
    difference_error: float | None
    slots: int
    window: int
    held_share: float | None
    bytes: int
    bytes_share: float | None
    read_seconds: float
    decode_ms: float
    front: bool = False
    peak_bytes: int = 0
    tokens_per_second: float = 0.0
    gap_closed: float | None = None
    gap_error: float | None = None
    second_loss: float | None = None
    second_gap_closed: float | None = None
    second_gap_error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The measurements of one run, in the order asked for, and its settings.

    settings: model, parameters, dtype, context (tokens the model was trained for, or None), text, text_sha256,
    second_text, second_text_sha256 (None without one), tokens, skip, prefill, rows, share, bytes, scored (positions in
    the loss), decoded, overrides, seed, load_seconds, device, machine, cores, threads, versions.
    """

    settings: dict[str, Any]
    policies: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """`{"settings": {…}, "policies": [{"policy": …, "loss": …, …}]}`; keys as in this class and `Measurement`."""
        return {"settings": self.settings, "policies": [asdict(measurement) for measurement in self.policies]}

    def to_json(self) -> str:
        """`to_dict()` as indented JSON. What was not measured is null."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """What `to_json` wrote. Raises `InputError` for anything else."""
        try:
            data = json.loads(text)
            settings, rows = dict(data["settings"]), [Measurement(**row) for row in data["policies"]]
            if missing := [name for name in SHOWN_SETTINGS if name not in settings]:
                raise KeyError(missing[0])
            if not rows:
                raise ValueError("no policies")
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(
                f"a comparison must be the JSON that memkit compare --json writes, got {type(error).__name__}: "
                f"{short(str(error))}"
            ) from None
        return cls(settings, tuple(rows))

    def to_pandas(self) -> pandas.DataFrame:
        """One row per policy, one column per field of `Measurement`; the settings are in `.attrs`."""
        try:
            import pandas
        except ImportError:
            raise ModelError("to_pandas needs pandas, which is not installed; run: pip install pandas") from None
        frame = pandas.DataFrame([asdict(measurement) for measurement in self.policies])
        frame.attrs.update(self.settings)
        return frame

    def table(self) -> Any:
        """A rich table sorted by memory with the memory–loss front marked, settings below: `rich.print(c.table())`."""
        return render(self, "table")

    def plot(self, axes: Any = None) -> Any:
        """Loss against memory, the front drawn as a line; into matplotlib `axes`, or into a new figure; the axes.

        Raises `ModelError` where matplotlib is not installed.
        """
        return render(self, "plot", axes)


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

    measured: list[_Measured] = []
    with reading(loaded, seed):
        for label, layers in asked.policies:
            report = progress or _say_nothing
            measured.append(_measure(loaded, layers, label, ids, other_ids, skip, decoded, prefill, report))

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
        **_machine(loaded.model.device),
    }
    streaming = asked.also(as_layers(STREAMING))
    return Comparison(settings, _against_others(measured, streaming))


@dataclass(frozen=True)
class _Measured:
    """One policy's measurement, and its loss at each scored position of both texts, float64 [n − skip]."""

    layers: LayerPoliciesSpec
    entry: Measurement
    losses: Tensor
    second_losses: Tensor | None


@dataclass(frozen=True)
class _Reading:
    """A text that was read: the cache, the last token's state, the loss at each scored position, and the seconds."""

    cache: Any
    last: Tensor
    losses: Tensor
    seconds: float


def _read(model: Any, head: Head, ids: Tensor, skip: int, prompt: int | None, done: Callable[[int], None]) -> _Reading:
    """Let the attached model read `ids` [1, n], the first `prompt` of them in one call of their own."""
    from memkit.hf.names import returned_cache, with_cache

    seconds, cache, hidden = 0.0, None, ids.new_empty(0)
    losses: list[Tensor] = []
    starts = [*([] if prompt is None else [0]), *range(prompt or 0, ids.shape[1], SEGMENT), ids.shape[1]]
    for begin, end in pairwise(starts):
        part = ids[:, begin:end]
        start = _now(ids.device)
        output = model.base_model(part, use_cache=True, **with_cache(model.base_model, cache))
        seconds += _now(ids.device) - start
        cache, hidden = returned_cache(output), output.last_hidden_state[0]
        first = max(0, skip - 1 - begin)  # the state of token i predicts token i + 1
        losses += _losses(head, hidden[first:], ids[0, begin + first + 1 : end + 1])
        done(end)
    return _Reading(cache, hidden[-1], torch.cat(losses), seconds)


def _measure(
    loaded: LoadedModel,
    policies: LayerPoliciesSpec,
    label: str,
    ids: Tensor,
    second_ids: Tensor | None,
    skip: int,
    decoded: int,
    prefill: Literal["policy", "full"],
    progress: Progress,
) -> _Measured:
    """Read `ids` [1, n], then decode; read the second text, where there is one."""
    from memkit import hf
    from memkit.hf.logits import output_head
    from memkit.hf.names import with_cache

    model: Any = loaded.model
    tokens = ids.shape[1]
    all_tokens = tokens + decoded + (0 if second_ids is None else tokens)
    times: list[float] = []
    progress(label, 0, all_tokens)
    prompt = skip if prefill == "full" else None
    words = hf.connecting_ids(loaded.tokenizer) if prefill == "full" else None
    with hf.attach(model, policies, prefill=prefill, connecting=words):
        model.base_model(ids[:, :SLICE], use_cache=True)  # the first call allocates; not counted
        head = output_head(model)
        reading = _read(model, head, ids, skip, prompt, lambda done: progress(label, done, all_tokens))
        layers = hf.memories(reading.cache)
        held = peak = sum(memory.bytes for memory in layers)
        slots = round(statistics.mean(float(memory.slots[0].double().mean()) for memory in layers))
        window = round(statistics.mean(int(memory.held_rows[0]) for memory in layers))
        token = head(reading.last).argmax().view(1, 1)
        for step in range(decoded):
            start = _now(ids.device)
            logits = model(token, use_cache=True, **with_cache(model, reading.cache)).logits
            times.append(_now(ids.device) - start)
            token = logits[:, -1:].argmax(-1)
            peak = max(peak, sum(memory.bytes for memory in hf.memories(reading.cache)))
            progress(label, tokens + step + 1, all_tokens)
        second = None
        if second_ids is not None:
            before = tokens + decoded
            second = _read(model, head, second_ids, skip, prompt, lambda n: progress(label, before + n, all_tokens))
    entry = Measurement(
        policy=label,
        loss=float(reading.losses.mean()),
        difference=None,
        difference_error=None,
        slots=slots,
        window=window,
        held_share=None,
        bytes=held,
        bytes_share=None,
        read_seconds=reading.seconds,
        decode_ms=1000 * statistics.median(times),
        peak_bytes=peak,
        tokens_per_second=tokens / reading.seconds,
        second_loss=None if second is None else float(second.losses.mean()),
    )
    return _Measured(policies, entry, reading.losses, None if second is None else second.losses)


def _losses(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """−ln p(target) of states hidden [n, width] (one more than targets at the text's end), slice by slice."""
    for states, words in zip(hidden[: len(targets)].split(SLICE), targets.split(SLICE), strict=True):
        yield nn.functional.cross_entropy(head(states).float(), words, reduction="none").double().cpu()


def _against_others(
    measured: list[_Measured], streaming_spec: LayerPoliciesSpec | None = None
) -> tuple[Measurement, ...]:
    """Fill in what compares a policy with the others."""
    full = _find(measured, as_layers(BASELINE))
    streaming = _find(measured, streaming_spec or as_layers(STREAMING))
    entries = [each.entry for each in measured]
    done: list[Measurement] = []
    for each in measured:
        beaten = any(_dominates(other, each.entry) for other in entries)
        entry = replace(each.entry, front=math.isfinite(each.entry.loss) and not beaten)
        if full is not None:
            gap = each.losses - full.losses
            entry = replace(
                entry,
                difference=float(gap.mean()),
                difference_error=float(gap.std(correction=0) / len(gap) ** 0.5),
                held_share=(entry.slots + entry.window) / (full.entry.slots + full.entry.window),
                bytes_share=entry.bytes / full.entry.bytes,
            )
        if full is not None and streaming is not None:
            closed, error = _closed(each.losses, full.losses, streaming.losses)
            entry = replace(entry, gap_closed=closed, gap_error=error)
            if each.second_losses is not None and full.second_losses is not None:
                assert streaming.second_losses is not None
                closed, error = _closed(each.second_losses, full.second_losses, streaming.second_losses)
                entry = replace(entry, second_gap_closed=closed, second_gap_error=error)
        done.append(entry)
    return tuple(done)


def _closed(losses: Tensor, full: Tensor, streaming: Tensor) -> tuple[float | None, float | None]:
    """The share of the gap from streaming to full attention that is closed, and its standard error.

    Both None where there is no gap, or a loss is no finite number.
    """
    gap, saved = float((streaming - full).mean()), streaming - losses
    if not (gap > 0 and math.isfinite(gap) and bool(saved.isfinite().all())):
        return None, None
    return float(saved.mean()) / gap, float(saved.std(correction=0)) / len(saved) ** 0.5 / gap


def _find(measured: list[_Measured], layers: LayerPoliciesSpec) -> _Measured | None:
    """What was measured under these policies."""
    return next((each for each in measured if each.layers == layers), None)


def _dominates(one: Measurement, other: Measurement) -> bool:
    no_worse = one.bytes <= other.bytes and one.loss <= other.loss
    return no_worse and (one.bytes < other.bytes or one.loss < other.loss)


def _second(text: str | Path | None, second: str | Path | None) -> tuple[str, str | None]:
    """Where the second text comes from, and the text; None where there is none."""
    if second is not None:
        return text_and_source(second)
    return (
        f"IDLE's help, Python {platform.python_version()} (no policy was chosen on it)",
        second_text() if text is None else None,
    )


def _tokenized(loaded: LoadedModel, text: str) -> list[int]:
    return loaded.tokenizer(text, verbose=False)["input_ids"]


def _token_ids(loaded: LoadedModel, source: str, text: str, tokens: int) -> Tensor:
    ids = _tokenized(loaded, text)
    if len(ids) < tokens:
        raise InputError(
            f"tokens must be at most {len(ids)}, the length of {source}, got {tokens}; lower it or give a longer text"
        )
    return torch.tensor([ids[:tokens]], device=loaded.model.device)


def _machine(device: torch.device) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": f"{cpu}, {platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **_installed("torch", "transformers"),
            "memkit": __version__,
        },
    }


def _installed(*packages: str) -> dict[str, str]:
    """The versions of those that are there."""
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _say_nothing(policy: str, done: int, total: int) -> None:
    """No progress."""
