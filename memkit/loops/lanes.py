"""A *lane* is one key/value head of one row of the batch, with the query heads that share it. Nothing of a lane depends
on another one, so that threads take lanes: PLAN, FOLD, READ and OBSERVE of a whole stretch of chunks is one call here.

It has its slots as lines (`lines.py`), and its tokens where the caller has them. Arrays are flat from a lane's first
number on, with the distance from token to token and from head to head beside them; everything else is contiguous.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memkit.loops.blas import product
from memkit.loops.compiling import loop
from memkit.loops.lines import admit, copy, join, ranking, read, score
from memkit.loops.softmax import softmax

__all__ = ["Reading", "Slots", "Tokens", "steps"]


class Tokens(NamedTuple):
    """A lane's tokens, by column of the timeline; queries and outputs by token of the call.

    rows [n, d + v], numbers [n, s]: what those that leave found slots with, the first of column `begin`; readers
    [r, n, d], contiguous: who is expected to read behind each chunk, made of its queries, from query `readers_begin`
    on; none where nobody is expected.
    """

    queries: Any
    query_head: int
    query_token: int
    keys: Any
    key_token: int
    values: Any
    value_token: int
    evidence: Any
    evidence_token: int
    outputs: Any
    output_head: int
    output_token: int
    rows: Any
    numbers: Any
    begin: int
    readers: Any
    readers_begin: int


class Slots(NamedTuple):
    """A lane's slots: lines [2, m, L], of which `which` [1] says where they stand, the other half being room for the
    next ones; values [1, m, v] and bias [1, m] as they are read."""

    lines: Any
    which: Any
    values: Any
    bias: Any


class Reading(NamedTuple):
    """How a chunk's queries read and tell: heads of the group, queries of a chunk, channels of keys and of values, the
    scale of scores; where a line has the key that queries meet; decay, maximal and apart as in `observe`; observed [q]:
    which of the queries of the group, head after head, are observed."""

    heads: int
    chunk: int
    width: int
    value_width: int
    scale: float
    key_at: int
    decay: float
    maximal: bool
    apart: int
    observed: Any
    covariance: bool
    sinks: int


@loop
def steps(plan, slots, tokens, at, scoring, merging, tiny, reading):
    """Chunk after chunk: PLAN and FOLD what leaves, READ, OBSERVE.

    plan [steps, 9]: the first query, among the call's tokens; its column; the first column that it sees; the column at
    which the chunk begins that leaves, −1 for none; slots before it, and after it; how many of those before, the first
    ones, are no candidates; how many tokens of the chunk found in any case; how many of the step's first queries are
    sinks'.
    """
    for step in range(plan.shape[0]):
        start, column, first, leaving, before, after, kept, sink_tokens, of_sinks = plan[step]
        if leaving >= 0:
            chunk = _lines_of_tokens(tokens, leaving, at, reading)
            _compete(slots, chunk, before, after, kept, sink_tokens, at, scoring, merging, tiny)
        _meet(slots, after, tokens, start, column, first, of_sinks, at, merging.by_mass, reading)


@loop
def _lines_of_tokens(tokens, column, at, reading):
    """The lines [1, c, L] of the chunk that begins at a column."""
    row, sums, line_width = column - tokens.begin, tokens.rows.shape[1], tokens.rows.shape[1] + tokens.numbers.shape[1]
    line_width += at.told + (reading.width if reading.key_at else 0)
    lines = np.empty((1, reading.chunk, line_width), tokens.rows.dtype)
    for i in range(reading.chunk):
        line = lines[0, i]
        copy(tokens.rows[row + i], line[:sums])
        for j in range(tokens.numbers.shape[1]):
            line[sums + j] = tokens.numbers[row + i, j]
        told, key = (column + i) * tokens.evidence_token, (column + i) * tokens.key_token
        copy(tokens.evidence[told : told + at.told], line[at.evidence : at.evidence + at.told])
        if reading.key_at:
            copy(tokens.keys[key : key + reading.width], line[reading.key_at :])
    return lines


@loop
def _compete(slots, tokens, before, after, kept, sink_tokens, at, scoring, merging, tiny):
    """PLAN and FOLD: of slots and tokens [1, c, L] as many stay as there are slots afterwards."""
    which, width = slots.which[0], at.keys
    there, out = slots.lines[which : which + 1], slots.lines[1 - which : 2 - which]
    befores, afters = np.full(1, before, np.int64), np.full(1, after, np.int64)
    count = before - kept + tokens.shape[1]
    lost = before + tokens.shape[1] - after
    scores = np.zeros((1, count), out.dtype)
    if lost:
        score(there, tokens, befores, kept, at, scoring, tiny, scores)
    order = ranking(scores[0], sink_tokens).reshape(1, count)
    losers = np.empty((1, max(lost, 1), out.shape[2]), out.dtype)
    keys = np.empty((1, max(lost, 1), width), out.dtype)
    admit(there, tokens, befores, afters, kept, order, out, losers, keys)
    if merging.joins and lost and after:
        products = np.empty((1, lost, after), out.dtype)
        product(keys, width, False, out, out.shape[2], True, (lost, after, width), 1.0, False, products, after)
        losts = np.full(1, lost, np.int64)
        join(products, losers, losts, afters, kept + sink_tokens, at, merging, out)
    read(out, at, merging, slots.values, slots.bias)
    slots.which[0] = 1 - which


@loop
def _meet(slots, count, tokens, start, column, first, of_sinks, at, biased, reading):
    """READ and OBSERVE: a chunk's queries, the first at `column`, meet `count` slots and the window from `first` on."""
    heads, chunk, width, wide = reading.heads, reading.chunk, reading.width, reading.value_width
    lines, key_at = slots.lines[slots.which[0]], reading.key_at
    older, asked = column - first, heads * chunk
    met, window = count + older + chunk, older + chunk
    keys, values = tokens.keys[first * tokens.key_token :], tokens.values[first * tokens.value_token :]
    queries, outputs = np.empty((asked, width), lines.dtype), np.empty((asked, wide), lines.dtype)
    for h in range(heads):
        for i in range(chunk):
            begin = h * tokens.query_head + (start + i) * tokens.query_token
            copy(tokens.queries[begin : begin + width], queries[h * chunk + i])
    shares, whole = np.empty((asked, met), lines.dtype), np.empty((2, met), np.int32)
    if count:
        of_keys, length = lines[0, key_at:], lines.shape[1]
        product(queries, width, False, of_keys, length, True, (asked, count, width), reading.scale, False, shares, met)
    of_window = shares[0, count:]
    sizes = (asked, window, width)
    product(queries, width, False, keys, tokens.key_token, True, sizes, reading.scale, False, of_window, met)
    for q in range(asked):
        sees, row = count + older + q % chunk + 1, shares[q]
        if biased:
            for j in range(count):
                row[j] += slots.bias[0, j]
        softmax(row[:sees], whole)
        for j in range(sees, met):
            row[j] = 0
    if count:
        product(shares, met, False, slots.values, wide, False, (asked, wide, count), 1.0, False, outputs, wide)
    sizes = (asked, wide, window)
    product(of_window, met, False, values, tokens.value_token, False, sizes, 1.0, count > 0, outputs, wide)
    for h in range(heads):
        for i in range(chunk):
            begin = h * tokens.output_head + (start + i) * tokens.output_token
            copy(outputs[h * chunk + i], tokens.outputs[begin : begin + wide])
    told = _mean_shares(shares, reading)
    if tokens.readers.shape[1]:
        told = _expected(slots, lines, count, tokens, start, keys, window, of_sinks, biased, reading)
    _tell(shares, told, outputs, slots, lines, count, tokens, first, older, values, at, reading)


@loop
def _mean_shares(shares, reading):
    """What the observed queries pay each row, on average, [n], of the shares [r·c, n] of all."""
    told, observed = np.zeros(shares.shape[1], shares.dtype), reading.observed.shape[0]
    for i in range(observed):
        row = shares[reading.observed[i]]
        for j in range(told.shape[0]):
            told[j] += row[j]
    for j in range(told.shape[0]):
        told[j] /= observed
    return told


@loop
def _expected(slots, lines, count, tokens, start, keys, window, of_sinks, biased, reading):
    """What readers to come are expected to pay each row, [n]: `engine/expected.py`."""
    heads, chunk, width, dtype = reading.heads, reading.chunk, reading.width, lines.dtype
    met, each = count + window, reading.observed.shape[0] // heads
    share, row, whole = np.zeros(met, dtype), np.empty(met, dtype), np.empty((2, met), np.int32)
    for h in range(heads):
        some = reading.observed[h * each : (h + 1) * each] - h * chunk
        if some[each - 1] >= of_sinks:
            some = some[some >= of_sinks]
        readers = np.empty((len(some) + 1, width), dtype)  # and their mean in front
        for i in range(width):
            total = dtype.type(0)
            for n in range(len(some)):
                readers[n + 1, i] = tokens.readers[h, start - tokens.readers_begin + some[n], i]
                total += readers[n + 1, i]
            readers[0, i] = total / len(some)
            for n in range(len(some)):
                readers[n + 1, i] -= readers[0, i]
        asking = len(some) + 1 if reading.covariance else 1
        scores = np.empty((asking, met), dtype)
        if count:
            sizes = (asking, count, width)
            of_keys = lines[0, reading.key_at :]
            product(readers, width, False, of_keys, lines.shape[1], True, sizes, reading.scale, False, scores, met)
        sizes = (asking, window, width)
        of_window = scores[0, count:]
        product(readers, width, False, keys, tokens.key_token, True, sizes, reading.scale, False, of_window, met)
        copy(scores[0], row)
        for n in range(1, asking):
            for j in range(met):
                row[j] += scores[n, j] * scores[n, j] / (2 * len(some))
        if biased:
            for j in range(count):
                row[j] += slots.bias[0, j]
        softmax(row[reading.sinks :], whole)
        for j in range(reading.sinks, met):
            share[j] += row[j] / heads
    return share


@loop
def _tell(shares, told, outputs, slots, lines, count, tokens, first, older, values, at, reading):
    """OBSERVE: what a chunk's observed queries tell of slots and window, from the shares [r·c, n] and outputs [r·c, v]
    of all, and what is told of shares [n]: `pieces/evidence.py`."""
    observed, met, wide, chunk = reading.observed.shape[0], shares.shape[1], outputs.shape[1], reading.chunk
    squares, twice = np.empty((observed, met), shares.dtype), np.empty((observed, wide), shares.dtype)
    square, size = np.zeros(met, shares.dtype), np.zeros(met, shares.dtype)
    for i in range(observed):
        q, squared, length = reading.observed[i], squares[i], shares.dtype.type(0)
        row, output = shares[q], outputs[q]
        for j in range(wide):
            length += output[j] * output[j]
            twice[i, j] = -2 * output[j]
        tells = met
        if reading.apart:  # of tokens that stand too near before it a query tells nothing
            tells = count + max(0, older + q % chunk + 1 - reading.apart)
        for j in range(met):
            squared[j] = row[j] * row[j]
        for j in range(tells, met):
            squared[j] = 0
        for j in range(met):
            square[j] += squared[j]
            size[j] += squared[j] * length
    products = np.empty((met, wide), shares.dtype)
    product(squares, met, True, twice, wide, False, (met, wide, observed), 1.0, False, products, wide)
    for j in range(met):
        if j < count:
            value, sums = slots.values[0, j], lines[j, at.evidence : at.evidence + at.told]
        else:
            place = (first + j - count) * tokens.evidence_token
            value = values[(j - count) * tokens.value_token : (j - count) * tokens.value_token + wide]
            sums = tokens.evidence[place : place + at.told]
        error = size[j]
        for i in range(wide):
            error += value[i] * (value[i] * square[j] + products[j, i])
        _add(sums, (shares.dtype.type(0) if error < 0 else error) / observed, told[j], reading)


@loop
def _add(sums, error, share, reading):
    """Add to a row's evidence what one more chunk told: `Observation.added`."""
    judged = reading.decay * sums[2] + 1
    if reading.maximal:
        before = reading.decay * (sums[0] / max(sums[2], sums.dtype.type(1)))
        sums[0] = (before if before > error or np.isnan(before) else error) * judged
    else:
        sums[0] = reading.decay * sums[0] + error
    sums[1] = reading.decay * sums[1] + share
    sums[2] = judged
