"""Weights read under other policies than they were trained with."""

from pathlib import Path
from typing import Any

import pytest
import torch

from memkit import ModelError, load_model, load_policy
from memkit.lm import MemoryLM, load_model_spec, with_policy

SMALL = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = MemoryLM(load_model_spec("tiny-kvm-sqrt", SMALL))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


IDS = torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(0))


def logits(model: MemoryLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def test_more_slots_need_no_other_weights(folder: Path):
    own, more = load_model(folder), load_model(folder, policy=load_policy("kvm-sqrt-16", {"chunker.size": 32}))
    assert all(map(torch.equal, own.state_dict().values(), more.state_dict().values()))
    assert torch.equal(logits(own)[:, :64], logits(more)[:, :64])
    assert not torch.equal(logits(own), logits(more))


def test_what_only_the_former_policy_learned_is_left_out(folder: Path):
    full = load_model(folder, policy="full")
    assert not any("learned" in name or "attention.gate" in name for name in full.state_dict())
    own = load_model(folder)
    # One token sees itself alone, under any policy.
    with torch.no_grad():
        torch.testing.assert_close(full(IDS[:, :1])[0], own(IDS[:, :1])[0])


def test_what_the_new_policy_learns_starts_as_in_training(folder: Path, tmp_path: Path):
    load_model(folder, policy="full").save_pretrained(tmp_path / "full")
    kvm = load_model(tmp_path / "full", policy="kvm-fixed-256")
    fresh = MemoryLM(with_policy(load_model_spec(folder), "kvm-fixed-256")).state_dict()
    for name, tensor in kvm.state_dict().items():
        if ".learned." in name:
            assert torch.equal(tensor, fresh[name]), name
        elif name.endswith("gate.weight"):
            assert not tensor.any(), name
    plain = load_model(tmp_path / "full", {"layers.default.policy": "full"})
    assert torch.equal(logits(plain)[:, :256], logits(kvm)[:, :256])  # nothing has left the window yet


def test_an_override_of_the_policy_is_taken_as_policy(folder: Path):
    one = load_model(folder, {"layers.default.policy": {"from": "kvm-sqrt-16", "chunker.size": 32}})
    assert torch.equal(logits(one), logits(load_model(folder, policy=load_policy("kvm-sqrt-16", {"chunker.size": 32}))))


def layered(*policies: str) -> dict[str, Any]:
    """One policy for each layer."""
    at = [{"at": [layer], "mixer": {"kind": "attention", "policy": each}} for layer, each in enumerate(policies)]
    return {"layers.overrides": at}


@pytest.mark.parametrize(
    "own", [("full",) * 4, ("window-512", "full") * 2, ("full", "full", "window-512", "window-512")]
)
def test_first_values_come_from_where_they_came_in_training(own: tuple[str, ...], tmp_path: Path):
    """Nothing leaves these windows, so whatever policies say, logits are those of full attention."""
    torch.manual_seed(0)
    model = MemoryLM(load_model_spec("tiny-full", SMALL | {"depth": 4} | layered(*own)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "own")
    expected = logits(model)
    for number, (overrides, policy) in enumerate(
        [
            (None, "full"),
            (None, "window-512"),
            (layered("full", "window-512", "window-512", "full"), None),
            (layered("full", "window-512", "streaming-4-512", "full"), None),
            (layered("window-512", "window-512", "full", "full"), "full"),
        ]
    ):
        other = load_model(tmp_path / "own", overrides, policy=policy)
        torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
        other.save_pretrained(tmp_path / str(number))
        torch.testing.assert_close(logits(load_model(tmp_path / str(number))), expected, rtol=1e-4, atol=1e-4)
        back = load_model(tmp_path / str(number), layered(*own))
        torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-4)


def test_a_shipped_model_with_other_policies_in_some_layers_keeps_its_weights():
    own = load_model("tiny-full")
    other = load_model("tiny-full", layered("full", "window-512", "window-512"))
    assert torch.equal(own.head.weight, other.head.weight)
    torch.testing.assert_close(logits(other), logits(own), rtol=1e-4, atol=1e-4)


def test_kinds_of_a_hybrid_stay_apart():
    spec = load_model_spec("kvm-swa-120m")
    assert spec.value_layers == [0, 1] * 6
    assert with_policy(spec, "full").value_layers == [0, 1] * 6
    assert with_policy(load_model_spec("tiny-full"), "window-512").first_values is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_values": [0]}, "first_values must name a layer for each of 2, got 1"),
        ({"first_values": [1, 1]}, r"first_values\.0: must be 0, or a layer before it that mixes in its own, got 1"),
        ({"first_values": [0, -1]}, r"first_values\.1: must be 1, or a layer before it .*, got -1"),
        (
            {"first_values": [0, 0], "layers.overrides": [{"at": [1], "mixer": {"kind": "rwkv7"}}]},
            r"first_values\.1: must be a layer with a mixer of the same kind",
        ),
        (
            {
                "first_values": [0, 0],
                "layers.overrides": [{"at": [1], "mixer": {"kind": "attention", "policy": "full", "kv_heads": 1}}],
            },
            r"first_values\.1: must be a layer with a mixer of the same kind and as many values, got 0",
        ),
    ],
)
def test_first_values_that_are_not_there(changes: dict[str, Any], message: str):
    with pytest.raises(ModelError, match=message):
        load_model_spec("tiny-full", SMALL | changes)


def test_other_sizes_are_still_refused(folder: Path):
    with pytest.raises(ModelError, match="not this model's weights"):
        load_model(folder, {"width": 64}, policy="full")


def test_a_dtype_is_taken(folder: Path):
    assert load_model(folder, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    assert load_model("tiny-full", SMALL, dtype=torch.float64).head.weight.dtype == torch.float64


def test_with_policy_reaches_every_attention_layer():
    spec = with_policy(load_model_spec("tiny-kvm-rwkv7"), "full")
    assert [mixer.kind for mixer in spec.mixers] == ["rwkv7", "attention"] * 2
    assert spec.mixers[1].policy == load_policy("full")  # pyright: ignore[reportAttributeAccessIssue]
    assert spec.name == "tiny-kvm-rwkv7"
