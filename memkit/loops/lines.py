"""The loops, for Numba. All arrays are contiguous; R counts the rows of the batch times their heads.

A *line* is all that a row has, side by side (`memory/replacing.py`); what columns hold is said by `Columns`. Row r's
candidates are its slots but for the first `kept`, and behind its last slot, number before[r], the chunk's tokens. Loops
go through slots, then through tokens: a line chosen from two arrays keeps compilers from doing numbers side by side. A
loop is compiled once for each dtype, at its first call, which takes a second or two, and kept on disk beside this file,
or where NUMBA_CACHE_DIR says.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from memkit.loops.compiling import loop
from memkit.loops.rounding import to_bfloat16

__all__ = [
    "ERRORS",
    "KEY_DIFFERENCES",
    "KEY_NORMS",
    "SHARES",
    "Columns",
    "Merging",
    "Scoring",
    "admit",
    "copy",
    "join",
    "ranking",
    "rankings",
    "read",
    "score",
    "told_by",
    "told_of",
]

ERRORS, SHARES, KEY_NORMS, KEY_DIFFERENCES = range(4)
"""What candidates score by: what evidence says of them, the mean error or share; or keys, −‖k‖ or −cosine(k, k̄)."""

AT_ONCE = 16
"""Numbers that are compared at once."""


class Columns(NamedTuple):
    """Where a line has what: keys end at `keys`, values at `values`; mass and founder's mass stand at `mass` and
    `founder_mass`; evidence begins at `evidence` and has `told` numbers."""

    keys: int
    values: int
    mass: int
    founder_mass: int
    evidence: int
    told: int


class Merging(NamedTuple):
    """What becomes of candidates that lose, if they join at all; which numbers grow with a row's weight, and which are
    a founder's own, bool [s] each; what is added to shares; `merging.cap`; by_mass: whether slots are read with a bias
    for their mass."""

    joins: bool
    weighed: Any
    own: Any
    least: float
    cap: float
    tiny: float
    by_mass: bool


class Scoring(NamedTuple):
    """What candidates score: by errors, shares or keys; over `pool` neighbours, those that are there alone or (`zeros`)
    with zeros beyond the ends; the root of an error times its difference to a power; a share times its value's norm
    where `value_norm`. As in `pieces/admission.py`. Values are in bfloat16 where it `rounds`."""

    by: int
    pool: int
    zeros: bool
    difference: float
    value_norm: bool
    rounds: bool


@loop
def _dot(one, other):
    total = one.dtype.type(0)
    for i in range(one.shape[0]):
        total += one[i] * other[i]
    return total


@loop
def _share(line, at, least):
    return line[at.evidence + 1] / max(line[at.evidence + 2], line.dtype.type(1)) + least


@loop
def _mass(line, at):
    return line[at.mass] if line[at.mass] > 0 else line.dtype.type(1)


@loop
def copy(line, to):
    """As many numbers of the one as the other takes."""
    for i in range(to.shape[0]):
        to[i] = line[i]


@loop
def _highest(numbers, first):
    """Where the highest number from `first` on stands first, −1 where there is none."""
    best, highest = first, numbers.dtype.type(-np.inf)
    for begin in range(first, numbers.shape[0], AT_ONCE):
        end, higher = min(begin + AT_ONCE, numbers.shape[0]), False
        for i in range(begin, end):
            higher |= numbers[i] > highest
        if higher:
            for i in range(begin, end):
                if numbers[i] > highest:
                    best, highest = i, numbers[i]
    return best if first < numbers.shape[0] else -1


@loop
def score(slots, tokens, before, kept, at, scoring, tiny, out):
    """What candidates score, out [R, n]: of slots [R, m, L], tokens [R, c, L]."""
    for r in range(out.shape[0]):
        of_slots = before[r] - kept
        there, coming, scores = slots[r, kept : before[r]], tokens[r], out[r, : of_slots + tokens.shape[1]]
        parts = ((there, scores[:of_slots]), (coming, scores[of_slots:]))
        for lines, of_lines in parts:
            if scoring.by == ERRORS:
                _errors(lines, at, scoring.pool > 1 or scoring.difference != 0, of_lines)
            elif scoring.by == SHARES:
                _shares(lines, at, of_lines)
            elif scoring.by == KEY_NORMS:
                _key_norms(lines, at, of_lines)
        if scoring.by == KEY_DIFFERENCES:
            _likenesses(there, coming, at, tiny, scores)
            for j in range(scores.shape[0]):
                scores[j] = -scores[j]
        if scoring.pool > 1:
            _neighbours(scores.copy(), scoring.pool, scoring.zeros, scores)
        if scoring.by == ERRORS and scoring.difference != 0:
            alike, apart = np.empty_like(scores), np.empty_like(scores)
            _likenesses(there, coming, at, tiny, alike)
            _distances(there, coming, at, scoring.rounds, apart)
            for j in range(scores.shape[0]):
                scores[j] *= _power(max(1 - alike[j], 0) * apart[j], scoring.difference)
        if scoring.value_norm:
            for lines, of_lines in parts:
                _by_norm(lines, at, scoring.rounds, of_lines)


@loop
def _power(number, exponent):
    if exponent == 0.5:
        return np.sqrt(number)
    return number * number if exponent == 2 else number**exponent


@loop
def _shares(lines, at, out):
    """The mean share that evidence says of lines [n, L]."""
    for j in range(out.shape[0]):
        out[j] = _share(lines[j], at, out.dtype.type(0))


@loop
def _by_norm(lines, at, rounds, out):
    """Multiply by the norms of the values of lines [n, L]."""
    values = np.empty((out.shape[0], at.values - at.keys), out.dtype)
    _values(lines, at, rounds, values)
    for j in range(out.shape[0]):
        out[j] *= np.sqrt(_dot(values[j], values[j]))


@loop
def _values(lines, at, rounds, values):
    """The values of lines [n, L] as they are read, [n, v]."""
    for j in range(lines.shape[0]):
        line, value, mass = lines[j, at.keys : at.values], values[j], _mass(lines[j], at)
        for i in range(value.shape[0]):
            value[i] = line[i] / mass
    if rounds:
        for j in range(lines.shape[0]):
            to_bfloat16(values[j])


@loop
def _errors(lines, at, rooted, out):
    """The mean error that evidence says of lines [n, L], and the most that second readings said; or its root."""
    for j in range(out.shape[0]):
        out[j] = lines[j, at.evidence] / max(lines[j, at.evidence + 2], out.dtype.type(1))
        if at.told > 3:
            out[j] += lines[j, at.evidence + 3]
        if rooted:
            out[j] = np.sqrt(out[j])


@loop
def _neighbours(numbers, pool, zeros, means):
    """The mean of each number [n] and its neighbours, `pool` in all with zeros beyond the ends, or as many as there
    are."""
    count = numbers.shape[0]
    for j in range(count):
        first, end = max(0, j - pool // 2), min(count, j + pool // 2 + 1)
        total = numbers.dtype.type(0)
        for i in range(first, end):
            total += numbers[i]
        means[j] = total / (pool if zeros else end - first)


@loop
def _key_norms(lines, at, out):
    """−‖k‖ of lines [n, L], summed in float64."""
    for j in range(out.shape[0]):
        squared = 0.0
        for i in range(at.keys):
            squared += np.float64(lines[j, i]) * np.float64(lines[j, i])
        out[j] = -np.sqrt(squared)


@loop
def _likenesses(slots, tokens, at, tiny, out):
    """cosine(k, k̄) of candidates, [n], slots [m, L] and tokens [c, L], k̄ being the mean of all k / ‖k‖."""
    width, of_slots, mean = at.keys, slots.shape[0], np.zeros(at.keys, slots.dtype)
    lengths = np.empty(out.shape[0], slots.dtype)
    parts = ((slots, lengths[:of_slots], out[:of_slots]), (tokens, lengths[of_slots:], out[of_slots:]))
    for lines, length, _ in parts:
        for j in range(lines.shape[0]):
            length[j] = max(np.sqrt(_dot(lines[j, :width], lines[j, :width])), tiny)
            share = length.dtype.type(1) / length[j]
            for i in range(width):
                mean[i] += lines[j, i] * share
    for i in range(width):
        mean[i] /= out.shape[0]
    mean_length = np.sqrt(_dot(mean, mean))
    for lines, length, alike in parts:
        for j in range(lines.shape[0]):
            alike[j] = _dot(lines[j, :width], mean) / max(length[j] * mean_length, tiny)


@loop
def _distances(slots, tokens, at, rounds, out):
    """‖v − v̄‖ of candidates, [n], slots [m, L] and tokens [c, L]."""
    of_slots, wide = slots.shape[0], at.values - at.keys
    values, mean = np.empty((out.shape[0], wide), slots.dtype), np.zeros(wide, slots.dtype)
    for lines, value in ((slots, values[:of_slots]), (tokens, values[of_slots:])):
        _values(lines, at, rounds, value)
    for j in range(out.shape[0]):
        for i in range(wide):
            mean[i] += values[j, i]
    for i in range(wide):
        mean[i] /= out.shape[0]
    for j in range(out.shape[0]):
        squared = slots.dtype.type(0)
        for i in range(wide):
            squared += (values[j, i] - mean[i]) ** 2
        out[j] = np.sqrt(squared)


@loop
def ranking(scores, sure):
    """The order of scores [n], the highest first, the earliest on ties; the first `sure` of them are +inf, and what is
    no number is higher still, as PyTorch sorts."""
    falling, wrong = -scores, 0
    for j in range(sure):
        falling[j] = -np.inf
    for j in range(falling.shape[0]):
        wrong += np.isnan(falling[j])
    order = np.argsort(falling, kind="mergesort")
    if not wrong:
        return order
    ranked, of_wrong, of_others = np.empty_like(order), 0, wrong
    for j in range(falling.shape[0]):
        if np.isnan(falling[j]):
            ranked[of_wrong] = j
            of_wrong += 1
    for j in order:
        if not np.isnan(falling[j]):
            ranked[of_others] = j
            of_others += 1
    return ranked


@loop
def rankings(scores, sure, order):
    """The same for each row [R, n], into order [R, n]."""
    for r in range(scores.shape[0]):
        order[r] = ranking(scores[r], sure)


@loop
def admit(slots, tokens, before, after, kept, order, out, losers, keys):
    """The first of the candidates in this order [R, n] stay, as many as there are slots after[r] for.

    Their lines go to out [R, m, L], as they stood, behind the kept ones, and 0 follows; the losers' to losers
    [R, k, L], and their keys to keys [R, k, d].
    """
    for r in range(out.shape[0]):
        of_slots = before[r] - kept
        count = of_slots + tokens.shape[1]
        stays = np.zeros(order.shape[1], np.bool_)
        places = after[r] - kept
        for j in order[r]:
            if places and j < count:
                stays[j] = True
                places -= 1
        for j in range(kept):
            copy(slots[r, j], out[r, j])
        stay, lose = kept, 0
        for lines, begin in ((slots[r, kept : before[r]], 0), (tokens[r], of_slots)):
            for j in range(lines.shape[0]):
                if stays[begin + j]:
                    copy(lines[j], out[r, stay])
                    stay += 1
                else:
                    copy(lines[j], losers[r, lose])
                    copy(lines[j], keys[r, lose])
                    lose += 1
        out[r, stay:] = 0
        keys[r, lose:] = 0


@loop
def join(products, losers, lost, after, first, at, rule, out):
    """Each of the lost[r] losers [R, k, L] leaves its value, and its numbers but for its own, with the slot of
    out [R, m, L] most like it by cosine, none of the first `first`, the lowest on ties. Values, and numbers that are
    weighed, are scaled to the rows' shares.

    products [R, k, m]: of losers' keys and slots' keys.
    """
    weighed, own, least, cap, tiny = rule.weighed, rule.own, rule.least, rule.cap, out.dtype.type(rule.tiny)
    for r in range(out.shape[0]):
        slots = after[r]
        length, share = np.empty(slots, out.dtype), np.empty(slots, out.dtype)
        joined, somebody = np.zeros(slots, out.dtype), np.zeros(slots, np.bool_)
        likeness = np.empty(slots, out.dtype)
        for j in range(slots):
            key = out[r, j, : at.keys]
            length[j] = np.sqrt(_dot(key, key))
            share[j] = _share(out[r, j], at, least)
        for k in range(lost[r]):
            line = losers[r, k]
            own_length = np.sqrt(_dot(line[: at.keys], line[: at.keys]))
            for j in range(slots):  # the whole cosine, so that keys which differ by rounding alone are often equal
                likeness[j] = products[r, k, j] / max(own_length * length[j], tiny)
            best = _highest(likeness, first)
            if best < 0:
                continue
            slot = out[r, best]
            weight = min(_share(line, at, least), cap * share[best])
            if not somebody[best]:
                somebody[best] = True
                scale = share[best] / max(slot[at.mass], tiny)
                for i in range(at.keys, at.values):
                    slot[i] *= scale
                for i in range(at.values, at.evidence):
                    slot[i] *= scale if weighed[i - at.values] else slot.dtype.type(1)
            joined[best] += weight
            scale = weight / max(line[at.mass], tiny)
            for i in range(at.keys, at.values):
                slot[i] += line[i] * scale
            for i in range(at.values, at.evidence):
                if not own[i - at.values]:
                    slot[i] += line[i] * scale if weighed[i - at.values] else line[i]
        for j in range(slots):
            if somebody[j]:
                out[r, j, at.evidence + 1] *= (share[j] + joined[j]) / share[j]


@loop
def read(lines, at, rule, values, bias):
    """Slots [R, M, L] as they are read where values are means: values [R, M, v], and with `by_mass` the bias [R, M]."""
    for r in range(lines.shape[0]):
        _values(lines[r], at, False, values[r])
        for j in range(lines.shape[1]):
            if rule.by_mass:
                own = max(lines[r, j, at.founder_mass], rule.tiny)
                bias[r, j] = np.log(max(lines[r, j, at.mass] / own, lines.dtype.type(1)))


@loop
def told_by(shares, outputs, first, step, near, twice, told):
    """Over observed queries, every `step`-th from `first` on: shares [R, r, n], outputs [R, r, v] of all queries.

    Their shares become squares p², 0 among the last rows where near [q, w] says so; twice: −2·o [R, q, v]; told
    [R, n, 3]: Σ p², the mean of p, Σ p²·‖o‖².
    """
    rows, count = shares.shape[0], shares.shape[2]
    for r in range(rows):
        share, square = np.zeros(count, shares.dtype), np.zeros(count, shares.dtype)
        size = np.zeros(count, shares.dtype)
        for q in range(twice.shape[1]):
            p, o = shares[r, first + q * step], outputs[r, first + q * step]
            length = _dot(o, o)
            for i in range(o.shape[0]):
                twice[r, q, i] = -2 * o[i]
            for j in range(count):
                share[j] += p[j]
                p[j] *= p[j]
            for j in range(near.shape[1]):
                if near[q, j]:
                    p[count - near.shape[1] + j] = 0
            for j in range(count):
                square[j] += p[j]
                size[j] += p[j] * length
        for j in range(count):
            told[r, j, 0], told[r, j, 1], told[r, j, 2] = square[j], share[j] / twice.shape[1], size[j]


@loop
def told_of(values, products, queries, told):
    """What `told_by` summed [R, n, 3] becomes evidence: error, share, 1. values, products [R, n, v]: −2·Σ p²·o."""
    for r in range(values.shape[0]):
        for j in range(values.shape[1]):
            square, error = told[r, j, 0], told[r, j, 2]
            for i in range(values.shape[2]):
                error += values[r, j, i] * (values[r, j, i] * square + products[r, j, i])
            told[r, j, 0], told[r, j, 2] = max(error, 0) / queries, 1
