"""Strategies of specs: every family, registered kinds included, and whole valid policies.

Sizes are small, so that a counter-example is readable and every boundary is near: chunks of 1 to 8 tokens, up to three
chunks of window, up to ten sinks. Policies are built to be valid, not drawn and thrown away.

A third sees its readers (`observe`), in half of those that may slots compete with tokens (`eviction: weakest`), and a
fifth has heads with unequal numbers of slots. Of what is read (`readers`) only bounded reading is meant.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any, Literal

import annotated_types
from hypothesis import assume
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from memkit.errors import PolicyError
from memkit.pieces.admission import OutputErrorSpec
from memkit.pieces.growth import NoGrowthSpec
from memkit.pieces.heads import HeadsSpec
from memkit.pieces.merging import Merging, Weigh
from memkit.pieces.observation import ObservationSpec
from memkit.pieces.readout import ReadoutSpec
from memkit.pieces.registry import FamilySpec, Spec, kinds
from memkit.pieces.storage import StorageSpec
from memkit.pieces.window import AllWindowSpec, SlidingWindowSpec
from memkit.policy import PolicySpec

__all__ = ["FAMILIES", "policies", "specs"]

FAMILIES = ("chunker", "window", "growth", "admission", "routing", "merging", "readout", "rotary")

NUMBERS = (1.0, 2.0, 0.5, 0.25, 3.0, 0.1, 0.75)
"""Floats to choose from where a spec asks for one: short to read, and not all exact in binary."""

JUDGING = ("output-error", "attention", "expected-attention")
"""Kinds of admission that ask what observed queries told."""

RATIOS = ((0.5, 1.5), (1.5, 0.5), (2.0, 1.0), (0.5,))
"""How heads share slots: the shares of two, or that of each."""

SIZES: dict[str, st.SearchStrategy[Any]] = {
    "chunker.fixed.size": st.integers(1, 8),
    "chunker.boundaries.most": st.integers(1, 8),
    "window.block.chunks": st.integers(1, 3),
    "window.sliding.size": st.integers(1, 8),
    "growth.floor": st.sampled_from((0, 0, 1, 2, 5)),
    "growth.cap": st.none(),  # set beside the floor, see below
    "growth.round_down": st.sampled_from((1, 1, 2, 3)),
    "growth.fixed.slots": st.integers(0, 12),
    "growth.power.exponent": st.sampled_from((0.5, 1.0, 0.75, 0.3, 0.0)),
    "growth.log.start": st.sampled_from((1.0, 2.0, 7.5)),
    "growth.saturating.limit": st.integers(1, 16),
    "growth.linear.fraction": st.sampled_from((1.0, 0.5, 0.25, 0.1, 0.3)),
    "rotary.zero.width": st.integers(0, 3),
    "merging.weighted-mean.cap": st.sampled_from((None, None, 0.5, 1.0, 3.0)),
    "admission.expected-attention.future": st.integers(1, 5),
    "admission.attention.pool": st.sampled_from((1, 3, 5)),
    "admission.output-error.pool": st.sampled_from((1, 3, 5)),
    "admission.output-error.difference": st.sampled_from((0.0, 0.0, 1.0, 2.0)),
}
"""Fields whose small values are not the lowest allowed ones; by family and field, or family, kind and field."""


@st.composite
def specs(draw: st.DrawFn, family: str, kind: str | None = None, registered: bool = True) -> Any:
    """A spec of a family, of any kind or one; with `registered` those that are not memkit's own, too.

    `readout` has no kinds and is drawn all the same.
    """
    if family == "readout":
        return draw(_fields(ReadoutSpec, "readout"))
    known = {
        name: spec for name, spec in kinds(family).items() if registered or spec.__module__.startswith("memkit.pieces.")
    }
    chosen = known[kind] if kind is not None else known[draw(st.sampled_from(list(known)))]
    return draw(_fields(chosen, family))


@st.composite
def policies(draw: st.DrawFn, *, registered: bool = True, remembers: bool | None = None, **fixed: Any) -> PolicySpec:
    """A valid policy over every family and kind.

    registered: whether kinds that are not memkit's own may occur; remembers: whether there is growth (None: either);
    fixed: pieces that are not to be drawn, such as `merging=MyMergeSpec()`.
    """

    def piece(family: str) -> Any:
        return fixed[family] if family in fixed else draw(specs(family, registered=registered))

    chunker, merging, rotary = piece("chunker"), piece("merging"), piece("rotary")
    reads: ReadoutSpec | None = fixed.get("readout")
    if reads is not None and reads.build().divides_by_mass and hasattr(merging, "weigh"):
        merging = merging.model_copy(update={"weigh": Weigh()})
    sinks = fixed["sinks"] if "sinks" in fixed else draw(st.sampled_from((0, 0, 1, 2, 4, 10)))
    if "growth" in fixed:
        remembers = not isinstance(fixed["growth"], NoGrowthSpec)
    if remembers is None:
        remembers = draw(st.integers(0, 5)) > 0
    families: dict[str, Any] = {"chunker": chunker, "merging": merging, "rotary": rotary, "sinks": sinks}
    families["storage"] = StorageSpec(dtype=draw(st.sampled_from(("model", "float32"))))
    if not remembers:
        families["merging"] = merging = _without_share(merging)
        readout = _readout_for(draw, fixed, merging, by_runs=False)
        window = piece("window")
        if chunker.build().given and window.kind != "block":  # it cuts nothing else
            window = draw(specs("window", "block"))
        return PolicySpec(**families, window=window, growth=NoGrowthSpec(), readout=readout)

    window = piece("window")
    if isinstance(window, (AllWindowSpec, SlidingWindowSpec)):
        window = draw(specs("window", "block"))
    routing, admission = piece("routing"), piece("admission")
    observe = fixed["observe"] if "observe" in fixed else draw(_observations(merging.build().additive))
    if observes := observe.queries > 0:
        families["observe"] = observe
        if merging.build().by_share:
            merging = merging.model_copy(update={"weigh": Weigh()})
    else:
        merging = _without_share(merging)
    families["merging"] = merging
    if observes and "admission" not in fixed and (kind := draw(st.sampled_from((None, *JUDGING)))) is not None:
        admission = draw(specs("admission", kind))
    admission = _that_may_be(draw, admission, observes, rotary)
    # Without an admission the routing must found, and does so by runs.
    founds, radius = routing.build().founds, reads is not None and reads.value == "birth-radius"
    if admission.build() is None and (radius or not founds):
        admission = draw(specs("admission", "novelty"))
    by_runs = admission.build() is None
    growth = fixed["growth"] if "growth" in fixed else draw(_growths(registered))
    if (
        merging.build().joins
        and getattr(routing, "new_slots", True) is False
        and not (sinks == 0 and admission.kind == "novelty")
    ):
        # The first chunk must leave a slot to join: see the policy's rule.
        growth = growth.model_copy(update={"first_chunk": "whole"})
        least = 1 if chunker.build().given else chunker.build().size
        families["sinks"] = sinks = min(sinks, least - 1)
    families |= {"window": window, "routing": routing, "admission": admission}
    if observes and "observe" not in fixed:
        families["observe"] = _read_again(draw, observe, chunker, window, admission, rotary)
    families |= _sharing(draw, admission, merging, routing) | {
        name: fixed[name] for name in ("eviction", "heads") if name in fixed
    }
    families["readout"] = _readout_for(draw, fixed, merging, by_runs)
    if merging.build().joins and growth.floor <= sinks:
        # Raise the floor above the sinks only where the schedule would not get there by itself.
        try:
            return PolicySpec(**families, growth=growth)
        except PolicyError:
            floor = sinks + 1
            cap = None if growth.cap is None else max(growth.cap, floor)
            growth = growth.model_copy(update={"floor": floor, "cap": cap})
    return PolicySpec(**families, growth=growth)


@st.composite
def _observations(draw: st.DrawFn, may: bool) -> ObservationSpec:
    """Queries observed, in a third of the policies that may."""
    if not may or draw(st.integers(0, 2)):
        return ObservationSpec()
    return ObservationSpec(
        queries=draw(st.integers(1, 4)),
        decay=draw(st.sampled_from((1.0, 0.5, 0.9, 0.0))),
        aggregate=draw(st.sampled_from(("mean", "max"))),
        apart=draw(st.sampled_from((0, 0, 1, 2, 5))),
    )


def _read_again(
    draw: st.DrawFn, observe: ObservationSpec, chunker: Any, window: Any, admission: Any, rotary: Any
) -> ObservationSpec:
    """The same, in half of the policies that may for texts that are read again."""
    by_errors = isinstance(admission, OutputErrorSpec)
    whole = window.kind == "block" and not chunker.build().given and not rotary.build().turns_queries
    if not (by_errors and whole) or draw(st.booleans()):
        return observe
    return observe.model_copy(update={"again": 1})


def _that_may_be(draw: st.DrawFn, admission: Any, observes: bool, rotary: Any) -> Any:
    """The admission, or novelty where it needs what nobody observes, or expects queries that meet slots turned back."""
    built = admission.build()
    turned = rotary.build().turns_queries
    if built is None or not built.needs_evidence or (observes and not (built.expects is not None and turned)):
        return admission
    return draw(specs("admission", "novelty"))


def _without_share(merging: Any) -> Any:
    """A merge rule that asks no observed queries."""
    return merging.model_copy(update={"weight": "key-norm", "cap": None}) if merging.build().by_share else merging


def _sharing(draw: st.DrawFn, admission: Any, merging: Any, routing: Any) -> dict[str, Any]:
    """Whether slots compete, where they may, and how heads share them."""
    found: dict[str, Any] = {}
    built, rule = admission.build(), merging.build()
    new = getattr(routing, "new_slots", True)
    if built is not None and built.rates_slots and rule.additive and (new or not rule.joins):
        found["eviction"] = draw(st.sampled_from(("never", "weakest", "weakest")))
    if draw(st.integers(0, 4)) == 4:
        found["heads"] = HeadsSpec(ratios=draw(st.sampled_from(RATIOS)))
    return found


@st.composite
def _growths(draw: st.DrawFn, registered: bool) -> Any:
    names = [
        name
        for name, spec in kinds("growth").items()
        if not issubclass(spec, NoGrowthSpec) and (registered or spec.__module__.startswith("memkit.pieces."))
    ]
    return draw(specs("growth", draw(st.sampled_from(names)), registered))


def _readout_for(draw: st.DrawFn, fixed: dict[str, Any], merging: Any, by_runs: bool) -> Any:
    """A readout that this merging can serve; by_runs: whether slots are founded by runs of tokens, not by one."""
    if "readout" in fixed:
        return fixed["readout"]
    readout = draw(specs("readout"))
    changes: dict[str, Any] = {}
    weighs = merging.build().weighs
    if weighs.keys != weighs.values:
        changes["key"] = "layer-norm" if readout.key not in ("layer-norm", "l2") else readout.key
        changes["value"] = "count-mean" if readout.value not in ("count-mean", "birth-radius") else readout.value
    if by_runs and changes.get("value", readout.value) == "birth-radius":
        changes["value"] = "count-mean"
    rule = merging.build()
    weighs_itself = type(rule).weight is not Merging.weight and not rule.by_share
    if readout.bias == "mass" and (not rule.additive or weighs_itself):
        changes["bias"] = "count"  # a gradient would flow through it
    return readout.model_copy(update=changes)


@st.composite
def _fields(draw: st.DrawFn, spec: type[Spec], prefix: str) -> Any:
    """A spec of this class, each field drawn from its annotation and bounds."""
    values: dict[str, Any] = {}
    for name, field in spec.model_fields.items():
        if name != "kind":
            values[name] = draw(_field(spec, prefix, name, field))
    if prefix == "growth" and "cap" in values:
        values["cap"] = draw(st.sampled_from((None, None, 0, 3, 9)))
        if values["cap"] is not None:
            values["cap"] += values["floor"]
    if spec.__name__ == "WeightedMeanSpec" and values["weight"] != "share":
        values["cap"] = None
    if spec.__name__ == "ZeroSpec":  # one of its two fields, never both
        unused = draw(st.sampled_from(("width", "share")))
        values[unused] = None
        if values["share"] is None and values["width"] is None:
            values["share" if unused == "width" else "width"] = 0.5 if unused == "width" else 1
    try:
        return spec(**values)
    except PolicyError:
        assume(False)


def _field(spec: type[Spec], prefix: str, name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    kind = getattr(spec.model_fields.get("kind"), "default", "")
    for path in (f"{prefix}.{kind}.{name}", f"{prefix}.{name}"):
        if path in SIZES and spec.__module__.startswith("memkit.pieces."):
            return SIZES[path]
    return _annotated(field.annotation, field.metadata, prefix)


def _annotated(annotation: Any, bounds: list[Any], prefix: str) -> st.SearchStrategy[Any]:
    """Small values of an annotation: Literal, bool, int, float, a nested spec, or one of several."""
    if typing.get_origin(annotation) is Literal:
        return st.sampled_from(typing.get_args(annotation))
    arguments = typing.get_args(annotation)
    if type(None) in arguments:
        others = [_annotated(each, bounds, prefix) for each in arguments if each is not type(None)]
        return st.one_of(st.none(), *others)
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        allowed = [number for number in range(65) if _within(number, bounds)]
        return st.sampled_from(allowed[:9]) if allowed else st.from_type(int).filter(lambda n: _within(n, bounds))
    if annotation is float:
        return st.sampled_from([number for number in NUMBERS if _within(number, bounds)])
    if isinstance(annotation, type) and issubclass(annotation, Spec) and not issubclass(annotation, FamilySpec):
        return _fields(annotation, prefix)
    return st.from_type(annotation)


def _within(number: float, bounds: list[Any]) -> bool:
    checks: dict[type, Callable[[Any], bool]] = {
        annotated_types.Ge: lambda b: number >= b.ge,
        annotated_types.Gt: lambda b: number > b.gt,
        annotated_types.Le: lambda b: number <= b.le,
        annotated_types.Lt: lambda b: number < b.lt,
    }
    return all(checks[type(bound)](bound) for bound in bounds if type(bound) in checks)
