"""Laws of growth schedules: how many slots there may be after n tokens, for every n up to 2^53 and past it."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from memkit.pieces.growth import Growth
from memkit.testing.law import Broken, law

__all__ = [
    "GROWTH_LAWS",
    "growth_is_monotone",
    "growth_is_pure",
    "growth_is_steady",
    "growth_within_bounds",
    "whole_slots",
]

LARGEST = 2**53
"""Beyond it neighbouring whole numbers are one float, so that a formula in floats may wobble."""


def tokens() -> st.SearchStrategy[int]:
    """Numbers of tokens: small ones, squares, powers of two and their neighbours, up to 2^53."""
    near = st.integers(-2, 2)
    roots = st.one_of(st.integers(0, 300), st.integers(0, math.isqrt(LARGEST)))
    return st.one_of(
        st.integers(0, 300),
        st.builds(lambda root, step: max(0, root * root + step), roots, near),
        st.builds(lambda power, step: max(0, 2**power + step), st.integers(0, 53), near),
        st.integers(0, LARGEST),
    )


@law("whole slots", "growth")
def whole_slots(growth: Growth, n: int) -> None:
    """budget(n) is a whole number ≥ 0, a Python int.

    Slots are rows of a tensor; half a row, or a NaN, fails far from here.
    """
    budget = growth.budget(n)
    if type(budget) is not int or budget < 0:
        raise Broken(f"budget({n}) is {budget!r}, a {type(budget).__name__}")


@law("monotone", "growth")
def growth_is_monotone(growth: Growth, n: int) -> None:
    """budget(n) ≤ budget(n + 1) ≤ budget(2n + 1).

    A slot that is there cannot be taken back: what it holds has nowhere to go.
    """
    for more in (n + 1, 2 * n + 1):
        if growth.budget(n) > growth.budget(more):
            raise Broken(f"budget({n}) is {growth.budget(n)}, budget({more}) is {growth.budget(more)}")


@law("within bounds", "growth")
def growth_within_bounds(growth: Growth, n: int) -> None:
    """floor ≤ budget(n) ≤ cap, and between them a multiple of round_down, at most f(n).

    What a policy file promises about memory must hold at every length.
    """
    spec, budget = growth.spec, growth.budget(n)
    if budget < spec.floor or (spec.cap is not None and budget > spec.cap):
        raise Broken(f"budget({n}) is {budget}; floor {spec.floor}, cap {spec.cap}")
    if budget not in (spec.floor, spec.cap) and budget % spec.round_down:
        raise Broken(f"budget({n}) is {budget}, not a multiple of {spec.round_down}")
    size = growth.size(n)
    if budget > spec.floor and budget > size:
        raise Broken(f"budget({n}) is {budget}, but f({n}) is {size!r} and the floor {spec.floor}")
    if budget != spec.cap and budget + spec.round_down <= size:
        raise Broken(f"budget({n}) is {budget}, but f({n}) is {size!r}: {spec.round_down} more fit")


@law("steady", "growth")
def growth_is_steady(growth: Growth, n: int) -> None:
    """budget does not wobble under float error: it never falls between neighbours just below, at and above n, or 2^53.

    f computed in floats is exact nowhere near 2^53, and a formula that is a whole number there may come out an ulp
    below it, for one n and not for the next.
    """
    for middle in (n, LARGEST - n % 4096, LARGEST + n % 4096):
        around = [growth.budget(max(0, middle + step)) for step in range(-2, 3)]
        if sorted(around) != around:
            raise Broken(f"budget from {middle - 2} to {middle + 2}: {around}")


@law("purity", "growth")
def growth_is_pure(growth: Growth, n: int) -> None:
    """The same n gives the same budget, whatever was asked before.

    Splits, forks and a cost worked out beforehand all ask again.
    """
    first = growth.budget(n)
    growth.budget(2 * n + 1)
    growth.budget(0)
    if growth.budget(n) != first:
        raise Broken(f"budget({n}) is {first}, and {growth.budget(n)} when asked again")


GROWTH_LAWS = (whole_slots, growth_is_monotone, growth_within_bounds, growth_is_steady, growth_is_pure)
