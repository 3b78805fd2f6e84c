"""Windows: which recent tokens are seen exactly.

A window is one function: `begin(p)`, the first position that the query at position p sees exactly, its own included.
Tokens before `begin(p)` have left the window by then: the memory has absorbed or dropped them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from memkit.pieces.registry import FamilySpec, register
from memkit.whole import MOST

__all__ = ["AllWindow", "BlockWindow", "SlidingWindow", "Window", "WindowSpec"]

Position = int | NDArray[np.int64]
"""A position in the sequence, or one per row of a batch."""


class Window(ABC):
    """Which recent tokens a query sees exactly."""

    capacity: int | None
    """The most tokens that one query sees exactly; None when nothing ever leaves."""
    unit: int | None
    """Tokens that leave together; None when nothing ever leaves."""
    band: int | None = None
    """The number of tokens each query sees where that is the same for all; None where it changes by whole chunks."""

    @abstractmethod
    def begin(self, position: Position) -> NDArray[np.int64]:
        """First position seen exactly by the query at `position`; 0 ≤ begin ≤ position, never falling."""


class BlockWindow(Window):
    """The W newest chunks: begin(p) = max(0, ⌊p/C⌋ − W + 1)·C (arXiv 2605.09877, block sliding window attention)."""

    def __init__(self, chunk: int, chunks: int) -> None:
        self.unit = self.chunk = chunk
        self.chunks = chunks
        self.capacity = chunk * chunks

    def begin(self, position: Position) -> NDArray[np.int64]:
        return np.maximum(0, np.asarray(position) // self.chunk - self.chunks + 1) * self.chunk


class SlidingWindow(Window):
    """The last n tokens, the query included: begin(p) = max(0, p − n + 1)."""

    def __init__(self, size: int) -> None:
        self.size = self.capacity = self.band = size
        self.unit = 1

    def begin(self, position: Position) -> NDArray[np.int64]:
        return np.maximum(0, np.asarray(position) - self.size + 1)


class AllWindow(Window):
    """Every token, exactly: begin(p) = 0."""

    capacity = None
    unit = None

    def begin(self, position: Position) -> NDArray[np.int64]:
        return np.zeros_like(position)


class WindowSpec(FamilySpec):
    """Declares a window."""

    family: ClassVar[str] = "window"

    @abstractmethod
    def build(self, chunk: int) -> Window:
        """The window over chunks of `chunk` tokens."""


@register
class BlockWindowSpec(WindowSpec):
    """The newest chunks, the one being filled included."""

    kind: Literal["block"] = "block"
    chunks: int = Field(ge=1, le=MOST, description="chunks seen exactly (W), the query's own included, at least 1")

    def build(self, chunk: int) -> BlockWindow:
        return BlockWindow(chunk, self.chunks)


@register
class SlidingWindowSpec(WindowSpec):
    """The newest tokens. Needs growth `none`: tokens leave one by one and are dropped, sinks excepted."""

    kind: Literal["sliding"] = "sliding"
    size: int = Field(ge=1, le=MOST, description="tokens seen exactly, the query included, at least 1")

    def build(self, chunk: int) -> SlidingWindow:
        return SlidingWindow(self.size)


@register
class AllWindowSpec(WindowSpec):
    """All tokens: full causal attention. Needs growth `none`, for nothing ever leaves."""

    kind: Literal["all"] = "all"

    def build(self, chunk: int) -> AllWindow:
        return AllWindow()
