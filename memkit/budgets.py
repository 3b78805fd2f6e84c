"""How large memories may be, told as a number: rows of each head, a share of the prompt's tokens, or bytes.

A policy has a number of rows where its slots are a fixed number or its window slides. A budget sets it; layers that are
kept as in the stock model, and policies that grow by a law of their own, stay as they are. Where rows are few and
readers are observed, windows and chunks are smaller, so that the window is not most of what is held.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from memkit.catalog import load_policy
from memkit.costing import alike_parts
from memkit.errors import InputError, shown
from memkit.holding import Shape, held_bytes
from memkit.layers import LayerPoliciesSpec
from memkit.pieces.chunking import FixedChunkerSpec
from memkit.pieces.growth import FixedGrowthSpec
from memkit.pieces.window import BlockWindowSpec, SlidingWindowSpec
from memkit.policy import Policy, PolicySpec
from memkit.whole import is_finite, whole_number

__all__ = [
    "Budget",
    "alike",
    "bounded",
    "check_bounded",
    "has_rows",
    "held_at_most",
    "least_rows",
    "most_rows",
    "sized",
    "with_rows",
]

MOST = 2**40
FULL = 8
"""Texts of so many times the rows fill every head's slots: a head gets at most 8 times its even share."""

FEWEST = 2
"""Chunks of a window, down to which it is halved where rows are few."""
SMALLEST = 16
"""Tokens of a chunk, down to which chunks are halved where rows are few."""

TRIES = 12
"""Numbers of rows that are looked at, at most, for a number of bytes."""


@dataclass(frozen=True)
class Budget:
    """At most one of three: rows of each head, on average; a share of a prompt's tokens; bytes of a text's cache."""

    rows: int | None = None
    share: float | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, rows: Any, share: Any, bytes: Any, prefill: str) -> Budget:
        """What was asked for, checked. Raises `InputError`."""
        each = {"rows": rows, "share": share, "bytes": bytes}
        given = [f"{name}={shown(number)}" for name, number in each.items() if number is not None]
        if len(given) > 1:
            raise InputError(f"a budget is rows, share or bytes, got {' and '.join(given)}; give one of them")
        if share is not None:
            if not is_finite(share) or isinstance(share, bool) or not 0 < share <= 1:
                raise InputError(f"share must be a number above 0 and at most 1, got {shown(share)}")
            if prefill != "full":
                raise InputError(
                    "share is of the tokens of a prompt that is read in full, got prefill 'policy'; set prefill to "
                    "full, or give rows"
                )
        return cls(
            None if rows is None else whole_number("rows", rows, 1, MOST),
            None if share is None else float(share),
            None if bytes is None else whole_number("bytes", bytes, 1, 2**53),
        )

    def __bool__(self) -> bool:
        return any(each is not None for each in (self.rows, self.share, self.bytes))

    def rows_of(self, prompt: int) -> int | None:
        """Rows of each head after a prompt of so many tokens; None where they do not follow from that."""
        return self.rows if self.share is None else max(1, math.floor(self.share * prompt))


def has_rows(spec: PolicySpec) -> bool:
    """Whether a policy's rows are a number."""
    return isinstance(spec.window, SlidingWindowSpec) or isinstance(spec.growth, FixedGrowthSpec)


def _window(spec: PolicySpec) -> int:
    return 0 if isinstance(spec.window, SlidingWindowSpec) else spec.build().window.capacity or 0


def _narrowed(spec: PolicySpec, rows: int) -> PolicySpec:
    """The policy with its window halved until that has no larger a share of so few rows than it has of its own, where
    it observes and slots compete (and nothing is read again, which takes long in small portions): fewer chunks first,
    down to two, then smaller ones. The same share of a chunk's queries is observed, and evidence fades as much per
    token."""
    size, observe, growth, window = spec.chunker.build().size, spec.observe, spec.growth, spec.window
    judges = spec.eviction == "weakest" and observe.queries > 0 and not observe.again
    if not judges or not isinstance(growth, FixedGrowthSpec):
        return spec
    if not isinstance(spec.chunker, FixedChunkerSpec) or not isinstance(window, BlockWindowSpec):
        return spec
    own, chunks, halved, times = growth.slots + _window(spec), window.chunks, 1, 1
    while halved * rows < own:
        if chunks > FEWEST and chunks % 2 == 0:
            chunks //= 2
        elif size % (2 * times) == 0 and size >= 2 * times * SMALLEST:
            times *= 2
        else:
            break
        halved *= 2
    queries, decay = max(1, min(observe.queries, size) // times), observe.decay ** (1 / times)
    smaller = {"chunker.size": size // times, "observe.queries": queries, "observe.decay": decay}
    return load_policy(spec, {"window.chunks": chunks} | (smaller if times > 1 else {}))


def least_rows(specs: Iterable[PolicySpec]) -> int:
    """The fewest rows that all of these policies can have."""
    return max(_window(_narrowed(spec, 0)) + spec.sinks + 1 for spec in specs if has_rows(spec))


def with_rows(spec: PolicySpec, rows: int) -> PolicySpec:
    """The policy with so many rows a head, slots and window together, where its rows are a number; else as it is."""
    if not has_rows(spec):
        return spec
    if rows < (least := least_rows([spec])):
        raise InputError(f"rows must be at least {least} for {spec.name or 'this policy'}, got {rows}")
    if isinstance(spec.window, SlidingWindowSpec):
        return load_policy(spec, {"window.size": rows - spec.sinks})
    narrowed = _narrowed(spec, rows)
    return load_policy(narrowed, {"growth.slots": rows - _window(narrowed)})


def sized(layers: LayerPoliciesSpec, rows: int) -> LayerPoliciesSpec:
    """Layers' policies with so many rows a head, where a policy has a number of them."""
    return layers.mapped(partial(with_rows, rows=rows))


def alike(one: PolicySpec, other: PolicySpec) -> bool:
    """Whether policies are the same but for their rows."""
    if one == other:
        return True
    least = least_rows([one, other]) if has_rows(one) and has_rows(other) else MOST
    one, other = with_rows(one, least), with_rows(other, least)
    decay = one.observe.decay  # a root of a root, which is the whole's to rounding
    return math.isclose(decay, other.observe.decay) and one == load_policy(other, {"observe.decay": decay})


def _grows(policy: Policy) -> bool:
    return policy.window.capacity is None or policy.slots_after(2**24) > policy.slots_after(2**23)


def bounded(layers: LayerPoliciesSpec) -> bool:
    """Whether some policy of these layers has a number of rows, and none grows with the text."""
    policies = layers.policies
    return any(has_rows(each) for each in policies) and not any(_grows(each.build()) for each in policies)


def check_bounded(policies: Iterable[Policy]) -> None:
    """Raise `InputError` where a policy's memory grows with the text, so that no number of bytes would do."""
    for policy in policies:
        if _grows(policy):
            raise InputError(
                f"bytes are for policies that stop growing, got {policy.name or 'one without a name'}; give rows, or "
                "another policy for these layers"
            )


def held_at_most(policies: list[Policy], shape: Shape, rows: int) -> int:
    """The most bytes that layers of these policies hold of one text, however long; rows: about as many as they have."""
    chunks = max((policy.chunk or 1) for policy in policies)
    alike_layers: dict[tuple[PolicySpec, int], tuple[Policy, Shape]] = {}
    for policy, part in alike_parts(policies, dataclasses.replace(shape, layers=len(policies), rows=1)):
        kind = policy.spec, part.kv_heads
        before = alike_layers[kind][1].layers if kind in alike_layers else 0
        alike_layers[kind] = policy, dataclasses.replace(part, layers=before + part.layers)
    held = held_bytes(list(alike_layers.values()), FULL * rows + 4 * chunks)
    return max(held.slots + held.window, held.decoding)


def most_rows(bytes: int, held: Callable[[int], int], least: int) -> int:
    """As many rows, `least` or more, as no more than so many bytes hold, to within about a row.

    held: bytes, by rows; they grow by about as much with each, so that a few are looked at. Raises `InputError` where
    the least rows are too many.
    """
    rows, now = least, held(least)
    if now > bytes:
        raise InputError(f"bytes must be at least {now:,} for these policies ({least} rows a head), got {bytes:,}")
    best, other, held_by_other = rows, 2 * least, held(2 * least)
    for _ in range(TRIES):
        each = max(1.0, (held_by_other - now) / (other - rows))
        step = math.floor((bytes - now) / each)
        if not step:
            break
        other, held_by_other = rows, now
        rows = max(least, rows + step)
        if rows == other:
            break
        now = held(rows)
        if now <= bytes:
            best = max(best, rows)
    return best
