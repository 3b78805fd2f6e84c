"""YAML as files and --set have it: YAML 1.2's core schema, each field once, plain data."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import memkit
from memkit import yaml12
from memkit.lm import load_model_spec
from tests.counting import calls_made


def refused(text: str) -> str:
    with pytest.raises(memkit.PolicyError) as refusal:
        yaml12.load(text, "mine.yaml")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("+7", 7), ("-7", -7), ("1:30", "1:30"), ("1_000", "1_000"),
        ("1e-3", 0.001), ("1.0e-3", 0.001), (".5", 0.5), ("5.", 5.0), ("1e+308", 1e308), ("-.inf", -float("inf")),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True), ("False", False),
        ("~", None), ("", None), ("null", None), ("2020-01-01", "2020-01-01"), ("=", "="), ("'true'", "true"),
        ("!!str 5", "5"), ("!!int 5", 5), ("[1, {a: 2}]", [1, {"a": 2}]),
    ],
)  # fmt: skip
def test_plain_values_are_those_of_yaml_1_2(text: str, value: Any):
    found = yaml12.load(f"x: {text}", "mine.yaml")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sinks: 1\nwindow: {kind: all}\nsinks: 4\n",
            "mine.yaml: sinks: line 3: is given twice, first in line 1; leave one of them out",
        ),
        (
            "growth:\n  kind: fixed\n  slots: 3\n  slots: 4\n",
            "mine.yaml: growth.slots: line 4: is given twice, first in line 3; leave one of them out",
        ),
        ("growth: {slots: 3, 'slots': 4}", "mine.yaml: growth.slots: is given twice, first in line 1; "),
        ("1: 2\n1: 3", "mine.yaml: 1: line 2: is given twice"),
        ("a: 1\n<<: {sinks: 1}", "mine.yaml: <<: line 2: merge keys are no part of YAML 1.2; write the fields out"),
        ("a:\n  ? [1]\n  : 2", "mine.yaml: a: line 2: a field's name must be text, got a list or a mapping"),
        ("a: &a [1, *a]", "mine.yaml: a.1: must not contain itself"),
        ("a: !!binary aGk=", "mine.yaml: a: a tag must not change what is written, got '!!binary'; leave the tag out"),
        ("a: !!timestamp 2020-01-01", "mine.yaml: a: a tag must not change what is written, got '!!timestamp'"),
        ("a: !!python/object/apply:os.getcwd []", "mine.yaml: a: a tag must not change what is written"),
        ("!!set {a, b}", "mine.yaml: a tag must not change what is written, got '!!set'"),
        ("a: !!int many", "mine.yaml: a: a tag must not change what is written, got '!!int'"),
        ("a: " + "9" * 401, "mine.yaml: a: must have at most 400 digits, got 401"),
        ('a: "\\uD800"', "mine.yaml: a: text must be Unicode, got half of a surrogate pair"),
        ("a: 1\nb: [", "mine.yaml: line 2: not YAML: "),
        ("a: 1\n---\nb: 1", "mine.yaml: line 2: not YAML: expected a single document in the stream, but found another"),
        ("a: \x00", "mine.yaml: not YAML: unacceptable character #x0000"),
        ("[" * 3000, "mine.yaml: not YAML: must be nested at most 32 deep, got more; write it flatter"),
        ("{a: " * 3000, "mine.yaml: not YAML: must be nested at most 32 deep, got more; write it flatter"),
        ("- " * 3000, "mine.yaml: not YAML: must be nested at most 32 deep, got more; write it flatter"),
        ("#" * 200_001, "mine.yaml: not YAML: must be at most 200,000 characters long, got more"),
        (f"[{'1, ' * 30_000}]", "mine.yaml: not YAML: must hold at most 10,000 values, got more"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_refused_names_line_and_field(text: str, message: str):
    assert refused(text).startswith(message)


def test_aliases_may_be_used_and_not_multiplied():
    assert yaml12.load("a: &a [1, 2]\nb: *a", "mine.yaml") == {"a": [1, 2], "b": [1, 2]}
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    said = list[str]()
    assert calls_made(lambda: said.append(refused(bomb))) < 1_000_000  # written out it would be 9¹² values
    assert "must hold at most 10,000 values, got more (aliases count each time)" in said[0]
    stairs = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} {'[' * 9}*a{n - 1}{']' * 9}\n" for n in range(1, 99))
    assert "must be nested at most 32 deep" in refused(stairs)


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(
    [
        "on",
        "yes",
        "010",
        "0o10",
        "1e-3",
        "1:30",
        "~",
        "null",
        "true",
        "2020-01-01",
        "<<",
        "=",
        "1_000",
        ".5",
        "*a",
        "!x",
    ]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_dumped_reads_back_equal_here_and_as_yaml_1_1(data: Any):
    for text in (yaml12.dump(data), yaml12.dump(data, on_one_line=True)):
        assert yaml12.load(text, "again") == data
        assert yaml.safe_load(text) == data


def test_a_spec_with_words_of_yaml_1_1_round_trips(tmp_path: Path):
    for name in memkit.policy_names():
        spec = memkit.load_policy(name)
        (tmp_path / "again.yaml").write_text(spec.to_yaml())
        assert memkit.load_policy(tmp_path / "again.yaml") == spec
    for name in memkit.model_names():
        spec = load_model_spec(name)
        (tmp_path / "again.yaml").write_text(spec.to_yaml())
        assert load_model_spec(tmp_path / "again.yaml") == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("readout: {temperatures: yes}", "readout.temperatures: must be true or false, got 'yes'"),
        ("growth: {kind: fixed, slots: 1:30}", "growth.slots: must be a valid integer, got '1:30'"),
        ("sinks: 1_0", "sinks: must be a valid integer, got '1_0'"),
    ],
)
def test_words_that_meant_something_else_are_refused_where_they_mean_nothing(text: str, message: str, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(memkit.PolicyError) as refusal:
        memkit.load_policy(tmp_path / "mine.yaml")
    assert str(refusal.value).startswith(f"{tmp_path / 'mine.yaml'}: {message}")


def test_numbers_without_a_point_are_numbers(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(
        "window: {kind: block, chunks: 1}\ngrowth: {kind: linear, fraction: 1e-1, floor: 010}\n"
    )
    growth = memkit.load_policy(tmp_path / "mine.yaml").growth.model_dump()
    assert (growth["fraction"], growth["floor"]) == (0.1, 10)


def test_models_and_overrides_are_read_alike(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(load_model_spec("tiny-full").to_yaml() + "depth: 3\n")
    with pytest.raises(memkit.ModelError, match=r"mine\.yaml: depth: line \d+: is given twice, first in line 3"):
        load_model_spec(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(memkit.ModelError, match=r"mine\.yaml: not YAML: must be UTF-8"):
        load_model_spec(path)
