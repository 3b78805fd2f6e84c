"""Growth schedules: exact at the corners, within their bounds, never falling."""

import math
from fractions import Fraction
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memkit
from memkit import PolicySpec
from memkit.pieces.growth import (
    FixedGrowthSpec,
    Growth,
    GrowthSpec,
    LinearGrowthSpec,
    LogGrowthSpec,
    NoGrowthSpec,
    PowerGrowthSpec,
    SaturatingGrowthSpec,
    SqrtGrowthSpec,
)
from tests.counting import calls_made

TOKENS = st.integers(0, 2**40)
FACTORS = st.floats(0.01, 100, allow_nan=False)


@st.composite
def schedules(draw: st.DrawFn) -> GrowthSpec:
    """Any schedule with any bounds."""
    floor = draw(st.integers(0, 300))
    shared = {
        "floor": floor,
        "cap": draw(st.none() | st.integers(floor, 100_000)),
        "round_down": draw(st.integers(1, 64)),
    }
    kinds = [
        lambda: FixedGrowthSpec(slots=draw(st.integers(0, 5000)), **shared),
        lambda: SqrtGrowthSpec(factor=draw(FACTORS), **shared),
        lambda: PowerGrowthSpec(factor=draw(FACTORS), exponent=draw(st.floats(0, 1)), **shared),
        lambda: LogGrowthSpec(per_doubling=draw(FACTORS), start=draw(FACTORS), **shared),
        lambda: SaturatingGrowthSpec(limit=draw(st.integers(1, 5000)), **shared),
        lambda: LinearGrowthSpec(fraction=draw(st.floats(0.001, 1)), **shared),
    ]
    return draw(st.sampled_from(kinds))()


# 94906265 is the last whole number whose square lies below 2⁵³; past it, floats no longer count by ones.
@pytest.mark.parametrize("root", [1, 2, 3, 1000, 94_906_265, 94_906_266, 2**27, 2**40 + 1])
def test_sqrt_is_exact_at_perfect_squares(root: int):
    growth = SqrtGrowthSpec(factor=1).build()
    assert growth.budget(root**2) == root
    assert growth.budget(root**2 - 1) == root - 1
    assert growth.budget((root + 1) ** 2 - 1) == root


def test_sqrt_floors_exactly_for_the_factor_as_written():
    for factor in (0.1, 0.3, 16, 2.5, 1e-3):
        growth = SqrtGrowthSpec(factor=factor).build()
        for tokens in [*range(300), 2**53 - 1, 2**53, 2**53 + 1]:
            slots, square = growth.budget(tokens), Fraction(str(factor)) ** 2 * tokens
            assert slots**2 <= square < (slots + 1) ** 2, (factor, tokens)


@pytest.mark.parametrize("fraction", [0.1, 0.125, 0.3, 0.7, 1])
def test_linear_floors_exactly_for_the_fraction_as_written(fraction: float):
    growth = LinearGrowthSpec(fraction=fraction).build()
    exact = Fraction(str(fraction))
    for tokens in [*range(500), 10**6, 2**53 - 1, 2**53 + 1]:
        assert growth.budget(tokens) == math.floor(exact * tokens), tokens


def test_power_is_exact_where_its_value_is_whole():
    growth = PowerGrowthSpec(factor=1, exponent=0.75).build()
    for root in range(1, 2000):
        assert growth.budget(root**4) == root**3
        assert growth.budget(root**4 - 1) == root**3 - 1


def test_log_is_exact_at_each_doubling():
    growth = LogGrowthSpec(per_doubling=256, start=256).build()
    for doublings in range(40):
        tokens = 256 * (2**doublings - 1)
        assert growth.budget(tokens) == 256 * doublings
    assert growth.budget(255) == 255  # 256·log₂(511/256) = 255.3…


@given(limit=st.integers(1, 10_000), tokens=TOKENS)
def test_saturating_floors_exactly_and_stays_below_its_limit(limit: int, tokens: int):
    slots = SaturatingGrowthSpec(limit=limit).build().budget(tokens)
    assert slots == math.floor(Fraction(limit * tokens, limit + tokens))
    assert slots < limit
    assert SaturatingGrowthSpec(limit=limit).build().budget(limit) == limit // 2


def test_no_growth_builds_nothing():
    assert NoGrowthSpec().build() is None


@given(spec=schedules(), first=TOKENS, second=TOKENS)
def test_budgets_never_fall(spec: GrowthSpec, first: int, second: int):
    growth = spec.build()
    assert growth is not None
    assert growth.budget(min(first, second)) <= growth.budget(max(first, second))


@given(spec=schedules(), tokens=TOKENS)
def test_budgets_are_rounded_down_then_held_between_floor_and_cap(spec: GrowthSpec, tokens: int):
    growth = spec.build()
    assert growth is not None
    budget = growth.budget(tokens)
    assert isinstance(budget, int)
    assert budget >= spec.floor
    if spec.cap is not None:
        assert budget <= spec.cap
    if spec.floor < budget != spec.cap:
        assert budget % spec.round_down == 0
        assert budget <= growth.size(tokens) < budget + spec.round_down


def test_a_floor_above_the_cap_is_refused():
    with pytest.raises(memkit.PolicyError, match=r"floor must not exceed cap, got floor 9 and cap 8; lower the floor"):
        FixedGrowthSpec(slots=4, floor=9, cap=8)


@pytest.mark.parametrize("size", [math.inf, -math.inf, math.nan, "many", None])
def test_a_budget_must_be_a_finite_number(size: Any):
    class Wild(Growth):
        def size(self, tokens: int) -> float:
            return size

    with pytest.raises(memkit.PolicyError, match=r"must be a finite number, got .* after 7 tokens"):
        Wild(FixedGrowthSpec(slots=1)).budget(7)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (SqrtGrowthSpec, {"factor": 0}),
        (SqrtGrowthSpec, {"factor": math.inf}),
        (PowerGrowthSpec, {"factor": 1, "exponent": 1.5}),
        (PowerGrowthSpec, {"factor": 1, "exponent": -0.1}),
        (LinearGrowthSpec, {"fraction": 0}),
        (LinearGrowthSpec, {"fraction": 1.01}),
        (LogGrowthSpec, {"per_doubling": 1, "start": 0}),
        (SaturatingGrowthSpec, {"limit": 0}),
        (FixedGrowthSpec, {"slots": -1}),
        (FixedGrowthSpec, {"slots": 1, "round_down": 0}),
        (FixedGrowthSpec, {"slots": 1.0}),
    ],
)
def test_bounds_of_the_fields_are_checked(kind: type[GrowthSpec], fields: dict[str, float]):
    with pytest.raises(memkit.PolicyError, match=rf"{list(fields)[-1]}: .*got"):
        kind(**fields)


@pytest.mark.parametrize(
    "growth",
    [
        {"kind": "sqrt", "factor": 2.0**40},
        {"kind": "power", "factor": 2.0**40, "exponent": 1.0},
        {"kind": "log", "per_doubling": 2.0**40, "start": 1e-12},
        {"kind": "saturating", "limit": 2**40},
        {"kind": "fixed", "slots": 2**40},
    ],
    ids=str,
)
def test_the_largest_numbers_grow_as_the_tokens_do(growth):
    """What is allowed is counted without an overflow: a budget beyond the tokens grants every token a slot."""
    spec = PolicySpec(chunker={"kind": "fixed", "size": 4}, window={"kind": "block", "chunks": 2**40}, growth=growth)
    assert 2**39 < spec.build().budget(2**50) <= 2**50 + 4
    spec = PolicySpec(chunker={"kind": "fixed", "size": 4}, window={"kind": "block", "chunks": 1}, growth=growth)
    assert spec.build().slots_after(4001) in (3999, 4000)  # saturating: just below


def test_a_size_beyond_the_floats_is_a_budget():
    """`isfinite` takes no whole number beyond the floats: it raised OverflowError."""

    class Spec(GrowthSpec):
        kind: Literal["huge"] = "huge"

        def build(self):
            class Huge(Growth):
                def size(self, tokens):
                    return 10**400

            return Huge(self)

    assert Spec(cap=7).build().budget(1) == 7
    assert Spec().build().budget(1) == 10**400


def test_many_sinks_are_checked_at_once():
    def declare() -> None:
        PolicySpec(
            sinks=2**20,
            chunker={"kind": "fixed", "size": 1},
            window={"kind": "block", "chunks": 1},
            growth={"kind": "fixed", "slots": 2**20 + 1},
        )

    assert calls_made(declare) < 100_000  # not one for each
