"""READ of a lane: queries of its heads meet slots and the window's tokens, in one softmax."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memkit.loops.blas import product
from memkit.loops.compiling import loop
from memkit.loops.lines import copy
from memkit.loops.softmax import softmax

__all__ = ["Asked", "Heads", "Met", "meet", "read", "rooms", "steps"]

QUERIES = 64
"""Queries, of all heads together, that meet slots and window at once: what they pay stays near the core."""


class Asked(NamedTuple):
    """A lane's queries and outputs, by token of the call, and the window's keys and values, by column of the timeline.

    Each is flat from its first number on, with the distance from head to head and from token to token beside it.
    queries meet the window; remembering, the same ones where `Heads.alike`, meet slots.
    """

    queries: Any
    query_head: int
    query_token: int
    remembering: Any
    remembering_head: int
    remembering_token: int
    keys: Any
    key_token: int
    values: Any
    value_token: int
    outputs: Any
    output_head: int
    output_token: int


class Heads(NamedTuple):
    """A lane's query heads: what each one's queries are multiplied by where they meet the window, and slots, [h];
    whether both meet the same; channels of keys and of values; the scale of scores."""

    of_window: Any
    of_slots: Any
    alike: bool
    width: int
    value_width: int
    scale: float


class Met(NamedTuple):
    """The slots that are met: so many; keys and values, of which the next slot's stand so many numbers further; a bias
    of scores, empty for none."""

    count: int
    keys: Any
    key_step: int
    values: Any
    value_step: int
    bias: Any


@loop
def steps(plan, slots, asked, heads, band):
    """Step after step: READ, where nothing is folded in.

    plan [steps, 10]: `engine/lanes.py` says of what.
    """
    room, wholes, outputs = rooms(plan, heads, slots.keys)
    for step in range(plan.shape[0]):
        start, stop, column, first, _, _, _, _, _, _ = plan[step]
        read(asked, heads, start, stop, column, first, band, slots, room, wholes, outputs)


@loop
def rooms(plan, heads, like):
    """What `read` takes for its use in these steps, of the numbers of `like`: room for scores, which become shares;
    int32 for the softmax; and outputs."""
    most, rows = 0, max(QUERIES, heads.of_window.shape[0])
    for step in range(plan.shape[0]):
        start, stop, column, first, _, _, after, _, _, _ = plan[step]
        most = max(most, after + column - first + stop - start)
    room, outputs = np.empty(rows * most, like.dtype), np.empty((rows, heads.value_width), like.dtype)
    return room, np.empty((2, most), np.int32), outputs


@loop
def read(asked, heads, start, stop, column, first, band, slots, room, wholes, outputs):
    """READ: the queries `start` … `stop` − 1 of each head, some at a time; room, wholes and outputs by `rooms`, the
    others as in `meet`."""
    group = heads.of_window.shape[0]
    span = max(1, QUERIES // group)
    for begin in range(start, stop, span):
        some, here = min(span, stop - begin), column + begin - start
        oldest = first if band == 0 else max(first, here - band + 1)
        rows, met = group * some, slots.count + here - oldest + some
        shares = room[: rows * met].reshape(rows, met)
        meet(asked, heads, begin, some, here, oldest, band, slots, shares, wholes, outputs[:rows])


@loop
def meet(asked, heads, start, span, column, first, band, slots, shares, wholes, outputs):
    """The queries `start` … `start + span` − 1 of each head, the first of which stands at `column`, meet slots, and the
    window from column `first` to their own; where `band` is not 0, so many columns of it at most.

    What they get goes to `asked.outputs`. For the caller: shares [h·span, m + n], of slots and of the window's tokens,
    and outputs [h·span, v]. wholes [2, m + n]: int32, for its use.
    """
    rows, width, wide = heads.of_window.shape[0] * span, heads.width, heads.value_width
    window, count = column - first + span, slots.count
    met, queries = count + window, np.empty((rows, width), shares.dtype)
    keys, values = asked.keys[first * asked.key_token :], asked.values[first * asked.value_token :]
    _gather(asked.queries, asked.query_head, asked.query_token, heads.of_window, start, span, queries)
    of_window, sizes = shares[0, count:], (rows, window, width)
    product(queries, width, False, keys, asked.key_token, True, sizes, heads.scale, False, of_window, met)
    if count:
        if not heads.alike:
            of_slots = (asked.remembering, asked.remembering_head, asked.remembering_token, heads.of_slots)
            _gather(*of_slots, start, span, queries)
        sizes = (rows, count, width)
        product(queries, width, False, slots.keys, slots.key_step, True, sizes, heads.scale, False, shares, met)
    for q in range(rows):
        row, sees = shares[q], met - span + q % span + 1
        for j in range(slots.bias.shape[0]):
            row[j] += slots.bias[j]
        # The row: slots, and the window's columns, of which the first `fallen` are out of this query's band.
        fallen = 0 if band == 0 else max(0, sees - count - band)
        if fallen:  # slots stand beside what is seen until shares are known
            for j in range(count - 1, -1, -1):
                row[fallen + j] = row[j]
        softmax(row[fallen:sees], wholes)
        if fallen:
            for j in range(count):
                row[j] = row[fallen + j]
            for j in range(count, count + fallen):
                row[j] = 0
        for j in range(sees, met):
            row[j] = 0
    if count:
        sizes = (rows, wide, count)
        product(shares, met, False, slots.values, slots.value_step, False, sizes, 1.0, False, outputs, wide)
    sizes = (rows, wide, window)
    product(of_window, met, False, values, asked.value_token, False, sizes, 1.0, count > 0, outputs, wide)
    for q in range(rows):
        begin = q // span * asked.output_head + (start + q % span) * asked.output_token
        copy(outputs[q], asked.outputs[begin : begin + wide])


@loop
def _gather(queries, head_step, token_step, scales, start, span, into):
    """So many queries of each head, times its scale, [h·span, d]."""
    for q in range(into.shape[0]):
        begin, scale = q // span * head_step + (start + q % span) * token_step, scales[q // span]
        for i in range(into.shape[1]):
            into[q, i] = queries[begin + i] * scale
