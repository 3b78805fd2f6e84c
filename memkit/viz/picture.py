"""Who sees what: a policy scaled down to a few tokens, and what each query sees of each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.text import Text

from memkit.engine import plan
from memkit.errors import MemkitError
from memkit.pieces.chunking import FixedChunkerSpec
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.pieces.window import BlockWindowSpec, SlidingWindowSpec
from memkit.policy import Policy

__all__ = ["Picture", "draw", "picture"]

TOKENS = 60
CHUNK = 4
SLIDING = 12
HEAD_WIDTH = 256

EXACT, SINK, FOUNDED, JOINED, DROPPED, UNSEEN = "■◆●○· "
MEANING = {
    EXACT: "seen exactly",
    SINK: "sink",
    FOUNDED: "founded a slot",
    JOINED: "joined a slot",
    DROPPED: "forgotten",
}
STYLE = {EXACT: "bold", SINK: "yellow", FOUNDED: "green", JOINED: "cyan", DROPPED: "dim"}


@dataclass(frozen=True)
class Picture:
    """cells[i][j]: how query `queries[i]` sees token j; slots[i], window[i]: how many slots and window tokens it reads.

    scale: real tokens, and real slots, for each one drawn.
    """

    scale: float
    queries: tuple[int, ...]
    cells: tuple[str, ...]
    slots: tuple[int, ...]
    window: tuple[int, ...]


def picture(policy: Policy) -> Picture | None:
    """The picture of a policy scaled down to chunks of 4 tokens; None where it cannot be run without knowing more.

    Plans are the engine's own, for keys that wander among a few random directions (always the same ones).
    """
    small, scale = _scaled(policy)
    try:
        made = plan(
            small, _keys(), rotation=Rotation("half-split", 2, torch.zeros(1)) if Need.ROTATION in small.needs else None
        )
    except MemkitError:
        return None
    slot, founded = made.slot[0, 0].tolist(), made.founded[0, 0].tolist()
    queries = tuple(range(CHUNK - 1, TOKENS, CHUNK))
    begins = [int(small.window.begin(query)) for query in queries]

    def cell(token: int, query: int, begin: int) -> str:
        if token >= begin:
            return EXACT if token <= query else UNSEEN
        if slot[token] < 0:
            return DROPPED
        if slot[token] < small.sinks:
            return SINK
        return FOUNDED if founded[token] else JOINED

    return Picture(
        scale=scale,
        queries=queries,
        cells=tuple(
            "".join(cell(token, query, begin) for token in range(TOKENS))
            for query, begin in zip(queries, begins, strict=True)
        ),
        slots=tuple(small.slots_after(query + 1) for query in queries),
        window=tuple(query - begin + 1 for query, begin in zip(queries, begins, strict=True)),
    )


def draw(drawn: Picture) -> Text:
    """Queries downwards, tokens to the right."""
    text = Text()
    scaled = "" if drawn.scale == 1 else f", scaled down {drawn.scale:.3g} times (random keys)"
    text.append(f"Who sees what of {TOKENS} tokens{scaled}\n", style="bold")
    text.append(f"query {'token 0 …':{TOKENS}} slots exact\n", style="dim")
    for query, cells, slots, window in zip(drawn.queries, drawn.cells, drawn.slots, drawn.window, strict=True):
        text.append(f"{query:5} ", style="dim")
        for mark in cells:
            text.append(mark, style=STYLE.get(mark))
        text.append(f" {slots:5} {window:5}\n", style="dim")
    used = [mark for mark in MEANING if any(mark in cells for cells in drawn.cells)]
    for mark in used:
        text.append("      " if mark == used[0] else "  ")
        text.append(mark, style=STYLE[mark])
        text.append(f" {MEANING[mark]}")
    return text


class _Small(Policy):
    """A policy with chunks of `chunk` tokens and slots to match: as many chunks leave, each founds its share."""

    def __init__(self, big: Policy, chunk: int) -> None:
        sinks = _ceil(big.sinks * chunk, big.chunk)
        if big.sinks < big.chunk:  # then the first chunk holds more than sinks
            sinks = min(sinks, chunk - 1)
        super().__init__(big.spec.model_copy(update={"chunker": FixedChunkerSpec(size=chunk), "sinks": sinks}))
        self.big = big

    def slots_after_chunk(self, index: int) -> int:
        if self.growth is None:
            return super().slots_after_chunk(index)
        slots = self.big.slots_after_chunk(index)
        least = self.sinks + 1 if slots > self.big.sinks else 0
        return max(least, _ceil(slots * self.chunk, self.big.chunk))


def _scaled(policy: Policy) -> tuple[Policy, float]:
    """The policy in small, and real tokens for each of its tokens."""
    match policy.spec.window:
        case BlockWindowSpec(chunks=chunks):
            chunk = max(1, min(CHUNK, policy.chunk, TOKENS // (2 * chunks)))
            return _Small(policy, chunk), policy.chunk / chunk
        case SlidingWindowSpec(size=size) as window if size > SLIDING:
            sinks = _ceil(policy.sinks * SLIDING, size)
            changes = {"window": window.model_copy(update={"size": SLIDING}), "sinks": sinks}
            return Policy(policy.spec.model_copy(update=changes)), size / SLIDING
        case _:
            return policy, 1


def _keys() -> torch.Tensor:
    """[1, 1, TOKENS, HEAD_WIDTH]: a few topics taking turns, each token a little off its topic."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(6, HEAD_WIDTH, generator=generator)
    turns = torch.randint(len(topics), (TOKENS,), generator=generator)
    return (topics[turns] + 0.5 * torch.randn(TOKENS, HEAD_WIDTH, generator=generator))[None, None]


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
