"""The registry: what it refuses, and that a kind of one's own works like a shipped one, in YAML too."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

import memkit
from memkit.pieces import GrowthSpec, Merging, MergingSpec, Spec, kinds
from memkit.pieces.growth import Growth
from memkit.policy import PolicySpec

FAMILIES = ("admission", "chunker", "growth", "merging", "rotary", "routing", "window")


class HalvingSpec(MergingSpec):
    """Every token counts half."""

    kind: Literal["halving"] = "halving"
    share: float = Field(default=0.5, gt=0, description="share of a token")

    def build(self) -> Merging:
        return Halving(self.share)


class Halving(Merging):
    def __init__(self, share: float) -> None:
        self.share = share

    def weight(self, keys, weights):
        return keys.new_full(keys.shape[:-1], self.share)


class EveryTenthSpec(GrowthSpec):
    """A slot for every tenth token."""

    kind: Literal["every-tenth"] = "every-tenth"

    def build(self) -> Growth:
        return EveryTenth(self)


class EveryTenth(Growth):
    def size(self, tokens: int) -> int:
        return tokens // 10


@pytest.mark.parametrize("thing", [dict, 3, HalvingSpec(), Spec, Merging])
def test_only_specs_of_a_family_are_registered(thing):
    with pytest.raises(memkit.PolicyError, match=r"register takes a subclass of a family's spec such as .*, got"):
        memkit.register(thing)


def test_a_kind_needs_a_default():
    class NamelessSpec(MergingSpec):
        kind: Literal["nameless"]

    with pytest.raises(memkit.PolicyError, match=r"NamelessSpec needs a default kind; write `kind: Literal"):
        memkit.register(NamelessSpec)


def test_a_kind_that_is_taken_is_refused():
    class MeanSpec(MergingSpec):
        kind: Literal["mean"] = "mean"

    with pytest.raises(memkit.PolicyError, match=r"merging kind 'mean' is already .*; choose another kind"):
        memkit.register(MeanSpec)


@pytest.mark.usefixtures("own_kinds")
def test_registering_again_is_fine_and_a_redefinition_replaces():
    assert memkit.register(HalvingSpec) is HalvingSpec
    memkit.register(HalvingSpec)
    again = type("HalvingSpec", (HalvingSpec,), {"__module__": __name__, "__qualname__": "HalvingSpec"})
    memkit.register(again)
    assert kinds("merging")["halving"] is again


@pytest.mark.usefixtures("own_kinds")
def test_own_kinds_work_in_yaml(tmp_path: Path):
    memkit.register(HalvingSpec)
    memkit.register(EveryTenthSpec)
    file = tmp_path / "mine.yaml"
    file.write_text(
        "window: {kind: block, chunks: 2}\n"
        "growth: {kind: every-tenth, floor: 3}\n"
        "merging: {kind: halving, share: 0.25}\n"
    )
    spec = memkit.load_policy(file)
    assert spec.merging == HalvingSpec(share=0.25)
    assert spec.name == "mine"
    assert spec.build().budget(1024) == 153
    with pytest.raises(memkit.PolicyError, match=r"mine.yaml: merging.shar: unknown field; did you mean 'share'"):
        memkit.load_policy(file, {"merging.shar": 1})
    with pytest.raises(memkit.PolicyError, match=r"unknown merging kind 'halvin'; did you mean 'halving'"):
        memkit.load_policy(file, {"merging.kind": "halvin"})


@pytest.mark.usefixtures("own_kinds")
def test_dumps_keep_the_whole_subclass():
    memkit.register(HalvingSpec)
    spec = PolicySpec(merging=HalvingSpec(share=0.25))
    assert spec.model_dump()["merging"] == {"kind": "halving", "share": 0.25}
    assert yaml.safe_load(spec.to_yaml())["merging"] == {"kind": "halving", "share": 0.25}
    assert PolicySpec(**yaml.safe_load(spec.to_yaml())) == spec
    assert PolicySpec(merging=HalvingSpec(share=0.5)) != spec


def test_an_unregistered_kind_is_unknown_to_yaml():
    with pytest.raises(memkit.PolicyError, match=r"merging.kind: unknown merging kind 'halving'.*known: drop, mean"):
        PolicySpec(merging={"kind": "halving"})


def test_a_mapping_without_kind_says_which_there_are():
    with pytest.raises(memkit.PolicyError, match=r"growth.kind: says which growth is meant; one of .*sqrt"):
        PolicySpec(growth={"factor": 16})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_says_what_it_is_and_what_its_fields_mean(family: str):
    for kind, spec in kinds(family).items():
        assert spec.__doc__, kind
        assert spec.family == family
        assert spec.model_fields["kind"].default == kind
        for name, field in spec.model_fields.items():
            assert name == "kind" or field.description, f"{spec.__name__}.{name}"


def test_specs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        HalvingSpec().share = 1
