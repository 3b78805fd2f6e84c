"""A lane whose slots compete with the tokens that leave: PLAN, FOLD, READ, and OBSERVE where somebody is observed, of a
whole stretch of chunks is one call. It has its slots as lines (`lines.py`)."""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memkit.loops.blas import product
from memkit.loops.compiling import loop
from memkit.loops.lines import admit, copy, join, ranking, read, score
from memkit.loops.reading import Met, meet
from memkit.loops.rounding import to_bfloat16
from memkit.loops.softmax import softmax

__all__ = ["Slots", "Telling", "Tokens", "see", "steps"]


class Tokens(NamedTuple):
    """A lane's tokens: what is told of each by column of the timeline, flat, with the distance from one to the next.

    rows [n, d + v], numbers [n, s]: what those that leave found slots with, the first of column `begin`; readers
    [r, n, d], contiguous: who is expected to read behind each chunk, made of its queries; none where nobody is
    expected.
    """

    evidence: Any
    evidence_token: int
    rows: Any
    numbers: Any
    begin: int
    readers: Any


class Slots(NamedTuple):
    """A lane's slots: lines [2, m, L], of which `which` [1] says where they stand, the other half being room for the
    next ones; values [1, m, v] and bias [1, m] as they are read."""

    lines: Any
    which: Any
    values: Any
    bias: Any


class Telling(NamedTuple):
    """How a chunk's queries tell: queries of a chunk; where a line has the key that queries meet; decay, maximal and
    apart as in `observe`; observed [q]: which of the queries of the group, head after head, are observed; of readers to
    come whether their covariance counts, and the first slots, which they leave out."""

    chunk: int
    key_at: int
    decay: float
    maximal: bool
    apart: int
    observed: Any
    covariance: bool
    sinks: int


@loop
def steps(plan, slots, tokens, asked, heads, at, scoring, merging, tiny, telling):
    """Chunk after chunk: PLAN and FOLD what leaves, READ, and OBSERVE where the chunk is a whole one and readers tell.

    plan [steps, 10]: `engine/lanes.py` says of what.
    """
    for step in range(plan.shape[0]):
        start, stop, column, first, leaving, before, after, kept, sink_tokens, of_sinks = plan[step]
        if leaving >= 0:
            chunk = _lines_of_tokens(tokens, asked, heads, leaving, at, telling)
            _compete(slots, chunk, before, after, kept, sink_tokens, at, scoring, merging, tiny)
        if stop > start:
            span, biased = stop - start, merging.by_mass
            _meet(slots, after, tokens, asked, heads, start, span, column, first, of_sinks, at, biased, telling)


@loop
def _lines_of_tokens(tokens, asked, heads, column, at, telling):
    """The lines [1, c, L] of the chunk that begins at a column."""
    row, sums, line_width = column - tokens.begin, tokens.rows.shape[1], tokens.rows.shape[1] + tokens.numbers.shape[1]
    line_width += at.told + (heads.width if telling.key_at else 0)
    lines = np.empty((1, telling.chunk, line_width), tokens.rows.dtype)
    for i in range(telling.chunk):
        line = lines[0, i]
        copy(tokens.rows[row + i], line[:sums])
        for j in range(tokens.numbers.shape[1]):
            line[sums + j] = tokens.numbers[row + i, j]
        told, key = (column + i) * tokens.evidence_token, (column + i) * asked.key_token
        copy(tokens.evidence[told : told + at.told], line[at.evidence : at.evidence + at.told])
        if telling.key_at:
            copy(asked.keys[key : key + heads.width], line[telling.key_at :])
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
    see(out, at, merging, slots.values, slots.bias, scoring.rounds)
    slots.which[0] = 1 - which


@loop
def see(lines, at, merging, values, bias, rounds):
    """How slots are read, of lines [1, m, L]: values [1, m, v] and bias [1, m], in bfloat16 where it `rounds`."""
    read(lines, at, merging, values, bias)
    if rounds:
        for j in range(bias.shape[1]):
            to_bfloat16(values[0, j])
        to_bfloat16(bias[0])


@loop
def _meet(slots, count, tokens, asked, heads, start, span, column, first, of_sinks, at, biased, telling):
    """READ and OBSERVE: a chunk's queries, the first at `column`, meet `count` slots and the window from `first` on."""
    lines, rows = slots.lines[slots.which[0]], heads.of_window.shape[0] * span
    older, met = column - first, count + column - first + span
    shares, wholes = np.empty((rows, met), lines.dtype), np.empty((2, met), np.int32)
    outputs = np.empty((rows, heads.value_width), lines.dtype)
    bias = slots.bias[0, : count if biased else 0]
    view = Met(count, lines[0, telling.key_at :], lines.shape[1], slots.values[0], heads.value_width, bias)
    meet(asked, heads, start, span, column, first, 0, view, shares, wholes, outputs)
    if span < telling.chunk or not telling.observed.shape[0]:
        return
    told = _mean_shares(shares, telling)
    if tokens.readers.shape[1]:
        told = _expected(view, tokens, asked, heads, start, first, older + span, of_sinks, telling)
    _tell(shares, told, outputs, slots, lines, count, tokens, asked, first, older, at, telling)


@loop
def _mean_shares(shares, telling):
    """What the observed queries pay each row, on average, [n], of the shares [r·c, n] of all."""
    told, observed = np.zeros(shares.shape[1], shares.dtype), telling.observed.shape[0]
    for i in range(observed):
        row = shares[telling.observed[i]]
        for j in range(told.shape[0]):
            told[j] += row[j]
    for j in range(told.shape[0]):
        told[j] /= observed
    return told


@loop
def _expected(slots, tokens, asked, heads, start, first, window, of_sinks, telling):
    """What readers to come are expected to pay each row, [n]: `engine/expected.py`."""
    group, chunk, width, dtype = heads.of_window.shape[0], telling.chunk, heads.width, tokens.rows.dtype
    count, each = slots.count, telling.observed.shape[0] // group
    met, keys = count + window, asked.keys[first * asked.key_token :]
    share, row, wholes = np.zeros(met, dtype), np.empty(met, dtype), np.empty((2, met), np.int32)
    for h in range(group):
        some = telling.observed[h * each : (h + 1) * each] - h * chunk
        if some[each - 1] >= of_sinks:
            some = some[some >= of_sinks]
        readers = np.empty((len(some) + 1, width), dtype)  # and their mean in front
        for i in range(width):
            total = dtype.type(0)
            for n in range(len(some)):
                readers[n + 1, i] = tokens.readers[h, start + some[n], i]
                total += readers[n + 1, i]
            readers[0, i] = total / len(some)
            for n in range(len(some)):
                readers[n + 1, i] -= readers[0, i]
        asking = len(some) + 1 if telling.covariance else 1
        scores = np.empty((asking, met), dtype)
        if count:
            sizes = (asking, count, width)
            product(readers, width, False, slots.keys, slots.key_step, True, sizes, heads.scale, False, scores, met)
        sizes = (asking, window, width)
        of_window = scores[0, count:]
        product(readers, width, False, keys, asked.key_token, True, sizes, heads.scale, False, of_window, met)
        copy(scores[0], row)
        for n in range(1, asking):
            for j in range(met):
                row[j] += scores[n, j] * scores[n, j] / (2 * len(some))
        for j in range(slots.bias.shape[0]):
            row[j] += slots.bias[j]
        softmax(row[telling.sinks :], wholes)
        for j in range(telling.sinks, met):
            share[j] += row[j] / group
    return share


@loop
def _tell(shares, told, outputs, slots, lines, count, tokens, asked, first, older, at, telling):
    """OBSERVE: what a chunk's observed queries tell of slots and window, from the shares [r·c, n] and outputs [r·c, v]
    of all, and what is told of shares [n]: `pieces/evidence.py`."""
    observed, met, wide, chunk = telling.observed.shape[0], shares.shape[1], outputs.shape[1], telling.chunk
    squares, twice = np.empty((observed, met), shares.dtype), np.empty((observed, wide), shares.dtype)
    square, size = np.zeros(met, shares.dtype), np.zeros(met, shares.dtype)
    for i in range(observed):
        q, squared, length = telling.observed[i], squares[i], shares.dtype.type(0)
        row, output = shares[q], outputs[q]
        for j in range(wide):
            length += output[j] * output[j]
            twice[i, j] = -2 * output[j]
        tells = met
        if telling.apart:  # of tokens that stand too near before it a query tells nothing
            tells = count + max(0, older + q % chunk + 1 - telling.apart)
        for j in range(met):
            squared[j] = row[j] * row[j]
        for j in range(tells, met):
            squared[j] = 0
        for j in range(met):
            square[j] += squared[j]
            size[j] += squared[j] * length
    products = np.empty((met, wide), shares.dtype)
    product(squares, met, True, twice, wide, False, (met, wide, observed), 1.0, False, products, wide)
    for j in range(count):
        error = _error(slots.values[0, j], products[j], square[j], size[j]) / observed
        _add(lines[j, at.evidence : at.evidence + at.told], error, told[j], telling)
    for j in range(count, met):
        begin, place = (first + j - count) * asked.value_token, (first + j - count) * tokens.evidence_token
        error = _error(asked.values[begin : begin + wide], products[j], square[j], size[j]) / observed
        _add(tokens.evidence[place : place + at.told], error, told[j], telling)


@loop
def _error(value, product, square, size):
    """What queries would miss in all without a row of this value: Σ p²·‖v − o‖², of which product is −2·Σ p²·o, square
    Σ p² and size Σ p²·‖o‖²."""
    error = size
    for i in range(value.shape[0]):
        error += value[i] * (value[i] * square + product[i])
    return value.dtype.type(0) if error < 0 else error


@loop
def _add(sums, error, share, telling):
    """Add to a row's evidence what one more chunk told: `Observation.added`."""
    judged = telling.decay * sums[2] + 1
    if telling.maximal:
        before = telling.decay * (sums[0] / max(sums[2], sums.dtype.type(1)))
        sums[0] = (before if before > error or np.isnan(before) else error) * judged
    else:
        sums[0] = telling.decay * sums[0] + error
    sums[1] = telling.decay * sums[1] + share
    sums[2] = judged
