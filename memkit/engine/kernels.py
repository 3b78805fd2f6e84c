"""PLAN and FOLD as four kernels for GPUs, in Triton, nearest → found → join → fold, and FOLD's gradient, unfold.

A chunk costs two launches once slots no longer grow, and four while they do, where PyTorch takes some seventy. Each
program has a tile of tokens or of slots of one key/value head; nothing is added by atomic operations, so two runs give
the same numbers. Products are of float32 in three parts (`tf32x3`), as exact as float32 to a few roundings.

Pointers are of contiguous tensors, but for the strides that are given; a *head* is one of all b·g, and all that is of a
chunk begins at its first token. This module is imported where Triton is there (`fused.py`).
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fold", "found", "join", "nearest", "unfold"]

VARYING = ["live", "new", "after", "chunk", "first", "chunks", "count", "room"]
"""Numbers that differ from chunk to chunk: a kernel is not compiled anew for some of them."""


@triton.jit(do_not_specialize=VARYING)
def nearest(
    keys,
    route,
    best_of_all,
    best,
    slot,
    live,
    chunk,
    keys_stride,
    route_stride,
    slot_stride,
    sinks: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    tokens: tl.constexpr,
    slots: tl.constexpr,
):
    """For each token of a chunk: the slot most like it that is no sink (there is one), and how alike any is at best."""
    head, w = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    t = tl.program_id(1) * tokens + tl.arange(0, tokens)
    there, columns = t < chunk, w < width
    mine = tl.load(keys + head * keys_stride + t[:, None] * width + w, there[:, None] & columns[None, :], 0.0)
    most = tl.full((tokens,), float("-inf"), tl.float32)
    most_of_all = most
    where = tl.full((tokens,), -1, tl.int32)
    for begin in range(0, live, slots):
        s = begin + tl.arange(0, slots)
        rows = route + head * route_stride + s[:, None] * width + w
        theirs = tl.load(rows, (s < live)[:, None] & columns[None, :], 0.0)
        score = tl.dot(mine, tl.trans(theirs), input_precision="tf32x3")
        score = tl.where((s < live)[None, :], score, float("-inf"))
        most_of_all = tl.maximum(most_of_all, tl.max(score, 1))
        score = tl.where((s >= sinks)[None, :], score, float("-inf"))
        highest, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        where = tl.where(highest > most, begin + at, where)
        most = tl.maximum(most, highest)
    tl.store(best_of_all + head * chunk + t, most_of_all, there)
    tl.store(best + head * chunk + t, most, there)
    where = tl.maximum(where, sinks)  # where scores are no numbers
    tl.store(slot + head * slot_stride + t, where.to(tl.int64), there)


@triton.jit(do_not_specialize=VARYING)
def found(
    best_of_all,
    founded,
    place,
    new,
    live,
    chunk,
    founded_stride,
    padded_chunk: tl.constexpr,
    tokens: tl.constexpr,
):
    """Which tokens found, the `new` that are least like any slot, the earliest on ties; and their slots: behind the
    live ones, in token order. A program has all tokens of a head."""
    head, t = tl.program_id(0).to(tl.int64), tl.arange(0, padded_chunk)
    mine = tl.load(best_of_all + head * chunk + t, t < chunk, float("inf"))
    ahead = tl.zeros((padded_chunk,), tl.int32)
    for begin in range(0, chunk, tokens):
        other = begin + tl.arange(0, tokens)
        theirs = tl.load(best_of_all + head * chunk + other, other < chunk, float("inf"))
        earlier = (theirs[None, :] == mine[:, None]) & (other[None, :] < t[:, None])
        before = ((theirs[None, :] < mine[:, None]) | earlier) & (other < chunk)[None, :]
        ahead += tl.sum(before.to(tl.int32), 1)
    founds = ((ahead < new) & (t < chunk)).to(tl.int32)
    tl.store(founded + head * founded_stride + t, founds.to(tl.uint8), t < chunk)
    tl.store(place + head * chunk + t, live + tl.cumsum(founds, 0) - 1, t < chunk)


@triton.jit(do_not_specialize=VARYING)
def join(
    keys,
    alone,
    founded,
    place,
    best,
    slot,
    chunk,
    keys_stride,
    founded_stride,
    width: tl.constexpr,
    padded: tl.constexpr,
    tokens: tl.constexpr,
):
    """Founders go to their own slots, and who is more like a founder than like any slot joins that one's.

    alone: the tokens' keys as slots of their own are read; place: founders' slots. `slot` and `founded` have the same
    stride.
    """
    head, w = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    t = tl.program_id(1) * tokens + tl.arange(0, tokens)
    there, columns = t < chunk, w < width
    mine = tl.load(keys + head * keys_stride + t[:, None] * width + w, there[:, None] & columns[None, :], 0.0)
    most = tl.load(best + head * chunk + t, there, float("-inf"))
    whom = tl.full((tokens,), -1, tl.int32)
    for begin in range(0, chunk, tokens):
        other = begin + tl.arange(0, tokens)
        founds = tl.load(founded + head * founded_stride + other, other < chunk, 0) > 0
        if tl.sum(founds.to(tl.int32)) > 0:
            rows = alone + head * keys_stride + other[:, None] * width + w
            theirs = tl.load(rows, founds[:, None] & columns[None, :], 0.0)
            score = tl.dot(mine, tl.trans(theirs), input_precision="tf32x3")
            score = tl.where(founds[None, :], score, float("-inf"))
            highest, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
            whom = tl.where(highest > most, begin + at, whom)
            most = tl.maximum(most, highest)
    own = tl.load(founded + head * founded_stride + t, there, 0) > 0
    whom = tl.where(own, t, whom)
    goes = tl.load(place + head * chunk + whom, there & (whom >= 0), 0).to(tl.int64)
    stands = tl.load(slot + head * founded_stride + t, there, 0)
    tl.store(slot + head * founded_stride + t, tl.where(whom >= 0, goes, stands), there)


@triton.jit(do_not_specialize=VARYING)
def fold(
    alone,
    joining,
    radius,
    slot,
    founded,
    sums,
    radii,
    route,
    norm_weight,
    norm_bias,
    view_keys,
    view_values,
    kept_sums,
    kept_radii,
    first,
    chunks,
    after,
    chunk,
    count,
    heads,
    rows_stride,
    slot_stride,
    room,
    width: tl.constexpr,
    values: tl.constexpr,
    padded: tl.constexpr,
    padded_values: tl.constexpr,
    tokens: tl.constexpr,
    slots: tl.constexpr,
    epsilon: tl.constexpr,
    shortest: tl.constexpr,
    keeps: tl.constexpr,
):
    """Add the rows of some chunks, from the `first` on, to their slots, and read all slots after each: LN(K), ρ·V/‖V‖.

    alone, joining [b·g, n, d + v]: what tokens add to a slot that they found, or join; radius [b·g, n]: and to the
    radius of one that they found. sums [b·g, room, d + v], radii [b·g, room] are written anew, and route [b·g, room, d]
    with them; or, where `keeps`, what each step holds is kept in kept_sums [b, count, g, room, d + v], kept_radii, and
    none of these is written. view_keys, view_values [b, count, g, room, …]: as the queries of each step meet the slots.
    """
    head, s = tl.program_id(0).to(tl.int64), tl.program_id(1) * slots + tl.arange(0, slots)
    w, v = tl.arange(0, padded), tl.arange(0, padded_values)
    there, columns, channels = s < after, w < width, v < values
    some_keys, some_values = there[:, None] & columns[None, :], there[:, None] & channels[None, :]
    both = width + values
    at = sums + (head * room + s)[:, None] * both
    of_keys = tl.load(at + w, some_keys, 0.0)
    of_values = tl.load(at + width + v, some_values, 0.0)
    reach = tl.load(radii + head * room + s, there, 0.0)
    weight, bias = tl.load(norm_weight + w, columns, 0.0), tl.load(norm_bias + w, columns, 0.0)
    for number in range(first, first + chunks):
        for begin in range(0, chunk, tokens):
            t = begin + tl.arange(0, tokens)
            inside = t < chunk
            t += number * chunk
            whose = tl.load(slot + head * slot_stride + t, inside, -1).to(tl.int32)
            takes = whose[None, :] == s[:, None]
            if tl.sum(takes.to(tl.int32)) > 0:
                founds = tl.load(founded + head * slot_stride + t, inside, 0) > 0
                one, other = (inside & founds)[:, None], (inside & ~founds)[:, None]
                row = head * rows_stride + t[:, None] * both
                adds = takes.to(tl.float32)
                keys = tl.load(alone + row + w, one & columns[None, :], 0.0)
                keys += tl.load(joining + row + w, other & columns[None, :], 0.0)
                of_keys += tl.dot(adds, keys, input_precision="tf32x3")
                more = tl.load(alone + row + width + v, one & channels[None, :], 0.0)
                more += tl.load(joining + row + width + v, other & channels[None, :], 0.0)
                of_values += tl.dot(adds, more, input_precision="tf32x3")
                far = tl.load(radius + head * slot_stride + t, inside & founds, 0.0)
                reach += tl.sum(adds * far[None, :], 1)
        centred = tl.where(columns[None, :], of_keys - (tl.sum(of_keys, 1) / width)[:, None], 0.0)
        spread = tl.rsqrt(tl.sum(centred * centred, 1) / width + epsilon)
        key = centred * spread[:, None] * weight[None, :] + bias[None, :]
        length = tl.maximum(tl.sqrt(tl.sum(of_values * of_values, 1)), shortest)
        value = of_values * (reach / length)[:, None]
        place = ((head // heads * count + number) * heads + head % heads) * room + s
        tl.store(view_keys + place[:, None] * width + w, key.to(view_keys.dtype.element_ty), some_keys)
        tl.store(view_values + place[:, None] * values + v, value.to(view_values.dtype.element_ty), some_values)
        if keeps:
            tl.store(kept_sums + place[:, None] * both + w, of_keys, some_keys)
            tl.store(kept_sums + place[:, None] * both + width + v, of_values, some_values)
            tl.store(kept_radii + place, reach, there)
        else:
            tl.store(route + (head * room + s)[:, None] * width + w, key, some_keys)
    if not keeps:
        tl.store(at + w, of_keys, some_keys)
        tl.store(at + width + v, of_values, some_values)
        tl.store(radii + head * room + s, reach, there)


@triton.jit(do_not_specialize=VARYING)
def unfold(
    kept_sums,
    kept_radii,
    grad_keys,
    grad_values,
    grad_sums,
    grad_radii,
    norm_weight,
    grad_norm,
    count,
    heads,
    room,
    width: tl.constexpr,
    values: tl.constexpr,
    padded: tl.constexpr,
    padded_values: tl.constexpr,
    slots: tl.constexpr,
    epsilon: tl.constexpr,
    shortest: tl.constexpr,
):
    """Back through what `fold` read: gradients of what slots hold, from those of how they read, the last step first.

    kept_sums, kept_radii: as `fold` kept them; what a step held becomes its gradient, which is the suffix sum over all
    later readings. grad_keys, grad_values [b, count, g, room, …]; grad_sums [b·g, room, d + v], grad_radii [b·g, room]:
    those after the last step become those before the first; grad_norm [b·g, tiles, 2, d]: of LayerNorm's weight and
    bias, a program's part each.
    """
    head, s = tl.program_id(0).to(tl.int64), tl.program_id(1) * slots + tl.arange(0, slots)
    w, v = tl.arange(0, padded), tl.arange(0, padded_values)
    there, columns, channels = s < room, w < width, v < values
    some_keys, some_values = there[:, None] & columns[None, :], there[:, None] & channels[None, :]
    both = width + values
    at = grad_sums + (head * room + s)[:, None] * both
    of_keys = tl.load(at + w, some_keys, 0.0)
    of_values = tl.load(at + width + v, some_values, 0.0)
    of_reach = tl.load(grad_radii + head * room + s, there, 0.0)
    weight = tl.load(norm_weight + w, columns, 0.0)
    of_weight, of_bias = tl.zeros((padded,), tl.float32), tl.zeros((padded,), tl.float32)
    for back in range(count):
        place = ((head // heads * count + count - 1 - back) * heads + head % heads) * room + s
        held = kept_sums + place[:, None] * both
        keys = tl.load(held + w, some_keys, 0.0)
        given = tl.load(grad_keys + place[:, None] * width + w, some_keys, 0.0).to(tl.float32)
        centred = tl.where(columns[None, :], keys - (tl.sum(keys, 1) / width)[:, None], 0.0)
        spread = tl.rsqrt(tl.sum(centred * centred, 1) / width + epsilon)
        normal = centred * spread[:, None]
        of_weight += tl.sum(given * normal, 0)
        of_bias += tl.sum(given, 0)
        given *= weight[None, :]
        mean, along = tl.sum(given, 1) / width, tl.sum(given * normal, 1) / width
        of_keys += tl.where(some_keys, (given - mean[:, None] - normal * along[:, None]) * spread[:, None], 0.0)
        sums = tl.load(held + width + v, some_values, 0.0)
        given = tl.load(grad_values + place[:, None] * values + v, some_values, 0.0).to(tl.float32)
        reach = tl.load(kept_radii + place, there, 0.0)
        own = tl.sqrt(tl.sum(sums * sums, 1))
        length = tl.maximum(own, shortest)
        direction = sums / length[:, None]
        along = tl.sum(given * direction, 1)
        of_reach += along
        across = given - direction * tl.where(own >= shortest, along, 0.0)[:, None]
        of_values += across * (reach / length)[:, None]
        tl.store(held + w, of_keys, some_keys)
        tl.store(held + width + v, of_values, some_values)
        tl.store(kept_radii + place, of_reach, there)
    tl.store(at + w, of_keys, some_keys)
    tl.store(at + width + v, of_values, some_values)
    tl.store(grad_radii + head * room + s, of_reach, there)
    part = grad_norm + ((head * tl.num_programs(1) + tl.program_id(1)) * 2) * width
    tl.store(part + w, of_weight, columns)
    tl.store(part + width + w, of_bias, columns)
