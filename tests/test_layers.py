"""A policy for each layer: which layer has which, and what that costs."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import memkit
from memkit.layers import LayerPoliciesSpec, as_layers, layer_policies

MIXED = {"default": "untrained-kvm-sqrt", "at": {"0,1,-1": "full"}, "sliding": "keep"}
CHANGED = {"from": "untrained-kvm-fixed", "growth.slots": 64}


def names(given: Any, layers: int = 5, **options: Any) -> list[str | None]:
    return [policy.name for policy in layer_policies(given, layers, 2, **options)]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mixed.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "given",
    [
        MIXED,
        LayerPoliciesSpec(**MIXED),
        {"default": memkit.load_policy("untrained-kvm-sqrt").build(), "at": {0: "full", 1: "keep", "-1": "full"}},
        lambda layer: "untrained-kvm-sqrt" if layer in (2, 3) else memkit.load_policy("full"),
    ],
    ids=["mapping", "spec", "numbers", "function"],
)
def test_each_layer_has_the_policy_that_is_said(given: Any):
    assert names(given) == ["full", "full", "untrained-kvm-sqrt", "untrained-kvm-sqrt", "full"]


def test_a_file_says_the_same_and_names_the_whole(tmp_path: Path):
    text = 'default: untrained-kvm-sqrt\nat:\n  0: full\n  "1, -1": full\nsliding: keep\n'
    spec = as_layers(written(tmp_path, text))
    assert (spec.label, names(spec)) == ("mixed", names(MIXED))
    assert as_layers(MIXED).label == "untrained-kvm-sqrt; 0,1,-1: full"


def test_layers_that_slide_in_the_stock_model():
    windows = [8, 8, None, 8, None]
    assert names("untrained-kvm-sqrt", windows=windows) == [
        "window-8", "window-8", "untrained-kvm-sqrt", "window-8", "untrained-kvm-sqrt",
    ]  # fmt: skip
    mixed = MIXED | {"sliding": "streaming-4-512", "at": {"0": "keep"}}
    streaming = "streaming-4-512"
    assert names(mixed, windows=windows) == [
        "window-8",
        streaming,
        "untrained-kvm-sqrt",
        streaming,
        "untrained-kvm-sqrt",
    ]
    with pytest.raises(memkit.PolicyError, match="newest 8 tokens alone, and none would have policy full"):
        names("full", windows=[8] * 5)
    assert names({"default": "full", "sliding": "keep"}, windows=[8] * 5) == ["window-8"] * 5


def test_a_round_trip_is_the_identity():
    spec = LayerPoliciesSpec(**MIXED)
    assert LayerPoliciesSpec(**yaml.safe_load(spec.to_yaml())) == spec
    assert LayerPoliciesSpec(default=CHANGED).default == memkit.load_policy("untrained-kvm-fixed", {"growth.slots": 64})


def test_a_field_is_changed_by_its_path():
    changed = as_layers(MIXED, {"default.chunker.size": 8})
    assert changed.default == memkit.load_policy("untrained-kvm-sqrt", {"chunker.size": 8})
    assert changed.at == as_layers(MIXED).at


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (MIXED | {"at": {"0,5": "full"}}, r"at: must name layers from 0 to 4 \(negative: from the end\), got 5"),
        (MIXED | {"at": {-6: "full"}}, "got -6"),
        (MIXED | {"at": {"0,-1": "full", 4: "keep"}}, "at: layer 4 is named twice, in '0,-1' and '4'; leave one out"),
        (MIXED | {"at": {"1,1": "full"}}, "layer 1 is named twice"),
        (
            MIXED | {"at": {"1:3": "full"}},
            "at: must name layers by numbers with commas between them, as '0,1,-1', got '1:3'",
        ),
        (MIXED | {"at": {True: "full"}}, "name must be text"),
        (MIXED | {"default": "untrained-kvm-sqr"}, "unknown policy 'untrained-kvm-sqr'; did you mean 'untrained"),
        (MIXED | {"default": 3}, "default: must be a policy's name or path, .*got 3"),
        (MIXED | {"sliding": {"sinks": -1}}, r"sliding\.sinks: .*got -1"),
        (MIXED | {"slding": "keep"}, "slding: unknown field; did you mean 'sliding'"),
        ({"at": {0: "full"}}, "default: is required and missing"),
        (lambda layer: None, "must be a policy's name or path"),
        (7, "a mapping of layers, got int"),
    ],
)
def test_what_is_refused_in_one_line(given: Any, message: str):
    with pytest.raises(memkit.PolicyError, match=message) as caught:
        names(given)
    assert "\n" not in str(caught.value)


def test_a_file_with_a_mistake_is_named(tmp_path: Path):
    with pytest.raises(memkit.PolicyError, match=r"mixed\.yaml: sliding: unknown policy 'kep'"):
        as_layers(written(tmp_path, "default: full\nsliding: kep\n"))
    with pytest.raises(memkit.PolicyError, match=r"mixed: at: must name layers from 0 to 2"):
        memkit.cost(str(written(tmp_path, "default: full\nat: {3: keep}\n")), 100, layers=3)


def test_costs_are_those_of_the_layers_together():
    shape = {"heads": 4, "kv_heads": 2, "head_width": 8}
    whole = memkit.cost(MIXED, [100, 4000], layers=5, **shape)
    full, kvm = (memkit.cost(name, [100, 4000], **shape) for name in ("full", "untrained-kvm-sqrt"))
    for said, one, other in zip(whole, full, kvm, strict=True):
        assert said.policy == "untrained-kvm-sqrt; 0,1,-1: full"
        assert said.bytes == 3 * one.bytes + 2 * other.bytes
        assert said.prefill.total == 3 * one.prefill.total + 2 * other.prefill.total
        assert said.decode.total == 3 * one.decode.total + 2 * other.decode.total
        assert said.slots == round(2 * other.slots / 5)
        assert said.window == round((3 * one.window + 2 * other.window) / 5)
        assert other.exponent < said.exponent < one.exponent


def test_the_schema_takes_what_loads_and_refuses_typos():
    schema = LayerPoliciesSpec.model_json_schema()
    check = jsonschema.Draft7Validator(schema)
    for good in (MIXED, {"default": CHANGED}, {"default": {"sinks": 4, "window": {"kind": "sliding", "size": 8}}}):
        assert not list(check.iter_errors(good))
    for wrong in ({"at": {}}, MIXED | {"slding": "keep"}, {"default": 3}):
        assert list(check.iter_errors(wrong))
