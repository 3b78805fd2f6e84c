import re
from typing import Any

import pytest
import yaml

from memkit import load_policy
from memkit.lm import AttentionMixerSpec, ModelSpec, RWKV7MixerSpec
from memkit.pieces.registry import SpecError

BASE: dict[str, Any] = {"vocabulary": 256, "width": 64, "depth": 6, "heads": 4}
KVM = {"kind": "attention", "policy": "kvm-sqrt-16"}
FULL = {"kind": "attention", "policy": "full"}
RWKV7 = {"kind": "rwkv7"}


def spec(**changes):
    return ModelSpec(**{**BASE, "layers": {"default": KVM}, **changes})


def test_layers_are_written_briefly():
    declared = spec(
        layers={
            "default": KVM,
            "overrides": [{"every": 2, "mixer": RWKV7}, {"at": [2, -1], "mixer": FULL}],
        }
    )
    kinds = [mixer.policy.name if isinstance(mixer, AttentionMixerSpec) else mixer.kind for mixer in declared.mixers]
    assert kinds == ["rwkv7", "kvm-sqrt-16", "full", "kvm-sqrt-16", "rwkv7", "full"]
    shifted = spec(layers={"default": KVM, "overrides": [{"every": 3, "first": 1, "mixer": RWKV7}]})
    assert [isinstance(mixer, RWKV7MixerSpec) for mixer in shifted.mixers] == [False, True, False, False, True, False]


def test_a_policy_is_a_name_or_written_out():
    named, written = (
        spec(),
        spec(layers={"default": {"kind": "attention", "policy": load_policy("kvm-sqrt-16").model_dump()}}),
    )
    assert named == written
    assert hash(named) == hash(written)
    mixer = named.layers.default
    assert isinstance(mixer, AttentionMixerSpec)
    assert mixer.policy == load_policy("kvm-sqrt-16")


def test_round_trip():
    declared = spec(
        kv_heads=2,
        head_width=12,
        rotary={"width": 4, "theta": 500.0, "pairing": "adjacent", "spacing": "closed", "clockwise": True},
        mlp={"expansion": 3.5, "token_shift": False},
        residual_scale=0.5,
        rounding="bfloat16",
        layers={"default": KVM, "overrides": [{"every": 2, "mixer": RWKV7}, {"at": [1], "mixer": FULL}]},
    )
    assert ModelSpec(**yaml.safe_load(declared.to_yaml())) == declared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "width must be a multiple of heads, got 30 and 4; or set head_width"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"depth": 0}, "depth"),
        ({"layers": {"default": {"kind": "mamba"}}}, "layers.default.kind: unknown mixer kind 'mamba'"),
        ({"layers": {"default": {"policy": "full"}}}, "layers.default.kind: says which mixer is meant"),
        (
            {"layers": {"default": {"kind": "attention", "policy": "kvm-sqt-16"}}},
            "layers.default.policy: unknown policy 'kvm-sqt-16'; did you mean 'kvm-sqrt-16'",
        ),
        (
            {"layers": {"default": {"kind": "attention", "policy": {"sinks": -1}}}},
            "layers.default.policy.sinks: ",
        ),
        (
            {"layers": {"default": KVM, "overrides": [{"mixer": FULL}]}},
            "exactly one of every and at says which layers are meant",
        ),
        (
            {"layers": {"default": KVM, "overrides": [{"at": [6], "mixer": FULL}]}},
            "layers.overrides.0.at: must name layers from 0 to 5 (negative: from the end), got 6",
        ),
        ({"rotary": {"width": 3}}, "rotary.width must be even"),
        ({"width": 10**20}, "width: must be less than or equal to 1048576, got 100000000000000000000"),
        ({"depth": 10**6}, "depth: must be less than or equal to 1024, got 1000000"),
        ({"mlp": {"expansion": 1e308}}, "mlp.expansion: must be less than or equal to 1024, got 1e+308"),
        ({"mlp": {"expansion": 1e-9}}, "mlp: expansion × width must reach multiple_of channels, got 1e-09 × 64"),
        (
            {"layers": {"default": {**FULL, "kv_heads": 3}}},
            "heads must be a multiple of a mixer's kv_heads, got 4 and 3",
        ),
        (
            {"width": 30, "head_width": 8, "layers": {"default": RWKV7}},
            "width must be a multiple of heads where a mixer is rwkv7, whatever head_width says, got 30 and 4",
        ),
        (
            {"layers": {"default": {"kind": "attention", "policy": "untrained-kvm-sqrt"}}, "rotary": {"width": 0}},
            "rotary rerotate un-rotates keys, but this model rotates none",
        ),
        ({"rotary": {"width": 64}}, "rotary.width must be even and at most the head width 16, got 64"),
        ({"self": 1}, "self: unknown field"),
        ({"layers": {"default": KVM, "overrides": [{1: 2}]}}, "layers.overrides.0: a field's name must be text, got 1"),
        ({"layer": {}}, "layer: unknown field; did you mean 'layers'"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(SpecError, match=re.escape(message)):
        spec(**changes)
