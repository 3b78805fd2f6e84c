"""Names ↔ files: the shipped policies, and policies read from anybody's YAML.

A file is data: loading one never imports or runs anything.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memkit import yaml12
from memkit.errors import MemkitError, PolicyError, short, shown, unknown_name
from memkit.pieces.registry import SpecError
from memkit.policy import Policy, PolicySpec

__all__ = ["as_policy", "load_policy", "policies_folder", "policy_header", "policy_names"]


FORMER = {"free-": "untrained-"}
"""How names of shipped policies began in former releases, and how they begin now."""


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
    return sorted(path.stem for path in policies_folder().glob("*.yaml"))


def policy_header(name: str) -> str:
    """The comment at the head of a shipped policy's file: what it is, where it comes from, when to use it."""
    lines = _path(name if _is_path(name) else _now(name)).read_text(encoding="utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.lstrip("# ").rstrip() for line in head if "yaml-language-server" not in line)


def load_policy(policy: str | Path | PolicySpec, overrides: Mapping[str, Any] | None = None) -> PolicySpec:
    """A policy by its shipped name or its YAML file's path, with fields overridden by dotted path.

    `load_policy("kvm-sqrt-16", {"growth.factor": 8})`. Overriding a `kind` with another one drops the family's other
    fields, since they belong to the kind. Raises `PolicyError` naming the file, the field and what is allowed.
    """
    changes = checked_overrides(overrides, PolicyError)
    if isinstance(policy, PolicySpec):
        name, source, data = policy.name, policy.name or "policy", policy.model_dump(mode="json")
    elif not isinstance(policy, (str, Path)):
        remedy = "; write PolicySpec(**fields) for a mapping" if isinstance(policy, Mapping) else ""
        raise PolicyError(f"a policy is a name, a path or a PolicySpec, got {shown(policy)}{remedy}")
    else:
        policy = policy if _is_path(policy) else _now(str(policy))
        if not changes and not _is_path(policy):
            return _shipped(str(policy))
        path = _path(policy)
        name, source, data = path.stem, short(str(policy)), _read(path)
    for field, value in sorted(changes.items(), key=lambda change: change[0].split(".")[-1] != "kind"):
        _override(data, source, field, value)
    return _validate(data, source).named(name)


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
    for field in overrides:
        if not isinstance(field, str) or not all(field.split(".")):
            raise kind(f"overrides must name fields by dotted paths, as 'growth.factor', got {shown(field)}")
    return dict(overrides)


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is no error."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@functools.cache
def _shipped(name: str) -> PolicySpec:
    return _validate(_read(_path(name)), name).named(name)


def _is_path(policy: str | Path) -> bool:
    return isinstance(policy, Path) or policy.endswith((".yaml", ".yml")) or "/" in policy or "\\" in policy


def _now(name: str) -> str:
    """A shipped policy's name of now, with a notice where it was given its former one."""
    for former, now in FORMER.items():
        renamed = now + name.removeprefix(former)
        if name.startswith(former) and is_file(policies_folder() / f"{renamed}.yaml"):
            warnings.warn(f"policy {name} is called {renamed} now; the old name goes soon", FutureWarning, stacklevel=3)
            return renamed
    return name


def _path(policy: str | Path) -> Path:
    if _is_path(policy):
        path = Path(policy)
        if not is_file(path):
            raise PolicyError(
                f"{short(str(policy))}: no such file; give the path of a policy's YAML or one of: "
                f"{', '.join(policy_names())}"
            )
        return path
    path = policies_folder() / f"{policy}.yaml"
    if not is_file(path):
        raise PolicyError(unknown_name("policy", str(policy), policy_names()) + "; or give the path of a YAML file")
    return path


def _read(path: Path) -> dict[str, Any]:
    data = yaml12.read(path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise PolicyError(f"{path}: a policy file is a mapping of families, got {type(data).__name__}")
    return data


def _default_family(family: str) -> dict[str, Any]:
    """What a policy file that leaves a family out means by that, for an override to change a part of it."""
    default = PolicySpec().model_dump(mode="json").get(family)
    return default if isinstance(default, dict) else {}


def _override(data: dict[str, Any], source: str, field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for depth, parent in enumerate(parents):
        data = data.setdefault(parent, _default_family(parent) if depth == 0 else {})
        if not isinstance(data, dict):
            raise PolicyError(
                f"{source}: {short(field)}: {short(parent)} is a plain value and has no field {short(last)}; "
                f"set {short(parent)} itself"
            )
    if last == "kind" and data.get("kind") != value:
        data.clear()
    data[last] = value


def _validate(data: dict[str, Any], source: str) -> PolicySpec:
    try:
        return PolicySpec(**{str(field): value for field, value in data.items()})
    except SpecError as error:
        raise PolicyError(
            "; ".join(f"{source}: {path}: {text}" if path else f"{source}: {text}" for path, text in error.problems)
        ) from None
