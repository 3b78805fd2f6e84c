"""How many bytes memories hold: the engine decodes a few tokens, and what it keeps is counted.

Large memories are tensors without numbers. Small ones are real: each operation without numbers takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from memkit.engine import attend
from memkit.memory import Memory
from memkit.memory.blank import blank
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy

__all__ = ["Held", "Shape", "held_bytes"]

SMALL = 2**24
"""Bytes up to which a memory is made for its size alone."""


@dataclass(frozen=True)
class Shape:
    """What is multiplied: `rows` sequences through `layers` layers, each of `heads` query heads, `kv_heads` key/value
    heads, keys of `head_width` and values of `value_width` channels, in `dtype`."""

    heads: int
    kv_heads: int
    head_width: int
    value_width: int
    dtype: str
    layers: int
    rows: int

    def __str__(self) -> str:
        widths = (
            f"{self.head_width}" if self.head_width == self.value_width else f"{self.head_width}/{self.value_width}"
        )
        grouped = "" if self.kv_heads == self.heads else f" over {self.kv_heads} key/value heads"
        return (
            f"{_several(self.layers, 'layer')} of {_several(self.heads, 'head')}{grouped}, width {widths}, "
            f"{self.dtype}, {_several(self.rows, 'row')}"
        )


@dataclass(frozen=True)
class Held:
    """Bytes: of slots and of the window after a prefill, and the most of all while tokens are decoded after it."""

    slots: int
    window: int
    decoding: int


def held_bytes(parts: Sequence[tuple[Policy, Shape]], tokens: int) -> Held:
    """What the memories of layers, and of heads that differ, hold together after `tokens` tokens and while decoding."""
    slots = window = 0
    courses: list[dict[int, int]] = []
    for policy, shape in parts:
        memory = _blank(policy, shape, tokens, "cpu" if _largest(policy, shape, tokens) <= SMALL else "meta")
        of_slots = sum(tensor.untyped_storage().nbytes() for tensor in memory.store.tensors())
        slots += shape.layers * of_slots
        window += shape.layers * (memory.bytes - of_slots)
        try:
            course = dict(_decoding(memory, shape))
        except (RuntimeError, TypeError):  # a piece that looks at numbers gets some: bytes are the same
            course = dict(_decoding(_blank(policy, shape, tokens, "cpu"), shape))
        courses.append({seen: shape.layers * held for seen, held in course.items()})
    # What one part holds when another changes is what it held when it last did.
    last, most = [0] * len(courses), 0
    for seen in sorted({seen for course in courses for seen in course}):
        last = [course.get(seen, held) for course, held in zip(courses, last, strict=True)]
        most = max(most, sum(last))
    return Held(slots, window, most)


def _largest(policy: Policy, shape: Shape, tokens: int) -> int:
    """Bytes of one layer's memory, or a little more."""
    seen = tokens - int(policy.window.begin(tokens - 1))
    a_row = 8 * (shape.head_width + shape.value_width)
    return shape.rows * shape.kv_heads * a_row * (policy.slots_after(tokens) + seen)


def _blank(policy: Policy, shape: Shape, tokens: int, device: str) -> Memory:
    """The memory of one layer after a prefill."""
    return blank(
        policy,
        tokens,
        rows=shape.rows,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        value_width=shape.value_width,
        dtype=getattr(torch, shape.dtype),
        rotation=_rotation(policy),
        device=device,
    )


def _decoding(memory: Memory, shape: Shape) -> Iterator[tuple[int, int]]:
    """Tokens seen and bytes held whenever these may have changed, until a chunk has left and its place is taken."""
    policy = memory.policy
    query, key, value = (
        torch.zeros(shape.rows, heads, 1, width, dtype=memory.dtype, device=memory.device)
        for heads, width in (
            (shape.heads, shape.head_width),
            (shape.kv_heads, shape.head_width),
            (shape.kv_heads, shape.value_width),
        )
    )
    end = int(memory.seen_rows[0]) + policy.chunk + 2
    while int(memory.seen_rows[0]) < end:
        with torch.no_grad():
            _, memory = attend(policy, query, key, value, memory=memory, rotation=_rotation(policy))
        yield int(memory.seen_rows[0]), memory.bytes
        if memory.buffer is not None:
            memory.skip(memory.buffer.until - memory.window.end)


def _rotation(policy: Policy) -> Rotation | None:
    """Any will do: it changes numbers alone."""
    return Rotation("adjacent", 2, torch.ones(1)) if Need.ROTATION in policy.needs else None


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
