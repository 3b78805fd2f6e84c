"""The window: tokens seen exactly, and the streams they carry, on one axis of columns for all rows.

The rows of a batch may be at unequal positions. A call's tokens stand at the same columns in every row, and what the
windows already hold stands right-aligned before them: appending is then one slice for all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from memkit.policy import Policy

__all__ = [
    "Columns",
    "Form",
    "Sections",
    "Streams",
    "Timeline",
    "Window",
    "columns",
    "joined",
    "room_for",
    "side_by_side",
    "stream_forms",
]

SLACK = 64
"""Tokens a decoding window takes beyond its most before it is moved to the front of its buffer."""

Streams = dict[str, Tensor]
"""What each token carries, by name, [b, g, n, …]; positions [b, 1, n]. The policy says which (`Policy.streams`)."""

Form = tuple[tuple[int, ...], torch.dtype]
"""A tensor's shape and dtype."""

Columns = slice | Tensor
"""Columns of an axis: one slice for all rows, or numbers per row, [b, c]."""


def stream_forms(
    policy: Policy, rows: int, heads: int, room: int, widths: tuple[int, int], dtype: torch.dtype
) -> dict[str, Form]:
    """The form of each stream that the policy's tokens carry.

    widths: of keys and of values; dtype: theirs. Weights may have another one, as the caller gives them.
    """
    every: dict[str, Form] = {
        "keys": ((rows, heads, room, widths[0]), dtype),
        "values": ((rows, heads, room, widths[1]), dtype),
        "weights": ((rows, heads, room), dtype),
        "positions": ((rows, 1, room), torch.float64),
        "evidence": ((rows, heads, room, policy.observation.numbers), torch.promote_types(dtype, torch.float32)),
    }
    return {name: every[name] for name in policy.streams}


@dataclass
class Window:
    """Tokens seen exactly. Those of a row are the columns before `end`, newest last, as many as the row holds.

    streams: [b, g, room, …] each, with room behind `end` for tokens to come.
    """

    streams: Streams
    end: int

    @property
    def room(self) -> int:
        """Columns there are."""
        return self.streams["keys"].shape[2]

    def last(self, count: int) -> Streams:
        """The newest columns, views of the window's own."""
        return {name: stream.narrow(2, self.end - count, count) for name, stream in self.streams.items()}

    def append(self, new: Streams) -> None:
        """Write tokens behind the window; they must fit."""
        for name, stream in new.items():
            self.streams[name].narrow(2, self.end, stream.shape[2]).copy_(stream)

    def fits(self, tokens: int) -> bool:
        """Whether so many more tokens can be written behind the window."""
        return self.end + tokens <= self.room

    def move_to_front(self, count: int) -> None:
        """Move the newest columns to the front of the buffer, and forget the others."""
        for stream in self.streams.values():
            stream.narrow(2, 0, count).copy_(stream.narrow(2, self.end - count, count).clone())
        self.end = count

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Window:
        """A window of changed streams."""
        return Window({name: change(stream) for name, stream in self.streams.items()}, self.end)


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Parts [b, g, n, …] of an axis as one tensor; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


class Sections:
    """A stream [b, g, n, …] whose columns are taken again and again, with a graph.

    What a slice gives back on the way back is as large as what it was taken of: to take n slices of one tensor costs n²
    then. So the stream is taken apart once, and columns are slices of a few sections; whoever puts them together keeps
    the slices for the way back, which are no copies.
    """

    def __init__(self, stream: Tensor, size: int) -> None:
        self.size = size if stream.requires_grad and torch.is_grad_enabled() else max(stream.shape[2], 1)
        self.sections = stream.split(self.size, dim=2)

    def parts(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """The columns begin … end − 1, one part behind the other."""
        first, behind = begin // self.size, max(-(-end // self.size), begin // self.size + 1)
        return tuple(
            section[:, :, max(0, begin - at) : end - at]
            for section, at in zip(
                self.sections[first:behind], range(first * self.size, end + 1, self.size), strict=False
            )
        )

    def columns(self, begin: int, end: int) -> Tensor:
        """The same as one tensor, as `stream[:, :, begin:end]` would give it."""
        return side_by_side(self.parts(begin, end))


@dataclass(frozen=True)
class Timeline:
    """The windows and a call's tokens, on one axis.

    in_place: the new tokens were written behind the window in its own buffers, of which the streams are views.
    """

    streams: Streams
    in_place: bool

    @classmethod
    def of(cls, window: Window | None, old: int, new: Streams, in_place: bool) -> Timeline:
        """The `old` newest columns of a window, and the new tokens behind them."""
        if window is None:
            return cls(new, False)
        tokens = new["keys"].shape[2]
        if in_place:
            window.append(new)
            streams = {name: window.streams[name].narrow(2, window.end - old, old + tokens) for name in new}
            return cls(streams, True)
        held = window.last(old)
        return cls({name: torch.cat((held[name], stream), dim=2) for name, stream in new.items()}, False)

    @property
    def keys(self) -> Tensor:
        """[b, g, n, d]."""
        return self.streams["keys"]

    @property
    def values(self) -> Tensor:
        """[b, g, n, v]; not there where only a plan is made."""
        return self.streams["values"]

    def get(self, name: str) -> Tensor | None:
        """A stream, or None where the policy has none of this name."""
        return self.streams.get(name)

    def window(self, keep: int, room: int, ends: Tensor | None) -> Window:
        """The last `keep` tokens of each row, right-aligned, in buffers with room for `room`.

        ends [b]: the column behind each row's last token; None: behind the last column.
        """
        streams: Streams = {}
        for name, stream in self.streams.items():
            if ends is None:
                newest = stream[:, :, stream.shape[2] - keep :]
            else:
                where = ends[:, None] - keep + torch.arange(keep, device=stream.device)
                newest = columns(stream, where.clamp(min=0))
            if room == keep:
                streams[name] = newest.clone()
                continue
            streams[name] = stream.new_zeros(*stream.shape[:2], room, *stream.shape[3:])
            streams[name][:, :, :keep] = newest
        return Window(streams, keep)


def room_for(policy: Policy, held: int, decodes: bool = False) -> int:
    """Columns for which a call that leaves `held` tokens in the window makes room.

    A quarter more than it holds and some slack. A window of chunks never holds more than all of them, and the token at
    which the oldest leaves; a sliding one moves on at every token, within the slack. A window of all tokens takes more
    room when it decodes, not before, and a sixteenth: a token then reads all of them, so that copying 16 is nothing.
    """
    capacity, grown = policy.window.capacity, held + held // 4
    if capacity is None:
        return held + held // 16 + SLACK if decodes else held
    if policy.window.band is None:
        return min(capacity + 1, grown + SLACK)
    return min(capacity, grown) + SLACK


def columns(stream: Tensor, where: Columns) -> Tensor:
    """Columns of [b, g, n, …]."""
    if isinstance(where, slice):
        return stream[:, :, where]
    index = where.reshape(where.shape[0], 1, where.shape[1], *[1] * (stream.ndim - 3))
    return stream.gather(2, index.expand(-1, stream.shape[1], -1, *stream.shape[3:]))


def joined(each: Sequence[Columns], rows: int, device: torch.device) -> Columns:
    """The columns of several chunks, one chunk's after the other's."""
    slices = [one for one in each if isinstance(one, slice)]
    if len(slices) == len(each) and all(one.stop == other.start for one, other in pairwise(slices)):
        return slice(slices[0].start, slices[-1].stop)
    indices = [
        torch.arange(one.start, one.stop, device=device).expand(rows, -1) if isinstance(one, slice) else one
        for one in each
    ]
    return torch.cat(indices, dim=1)
