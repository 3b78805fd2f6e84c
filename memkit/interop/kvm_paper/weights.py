"""The names of weights: ours, and theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memkit.interop.kvm_paper.fields import Fields
from memkit.lm.mixers import AttentionMixerSpec
from memkit.lm.rwkv7 import RWKV7MixerSpec
from memkit.lm.spec import MixerSpec, ModelSpec
from memkit.pieces.needs import Need

__all__ = ["unread_weights", "weight_names"]


def weight_names(spec: ModelSpec) -> dict[str, str]:
    """Our name of every weight → theirs."""
    names = {
        "embedding.weight": "transformer.wte.weight",
        "head.weight": "lm_head.weight",
        **_norm("embedding_norm", "transformer.ln_emb"),
        **_norm("head_norm", "transformer.ln_head"),
    }
    for layer, mixer in enumerate(spec.mixers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        names |= _norm(f"{ours}.mixer_norm", f"{theirs}.ln_attn") | _norm(f"{ours}.mlp_norm", f"{theirs}.ln_mlp")
        names |= {
            f"{ours}.mlp.up.weight": f"{theirs}.mlp.c_fc.weight",
            f"{ours}.mlp.down.weight": f"{theirs}.mlp.c_proj.weight",
        }
        if spec.mlp.token_shift:
            names[f"{ours}.mlp.shift.factor"] = f"{theirs}.mlp.x_k"
        inside = _rwkv7_names(mixer) if isinstance(mixer, RWKV7MixerSpec) else _attention_names(mixer)
        names |= {f"{ours}.mixer.{one}": f"{theirs}.attn.{other}" for one, other in inside.items()}
    return names


def _attention_names(mixer: MixerSpec) -> dict[str, str]:
    assert isinstance(mixer, AttentionMixerSpec)
    names = {
        f"attention.{ours}.weight": f"{theirs}.weight"
        for ours, theirs in (("query", "c_q"), ("key", "c_k"), ("value", "c_v"), ("output", "c_proj"))
    }
    if mixer.token_shift:
        names |= {f"shift.{ours}.factor": f"x_{ours[0]}" for ours in ("query", "key", "value")}
    if mixer.value_residual == "gated":
        names |= {
            "residual.gate.bias": "v_gate0",
            "residual.gate.down.weight": "v_gate1.weight",
            "residual.gate.up.weight": "v_gate2.weight",
        }
    if mixer.value_residual == "linear":
        names["residual.share"] = "lamb"
    if mixer.qk_norm == "layer-norm":
        names |= _norm("attention.query_norm", "ln_q") | _norm("attention.key_norm", "ln_k")
    if mixer.qk_norm == "unit":
        names["attention.query_scale"] = "beta"
    needs = mixer.policy.build().needs
    if Need.KEY_NORM in needs:
        names |= {f"attention.learned.key_norm_{part}": f"ln_s_k.{part}" for part in ("weight", "bias")}
    if Need.QUERY_SCALES in needs:
        names["attention.learned.temperature_window"] = "front_head_temp"
        names["attention.learned.temperature_memory"] = "state_head_temp"
    if Need.MERGE_WEIGHTS in needs:
        names["attention.gate.weight"] = "key_weighting.weight"
    return names


def _rwkv7_names(mixer: RWKV7MixerSpec) -> dict[str, str]:
    names = {f"{name}.weight": f"{name}.weight" for name in ("receptance", "key", "value", "output")}
    for ours, theirs in (("decay", "w"), ("rate", "a"), ("residual", "v"), ("gate", "g")):
        names |= {f"{ours}.down.weight": f"{theirs}1.weight", f"{ours}.up.weight": f"{theirs}2.weight"}
        if theirs != "g":
            names[f"{ours}.bias"] = f"{theirs}0"
    names |= {"removal": "k_k", "replacement": "k_a", "bonus": "r_k", **_norm("norm", "ln_x")}
    if mixer.token_shift:
        shifts = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}
        names |= {f"shift.{ours}.factor": f"x_{theirs}" for ours, theirs in shifts.items()}
    return names


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}


def unread_weights(config: Mapping[str, Any]) -> set[str]:
    """Weights that their code makes and never reads: the value residual's x_v without a token shift."""
    fields = Fields(config)
    layers = range(fields.integer("num_hidden_layers"))
    return set() if fields.switch("use_tokenshift_att") else {f"transformer.h.{layer}.attn.x_v" for layer in layers}
