"""A lane whose slots are sums of the tokens nearest to them: PLAN, FOLD and READ of a whole stretch is one call.

The slots are the store's own, written into.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memkit.loops.blas import product
from memkit.loops.compiling import loop, no_nan
from memkit.loops.lines import ranking
from memkit.loops.reading import Met, read, rooms

__all__ = ["Reading", "Slots", "Tokens", "steps"]


class Slots(NamedTuple):
    """A lane's slots: sums [m, d + v], numbers [m, s]; keys [m, d], values [m, v] and bias [m] as they are read."""

    sums: Any
    numbers: Any
    keys: Any
    values: Any
    bias: Any


class Tokens(NamedTuple):
    """The tokens that leave, the first of column `begin`: memory keys [n, d], rows [n, d + v] and numbers [n, s] that
    each adds to a slot that it founds, and to one that it joins."""

    keys: Any
    founding: Any
    founding_numbers: Any
    joining: Any
    joining_numbers: Any
    begin: int


class Reading(NamedTuple):
    """Tokens of a chunk; the first slots, which are no targets; whether tokens join slots founded in the same chunk.

    How slots are read (`pieces/readout.py`): keys by LayerNorm with its weight and bias [d], else as means; values of
    their founder's length, whose square's root stands at `radius`, or over what stands at `value_mass`; a bias by what
    stands at `grown` (−1: none) over what stands at `founders` (−1: over 1). mass: where that of keys stands.
    """

    chunk: int
    sinks: int
    new_slots: bool
    layer_norm: bool
    weight: Any
    shift: Any
    epsilon: float
    mass: int
    radius: int
    value_mass: int
    shortest: float
    grown: int
    founders: int
    tiny: float


@loop
def steps(plan, slots, tokens, asked, heads, reading):
    """Step after step: PLAN and FOLD the chunk that leaves, READ.

    plan [steps, 10]: `engine/lanes.py` says of what.
    """
    room, wholes, outputs = rooms(plan, heads, slots.keys)
    for step in range(plan.shape[0]):
        start, stop, column, first, leaving, before, after, _, sure, _ = plan[step]
        if leaving >= 0:
            _take_in(slots, tokens, leaving - tokens.begin, before, after - before, sure, reading)
        bias = slots.bias[: min(after, slots.bias.shape[0])]
        met = Met(after, slots.keys, slots.keys.shape[1], slots.values, slots.values.shape[1], bias)
        read(asked, heads, start, stop, column, first, 0, met, room, wholes, outputs)


@loop
def _take_in(slots, tokens, row, before, new, sure, reading):
    """PLAN and FOLD the chunk whose first token stands in this row."""
    chunk, dtype = reading.chunk, slots.sums.dtype
    touched = np.zeros(before + new, np.bool_)
    slot, best = np.full(chunk, -1, np.int64), np.full(chunk, -np.inf, dtype)
    founded = np.zeros(chunk, np.bool_)
    if new == chunk:
        founded[:] = True
    else:
        keys = tokens.keys[row : row + chunk]
        novelty = np.full(chunk, np.inf, dtype)
        if before:
            _nearest(keys, slots.keys, before, reading.sinks, slot, best, novelty)
        if new:
            _found(keys, slots, tokens, row, before, new, sure, reading, novelty, founded)
            _join_founders(keys, tokens, row, before, new, sure, reading, founded, slot, best)
    place = before
    for i in range(chunk):
        if founded[i]:
            slot[i] = place
            place += 1
        slot[i] = max(slot[i], 0)  # −1 where no similarity is a number: anybody's
        _add(slots, slot[i], tokens, row + i, founded[i])
        touched[slot[i]] = True
    for j in range(before + new):
        if touched[j]:
            _read(slots, j, reading)


TILE = 512
"""Slots that a chunk is compared with at once: what stays near the core until the best of them is found."""

RUN = 64
"""Numbers whose highest is found at once."""


@loop
def _nearest(keys, slots, count, sinks, slot, best, novelty):
    """For each key [c, d] the slot most like it that is no sink, the lowest on ties, and minus the highest similarity
    to any."""
    chunk, width, first = keys.shape[0], keys.shape[1], min(sinks, count)
    alike = np.empty((chunk, min(TILE, count)), keys.dtype)
    for begin in range(0, count, TILE):
        size, room = min(TILE, count - begin), alike.shape[1]
        product(keys, width, False, slots[begin:], width, True, (chunk, size, width), 1.0, False, alike, room)
        for i in range(chunk):
            row = alike[i, :size]
            start = max(0, first - begin)
            if start < size:
                where = _best(row, start) if _finite(row) else _best_of_any(row, start)
                if slot[i] < 0 or _above(row[where], best[i]):
                    slot[i], best[i] = begin + where, row[where]
            for j in range(min(start, size)):
                if _above(row[j], -novelty[i]):
                    novelty[i] = -row[j]
    for i in range(chunk):
        if _above(best[i], -novelty[i]):
            novelty[i] = -best[i]


@loop
def _finite(row):
    wrong = row.dtype.type(0)
    for i in range(row.shape[0]):
        wrong += row[i] * row.dtype.type(0)
    return np.isfinite(wrong)


@loop
def _above(number, other):
    """Whether a number is higher than another one; NaN is the highest of all."""
    return number > other or (np.isnan(number) and not np.isnan(other))


@no_nan
def _best(row, first):
    """Where the highest number from `first` on stands first."""
    best, run = row[first], first
    for begin in range(first, row.shape[0], RUN):
        highest = row[begin]
        for i in range(begin, min(begin + RUN, row.shape[0])):
            highest = max(highest, row[i])
        if highest > best:
            best, run = highest, begin
    for i in range(run, row.shape[0]):
        if row[i] == best:
            return i
    return first


@loop
def _best_of_any(row, first):
    """The same, where NaN is the highest of all."""
    where = first
    for i in range(first, row.shape[0]):
        if _above(row[i], row[where]):
            where = i
    return where


@loop
def _found(keys, slots, tokens, row, before, new, sure, reading, novelty, founded):
    """The tokens least like any slot found, the first ones in any case, the earliest on ties."""
    chunk, width = keys.shape
    if before == 0:
        first = np.empty((1, width), keys.dtype)
        _read_key(tokens.founding[row], tokens.founding_numbers[row], reading, first[0])
        for i in range(chunk):
            alike = keys.dtype.type(0)
            for j in range(width):
                alike += keys[i, j] * first[0, j]
            novelty[i] = -alike
        sure = max(sure, 1)
    order = ranking(novelty, sure)
    for i in range(new):
        founded[order[i]] = True


@loop
def _join_founders(keys, tokens, row, before, new, sure, reading, founded, slot, best):
    """Whom a slot founded in this chunk is more like than any before it goes there, but to no sink."""
    chunk, width = keys.shape
    fresh, barred = np.empty((new, width), keys.dtype), np.zeros(new, np.bool_)
    nth = 0
    for i in range(chunk):
        if founded[i]:
            _read_key(tokens.founding[row + i], tokens.founding_numbers[row + i], reading, fresh[nth])
            barred[nth] = i < sure or not (reading.new_slots or (before == 0 and nth == 0))
            nth += 1
    alike = np.empty((chunk, new), keys.dtype)
    product(keys, width, False, fresh, width, True, (chunk, new, width), 1.0, False, alike, new)
    for i in range(chunk):
        if founded[i]:
            continue
        for j in range(new):
            if not barred[j] and alike[i, j] > best[i]:
                best[i], slot[i] = alike[i, j], before + j


@loop
def _add(slots, slot, tokens, row, founds):
    sums, numbers = slots.sums[slot], slots.numbers[slot]
    if founds:
        _sum(sums, tokens.founding[row])
        _sum(numbers, tokens.founding_numbers[row])
    else:
        _sum(sums, tokens.joining[row])
        _sum(numbers, tokens.joining_numbers[row])


@loop
def _sum(sums, more):
    for i in range(sums.shape[0]):
        sums[i] += more[i]


@loop
def _read(slots, j, reading):
    """A slot as it is read."""
    sums, numbers, value = slots.sums[j], slots.numbers[j], slots.values[j]
    width, one = slots.keys.shape[1], sums.dtype.type(1)
    _read_key(sums, numbers, reading, slots.keys[j])
    if reading.radius >= 0:
        squared = sums.dtype.type(0)
        for i in range(value.shape[0]):
            squared += sums[width + i] * sums[width + i]
        length = max(np.sqrt(squared), sums.dtype.type(reading.shortest))
        times = sums.dtype.type(numbers[reading.radius]) / length
        for i in range(value.shape[0]):
            value[i] = sums[width + i] * times
    else:
        mass = numbers[reading.value_mass]
        over = sums.dtype.type(mass) if mass > 0 else one
        for i in range(value.shape[0]):
            value[i] = sums[width + i] / over
    if reading.grown >= 0:
        own = max(numbers[reading.founders], reading.tiny) if reading.founders >= 0 else 1.0
        slots.bias[j] = np.log(max(numbers[reading.grown] / own, 1.0))


@loop
def _read_key(sums, numbers, reading, key):
    """The key of a slot with these sums: its LayerNorm, or the mean."""
    width, dtype = key.shape[0], sums.dtype.type
    if reading.layer_norm:
        mean, spread = dtype(0), dtype(0)
        for i in range(width):
            mean += sums[i]
        mean /= width
        for i in range(width):
            spread += (sums[i] - mean) ** 2
        per = 1 / np.sqrt(spread / width + dtype(reading.epsilon))
        for i in range(width):
            key[i] = (sums[i] - mean) * per * reading.weight[i] + reading.shift[i]
    else:
        mass = numbers[reading.mass]
        over = dtype(mass) if mass > 0 else dtype(1)
        for i in range(width):
            key[i] = sums[i] / over
