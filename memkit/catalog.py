"""Names ↔ files: one class for policies, models and profiles, and the policies.

A file is data: loading one never imports or runs anything.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from memkit import yaml12
from memkit.errors import MemkitError, PolicyError, RenamedWarning, short, shown, unknown_name, warn
from memkit.pieces.registry import NamedSpec, SpecError
from memkit.policy import Policy, PolicySpec

__all__ = ["Catalog", "as_policy", "load_policy", "policies_folder", "policy_header", "policy_names"]

AnySpec = TypeVar("AnySpec", bound=NamedSpec)


@dataclass(frozen=True, eq=False)
class Catalog(Generic[AnySpec]):
    """Names ↔ files of one kind of spec: those that memkit ships in a folder, and anybody's.

    Args:
        what: what messages call one: policy, model, profile.
        spec: its class.
        error: what is raised, in one line: file, field, what is allowed.
        folder: the name of the shipped files' folder, beside the shipped policies.
        given: what messages say one is given as.
        files: what messages say besides names may be given.
        looked_for: what messages say to give where a file is missing, before the shipped names.
        fields: what messages call the fields of a file.
        inside: the file that is meant where a folder is given; None: folders are not read.
        former: how shipped names began in former releases, and how they begin now.
        elsewhere: fields by which a file is seen to be of another kind, and what messages say of it.
    """

    what: str
    spec: type[AnySpec]
    error: type[MemkitError]
    folder: str
    given: str
    files: str
    looked_for: str
    fields: str = "fields"
    inside: str | None = None
    former: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    _shipped: dict[str, AnySpec] = field(default_factory=dict, init=False, repr=False)

    def shipped_folder(self) -> Path:
        """Where the shipped files lie."""
        return policies_folder().parent / self.folder

    def names(self) -> list[str]:
        """The shipped names, sorted."""
        return sorted(path.stem for path in self.shipped_folder().glob("*.yaml"))

    def header(self, name: str | Path) -> str:
        """The comment at the head of a file, its schema's name left out."""
        lines = self.path(self._now(name)).read_text(encoding="utf-8").splitlines()
        head = itertools.takewhile(lambda line: line.startswith("#"), lines)
        return "\n".join(line.lstrip("# ").rstrip() for line in head if "yaml-language-server" not in line)

    def load(self, given: str | Path | AnySpec, overrides: Mapping[str, Any] | None = None) -> AnySpec:
        """The spec of a shipped name, a path or a spec, with fields overridden by dotted path.

        Overriding a `kind` with another one drops the other fields beside it, since they belong to the kind.
        """
        changes = checked_overrides(overrides, self.error)
        if isinstance(given, self.spec):
            name, source, data = given.name, given.name or self.what, given.model_dump(mode="json")
        elif not isinstance(given, (str, Path)):
            remedy = f"; write {self.spec.__name__}(**fields) for a mapping" if isinstance(given, Mapping) else ""
            raise self.error(f"a {self.what} is {self.given}, got {shown(given)}{remedy}")
        else:
            given = self._now(given)
            if not changes and given in self._shipped:
                return self._shipped[str(given)]
            path = self.path(given)
            name = path.parent.name if path.name == self.inside else path.stem
            source, data = short(str(given)), self.read(path)
            for other in self.elsewhere.keys() & data.keys():
                raise self.error(f"{source}: {self.elsewhere[other]}")
        for changed, value in sorted(changes.items(), key=lambda change: change[0].split(".")[-1] != "kind"):
            self._override(data, source, changed, value)
        spec = self._validated(data, source).named(name)
        if not changes and isinstance(given, str) and not _is_path(given) and self._shipped_file(given) is not None:
            self._shipped[given] = spec
        return spec

    def path(self, given: str | Path) -> Path:
        """The YAML file of a shipped name or a path; raises where there is none."""
        if not isinstance(given, (str, Path)):
            raise self.error(f"a {self.what} is {self.given}, got {shown(given)}")
        path = Path(given)
        inside = None if self.inside is None else path / self.inside
        if not _is_path(given):
            if (shipped := self._shipped_file(given)) is not None:
                return shipped
            if inside is None or not is_file(inside):
                unknown = unknown_name(self.what, str(given), self.names())
                raise self.error(f"{unknown}; or give the path of {self.files}")
        if inside is not None and is_file(inside):
            return inside
        if not is_file(path):
            raise self.error(f"{short(str(given))}: no such file; give {self.looked_for}: {', '.join(self.names())}")
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """A file's fields, not yet validated; an empty file has none."""
        data = yaml12.read(path, self.error)
        if data is None:
            return {}
        if not isinstance(data, dict):
            raise self.error(f"{path}: a {self.what} file is a mapping of {self.fields}, got {type(data).__name__}")
        return data

    def _shipped_file(self, name: str | Path) -> Path | None:
        """The file of a shipped name; those in `more/` have a name, but are not among the names that are listed."""
        folder = self.shipped_folder()
        return next(
            (path for path in (folder / f"{name}.yaml", folder / "more" / f"{name}.yaml") if is_file(path)), None
        )

    def _now(self, name: str | Path) -> str | Path:
        """A shipped name of now, with a notice where it was given as it was in former releases."""
        if isinstance(name, str) and not _is_path(name):
            for former, now in self.former.items():
                renamed = now + name.removeprefix(former)
                if name.startswith(former) and self._shipped_file(renamed) is not None:
                    warn(f"{self.what} {name} is called {renamed} now; the old name goes soon", RenamedWarning)
                    return renamed
        return name

    def _override(self, data: dict[str, Any], source: str, changed: str, value: Any) -> None:
        *parents, last = changed.split(".")
        for depth, parent in enumerate(parents):
            data = data.setdefault(parent, self._default(parent) if depth == 0 else {})
            if not isinstance(data, dict):
                raise self.error(
                    f"{source}: {short(changed)}: {short(parent)} is a plain value and has no field {short(last)}; "
                    f"set {short(parent)} itself"
                )
        if last == "kind" and data.get("kind") != value:
            data.clear()
        data[last] = copy.deepcopy(value)  # a field within may be changed next, and the value is the caller's

    def _default(self, name: str) -> dict[str, Any]:
        """What a file that leaves a field out means by that, for an override to change a part of it."""
        known = self.spec.model_fields.get(name)
        default = None if known is None else known.get_default(call_default_factory=True, validated_data={})
        return default.model_dump(mode="json") if isinstance(default, BaseModel) else {}

    def _validated(self, data: dict[str, Any], source: str) -> AnySpec:
        try:
            return self.spec(**{str(name): value for name, value in data.items()})
        except SpecError as error:
            problems = (f"{source}: {path}: {text}" if path else f"{source}: {text}" for path, text in error.problems)
            raise self.error("; ".join(problems)) from None


POLICIES = Catalog(
    what="policy",
    spec=PolicySpec,
    error=PolicyError,
    folder="policies",
    given="a name, a path or a PolicySpec",
    files="a YAML file",
    looked_for="the path of a policy's YAML or one of",
    fields="families",
    former={"free-": "untrained-"},
    elsewhere={
        "default": "is a policy for each layer; memkit show, check and bench take one policy, "
        "memkit cost --layers N and memkit compare the whole"
    },
)


@functools.cache
def policies_folder() -> Path:
    """Where the shipped policies lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "policies", package.parent / "policies"):
        if folder.is_dir():
            return folder
    raise PolicyError(f"the shipped policies are missing beside {package}; install memkit-attention again")


def policy_names() -> list[str]:
    """The names of the shipped policies, sorted."""
    return POLICIES.names()


def is_shipped(name: str) -> bool:
    """Whether memkit ships a policy of that name, listed or not."""
    return not _is_path(name) and POLICIES._shipped_file(name) is not None


def policy_header(name: str) -> str:
    """The comment at the head of a shipped policy's file: what it is, where it comes from, when to use it."""
    return POLICIES.header(name)


def load_policy(policy: str | Path | PolicySpec, overrides: Mapping[str, Any] | None = None) -> PolicySpec:
    """A policy by its shipped name or its YAML file's path, with fields overridden by dotted path.

    `load_policy("kvm-sqrt-16", {"growth.factor": 8})`. Overriding a `kind` with another one drops the family's other
    fields, since they belong to the kind. Raises `PolicyError` naming the file, the field and what is allowed.
    """
    return POLICIES.load(policy, overrides)


def as_policy(policy: str | Path | PolicySpec | Policy) -> Policy:
    """What may stand for a policy everywhere → the policy."""
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, (str, Path, PolicySpec)):
        return (policy if isinstance(policy, PolicySpec) else load_policy(policy)).build()
    raise PolicyError(f"a policy is a name, a path, a PolicySpec or a Policy, got {type(policy).__name__}")


def checked_overrides(overrides: Mapping[str, Any] | None, kind: type[MemkitError]) -> dict[str, Any]:
    """Overrides as a dict of dotted paths; else raises `kind`."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise kind(f"overrides must be a mapping of fields, as {{'growth.factor': 8}}, got {shown(overrides)}")
    for name in overrides:
        if not isinstance(name, str) or not all(name.split(".")):
            raise kind(f"overrides must name fields by dotted paths, as 'growth.factor', got {shown(name)}")
    return dict(overrides)


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is no error."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _is_path(given: str | Path) -> bool:
    return isinstance(given, Path) or given.endswith((".yaml", ".yml", ".json")) or "/" in given or "\\" in given
