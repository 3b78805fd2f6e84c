"""Checks: every law of a piece or a policy, over many drawn examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from memkit.catalog import as_policy
from memkit.engine.threads import one_thread
from memkit.errors import PolicyError
from memkit.pieces.admission import Admission
from memkit.pieces.growth import Growth, GrowthSpec
from memkit.pieces.merging import Merging
from memkit.pieces.readout import Readout
from memkit.pieces.registry import Spec, kinds
from memkit.pieces.routing import Routing
from memkit.policy import Policy, PolicySpec
from memkit.profiles import per_layer, shape_of_shares
from memkit.testing.cases import Case, cases
from memkit.testing.claims import claimed
from memkit.testing.given import as_spec
from memkit.testing.law import Code, Law, LawBroken, code_of
from memkit.testing.laws.admission import ADMISSION_LAWS
from memkit.testing.laws.growth import GROWTH_LAWS, tokens
from memkit.testing.laws.leaving import leaving_examples, with_margin
from memkit.testing.laws.merging import (
    MERGING_LAWS,
    associativity,
    chunks_do_not_matter,
    isotropy,
    merge_gradients,
)
from memkit.testing.laws.merging.tokens import merges
from memkit.testing.laws.policy import POLICY_LAWS, round_trip
from memkit.testing.laws.readout import READOUT_LAWS, sums_of_slots
from memkit.testing.laws.routing import ROUTING_LAWS, routing_batch_invariance, slots_follow_their_keys
from memkit.testing.report import Report, Verdict
from memkit.testing.scaling import scaled_down
from memkit.testing.specs import policies

__all__ = [
    "calls",
    "check",
    "check_admission",
    "check_growth",
    "check_merge_rule",
    "check_policy",
    "check_readout",
    "check_routing",
    "examine",
    "examine_policies",
]


SLOW_IS_FINE = [
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.nested_given,
]


class Asked(NamedTuple):
    """A law, the strategy of its examples, and what of an example it is called with.

    verify: (example) → None; claims: whom the claim is asked of.
    """

    law: Law
    examples: st.SearchStrategy[Any]
    verify: Callable[[Any], None]
    claims: Any


def check(subject: Any, examples: int = 50, family: type | None = None) -> Report:
    """Check anything: a policy (name, path, spec), or a piece of any family (class, object or spec).

    examples: how many each law is tried on; family: what the piece must be, where that is known. Raises `PolicyError`
    for what is none, and `LawBroken` as soon as the examination is over, for the first law that does not hold;
    `examine` returns the report instead.
    """
    if family is not None and not isinstance(piece := _built(subject)[0], family):
        raise PolicyError(f"expected a {family.__name__}, its class or its spec, got {type(piece).__name__}")
    return examine(subject, examples).raise_if_broken()


def check_policy(policy: str | Path | PolicySpec | Policy, examples: int = 50) -> Report:
    """The ten laws. A policy of long chunks is examined in small, see `scaled_down`. Raises `LawBroken`."""
    return check(as_policy(policy), examples)


def check_merge_rule(rule: Any, examples: int = 50) -> Report:
    """The laws of merge rules that it claims, and the ten laws in random policies that merge so. Raises `LawBroken`.

    rule: a `Merging`, its class, a `MergingSpec` or its class.
    """
    return check(rule, examples, Merging)


def check_growth(growth: Any, examples: int = 50) -> Report:
    """The laws of growth schedules, and (for a spec) the ten laws in random policies. Raises `LawBroken`."""
    return check(growth, examples, Growth)


def check_admission(admission: Any, examples: int = 50) -> Report:
    """The laws of admissions that it claims, and the ten laws in random policies. Raises `LawBroken`."""
    return check(admission, examples, Admission)


def check_routing(routing: Any, examples: int = 50) -> Report:
    """The laws of routings that it claims, and the ten laws in random policies. Raises `LawBroken`."""
    return check(routing, examples, Routing)


def check_readout(readout: Any, examples: int = 50) -> Report:
    """The laws of readouts, and (where its spec builds it) the ten laws in random policies that read so. Raises
    `LawBroken`."""
    return check(readout, examples, Readout)


def examine(
    subject: Any,
    examples: int = 50,
    laws: tuple[Law, ...] | None = None,
    watch: Callable[[Law], None] | None = None,
    shrink: bool = True,
) -> Report:
    """Try every law of the subject (or only `laws`) on so many examples; what broke is in the report.

    watch: told of each law before it is tried; shrink: whether to look for the smallest counter-example.
    """
    with one_thread(0, torch.device("cpu")):  # tensors of a few numbers
        name, note, asked = _asked(subject)
        verdicts: list[Verdict] = []
        for one in asked:
            if laws is None or one.law in laws:
                if watch is not None:
                    watch(one.law)
                verdicts.append(_verdict(one, examples, shrink))
        return Report(name, tuple(verdicts), note)


def _verdict(asked: Asked, examples: int, shrink: bool) -> Verdict:
    if not claimed(asked.claims, asked.law.claim):
        return Verdict(asked.law, "not claimed")

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
        report_multiple_bugs=False,
        suppress_health_check=SLOW_IS_FINE,
    )
    @given(asked.examples)
    def tried(example: Any) -> None:
        try:
            asked.verify(example)
        except LawBroken as broken:
            found.append(broken)
            raise

    found: list[LawBroken] = []
    try:
        tried()
    except LawBroken as broken:
        return Verdict(asked.law, "broken", broken)
    except Flaky:  # broken once, and not when the same example was tried again
        return Verdict(asked.law, "broken", found[-1])
    return Verdict(asked.law, "held")


def _asked(subject: Any) -> tuple[str, str, list[Asked]]:
    """The subject's name, a note, and the laws to ask."""
    if isinstance(subject, (str, Path, PolicySpec, Policy)):
        return _asked_of_policy(as_policy(subject))
    piece, spec, code = _built(subject)
    for family, (kind, laws_of) in FAMILIES.items():
        if isinstance(piece, kind):
            own = [one._replace(verify=_of_one_made_anew(one.law, subject, code)) for one in laws_of(piece, code)]
            return code.expression, "", [*own, *_in_policies(family, piece, spec)]
    raise PolicyError(
        f"what can be checked is a policy, a merge rule, a growth, an admission, a routing or a readout, "
        f"got {type(piece).__name__}"
    )


def _of_one_made_anew(law: Law, subject: Any, code: Code) -> Callable[[Any], None]:
    """Verifies an example on a piece made for it, where it can be made: what one keeps from earlier examples would hide
    from the law that it keeps something, and from the reader how to show it again."""
    return lambda example: law(_built(subject)[0], example, code)


def _asked_of_policy(policy: Policy) -> tuple[str, str, list[Asked]]:
    notes: list[str] = []
    if (shape := shape_of_shares(policy.spec)) is not None and policy.spec.heads.profile is not None:
        layers = per_layer(policy, *shape)
        layer = max(range(len(layers)), key=lambda number: _unevenness(layers[number]))
        policy = layers[layer]
        notes.append(f"layer {layer} of the profile, whose heads differ most")
    spec = policy.spec
    small = scaled_down(spec)
    built = small.build() if small is not spec else policy
    if built.chunk != policy.chunk:
        notes.append(f"in small: chunks of {built.chunk} tokens for {policy.chunk}, budgets in proportion")
    elif built.window.capacity != policy.window.capacity:
        notes.append(f"in small: a window of {built.window.capacity} tokens for {policy.window.capacity}")
    asked = [_one(law, cases(built), built, None) for law in POLICY_LAWS]
    return policy.name or "policy", "; ".join(notes), asked


def _unevenness(policy: Policy) -> float:
    """How far the shares of a layer's heads lie apart."""
    return 0.0 if policy.head_ratios is None else max(policy.head_ratios) - min(policy.head_ratios)


def _of_rule(rule: Merging, code: Code) -> list[Asked]:
    tame = ("integers", "normal", "clusters", "duplicates", "zeros", "antipodal")
    wild = (*tame, "tiny", "huge", "spread")
    data = {associativity: tame, isotropy: tame, merge_gradients: ("normal", *tame)}
    return [
        _one(
            law,
            merges(
                rule,
                data=data.get(law, wild),
                dtypes=("float64",) if law is merge_gradients else ("float64", "float32"),
                drops=law is not chunks_do_not_matter,
            ),
            rule,
            code,
        )
        for law in MERGING_LAWS
    ]


def _of_growth(growth: Growth, code: Code) -> list[Asked]:
    return [_one(law, tokens(), growth, code) for law in GROWTH_LAWS]


def _of_admission(admission: Admission, code: Code) -> list[Asked]:
    return [_one(law, leaving_examples(), admission, code) for law in ADMISSION_LAWS]


def _of_routing(routing: Routing, code: Code) -> list[Asked]:
    sure = (slots_follow_their_keys, routing_batch_invariance)
    new = getattr(routing, "new_slots", True)
    return [
        _one(law, with_margin(new) if law in sure else leaving_examples(joins_new=new), routing, code)
        for law in ROUTING_LAWS
    ]


def _of_readout(readout: Readout, code: Code) -> list[Asked]:
    return [_one(law, sums_of_slots(), readout, code) for law in READOUT_LAWS]


FAMILIES: dict[str, tuple[type, Callable[[Any, Code], list[Asked]]]] = {
    "merging": (Merging, _of_rule),
    "growth": (Growth, _of_growth),
    "admission": (Admission, _of_admission),
    "routing": (Routing, _of_routing),
    "readout": (Readout, _of_readout),
}
"""What can be checked by itself: each family's piece, and the laws to ask it."""


def _one(law: Law, examples: st.SearchStrategy[Any], subject: Any, code: Code | None) -> Asked:
    claims = subject.merging if isinstance(subject, Policy) else subject
    return Asked(law, examples, lambda example: law(subject, example, code), claims)


def _in_policies(family: str, piece: Any, spec: Any) -> Iterator[Asked]:
    """The ten laws in random policies that have this piece; round trips only where YAML can name it."""
    if isinstance(piece, Readout):
        spec = piece.spec
        if type(spec.build()) is not type(piece):
            return  # no policy that can be declared reads so
    elif isinstance(piece, Growth) and not isinstance(spec, GrowthSpec):
        return  # a schedule without a spec stands in no policy
    named, given = spec is not None, cast(Any, piece)
    examples = calls(remembers=True, **{family: spec if named else as_spec(given)})
    merging = piece if isinstance(piece, Merging) else Merging()
    for law in POLICY_LAWS:
        if law is round_trip and not (named and _registered(family, spec)):
            continue

        def verify(call: Any, law: Law = law) -> None:
            law(*call)

        yield Asked(law, examples, verify, merging)


@st.composite
def calls(draw: st.DrawFn, **fixed: Any) -> tuple[PolicySpec, Case]:
    """A policy and a case for it; `fixed` as in `policies`."""
    spec = draw(policies(**{"registered": False, **fixed}))
    return spec, draw(cases(spec.build()))


def examine_policies(law: Law, examples: int = 50, shrink: bool = True, **fixed: Any) -> Verdict:
    """Try one of the ten laws on random policies; `fixed` as in `policies`."""
    return _verdict(Asked(law, calls(**fixed), lambda call: law(*call), Merging()), examples, shrink)


def _registered(family: str, spec: Any) -> bool:
    return family == "readout" or kinds(family).get(spec.kind) is type(spec)


def _built(subject: Any) -> tuple[Any, Any, Code]:
    """A piece, the spec it comes from (None where there is none), and how it is written."""
    code = code_of(subject)
    if inspect.isclass(subject):
        try:
            subject = subject()
        except (TypeError, PolicyError) as error:
            raise PolicyError(
                f"{subject.__name__} cannot be made without arguments ({error}); give one made with them"
            ) from None
    if isinstance(subject, Spec):
        piece = subject.build() if hasattr(subject, "build") else None  # type: ignore[attr-defined]
        if piece is None:
            raise PolicyError(f"{code.expression} stands for no piece at all, so there is nothing to check")
        return piece, subject, Code(code.imports, f"{code.expression}.build()")
    return subject, None, code
