"""The base of all specs, and the registry that finds a family's spec by its `kind`.

A spec is frozen, closed and strict: hyper-parameters only, no state. `spec.build()` makes the piece that acts.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, PrivateAttr, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from memkit.errors import PolicyError, nearest_name, short, shown, unknown_name
from memkit.yaml12 import dump

__all__ = ["AnyOf", "FamilySpec", "NamedSpec", "Spec", "SpecError", "kinds", "register"]


class SpecError(PolicyError):
    """A spec that does not validate. `problems` lists (field path, what is wrong and what is allowed)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems = [(short(path), text) for path, text in problems[:MOST_PROBLEMS]]
        super().__init__("; ".join(f"{path}: {text}" if path else text for path, text in problems))


class Spec(BaseModel):
    """Declares something: frozen, closed (unknown fields are refused), strict (no silent conversion)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, /, **data: Any) -> None:
        _check_names(data, "", 0)
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SpecError(_problems(error, type(self))) from None


class FamilySpec(Spec, ABC):
    """A spec that belongs to a family and is found in it by its `kind`."""

    family: ClassVar[str]
    kind: str


class NamedSpec(Spec):
    """A spec with files of its own, whose stems name it. Equal declarations are equal, whatever their names."""

    _name: str | None = PrivateAttr(None)

    @property
    def name(self) -> str | None:
        """The stem of the file it came from; None for a spec made in Python. No part of the declaration."""
        return self._name

    def named(self, name: str | None) -> Self:
        """The same declaration under a name."""
        copy = self.model_copy()
        copy._name = name
        return copy

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.to_yaml())

    def to_yaml(self) -> str:
        """The declaration as YAML, every field written out; reading it back gives an equal spec."""
        return dump(self.model_dump(mode="json"))


AnySpec = TypeVar("AnySpec", bound=type[FamilySpec])

MISSING = "is required and missing"
OWN_KIND = "a kind of your own must be imported first: `--import MODULE`, or `import` it in Python"
MOST_DEEP = 32
"""Lists and mappings within each other: a spec has five."""
MOST_PROBLEMS = 8
"""Problems of one spec that a message lists: the first ones, for the others may follow from them."""

_REGISTRY: dict[str, dict[str, type[FamilySpec]]] = {}


def register(spec: AnySpec) -> AnySpec:
    """Make a spec's `kind` known to its family, so that YAML can name it. Usable as a class decorator.

    Raises `PolicyError` where the class is no family's spec, has no default `kind`, or the kind is taken by another
    class (registering the same class again, or its redefinition in a notebook under the same name, replaces it).
    """
    if not (isinstance(spec, type) and issubclass(spec, FamilySpec) and hasattr(spec, "family")):
        raise PolicyError(
            f"register takes a subclass of a family's spec such as memkit.pieces.MergingSpec, got {spec!r}"
        )
    kind = spec.model_fields["kind"].default
    if not isinstance(kind, str):
        raise PolicyError(f'{spec.__name__} needs a default kind; write `kind: Literal["my-kind"] = "my-kind"`')
    if "family" in vars(spec):
        raise PolicyError(f"{spec.__name__} must inherit its family from the family's spec, got '{spec.family}'")
    known = _REGISTRY.setdefault(spec.family, {})
    held = known.get(kind)
    if held is not None and (held.__module__, held.__qualname__) != (spec.__module__, spec.__qualname__):
        raise PolicyError(
            f"{spec.family} kind '{kind}' is already {held.__module__}.{held.__qualname__}; choose another kind"
        )
    known[kind] = spec
    return spec


def kinds(family: str) -> dict[str, type[FamilySpec]]:
    """The registered specs of a family by kind."""
    return dict(_REGISTRY[family])


class AnyOf:
    """A field's annotation: any registered spec of one family, in YAML a mapping with its `kind`.

    `growth: Annotated[GrowthSpec, AnyOf("growth")]`; dumped with all fields of the subclass it really is.
    """

    def __init__(self, family: str) -> None:
        self.family = family

    def parse(self, value: Any) -> Any:
        """A mapping → the spec its `kind` names; a spec unchanged. Raises `SpecError` for anything else."""
        if isinstance(value, BaseModel):
            return value
        known = ", ".join(kinds(self.family))
        if not isinstance(value, dict):
            named = value if isinstance(value, str) and value in kinds(self.family) else next(iter(kinds(self.family)))
            raise SpecError(
                [("", f"must be a mapping with a kind, as {{kind: {named}}}, got {shown(value)}; kinds: {known}")]
            )
        kind = value.get("kind")
        if not isinstance(kind, str):
            got = f", got {shown(kind)}" if "kind" in value else ""
            raise SpecError([("kind", f"says which {self.family} is meant{got}; one of {known}")])
        if kind not in kinds(self.family):
            raise SpecError([("kind", f"{unknown_name(f'{self.family} kind', kind, kinds(self.family))}; {OWN_KIND}")])
        return kinds(self.family)[kind](**value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        as_it_is = core_schema.wrap_serializer_function_ser_schema(
            lambda value, serialize: serialize(value), schema=core_schema.any_schema()
        )
        return core_schema.no_info_before_validator_function(self.parse, handler(source), serialization=as_it_is)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        options: list[dict[str, Any]] = []
        for kind, spec in kinds(self.family).items():
            option = handler(spec.__pydantic_core_schema__)
            resolved = handler.resolve_ref_schema(option)
            resolved["required"] = sorted({*resolved.get("required", []), "kind"})
            resolved["properties"]["kind"] = {"const": kind, "type": "string", "title": "Kind"}
            options.append(option)
        return {"oneOf": options, "discriminator": {"propertyName": "kind"}}


def _check_names(value: Any, path: str, deep: int) -> None:
    """Fields have names, down to the last; and no list or mapping holds itself."""
    if deep > MOST_DEEP:
        raise SpecError([(path, f"must be nested at most {MOST_DEEP} deep, got more")])
    if isinstance(value, dict):
        for name, each in value.items():
            if not isinstance(name, str):
                raise SpecError([(path, f"a field's name must be text, got {shown(name)}")])
            _check_names(each, f"{path}.{name}" if path else name, deep + 1)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            _check_names(each, f"{path}.{index}", deep + 1)


def _problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[str, str]]:
    """A validation error in our words, one (path, text) per problem."""
    problems: list[tuple[str, str]] = []
    for detail in error.errors():
        path = ".".join(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, SpecError):
            problems += [(".".join(part for part in (path, inner) if part), text) for inner, text in cause.problems]
        elif isinstance(cause, ValueError):
            problems.append((path, str(cause)))
        else:
            problems.append((path, _wording(detail, model)))
    # A field left out because its name was mistyped is one problem, the typo.
    typos = [text for _, text in problems if text.startswith("unknown field")]
    return [
        (path, text)
        for path, text in problems
        if not (text == MISSING and any(f"did you mean '{path}'?" in typo for typo in typos))
    ]


def _wording(detail: ErrorDetails, model: type[BaseModel]) -> str:
    value = detail["input"]
    match detail["type"]:
        case "extra_forbidden":
            fields: list[str] = []
            holder: Any = model
            for part in detail["loc"][:-1]:
                holder = getattr(holder, "model_fields", {}).get(part)
                holder = getattr(holder, "annotation", None)
            fields = [name for name in getattr(holder, "model_fields", {}) if name != "kind"]
            name = str(detail["loc"][-1])
            if not fields:
                return "unknown field; this kind has none"
            return f"unknown field{nearest_name(name, fields) or ';'} known: {', '.join(fields)}"
        case "missing":
            return MISSING
        case "bool_type":
            return f"must be true or false, got {shown(value)}"
        case "model_type":
            return f"must be a mapping of its fields, got {shown(value)}"
        case _:
            text = detail["msg"]
            text = text[0].lower() + text[1:]
            return f"{text.replace('input should be', 'must be')}, got {shown(value)}"
