"""A text read in full, and then compressed at once: what leaves the window does so together, and competes once.

For a prompt that is read exactly and then kept small, as tools that compress a cache do (SnapKV, arXiv 2404.14469;
KVzip, 2505.23416). What rows are worth is asked of a few queries, the readers:

- `next`: queries of the text, turned to positions behind its end, which meet every row: somebody who goes on with it;
- `window`: the observed queries of the newest chunk, where they stand;
- `repeat`: queries of a second reading of the text, where they stand: somebody who may ask for any of it (KVzip).

Under `admission: expected-attention` it is asked of readers who are expected, as all of the text's queries are.

From here on the memory is the policy's own, and goes on chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine.autocast import autocasts, without_autocast
from memkit.engine.carry import close, open_store, open_timeline
from memkit.engine.checks import check, check_readers
from memkit.engine.expected import expected_shares
from memkit.engine.heads import by_heads
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import scaled
from memkit.engine.observe import Observer
from memkit.engine.plan import compete, place
from memkit.engine.schedule import LeavingChunk, Schedule
from memkit.errors import InputError
from memkit.memory import HeadsMemory, Memory
from memkit.memory.contest import Contest
from memkit.memory.replacing import replace
from memkit.memory.rows import Chunk, SlotRules, memory_keys
from memkit.memory.slots import SlotStore
from memkit.memory.window import Timeline
from memkit.parameters import PolicyParameters
from memkit.pieces.admission import Expectation, mean_of_neighbours
from memkit.pieces.evidence import AGAIN, ERROR, SHARE, Missed, output_errors, softmax_evidence
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy, PolicySpec

__all__ = ["ASKED", "compress", "next_readers", "repeat_readers", "row_worth"]

ASKED = 256
"""Readers who go on: so many queries of the text's end, and as many from everywhere in it."""
ASKED_AGAIN, ONE_IN = 512, 4
"""Readers who read the text again: so many of its second reading's queries at least, and one in four of a longer
text's. With one in fourteen, numbers that 7,168 tokens said were lost (docs/benchmarks.md)."""
AT_ONCE = 512
"""Readers who are asked together: scores are for so many of them and all rows."""
FIRST = 16
"""The first of those: earlier ones see hardly anything but sinks."""
NEIGHBOURS = 3
"""Rows over which the root of the output error is averaged: what is worth keeping seldom stands alone."""
LEAST_SHARE = 1e-7
"""Of the softmax, what a row has that nobody asks for: of the shares of thousands of rows, many are all but 0."""


@torch.no_grad()
def compress(
    policy: str | Path | PolicySpec | Policy,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    weights: Tensor | None = None,
    parameters: PolicyParameters | None = None,
    rotation: Rotation | None = None,
    scale: float | None = None,
    readers: Tensor | Sequence[Tensor] | None = None,
) -> Memory:
    """The memory of a text that was read in full, as if all that is older than the window left it now.

    No gradient flows into it.

    Args:
        policy: as for `attend`, and so are the tensors.
        queries: [b, h, t, d]: the text's.
        keys, values: [b, g, t, d], [b, g, t, v]. All rows have t tokens.
        weights, parameters, rotation, scale: as for `attend`.
        readers: queries [b, h, n, d] that say what rows are worth, turned to where they ask from; they see all of the
            text. Several such tensors: the mean of what each says. None: the observed queries of the newest chunk. Only
            for policies that observe, and do not expect readers of their own (`admission: expected-attention`).

    Raises `InputError` where these do not fit each other or the policy, `PolicyError` for a policy that is not there.
    """
    for name, tensor in (("queries", queries), ("values", values)):
        if tensor is None:  # `check` takes them as left out, for a plan
            raise InputError(f"{name} must be a tensor [batch, heads, tokens, width], got None")
    given = AttendInputs(
        as_policy(policy), queries, keys, values, weights, parameters, rotation, scale, None, None, None
    )
    inputs = check(given)
    groups = [readers] if isinstance(readers, Tensor) else readers
    groups = _checked_readers(inputs.policy, queries, groups)
    with without_autocast(keys.device) if autocasts(keys.device) else nullcontext():
        if not inputs.policy.head_policies:
            return _compressed(inputs, groups)
        each = [_compressed(check(part), [readers[:, heads] for readers in groups]) for heads, part in by_heads(given)]
        return HeadsMemory(inputs.policy, each)


def _checked_readers(policy: Policy, queries: Tensor, given: Sequence[Tensor] | None) -> list[Tensor]:
    """Groups of readers; none where the newest chunk's queries are asked."""
    if given is None:
        return []
    if not policy.observes:
        raise InputError("readers are given, but this policy observes no queries; leave them out")
    if policy.expects is not None:
        raise InputError(
            f"readers are given, but admission {policy.spec.admission.kind} expects them to be as the text's own "
            "queries; leave them out"
        )
    if not isinstance(given, (list, tuple)) or not given:
        raise InputError(
            f"readers must be a tensor [b, h, n, d] of one query at least, or several, got {type(given).__name__}"
        )
    for readers in given:
        check_readers(readers, queries.shape[0], queries.shape[1], queries.shape[3])
    return list(given)


def next_readers(queries: Tensor, rotation: Rotation) -> Tensor:
    """Those who go on with the text: some of its queries [b, h, t, d], turned to places behind its end, [b, h, n, d].

    The queries stand at positions 0 … t − 1. The last 256 of them and 256 evenly spaced ones are asked, each at a
    position of its own among the 256 that follow the text: one draw for all layers and heads.
    """
    tokens, device = queries.shape[2], queries.device
    last = torch.arange(max(0, tokens - ASKED), tokens, device=device)
    spread = torch.linspace(min(FIRST, tokens - 1), tokens - 1, min(ASKED, tokens), device=device).long()
    asked = torch.cat((last, spread))
    ahead = torch.randint(ASKED, (len(asked),), generator=torch.Generator().manual_seed(0)).to(device)
    return rotation.apply(queries[:, :, asked], tokens + ahead - asked)


def repeat_readers(queries: Tensor) -> Tensor:
    """Those who read the text again: 512 of the second reading's queries [b, h, t, d], or a quarter of them if that is
    more, evenly spaced, where they stand, [b, h, n, d]."""
    tokens = queries.shape[2]
    count = min(max(ASKED_AGAIN, tokens // ONE_IN), tokens)
    return queries[:, :, (torch.arange(count, device=queries.device) + 1) * tokens // count - 1]


def row_worth(
    readers: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    hidden: Tensor | None = None,
    neighbours: int = NEIGHBOURS,
    missed: Missed = output_errors,
) -> tuple[Tensor, Tensor]:
    """What each row is worth to the readers: the root of what they would miss, averaged over neighbours, and the share.

    readers [b, h, n, d], keys [b, g, t, d], values [b, g, t, v]; hidden [n, t]: what a reader does not see; None: it
    sees all. Both results [b, g, t], float32 or float64.
    """
    wide, group = torch.promote_types(keys.dtype, torch.float32), readers.shape[1] // keys.shape[1]
    count = readers.shape[2]
    roots: list[Tensor] = []
    shares: list[Tensor] = []
    for head in range(keys.shape[1]):  # one at a time, and a part of the readers: [readers, t] scores are large
        key, value = (each[:, head : head + 1].to(wide) for each in (keys, values))
        told = key.new_zeros(*key.shape[:3], AGAIN)
        for part in (slice(first, first + AT_ONCE) for first in range(0, count, AT_ONCE)):
            asked = readers[:, head * group : (head + 1) * group, part].to(wide)
            scores = asked.flatten(1, 2).unsqueeze(1) @ key.mT * scale
            if hidden is not None:
                scores.masked_fill_(hidden[part].repeat(group, 1), -torch.inf)
            told.add_(softmax_evidence(scores, value, missed=missed)[1], alpha=asked.shape[2] / count)
        roots.append(mean_of_neighbours(told[..., ERROR].sqrt(), neighbours))
        shares.append(told[..., SHARE])
    return torch.cat(roots, dim=1), torch.cat(shares, dim=1)


def _compressed(inputs: AttendInputs, readers: list[Tensor]) -> Memory:
    policy, keys = inputs.policy, inputs.keys
    rows, _, tokens, width = keys.shape
    schedule = Schedule(policy, np.zeros(rows, dtype=np.int64), inputs.row_lengths, tokens)
    timeline, following = open_timeline(inputs, schedule)
    observer = Observer(inputs, schedule) if policy.observes else None
    if observer is not None and tokens:
        _observe(inputs, timeline, readers)
    store = open_store(inputs, schedule, timeline)
    left = int(schedule.left_after.max(initial=0))
    new, sinks = min(left, policy.slots_after(tokens)), min(left, policy.sinks)
    rules = SlotRules(policy, width, keys.dtype, inputs.key_norm, inputs.rotation, valued=True)
    if left and store.room:
        _fold(rules, store, timeline, left, new, sinks)
    memory = close(inputs, rules, schedule, timeline, store, following)
    memory.observed = None if observer is None else observer.waiting()
    return memory


def _fold(rules: SlotRules, store: SlotStore, timeline: Timeline, left: int, new: int, sinks: int) -> None:
    """PLAN and FOLD all tokens that leave, as one chunk."""
    where = slice(0, left)
    chunk = Chunk.of(timeline.streams, where, first=True)
    chunk.memory_keys = memory_keys(rules, chunk)
    if rules.policy.replaces:
        contest = Contest(kept=0, size=left, before=(0,) * len(chunk.keys), after=(new,) * len(chunk.keys))
        replace(store, rules, compete(rules, chunk, store, contest, sinks), chunk, contest)
        return
    everyone = np.ones(len(chunk.keys), dtype=np.int64)
    leaving = LeavingChunk(left, everyone > 0, 0 * everyone, 0 * everyone, new * everyone, sinks * everyone)
    store.add(rules, place(rules, leaving, chunk, store), chunk)


def _observe(inputs: AttendInputs, timeline: Timeline, readers: list[Tensor]) -> None:
    """Write into the timeline what the readers say of every row: the mean over groups of them."""
    assert inputs.queries is not None
    policy, tokens, device, hidden = inputs.policy, inputs.keys.shape[2], inputs.keys.device, None
    scales = None if inputs.parameters is None else inputs.parameters.query_scale_window
    if policy.expects is not None:
        share = _expected(inputs, timeline, policy.expects)
        timeline.streams["evidence"].copy_(torch.stack((0 * share, share, torch.ones_like(share)), dim=-1))
        return
    read_again = policy.observation.again > 0 and bool(readers)  # by whoever was given
    if not readers:
        offsets = policy.observation.offsets_in(min(policy.chunk, tokens))
        stand = torch.tensor(offsets, device=device) + max(0, tokens - policy.chunk)
        readers = [inputs.queries[:, :, stand]]
        hidden = torch.arange(tokens, device=device) > stand[:, None]
    pools = policy.admission is not None and policy.admission.pools_errors
    rest = (inputs.checked_scale, hidden, 1 if pools else NEIGHBOURS, policy.missed)
    told: list[Tensor] = []
    for group in readers:
        root, share = row_worth(scaled(group, scales), inputs.keys, timeline.values, *rest)
        told.append(torch.stack((root.square(), share + LEAST_SHARE, torch.ones_like(share)), dim=-1))
    evidence, mean = timeline.streams["evidence"], torch.stack(told).mean(0)
    evidence[..., :AGAIN].copy_(mean)
    if read_again:
        evidence[..., AGAIN] = mean[..., ERROR]
        evidence[..., ERROR] = 0


def _expected(inputs: AttendInputs, timeline: Timeline, expects: Expectation) -> Tensor:
    """What each row is expected to get from those who go on with the text and ask as it did, [b, g, t]; sinks: 0."""
    assert inputs.queries is not None and inputs.rotation is not None
    sinks, wide = inputs.policy.sinks, timeline.streams["evidence"].dtype
    first = sinks if sinks < inputs.keys.shape[2] else 0
    positions = timeline.streams["positions"]
    ahead = positions[:, :, -1:] + 1 - positions[:, :, first:]
    queries = inputs.queries[:, :, first:].to(wide)
    queries = queries if inputs.parameters is None else scaled(queries, inputs.parameters.query_scale_window)
    turned = inputs.rotation.apply(queries, ahead)
    return expected_shares(expects, turned, inputs.keys.to(wide), inputs.checked_scale, inputs.rotation, sinks=sinks)
