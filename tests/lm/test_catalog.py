from typing import Any

import pytest
import torch

import memkit
from memkit import ModelError, load_model, model_names
from memkit.interop import kvm_paper
from memkit.lm import MemoryLM, from_pretrained, load_model_spec, model_header, save_pretrained
from memkit.lm.footprint import memory_bytes

PARAMETERS = {
    "full-120m": 162_883_584,
    "kvm-120m": 162_942_096,
    "kvm-350m": 407_026_048,
    "kvm-rwkv7-120m": 165_315_144,
    "kvm-sqrt-120m": 162_942_096,
    "kvm-sqrt-350m": 407_026_048,
    "kvm-swa-120m": 162_912_840,
    "ovq-swa-120m": 162_880_548,
    "rwkv7-120m": 167_688_192,
    "tiny-full": 890_368,
    "tiny-kvm-fixed": 892_704,
    "tiny-kvm-rwkv7": 942_992,
    "tiny-kvm-sqrt": 892_704,
    "tiny-ovq": 890_120,
    "tiny-rwkv7": 993_280,
    "tiny-window": 890_368,
}


def shapes(spec):
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in MemoryLM(spec).named_parameters()}


def test_parameter_counts():
    found = {}
    for name in model_names():
        with torch.device("meta"):
            found[name] = MemoryLM(load_model_spec(name)).parameter_count
    assert found == PARAMETERS


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_models_say_what_they_are(name):
    assert len(model_header(name)) > 40
    assert load_model_spec(name).name == name


# The fields of the authors' training configurations that differ from the defaults.
COMMON = {"vocab_size": 50304, "num_hidden_layers": 12, "num_attention_heads": 6, "hidden_size": 768}
LARGE = {"num_hidden_layers": 24, "num_attention_heads": 8, "hidden_size": 1024, "residual_scale": 0.5}
FIXED = {"token_mixer": "kvm", "state_min_len": 256}
SQRT = {**FIXED, "n_max_d_chunks": 10000, "state_budget_mode": "power_law", "state_growth_factor": 16.0}
HYBRID = {"alt_layer_every": 2, "alt_rope_partial_dim": 128}
SATURATING = {"state_budget_mode": "kvm_saturation", "state_saturation_n": 1024, "state_min_len": 1}
PUBLISHED: dict[str, dict[str, Any]] = {
    "full-120m": {"token_mixer": "gptalpha"},
    "kvm-120m": FIXED,
    "kvm-sqrt-120m": SQRT,
    "kvm-350m": {**FIXED, **LARGE},
    "kvm-sqrt-350m": {**SQRT, **LARGE},
    "kvm-swa-120m": {"token_mixer": "kvm", "n_max_d_chunks": 10000, **HYBRID, **SATURATING},
    "ovq-swa-120m": {
        "token_mixer": "ovq",
        "rope_partial_dim": 0,
        "ovq_chunk_size": 256,
        "ovq_max_centroids": 1024,
        **HYBRID,
    },
    "rwkv7-120m": {"token_mixer": "rwkv7"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_models_are_the_published_ones(name):
    ours, theirs = load_model_spec(name), kvm_paper.model_spec({**COMMON, **PUBLISHED[name]})
    assert shapes(ours) == shapes(theirs)
    assert ours.residual_scale == theirs.residual_scale
    for one, other in zip(ours.mixers, theirs.mixers, strict=True):
        # A cap far above any budget, or the rotated channels as a number, makes another spec of the same policy.
        mine: Any = one.model_dump(exclude={"policy", "rotary"})
        assert mine == other.model_dump(exclude={"policy", "rotary"})
        if one.kind != "attention":
            continue
        policies = [mixer.policy.build() for mixer in (one, other)]  # type: ignore[attr-defined]
        for tokens in (1, 256, 512, 513, 769, 4096, 65_537, 1_000_001):
            assert policies[0].slots_after(tokens) == policies[1].slots_after(tokens)
        specs = [policy.spec.model_dump(exclude={"growth", "rotary"}) for policy in policies]
        assert specs[0] == specs[1]
        rotaries = [mixer.rotary or spec.rotary for mixer, spec in ((one, ours), (other, theirs))]  # type: ignore[attr-defined]
        frequencies = [rotary.frequencies(128) for rotary in rotaries]
        assert torch.equal(*frequencies)
        keys = torch.ones(1, 1, 1, 128)
        if policies[0].growth is not None:
            treated = [policy.rotary.memory_keys(keys, None, None) for policy in policies]
            assert torch.equal(*treated)


def test_the_same_seed_gives_the_same_model():
    state = torch.random.get_rng_state()
    small = {"width": 64, "depth": 1}
    one, other, third = (load_model("tiny-kvm-sqrt", small, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.head.weight, third.head.weight)


@pytest.mark.parametrize("name", ["tiny-kvm-rwkv7", "tiny-ovq"])
def test_save_and_load(tmp_path, name):
    model = load_model(name, {"rounding": "bfloat16"})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "model.yaml"]
    ids = torch.arange(200)[None]
    for loaded in (MemoryLM.from_pretrained(tmp_path / "out"), load_model(str(tmp_path / "out"))):
        assert loaded.spec == model.spec
        assert loaded.spec.name == "out"
        assert not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(ids)[0], model(ids)[0])
    loaded.loss(ids).backward()  # type: ignore[possibly-undefined]


def test_parameters_that_share_memory_are_not_written(tmp_path):
    model = load_model("tiny-ovq")
    model.head.weight = model.embedding.weight
    with pytest.raises(ModelError, match=r"memory of their own .*, got head\.weight in that of embedding\.weight"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("vocabulary: 9\nwidth: 8\ndepth: 1\nheads: 2\nlayers: {default: {kind: attention, policy: full}}\n")
    model = load_model(path)
    assert model.spec.name == "mine"
    assert model(torch.tensor([[1, 8]]))[0].shape == (1, 2, 9)
    save_pretrained(load_model(path, {"width": 16}), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match=r"mine\.safetensors: not this model's weights"):
        load_model(path)


def test_errors(tmp_path):
    with pytest.raises(ModelError, match="unknown model 'kvm-sqt-120m'; did you mean 'kvm-sqrt-120m'"):
        load_model("kvm-sqt-120m")
    with pytest.raises(ModelError, match="unknown model 'tiny-kvm'; did you mean 'tiny-kvm-sqrt'"):
        load_model("tiny-kvm")
    with pytest.raises(ModelError, match=r"none\.yaml: no such file"):
        load_model(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    path.write_text("vocabulary: 9\nwidth: 8\ndepth: 1\nheads: 2\nlayers: {default: {kind: attention, policy: fll}}\n")
    with pytest.raises(ModelError, match=r"bad\.yaml: layers\.default\.policy: unknown policy 'fll'"):
        load_model(path)
    path.write_text("- 1")
    with pytest.raises(ModelError, match="a model file is a mapping of fields, got list"):
        load_model(path)
    (tmp_path / "model.yaml").write_text(load_model_spec("tiny-full").to_yaml())
    with pytest.raises(ModelError, match="no weights here"):
        from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="depth is a plain value"):
        load_model_spec("tiny-full", {"depth.kind": 1})


def test_public_names():
    assert memkit.load_model is load_model
    assert memkit.MemoryLM is MemoryLM


@pytest.mark.parametrize("name", ["tiny-kvm-rwkv7", "tiny-ovq", "tiny-full", "tiny-window"])
@pytest.mark.parametrize("tokens", [1, 40, 333])
def test_the_memory_of_a_model_is_known_beforehand(name, tokens):
    spec = load_model_spec(name, {"depth": 3})
    with torch.no_grad():
        _, memory = MemoryLM(spec)(torch.zeros(2, tokens, dtype=torch.long))
    assert sum(memory_bytes(spec, [tokens], rows=2)[0]) == memory.bytes


def test_a_model_that_this_machine_cannot_hold_is_refused_before_it_is_made():
    with pytest.raises(memkit.ModelError, match=r"tiny-full: its [0-9,]+ parameters take [0-9,]+ GB, and this machine"):
        memkit.load_model("tiny-full", {"width": 2**20})
