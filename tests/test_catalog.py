"""The catalogue: names and paths, overrides, and that files are data."""

import re
from pathlib import Path

import pytest
import yaml

import memkit
from memkit.catalog import as_policy, policies_folder, policy_header
from memkit.pieces.growth import FixedGrowthSpec, LogGrowthSpec, SqrtGrowthSpec

SHIPPED = {
    "block-mean-8",
    "block-mean-sqrt",
    "block-window-3x256",
    "caote-512",
    "expected-attention-512",
    "h2o-512",
    "keydiff-512",
    "knorm-512",
    "snapkv-512",
    "tova-512",
    "untrained-observed",
    "untrained-observed-sqrt",
    "untrained-recall",
    "untrained-reread",
    "full",
    "kvm-fixed-256",
    "kvm-log-256",
    "kvm-power-075",
    "kvm-saturating-1024",
    "kvm-sqrt-16",
    "ovq-1024",
    "streaming-4-512",
    "window-512",
}


MORE = {"untrained-block-mean", "untrained-kvm-fixed", "untrained-kvm-log", "untrained-kvm-sqrt"}


@pytest.mark.parametrize("name", sorted(MORE))
def test_policies_that_are_not_listed_have_their_names_all_the_same(name: str):
    assert name not in memkit.policy_names()
    assert memkit.load_policy(name).name == name
    assert policy_header(name)


def test_names():
    assert memkit.policy_names() == sorted(memkit.policy_names())
    assert set(memkit.policy_names()) >= SHIPPED


@pytest.mark.parametrize("name", memkit.policy_names())
def test_every_shipped_policy_loads_and_survives_a_round_trip(name: str, tmp_path: Path):
    spec = memkit.load_policy(name)
    assert spec.name == name
    assert memkit.load_policy(name) is spec
    copy = tmp_path / f"{name}.yaml"
    copy.write_text(spec.to_yaml())
    assert memkit.load_policy(copy) == spec
    assert memkit.load_policy(copy).to_yaml() == spec.to_yaml()
    assert memkit.load_policy(str(policies_folder() / f"{name}.yaml")) == spec


@pytest.mark.parametrize("name", memkit.policy_names())
def test_every_shipped_policy_says_what_it_is_and_names_the_schema(name: str):
    lines = (policies_folder() / f"{name}.yaml").read_text().splitlines()
    comment = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", lines[0])
    assert comment is not None
    assert (policies_folder() / comment[1]).resolve().is_file()
    header = policy_header(name)
    assert header.splitlines()[0].rstrip(".")
    assert "yaml-language-server" not in header
    assert len(header.splitlines()) >= 2, "what it is, where it comes from, when to use it"


def test_overrides_change_fields_and_leave_the_shipped_policy_alone():
    spec = memkit.load_policy("kvm-sqrt-16", {"growth.factor": 8, "sinks": 2, "readout.bias": "count"})
    assert isinstance(spec.growth, SqrtGrowthSpec)
    assert (spec.growth.factor, spec.growth.floor, spec.sinks, spec.readout.bias) == (8, 256, 2, "count")
    assert memkit.load_policy("kvm-sqrt-16") != spec


@pytest.mark.parametrize("order", [1, -1])
def test_overriding_the_kind_drops_the_other_fields_whatever_the_order(order: int):
    changes = [("growth.kind", "log"), ("growth.per_doubling", 64), ("growth.start", 256)][::order]
    spec = memkit.load_policy("kvm-sqrt-16", dict(changes))
    assert spec.growth == LogGrowthSpec(per_doubling=64, start=256)


def test_overrides_count_in_the_order_given_and_the_callers_mapping_is_left_as_it_was():
    growth = {"kind": "fixed", "slots": 8}
    assert memkit.load_policy("kvm-sqrt-16", {"growth": growth, "growth.slots": 9}).growth == FixedGrowthSpec(slots=9)
    assert memkit.load_policy("kvm-sqrt-16", {"growth.floor": 9, "growth": growth}).growth == FixedGrowthSpec(slots=8)
    assert growth == {"kind": "fixed", "slots": 8}


def test_overriding_with_the_same_kind_keeps_the_fields():
    assert memkit.load_policy("kvm-sqrt-16", {"growth.kind": "sqrt"}) == memkit.load_policy("kvm-sqrt-16")


def test_overriding_a_whole_family():
    spec = memkit.load_policy(
        "full", {"window": {"kind": "block", "chunks": 2}, "growth": {"kind": "fixed", "slots": 3}}
    )
    assert spec.build().slots_after(1024) == 3


def test_overrides_work_on_specs_and_files(tmp_path: Path):
    changed = memkit.load_policy(memkit.load_policy("untrained-kvm-sqrt"), {"growth.factor": 8})
    assert changed.name == "untrained-kvm-sqrt"
    assert memkit.load_policy("untrained-kvm-sqrt", {"growth.factor": 8}) == changed
    file = tmp_path / "mine.yml"
    file.write_text("sinks: 3\n")
    assert memkit.load_policy(file, {"window.kind": "sliding", "window.size": 9}).build().window.capacity == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"growth.factr": 8}, "kvm-sqrt-16: growth.factr: unknown field; did you mean 'factor'?"),
        ({"growth.factor": "many"}, "kvm-sqrt-16: growth.factor: must be a valid number, got 'many'"),
        ({"growt.factor": 8}, "kvm-sqrt-16: growt: unknown field; did you mean 'growth'?"),
        ({"growth.kind": "lag"}, "kvm-sqrt-16: growth.kind: unknown growth kind 'lag'; did you mean 'log'?"),
        ({"growth.kind": "log"}, "kvm-sqrt-16: growth.per_doubling: is required and missing"),
        ({"sinks.size": 1}, "kvm-sqrt-16: sinks.size: sinks is a plain value and has no field size; set sinks itself"),
        ({"window.kind": "all"}, "kvm-sqrt-16: window: nothing ever leaves a window of all tokens"),
    ],
)
def test_overrides_that_do_not_fit(overrides: dict[str, object], message: str):
    with pytest.raises(memkit.PolicyError, match=re.escape(message)):
        memkit.load_policy("kvm-sqrt-16", overrides)


def test_an_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(memkit.PolicyError, match=r"unknown policy 'kvm-sqrt'; did you mean 'kvm-sqrt-16'\? known: bl"):
        memkit.load_policy("kvm-sqrt")
    with pytest.raises(memkit.PolicyError, match=r"unknown policy 'zzz'.*full.*; or give the path of a YAML file"):
        memkit.load_policy("zzz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("growth: [", r"mine.yaml: not YAML: "),
        ("- full\n", r"mine.yaml: a policy file is a mapping of families, got list"),
        ("7\n", r"mine.yaml: a policy file is a mapping of families, got int"),
        ("sinks: -1\n", r"mine.yaml: sinks: must be greater than or equal to 0, got -1"),
        ("1: 2\n", r"mine.yaml: 1: unknown field"),
        ("window: {kind: block, chunks: 1}\ngrowth: {kind: sqrt, factor: .inf}\n", r"growth.factor: .*finite number"),
        ("sinks: !!python/object/apply:os.getcwd []\n", r"mine.yaml: sinks: a tag must not change what is written"),
    ],
)
def test_files_that_are_no_policies(text: str, message: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(memkit.PolicyError, match=message) as caught:
        memkit.load_policy(file)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(
        memkit.PolicyError, match=r"nowhere.yaml: no such file; give the path of a policy's YAML or one"
    ):
        memkit.load_policy(tmp_path / "nowhere.yaml")
    with pytest.raises(memkit.PolicyError, match="no such file"):
        memkit.load_policy(tmp_path)


def test_an_empty_file_is_full_attention(tmp_path: Path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert memkit.load_policy(file) == memkit.load_policy("full")


def test_what_may_stand_for_a_policy():
    spec = memkit.load_policy("full")
    built = spec.build()
    assert as_policy("full") is as_policy(spec) is as_policy(built) is built
    assert as_policy(policies_folder() / "full.yaml").spec == spec
    with pytest.raises(memkit.PolicyError, match="a policy is a name, a path, a PolicySpec or a Policy, got int"):
        as_policy(7)


def test_dumps_are_plain_yaml():
    for name in memkit.policy_names():
        assert yaml.safe_load(memkit.load_policy(name).to_yaml())["readout"]["key"]


def test_a_former_name_still_loads_with_a_notice():
    with pytest.warns(FutureWarning, match="free-kvm-sqrt is called untrained-kvm-sqrt now"):
        spec = memkit.load_policy("free-kvm-sqrt")
    assert spec == memkit.load_policy("untrained-kvm-sqrt")
    assert spec.name == "untrained-kvm-sqrt"
    with pytest.warns(FutureWarning):
        assert memkit.load_policy("free-kvm-sqrt", {"growth.factor": 8}).name == "untrained-kvm-sqrt"
    assert not any(name.startswith("free-") for name in memkit.policy_names())
    with pytest.raises(memkit.PolicyError, match="free-kvm-cube"):
        memkit.load_policy("free-kvm-cube")


@pytest.mark.parametrize("path", sorted((policies_folder() / "more").glob("*.yaml")), ids=lambda path: path.stem)
def test_policies_put_aside_load_by_name_and_are_not_listed(path: Path):
    assert memkit.load_policy(path.stem).name == path.stem
    assert path.stem not in memkit.policy_names()
    why = policy_header(path.stem).partition("Kept to compare with: ")[2]
    assert "loses to StreamingLLM" in why
    assert memkit.load_policy(path) == memkit.load_policy(path.stem)
