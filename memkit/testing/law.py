"""What a law is: a function of a subject and an example that raises where it does not hold."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from memkit.pieces.registry import Spec
from memkit.policy import Policy, PolicySpec
from memkit.testing.given import GivenAdmissionSpec, GivenMergingSpec, GivenRoutingSpec

__all__ = ["Broken", "Code", "Law", "LawBroken", "code_of", "law"]


class Broken(AssertionError):
    """Raised inside a law: the numbers that show it does not hold."""


class LawBroken(AssertionError):
    """A law does not hold.

    law: which one; code: the example as code, which runs where a piece can be made without arguments or comes from a
    spec; numbers: what was found and what was expected.
    """

    def __init__(self, law: Law, says: str, code: str, numbers: str) -> None:
        self.law, self.says, self.code, self.numbers = law, says, code, numbers
        found = textwrap.indent(numbers, "  ")
        super().__init__(f"broken law: {law.family}, {law.name}\n{says}\n\n{found}\n\nshow it again:\n\n{code}\n")


@dataclass(frozen=True)
class Code:
    """How something is written in Python: import lines, and an expression."""

    imports: tuple[str, ...]
    expression: str


class Law:
    """A law of one family. Calling it verifies one example and raises `LawBroken` where it does not hold.

    name: as tables and errors show it; family: `policy`, or the family of pieces it is about;
    claim: the claim whose holders are asked, None where everybody is.
    """

    def __init__(self, name: str, family: str, claim: str | None, verify: Callable[[Any, Any], None]) -> None:
        self.name, self.family, self.claim, self.verify = name, family, claim, verify
        self.__name__, self.__doc__, self.__wrapped__ = verify.__name__, verify.__doc__, verify

    @property
    def says(self) -> str:
        """The law in one line: the first of its docstring."""
        return (self.__doc__ or "").strip().splitlines()[0]

    def __call__(self, subject: Any, example: Any, code: Code | None = None) -> None:
        """Verify one example; `code`: how the subject is written in Python, for the error."""
        try:
            self.verify(subject, example)
        except Broken as broken:
            raise self._broken(subject, example, code, str(broken)) from None
        except Exception as error:  # a rule that raises on data it must take keeps no law
            raise self._broken(subject, example, code, f"raised {type(error).__name__}: {error}") from error

    def _broken(self, subject: Any, example: Any, code: Code | None, numbers: str) -> LawBroken:
        shown = code_of(subject) if code is None else code
        parts = {type(example).__name__} if is_dataclass(example) else set()
        imports = [*shown.imports, f"from memkit.testing import {', '.join(sorted({'laws', *parts}))}"]
        call = f"laws.{self.__name__}({shown.expression}, {_example(example)})"
        return LawBroken(self, self.says, "\n".join([*imports, "", call]), numbers)

    def __repr__(self) -> str:
        return f"Law({self.family}: {self.name})"


def law(name: str, family: str, claim: str | None = None) -> Callable[[Callable[[Any, Any], None]], Law]:
    """Makes a function (subject, example) → None a law."""
    return lambda verify: Law(name, family, claim, verify)


def code_of(subject: Any) -> Code:
    """How a policy, a spec, a piece or a class without arguments is written."""
    if isinstance(subject, Policy):
        subject = subject.spec
    if isinstance(subject, PolicySpec):
        return _policy_code(subject)
    kind = subject if isinstance(subject, type) else type(subject)
    text = repr(subject)
    if isinstance(subject, type) or text.startswith("<"):
        text = f"{kind.__qualname__}()"
    return Code((f"from {kind.__module__} import {kind.__qualname__.partition('.')[0]}",), text)


def _policy_code(spec: PolicySpec) -> Code:
    imports, families = {"from memkit import PolicySpec"}, []
    for name, field in PolicySpec.model_fields.items():
        piece = getattr(spec, name)
        if piece == field.default and type(piece) is type(field.default):
            continue
        if isinstance(piece, (GivenMergingSpec, GivenAdmissionSpec, GivenRoutingSpec)):
            given = code_of(piece.build())
            imports |= {*given.imports, "from memkit.testing import as_spec"}
            families.append(f"    {name}=as_spec({given.expression}),\n")
            continue
        if isinstance(piece, Spec):
            kind = getattr(piece, "kind", None)  # observe, heads, readout and storage have none
            if not type(piece).__module__.startswith("memkit.pieces."):
                imports.add(f"import {type(piece).__module__}  # registers {kind}")
            given = piece.model_dump(mode="json", exclude_defaults=True)
            piece = given if kind is None else {"kind": kind, **given}
        families.append(f"    {name}={piece!r},\n")
    inner = "\n" + "".join(families) if families else ""
    return Code(tuple(sorted(imports)), f"PolicySpec({inner})")


def _example(example: Any) -> str:
    """An example as code; parts that have their default are left out."""
    if not is_dataclass(example):
        return repr(example)
    parts = [
        f"{field.name}={value!r}"
        for field in fields(example)
        if (value := getattr(example, field.name)) != field.default
    ]
    return f"{type(example).__name__}({', '.join(parts)})"
