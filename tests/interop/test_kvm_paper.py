"""Small models computed with the Key-Value Means authors' published code: see tests/golden/model/README.md."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from memkit import ModelError
from memkit.interop import kvm_paper
from memkit.pieces.statistics import COUNT, RADIUS

FOLDER = Path(__file__).parents[1] / "golden" / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


@functools.cache
def golden(name) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        info = json.loads(file.metadata()["info"])
        return info, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def weights(tensors, prefix="weights."):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load(name, **settings):
    info, tensors = golden(name)
    return kvm_paper.load_model(info["config"], weights(tensors), **settings)


@functools.cache
def decoded(name):
    """Logits of a prefill and of one token at a time, and the memory at the end."""
    info, tensors = golden(name)
    model, ids = load(name), tensors["input_ids"]
    with torch.no_grad():
        logits, memory = model(ids[:, : info["prefill_len"]])
        parts = [logits]
        for index in range(info["prefill_len"], ids.shape[1]):
            logits, memory = model(ids[:, index : index + 1], memory)
            parts.append(logits)
    return torch.cat(parts, dim=1), memory


def test_all_golden_files_are_here():
    assert len(NAMES) == 14


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    _, tensors = golden(name)
    with torch.no_grad():
        logits, _ = load(name)(tensors["input_ids"])
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_after_a_prefill(name):
    logits, _ = decoded(name)
    torch.testing.assert_close(logits, golden(name)[1]["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rounded_logits(name):
    _, tensors = golden(name)
    with torch.no_grad():
        logits, _ = load(name, bf16_rounding=True)(tensors["input_ids"])
    torch.testing.assert_close(logits, tensors["logits_bf16_rounded"], atol=5e-4, rtol=0)
    if name != "rwkv7":  # the tolerance tells the two variants apart
        assert (tensors["logits"] - tensors["logits_bf16_rounded"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if "kvm" in name])
def test_slots(name):
    info, tensors = golden(name)
    memories = decoded(name)[1].memories
    layers = {int(key.split(".")[1]) for key in tensors if key.startswith("cache.") and "kvm" in key}
    assert layers
    for layer in layers:
        memory = memories[layer]
        slots, width = int(memory.slots[0]), memory.head_widths[0]
        expected = [tensors[f"cache.{layer}.kvm_{part}"] for part in ("s_k", "s_v", "s_vlen")]
        assert slots == expected[0].shape[2]
        radius = RADIUS if info["config"].get("kvm_use_vlens", 1) else COUNT
        torch.testing.assert_close(memory.sums[:, :, :slots, :width], expected[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(memory.sums[:, :, :slots, width:], expected[1], atol=1e-4, rtol=0)
        torch.testing.assert_close(memory.number(radius)[:, :, :slots].float(), expected[2][..., 0], atol=1e-4, rtol=0)


def test_dictionary_slots_of_ovq():
    _, tensors = golden("ovq-swa-hybrid")
    for layer in (1, 3):
        memory = decoded("ovq-swa-hybrid")[1].memories[layer]
        slots, width = int(memory.slots[0]), memory.head_widths[0]
        counts = tensors[f"cache.{layer}.ovq_d_counts"][..., 0]
        assert (counts > 0).sum(-1).unique().tolist() == [slots]
        expected = [tensors[f"cache.{layer}.ovq_d_{part}"][:, :, :slots] for part in "kv"]
        count = memory.number(COUNT)[:, :, :slots, None].float()
        found = [memory.sums[:, :, :slots, :width] / count, memory.sums[:, :, :slots, width:] / count]
        # Slots founded in one step stand in another order: compare the rows (count, key, value) as sets.
        theirs, ours = (
            torch.cat((number, *parts), -1) for number, parts in ((counts[..., :slots, None], expected), (count, found))
        )
        distance = (ours[:, :, :, None] - theirs[:, :, None]).abs().amax(-1)
        assert distance.amin(-1).max() < 1e-4
        assert distance.amin(-2).max() < 1e-4


@pytest.mark.parametrize(("name", "layers"), [("rwkv7", (0, 1)), ("kvm-sqrt4-rwkv7-hybrid", (0, 2))])
def test_states_of_rwkv7(name, layers):
    memory = decoded(name)[1]
    for layer in layers:
        expected = golden(name)[1][f"cache.{layer}.rwkv7_time_mix"]
        torch.testing.assert_close(memory.layers[layer]["state"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if "loss" in golden(name)[1]])
def test_loss_and_gradients(name):
    _, tensors = golden(name)
    model = load(name)
    loss = model.loss(tensors["input_ids"])
    torch.testing.assert_close(loss, tensors["loss"][0], atol=1e-5, rtol=0)
    expected = weights(tensors, "grads.")
    if not expected:
        return
    loss.backward()
    names = kvm_paper.weight_names(model.spec)
    assert set(names.values()) == set(expected)
    for ours, parameter in model.named_parameters():
        theirs = expected[names[ours]]
        assert parameter.grad is not None
        error = (parameter.grad.view_as(theirs) - theirs).abs().max()
        # Layer 0's value residual mixes values with themselves: its gradient is 0, up to their rounding.
        assert error <= 1e-3 * theirs.abs().max() + 1e-9, ours


# What configurations say


def config(**changes):
    return {**golden("kvm-sqrt4")[0]["config"], **changes}


def test_config_sections_and_hugging_face_fields():
    plain = kvm_paper.model_spec(config())
    decorated = {"architectures": ["X"], "torch_dtype": "bfloat16", "transformers_version": "4.57.1", "use_cache": True}
    assert kvm_paper.model_spec({**config(), **decorated}) == plain
    assert kvm_paper.model_spec({"model": config(), "train": {"lr": 1}}) == plain
    assert kvm_paper.model_spec(config(token_mixer_class_path="model.kvm_triton_mixer.SequenceMixer")) == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_mixer": "kda"}, "token_mixer must be one of kvm, gptalpha, .*, got 'kda'"),
        ({"alt_layer_every": 2, "alt_token_mixer": "lact"}, "alt_token_mixer must be one of .*, got 'lact'"),
        ({"token_mixer_class_path": "mine.Mixer"}, "token_mixer_class_path must be one of .*, got 'mine.Mixer'"),
        ({"alt_layer_every": 1}, "alt_layer_every must be at least 2"),
        ({"use_skip_connections": 1}, "use_skip_connections must be 0"),
        ({"logit_softcap": 30.0}, "logit_softcap must be 0"),
        ({"alt_share_v0": 1}, "alt_share_v0 must be 0"),
        ({"chunk_length": 3}, "unknown field chunk_length; did you mean 'chunk_len'"),
        ({"state_budget_mode": "log"}, "state_budget_mode must be fixed, power_law or kvm_saturation, got 'log'"),
        ({"kvm_value_residual_mode": "rwkv_post_tokenshift"}, "kvm_value_residual_mode must be rwkv or linear"),
        ({"token_mixer": "ovq", "ovq_normalize_centroids": 1}, "ovq_normalize_centroids must be 0, got 1"),
        ({"token_mixer": "ovq", "ovq_use_delta_rule": 1}, "ovq_use_delta_rule must be 0, got 1"),
        ({"token_mixer": "rwkv7", "d_head": 32}, "d_head must be hidden_size / num_attention_heads in rwkv7, got 32"),
        ({"d_v_head": 32}, "d_v_head must be the width of queries and keys, got 32"),
        ({"kvm_use_vlens": 2}, "kvm_use_vlens must be 0 or 1, got 2"),
        ({"chunk_len": "16"}, "chunk_len must be a whole number, got '16'"),
        ({"chunk_len": float("nan")}, "chunk_len must be a whole number, got nan"),
        ({"chunk_len": float("inf")}, "chunk_len must be a whole number, got inf"),
        ({"residual_scale": float("nan")}, "residual_scale must be a finite number, got nan"),
        ({"residual_scale": 10**400}, "residual_scale must be a finite number, got 1000"),
        ({"token_mixer": ["kvm"]}, r"token_mixer must be one of .*, got \['kvm'\]"),
        ({"kvm_token_shift_mode": ["rwkv"]}, r"kvm_token_shift_mode must be rwkv or none, got \['rwkv'\]"),
        (
            {"kvm_apply_merge_gate_to_initial_state": 1, "kvm_use_merge_gate_keys": 0},
            "kvm_apply_merge_gate_to_initial_state weighs keys and values alike",
        ),
        ({"sink_len": 16, "state_min_len": 1, "state_growth_factor": 0.1}, "no counterpart in memkit: .*sinks"),
    ],
)
def test_what_cannot_be_represented_is_named(changes, message):
    with pytest.raises(ModelError, match=message):
        kvm_paper.model_spec(config(**changes))


def test_switches_reach_the_policy():
    def mixer(**changes) -> Any:
        return kvm_paper.model_spec(config(**changes)).mixers[0]

    def policy(**changes) -> Any:
        return mixer(**changes).policy

    assert policy(kvm_use_merge_gate_keys=0).merging.weigh.keys is False
    assert policy(kvm_apply_merge_gate_to_initial_state=1).merging.weigh.first_chunk is True
    assert policy(kvm_use_merge_gate_keys=0, kvm_use_merge_gate_values=0).merging.kind == "mean"
    assert policy(state_growth_exponent=0.75).growth.kind == "power"
    assert policy(state_budget_mode="fixed", state_min_len=-1).growth.slots == 0
    assert policy(state_budget_mode="fixed", state_min_len=32, n_max_d_chunks=1).growth.slots == 16
    assert policy(rope_partial_dim=0).rotary.share == 1
    assert policy(token_mixer="ovq", ovq_use_counts_for_lr_only=1).readout.bias == "none"
    assert policy(token_mixer="ovq", ovq_use_min_state_size=1).growth.kind == "fixed"
    assert policy(token_mixer="swa").window.size == 16
    assert policy(token_mixer="swa", swa_window_size=5).window.size == 5
    assert policy(token_mixer="gptalpha_bswa", sink_len=3).sinks == 3
    assert mixer(kvm_value_residual_mode="linear").value_residual == "linear"
    assert mixer(use_value_residual=0).value_residual == "none"
    assert not mixer(use_tokenshift_att=0).token_shift
    assert not kvm_paper.model_spec(config(use_tokenshift_ffn=0)).mlp.token_shift


def test_weights_that_do_not_fit_are_named():
    info, tensors = golden("kvm-sqrt4")
    given = weights(tensors)
    with pytest.raises(ModelError, match=r"missing transformer\.ln_emb\.bias;"):
        kvm_paper.load_model(info["config"], {k: v for k, v in given.items() if k != "transformer.ln_emb.bias"})
    with pytest.raises(ModelError, match=r"no place for transformer\.h\.0\.attn\.beta;"):
        kvm_paper.load_model(info["config"], {**given, "transformer.h.0.attn.beta": torch.ones(4)})
    with pytest.raises(ModelError, match=r"lm_head\.weight must have shape \(97, 64\), got \(96, 64\)"):
        kvm_paper.load_model(info["config"], {**given, "lm_head.weight": given["lm_head.weight"][:96]})
    with pytest.raises(ModelError, match=r"lm_head\.weight must be of a floating-point dtype, got torch\.int64"):
        kvm_paper.load_model(info["config"], {**given, "lm_head.weight": given["lm_head.weight"].long()})
    with pytest.raises(ModelError, match=r"no place for foo1\.weight;"):
        kvm_paper.load_model(info["config"], {**given, "foo1.weight": torch.tensor(1.0)})
    gate = "transformer.h.0.attn.v_gate1.weight"
    with pytest.raises(ModelError, match=r"v_gate1\.weight must have shape \(.*\), got \(\)"):
        kvm_paper.load_model(info["config"], {**given, gate: torch.tensor(1.0)})


def test_shards_hold_each_weight_once(tmp_path):
    info, tensors = golden("kvm-fixed16")
    (tmp_path / "config.json").write_text(json.dumps(info["config"]))
    given = weights(tensors)
    half = len(given) // 2
    save_file(dict(list(given.items())[:half]), tmp_path / "a.safetensors")
    save_file(dict(list(given.items())[half:]), tmp_path / "b.safetensors")
    found = kvm_paper.import_files(tmp_path / "config.json", tmp_path)
    assert torch.equal(found.head.weight, given["lm_head.weight"])
    save_file({"lm_head.weight": torch.zeros_like(given["lm_head.weight"])}, tmp_path / "z.safetensors")
    with pytest.raises(
        ModelError, match=r"must be in one file, got lm_head\.weight in [ab]\.safetensors and z\.safetensors"
    ):
        kvm_paper.import_files(tmp_path / "config.json", tmp_path)


def test_a_loaded_model_shares_nothing_with_the_tensors_given():
    info, tensors = golden("kvm-fixed16")
    given = {name: tensor.clone() for name, tensor in weights(tensors).items()}
    model = kvm_paper.load_model(info["config"], given)
    before = model.head.weight.clone()
    given["lm_head.weight"].zero_()
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_from_files(tmp_path, suffix):
    info, tensors = golden("kvm-fixed16")
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps(info["config"]) if suffix == ".json" else yaml.safe_dump({"model": info["config"]}))
    save_file(weights(tensors), tmp_path / "model.safetensors")
    for given in (tmp_path / "model.safetensors", tmp_path):
        model = kvm_paper.import_files(path, given)
        with torch.no_grad():
            assert torch.equal(model(tensors["input_ids"])[0], load("kvm-fixed16")(tensors["input_ids"])[0])
    with pytest.raises(ModelError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        kvm_paper.import_files(tmp_path / "none.yaml", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="no safetensors files"):
        kvm_paper.import_files(path, tmp_path / "empty")
