"""One model reads a text under one policy: what it holds, how long it takes, and the loss at each position."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from memkit.comparison.against import Measured
from memkit.comparison.record import Measurement
from memkit.layers import LayerPoliciesSpec
from memkit.machine import now

if TYPE_CHECKING:
    from memkit.hf import LoadedModel

__all__ = ["SEGMENT", "SLICE", "Progress", "measure"]

SEGMENT = 4096
"""Tokens per forward call, which bounds the activations. Longer ones are not faster: stock SmolLM2-135M read 4,096
tokens on two cores in 11.6 s as 1 × 4,096 or 2 × 2,048, in 12.1 s as 4 × 1,024, in 12.6 s as 8 × 512."""
SLICE = 256
"""Positions whose logits are held at once: 256 · 49,152 words · 4 bytes = 50 MB."""

Progress = Callable[[str, int, int], None]
"""Called with (policy, tokens done, tokens in all) as a policy is measured."""
Head = Callable[[Tensor], Tensor]
"""Logits of last hidden states."""


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
        start = now(ids.device)
        output = model.base_model(part, use_cache=True, **with_cache(model.base_model, cache))
        seconds += now(ids.device) - start
        cache, hidden = returned_cache(output), output.last_hidden_state[0]
        first = max(0, skip - 1 - begin)  # the state of token i predicts token i + 1
        losses += _losses(head, hidden[first:], ids[0, begin + first + 1 : end + 1])
        done(end)
    return _Reading(cache, hidden[-1], torch.cat(losses), seconds)


def measure(
    loaded: LoadedModel,
    policies: LayerPoliciesSpec,
    label: str,
    ids: Tensor,
    second_ids: Tensor | None,
    skip: int,
    decoded: int,
    prefill: Literal["policy", "full"],
    progress: Progress,
) -> Measured:
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
    words = hf.connecting_ids(loaded.tokenizer)
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
            start = now(ids.device)
            logits = model(token, use_cache=True, **with_cache(model, reading.cache)).logits
            times.append(now(ids.device) - start)
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
    return Measured(policies, entry, reading.losses, None if second is None else second.losses)


def _losses(head: Head, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """−ln p(target) of states hidden [n, width] (one more than targets at the text's end), slice by slice."""
    for states, words in zip(hidden[: len(targets)].split(SLICE), targets.split(SLICE), strict=True):
        yield nn.functional.cross_entropy(head(states).float(), words, reduction="none").double().cpu()
