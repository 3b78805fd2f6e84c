"""Where the tokens of a text are, step by step: one head's policy run with a mark on every token.

A token's value gets a column of its own, tiny beside the values, and slots sum values: so which columns of a slot's
sum are not zero says which tokens are in it, whatever the policy does: merge, evict, drop or forget by halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine import attend
from memkit.errors import InputError
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.admission import Admission
from memkit.pieces.chunk import ChunkContext, maximum
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy, PolicySpec

__all__ = ["Decision", "Trace", "trace"]

MARK = 1e-4
"""What a mark is: values change by its square, 10⁻⁸ of themselves, which float32 can hardly tell."""

LOOKS = 64
"""Steps at most: where chunks are shorter than that, several are read between two looks."""


@dataclass(frozen=True)
class Decision:
    """A chunk that left the window: who was scored, and who got a row of its own.

    tokens_read: when; score [c]: of the candidates; slots: how many of them, the first ones, were slots before (where
    slots compete), the others the chunk's tokens; chosen [c] bool: who founded a slot, or kept it. The others joined
    another or are gone, as the policy's merging says.
    """

    tokens_read: int
    score: np.ndarray
    slots: int
    chosen: np.ndarray


@dataclass(frozen=True)
class Trace:
    """Where the tokens of one key/value head are after each of s steps.

    policy: its name; sinks: the first so many slots; joins: whether tokens that get no row of their own join another.
    tokens_read: after each step; window_begin: the first token that is seen exactly then; live: slots there are;
    slots [s, t]: the slot of each token, −1 in none: not read yet, in the window, or forgotten;
    decisions: of the admission, one per chunk; empty where nothing is scored.
    """

    policy: str
    sinks: int
    joins: bool
    tokens_read: tuple[int, ...]
    window_begin: tuple[int, ...]
    live: tuple[int, ...]
    slots: np.ndarray
    decisions: tuple[Decision, ...]

    def counts(self, look: int = -1) -> np.ndarray:
        """Tokens in each slot after a step, [live]."""
        inside = self.slots[look][self.slots[look] >= 0]
        return np.bincount(inside, minlength=self.live[look])

    def ages(self, look: int = -1) -> np.ndarray:
        """How many tokens ago a slot's tokens were read, on average, [live]; NaN where a slot has none."""
        tokens = np.flatnonzero(self.slots[look] >= 0)
        total = np.bincount(self.slots[look][tokens], self.tokens_read[look] - 1 - tokens, self.live[look])
        counts = self.counts(look)
        return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)

    def first_tokens(self, look: int = -1) -> dict[int, int]:
        """The earliest token of each slot."""
        found: dict[int, int] = {}
        for token in np.flatnonzero(self.slots[look] >= 0).tolist():
            found.setdefault(int(self.slots[look, token]), token)
        return found

    def forgotten(self, look: int = -1) -> int:
        """Tokens that left the window and are in no slot."""
        return int((self.slots[look, : self.window_begin[look]] < 0).sum())


@torch.no_grad()
def trace(
    policy: str | Path | PolicySpec | Policy,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    weights: Tensor | None = None,
    parameters: PolicyParameters | None = None,
    rotation: Rotation | None = None,
    scale: float | None = None,
) -> Trace:
    """Let one key/value head read a text under a policy, and look where its tokens are.

    Args:
        policy: as for `memkit.attend`; one whose heads differ is that of its first head.
        queries: [r, t, d], of the query heads that share this key/value head. They arrive rotated.
        keys: [t, d]. They arrive rotated.
        values: [t, v].
        weights: merge weights [t], where the policy's are learned.
        parameters: what the policy has learned, for r query heads.
        rotation: how keys were rotated, where the policy needs it.
        scale: of the scores; None: 1/√d.

    Raises:
        InputError: tensors that do not fit each other or the policy.
    """
    if queries.ndim != 3 or keys.ndim != 2 or values.ndim != 2:
        raise InputError(
            "one head at a time: queries must be [r, t, d], keys [t, d] and values [t, v], got "
            f"{list(queries.shape)}, {list(keys.shape)} and {list(values.shape)}"
        )
    built = as_policy(policy)
    watched = _Watched(built.head_policies[0][1] if built.head_policies else built)
    tokens, width = len(keys), values.shape[1]
    size = MARK * float(values.float().norm(dim=1).mean().clamp(min=1e-12))
    marked = torch.cat((values, size * torch.eye(tokens, dtype=values.dtype, device=values.device)), dim=1)
    unit = max(watched.chunk, 1)
    step = unit * -(-tokens // (LOOKS * unit))
    memory: Memory | None = None
    found: list[np.ndarray] = []
    looks: list[int] = []
    for begin in range(0, tokens, step):
        end = min(tokens, begin + step)
        watched.log.tokens_read = end
        _, memory = attend(
            watched,
            queries[None, :, begin:end],
            keys[None, None, begin:end],
            marked[None, None, begin:end],
            weights=None if weights is None else weights[None, None, begin:end],
            parameters=parameters,
            rotation=rotation,
            scale=scale,
            memory=memory,
        )
        found.append(_slot_of_each(memory.sums[0, 0, : int(memory.live_rows[0]), keys.shape[1] + width :]))
        looks.append(end)
    return Trace(
        policy=built.name or "unnamed",
        sinks=watched.sinks,
        joins=watched.merging.joins,
        tokens_read=tuple(looks),
        window_begin=tuple(int(watched.window.begin(end - 1)) for end in looks),
        live=tuple(watched.slots_after(end) for end in looks),
        slots=np.stack(found),
        decisions=tuple(watched.log.decisions),
    )


def _slot_of_each(marks: Tensor) -> np.ndarray:
    """From the marks in each slot [m, t]: the slot of each token, −1 for none, [t]."""
    held = marks > 0
    if not len(held):
        return np.full(marks.shape[1], -1)
    return torch.where(held.any(0), held.int().argmax(0), -1).cpu().numpy()


class _Log(Admission):
    """An admission that notes what it said."""

    def __init__(self, inner: Admission) -> None:
        self.inner, self.tokens_read = inner, 0
        self.decisions: list[Decision] = []
        self.compares, self.rates_slots = inner.compares, inner.rates_slots  # pyright: ignore[reportAttributeAccessIssue]
        self.expects, self.pools_errors = inner.expects, inner.pools_errors
        self.fills_up = inner.fills_up  # pyright: ignore[reportAttributeAccessIssue]
        self.needs_evidence = inner.needs_evidence  # pyright: ignore[reportAttributeAccessIssue]
        self.chunk = 0

    def score(self, chunk: ChunkContext) -> Tensor:
        score = self.inner.score(chunk)
        each = score.expand(chunk.shape)[0, 0]
        first = maximum(chunk.sink_tokens, chunk.is_first) if self.compares else chunk.sink_tokens
        ranked = each.double().masked_fill(chunk.offsets < int(first), torch.inf)
        chosen = torch.zeros(len(each), dtype=torch.bool)
        chosen[ranked.argsort(descending=True, stable=True)[: int(chunk.new_slots)].cpu()] = True
        slots = len(each) - self.chunk
        self.decisions.append(Decision(self.tokens_read, each.double().cpu().numpy(), max(0, slots), chosen.numpy()))
        return score


class _NoLog:
    """Where nothing is scored."""

    tokens_read = 0
    decisions: tuple[Decision, ...] = ()


class _Watched(Policy):
    """A policy whose admission is logged. It is the policy itself to the engine: same declaration, same pieces."""

    log: _Log | _NoLog

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.spec)
        self.log = _NoLog()
        if self.admission is not None:
            self.log = self.admission = _Log(self.admission)
            self.log.chunk = self.chunk
