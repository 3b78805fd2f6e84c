"""Observation: which queries tell what rows are worth. What they tell is `evidence`.

When a chunk has been read, some of its queries, with what each saw then, judge every row.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from memkit.pieces.evidence import AGAIN, ERROR, JUDGED, Evidence
from memkit.pieces.registry import Spec

__all__ = ["Observation", "ObservationSpec"]


class ObservationSpec(Spec):
    """Declares which queries are observed. None are by default."""

    queries: int = Field(
        default=0,
        ge=0,
        le=2**20,
        description="queries of each chunk that are observed, evenly spaced; more than it has: all; 0: none",
    )
    decay: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="γ: what evidence still counts one chunk later; 1: as much as new; 0: not at all",
    )
    apart: int = Field(
        default=0,
        ge=0,
        le=2**20,
        description="while a text is read, a query tells nothing of errors of tokens in the window that stand fewer "
        "than so many before it: what only its neighbours look at nobody will ask for; 0: it tells of all",
    )
    aggregate: Literal["mean", "max"] = Field(
        default="mean",
        description="how the errors that chunks told of a row are joined over its life; mean: best for prediction; "
        "max: what mattered to one chunk stays, for whoever may ask for what was read once",
    )
    readers: Literal["next", "window", "repeat", "mixed"] = Field(
        default="next",
        description="where a text is read in full and then compressed, who says what rows are worth: next: somebody "
        "who goes on with the text (its queries, turned to places behind its end); window: the newest chunk's queries; "
        "repeat: those of a second reading of the text; mixed: half next, half repeat",
    )
    again: int = Field(
        default=0,
        ge=0,
        le=2**20,
        description="a stock model reads so many chunks at a time a second time, as soon as it has read them, and the "
        "most that a second reading's queries said of a row counts beside what its first said; costs another reading; "
        "0: it does not. `attend` leaves that to its caller (`memkit.ask_again`)",
    )

    def build(self, chunk: int, given: bool = False) -> Observation:
        """The observation, in chunks of `chunk` tokens; given: at most, for the caller says where they end."""
        return Observation(self, chunk, given)


class Observation:
    """Which queries are observed, and what is made of them."""

    def __init__(self, spec: ObservationSpec, chunk: int, given: bool = False) -> None:
        self.queries, self.decay, self.maximal = min(spec.queries, chunk), spec.decay, spec.aggregate == "max"
        self.apart = spec.apart
        self.again = spec.again * chunk
        """Tokens that are read again at a time; 0: none are."""
        self.offsets = self.offsets_in(chunk)
        """Offsets in a chunk of its observed queries: ⌊(i + 1)·C/n⌋ − 1."""
        self.waits = list(range(chunk)) if given and self.queries else self.offsets
        """Offsets of the queries that wait for the end of their chunk: all, where nobody knows its length before."""

    def offsets_in(self, chunk: int) -> list[int]:
        """The offsets in a chunk of this length, of all its queries where it has fewer."""
        queries = min(self.queries, chunk)
        return [(i + 1) * chunk // queries - 1 for i in range(queries)]

    @property
    def numbers(self) -> int:
        """Numbers e of a row's evidence [..., e]."""
        return 4 if self.again else 3

    def added(self, evidence: Tensor, told: Tensor) -> Tensor:
        """Evidence [..., e] after one more chunk has judged; told [..., 3]: what it said."""
        sums = evidence[..., :AGAIN]
        after = self.decay * sums + told
        if self.maximal:
            before = Evidence.of(sums).error
            after[..., ERROR] = torch.maximum(self.decay * before, told[..., ERROR]) * after[..., JUDGED]
        return torch.cat((after, evidence[..., AGAIN:]), dim=-1) if self.again else after

    def add_(self, evidence: Tensor, told: Tensor) -> None:
        """The same, written into the evidence."""
        if self.maximal:
            evidence.copy_(self.added(evidence, told))
            return
        sums = evidence[..., :AGAIN]
        (sums if self.decay == 1 else sums.mul_(self.decay)).add_(told)

    def add_again_(self, evidence: Tensor, error: Tensor) -> None:
        """Write into the evidence [..., e] what a second reading's queries told of rows: error [...]."""
        most = evidence[..., AGAIN]
        torch.maximum(most, error, out=most)
