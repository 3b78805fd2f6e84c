"""YAML as memkit reads and writes it: the core schema of YAML 1.2, as plain data.

PyYAML reads YAML 1.1, in which `yes` is true, `010` is 8 and `1:30` is 90; in YAML 1.2, and here, these are text, 10
and text, and `1e-3` is a number. A field that is given twice is refused instead of the last one winning. Nothing but
mappings, lists, text, numbers, true, false and null can come out: no dates, no tags, no merge keys. What a few bytes
may become is bounded, so that no file takes long to read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from memkit.errors import MemkitError, PolicyError, short, shown

__all__ = ["dump", "load", "read"]

MOST_CHARACTERS = 200_000
MOST_VALUES = 10_000
"""Values that a text may hold, aliases counted each time: a shipped policy has 40, a model 300."""
MOST_DEEP = 32
MOST_DIGITS = 400
"""Digits of a whole number: more than the largest float has."""
TOO_DEEP = f"must be nested at most {MOST_DEEP} deep, got more; write it flatter"
TOO_MANY = f"must hold at most {MOST_VALUES:,} values, got more (aliases count each time)"

CORE = "tag:yaml.org,2002:"
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS: dict[str, dict[str, bool | None]] = {
    "bool": {"true": True, "false": False},
    "null": {"null": None, "~": None, "": None},
}
FORMS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", INTEGER, list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
)
"""How a plain scalar is told: YAML 1.2.2, section 10.3.2. The first form that matches; text where none does."""


def read(path: Path, kind: type[MemkitError] = PolicyError) -> Any:
    """What a YAML file says. Raises `kind`, naming the file, where it cannot be read or is none of ours."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not YAML: must be UTF-8, got {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})") from None
    return load(text, str(path), kind)


def load(text: str, source: str, kind: type[MemkitError] = PolicyError) -> Any:
    """What a YAML text says; `source` begins the messages. Raises `kind`: source, field, line, rule, remedy."""
    if len(text) > MOST_CHARACTERS:
        raise kind(f"{source}: not YAML: must be at most {MOST_CHARACTERS:,} characters long, got more")
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _Values(node).value(node, "", 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None and "\n" in text.strip() else ""
        problem = error.problem or error.context or "cannot be read"
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        raise kind(f"{source}: {line}not YAML: {_one_line(problem)}") from None
    except yaml.YAMLError as error:
        raise kind(f"{source}: not YAML: {_one_line(str(error))}") from None
    except _Fault as fault:
        line = f"line {fault.line}: " if "\n" in text.strip() else ""
        field = f"{short(fault.field)}: " if fault.field else ""
        raise kind(f"{source}: {field}{line}{fault}") from None


def dump(data: Any, on_one_line: bool = False) -> str:
    """Plain data as YAML that reads back equal, here and by readers of YAML 1.1."""
    options: dict[str, Any] = {"default_flow_style": True, "width": 10_000} if on_one_line else {}
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


class _Fault(Exception):
    """YAML that is well formed, but not ours. `line` counts from 1."""

    def __init__(self, node: yaml.Node, field: str, text: str) -> None:
        super().__init__(text)
        self.line, self.field = node.start_mark.line + 1, field


class _Loader(yaml.SafeLoader):
    """Reads YAML as far as its nodes, and tells plain scalars apart by the core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    deep = number = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.deep, self.number = self.deep + 1, self.number + 1
        if self.deep > MOST_DEEP + 1 or self.number > 2 * MOST_VALUES:  # a field's name is a node as well
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(None, None, TOO_DEEP if self.deep > MOST_DEEP else TOO_MANY, mark)
        node = super().compose_node(parent, index)
        self.deep -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would take for something else, too."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _form, _first in FORMS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(CORE + _name, re.compile(rf"(?:{_form.pattern})\Z"), _first)


class _Values:
    """Nodes → plain data."""

    def __init__(self, root: yaml.Node) -> None:
        self.number = 0
        self.within: set[int] = set()

    def value(self, node: yaml.Node, field: str, deep: int) -> Any:
        """What a node stands for; `field` is its dotted path."""
        self.number += 1
        if self.number > MOST_VALUES:
            raise _Fault(node, "", TOO_MANY)
        if deep > MOST_DEEP:
            raise _Fault(node, "", TOO_DEEP)
        if id(node) in self.within:
            raise _Fault(node, field, "must not contain itself (an alias inside its own anchor); write it out")
        self.within.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, field, deep)
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, field, "seq")
                return [self.value(each, _below(field, str(index)), deep + 1) for index, each in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, field)
        finally:
            self.within.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, field: str, deep: int) -> dict[str, Any]:
        self._check_tag(node, field, "map")
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, each in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Fault(key, field, "a field's name must be text, got a list or a mapping")
            name, line = _text(key, field), key.start_mark.line + 1
            if name == "<<" and key.style is None:
                raise _Fault(key, _below(field, name), "merge keys are no part of YAML 1.2; write the fields out")
            if name in found:
                raise _Fault(
                    key, _below(field, name), f"is given twice, first in line {lines[name]}; leave one of them out"
                )
            found[name], lines[name] = self.value(each, _below(field, name), deep + 1), line
        return found

    def _scalar(self, node: yaml.ScalarNode, field: str) -> Any:
        text, form = _text(node, field), node.tag.removeprefix(CORE)
        if form == "str":
            return text
        if form == "int" and INTEGER.fullmatch(text):
            if len(text) > MOST_DIGITS:
                raise _Fault(node, field, f"must have at most {MOST_DIGITS} digits, got {len(text):,}")
            return int(text[2:], 8 if text[1] == "o" else 16) if text[1:2] in ("o", "x") else int(text)
        if form == "float" and FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if text.lower() in WORDS.get(form, {}):
            return WORDS[form][text.lower()]
        return self._check_tag(node, field, "")

    @staticmethod
    def _check_tag(node: yaml.Node, field: str, wanted: str) -> None:
        if node.tag != CORE + wanted:
            tag = node.tag.replace(CORE, "!!")
            raise _Fault(node, field, f"a tag must not change what is written, got {shown(tag)}; leave the tag out")


def _text(node: yaml.ScalarNode, field: str) -> str:
    text = str(node.value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Fault(node, field, "text must be Unicode, got half of a surrogate pair")
    return text


def _below(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _one_line(text: str) -> str:
    return " ".join(text.split())
