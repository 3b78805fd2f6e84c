"""Head profiles: files, what a wrong one says, and which layer gets what."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import memkit
from memkit.errors import EvenSharesWarning
from memkit.profiles import HeadProfile, load_profile, per_layer, profile_names, profile_of, warn_of_even_shares

RATIOS = ((0.5, 1.5), (1.0, 1.0), (0.75, 1.25))
SLOTS = memkit.load_policy("untrained-observed").build().slots_after(10_000)
FACTS = {"model_type": "llama", "hidden_size": 8}


def written(folder: Path, **changes: object) -> str:
    profile = HeadProfile(**{"model": FACTS, "measured": {"texts": "none"}, "ratios": RATIOS} | changes)
    path = folder / "profile.yaml"
    path.write_text(profile.to_yaml(), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_share_what_there_is(name: str):
    profile = load_profile(name)
    ratios = [ratio for row in profile.ratios for ratio in row]
    assert sum(ratios) == len(ratios)
    assert (found := profile_of(profile.model)) is not None
    assert found.endswith("-repeat")
    assert load_profile(found).model == profile.model
    assert profile_of({**profile.model, "hidden_size": 1}) is None


@pytest.mark.parametrize("readers", ["next", "repeat", "mixed", "window"])
def test_auto_is_the_profile_of_who_reads_again(readers: str):
    profile = load_profile("smollm2-135m-repeat")
    assert profile.readers == "repeat"
    spec = memkit.load_policy("untrained-observed", {"observe.readers": readers})
    layers = per_layer(spec, 30, 3, profile.model)
    assert tuple(layer.spec.heads.ratios for layer in layers) == profile.ratios


def test_auto_is_the_profile_of_answers_for_whoever_may_ask():
    profile = load_profile("smollm2-135m-asked")
    assert profile.readers == "asked"
    assert profile.measured["beside"] == "smollm2-135m-repeat, as it was measured on 2,048 tokens a text"
    layers = per_layer("untrained-recall", 30, 3, profile.model)
    assert tuple(layer.spec.heads.ratios for layer in layers) == profile.ratios


def test_a_file_gives_each_layer_its_ratios(tmp_path: Path):
    path = written(tmp_path)
    assert load_profile(path).ratios == RATIOS
    spec = memkit.load_policy("untrained-observed", {"heads.profile": path})
    layers = per_layer(spec, 3, 2)
    assert [layer.spec.heads.ratios for layer in layers] == list(RATIOS)
    assert layers[0].name == "untrained-observed"
    assert [policy.slots_after(10_000) for _, policy in layers[0].head_policies] == [4 + 190, 4 + 570]
    assert not layers[1].head_policies
    assert layers[1].slots_after(10_000) == SLOTS


def test_auto_without_a_profile_is_even():
    for facts in (None, {}, FACTS):
        layers = per_layer("untrained-observed", 2, 2, facts)
        assert all(not layer.head_policies and layer.slots_after(10_000) == SLOTS for layer in layers)
    assert per_layer("kvm-sqrt-16", 2, 2) == [memkit.load_policy("kvm-sqrt-16").build()] * 2


def test_a_model_without_a_profile_is_told_so():
    others = {**load_profile("smollm2-135m").model, "num_hidden_layers": 3}
    observed, even = memkit.load_policy("untrained-observed"), memkit.load_policy("untrained-observed", {"heads": {}})
    with pytest.warns(EvenSharesWarning, match=r"\(llama, 3 layers × 3 key/value heads\).*untrained-observed"):
        warn_of_even_shares([observed], others)
    assert [layer.spec.heads.ratios for layer in per_layer(observed, 3, 3, others)] == [(1.0,)] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_even_shares([even, memkit.load_policy("full")], others)
        warn_of_even_shares([observed], load_profile("smollm2-135m").model)


def test_another_model_is_refused(tmp_path: Path):
    spec = memkit.load_policy("untrained-observed", {"heads.profile": written(tmp_path)})
    with pytest.raises(memkit.PolicyError, match="3 layers × 2 key/value heads, got 4 × 2"):
        per_layer(spec, 4, 2)
    with pytest.raises(memkit.PolicyError, match="measured on another model"):
        per_layer(spec, 3, 2, {**FACTS, "hidden_size": 16})
    assert per_layer(spec, 3, 2, FACTS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ratios: [[1, 0], [1, 1]]\nmodel: {}\n", "above 0"),
        ("ratios: [[1], [1, 1]]\nmodel: {}\n", "a row per layer"),
        ("ratios: []\nmodel: {}\n", "a row per layer"),
        ("ratios: [[4, 4], [4, 4]]\nmodel: {}\n", "must have the mean 1, .* got 4"),
        ("ratios: 3\nmodel: {}\n", "ratios"),
        ("model: {}\n", "ratios"),
        ("- 1\n", "mapping"),
        ("ratios: [[1]]\nmodel: {}\nmore: 1\n", "more"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, says: str):
    path = tmp_path / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(memkit.PolicyError, match=says):
        load_profile(path)


def test_a_name_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(memkit.PolicyError, match="smollm2-135m"):
        load_profile("smollm2-136m")
    with pytest.raises(memkit.PolicyError, match="no such file"):
        load_profile(tmp_path / "none.yaml")
    with pytest.raises(memkit.PolicyError, match="no such file"):  # an ending of files is never a name's
        load_profile("none.json")


def test_one_call_is_about_one_layer(tmp_path: Path):
    import torch

    spec = memkit.load_policy("kvm-sqrt-16", {"heads": {"profile": written(tmp_path)}})
    tensors = torch.randn(3, 1, 2, 4, 8)
    with pytest.raises(memkit.InputError, match="per_layer"):
        memkit.attend(spec, *tensors)


def test_costs_are_those_of_all_layers(tmp_path: Path):
    path = written(tmp_path)
    spec = memkit.load_policy("untrained-observed", {"heads.profile": path})
    shape = {"heads": 4, "kv_heads": 2, "head_width": 8}
    whole = memkit.cost(spec, 4000, layers=3, **shape)
    each = [memkit.cost(layer, 4000, **shape) for layer in per_layer(spec, 3, 2)]
    assert whole.bytes == sum(one.bytes for one in each)
    assert whole.prefill.total == sum(one.prefill.total for one in each)
    assert whole.slots == SLOTS
    with pytest.raises(memkit.PolicyError, match="key/value heads"):
        memkit.cost(spec, 4000, layers=1, **shape)
