"""The Key-Value Means authors' models (arXiv 2605.09877): their configuration and weights → a `MemoryLM`.

`model_spec` says what a configuration means, field by field; `weight_names` pairs the names of weights. What memkit
cannot represent is named and refused: nothing is read half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from memkit import yaml12
from memkit.errors import MemkitError, ModelError, nearest_name, shown
from memkit.lm.mixers import AttentionMixerSpec
from memkit.lm.model import MemoryLM
from memkit.lm.parts import rank
from memkit.lm.rwkv7 import RWKV7MixerSpec
from memkit.lm.spec import MixerSpec, ModelSpec

__all__ = ["import_files", "load_model", "model_spec", "weight_names"]

DEFAULTS: dict[str, Any] = {
    "token_mixer": None,
    "vocab_size": None,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "d_head": None,
    "d_qk_head": None,
    "d_v_head": None,
    "rope_theta": 10_000.0,
    "rope_partial_dim": 64,
    "alt_rope_theta": 10_000.0,
    "alt_rope_partial_dim": 64,
    "alt_token_mixer": "swa",
    "alt_layer_every": -1,
    "ffn_expansion": 4.0,
    "residual_scale": 1.0,
    "use_tokenshift_att": 1,
    "use_tokenshift_ffn": 1,
    "use_value_residual": 1,
    "sink_len": 1,
    "chunk_len": 256,
    "n_max_d_chunks": 1,
    "n_bswa_chunks": 2,
    "swa_window_size": -1,
    "state_budget_mode": "fixed",
    "state_growth_factor": 1.0,
    "state_growth_exponent": 0.5,
    "state_round_down": 1,
    "state_min_len": -1,
    "state_saturation_n": None,
    "ovq_window_size": 128,
    "ovq_chunk_size": 128,
    "ovq_max_centroids": 2048,
    "ovq_normalize_centroids": 0,
    "ovq_use_min_state_size": 0,
    "ovq_use_counts_for_lr_only": 0,
    "ovq_use_delta_rule": 0,
    "kvm_use_merge_gate_keys": 1,
    "kvm_use_merge_gate_values": 1,
    "kvm_use_head_temps": 1,
    "kvm_use_vlens": 1,
    "kvm_apply_merge_gate_to_initial_state": 0,
    "kvm_apply_merge_gate_to_appends": 0,
    **{f"{name}_value_residual_mode": None for name in ("gptalpha", "gptalpha_bswa", "kvm", "swa", "ovq")},
    **{f"{name}_token_shift_mode": None for name in ("gptalpha", "gptalpha_bswa", "kvm", "swa", "ovq")},
}
"""The fields that are read, and what they are where left out (None: they must be there, or follow from others)."""

FIXED: dict[str, Any] = {
    "use_block_lambdas": 0,
    "use_skip_connections": 0,
    "logit_softcap": 0,
    "alt_share_v0": 0,
    "use_state_deltarule": 0,
    "use_state_decay": 0,
}
"""Parts of their backbone that memkit has not: the one value that switches them off."""

CLASS_PATHS = {"token_mixer_class_path": "token_mixer", "alt_token_mixer_class_path": "alt_token_mixer"}

IGNORED = {"model_class_path", "mup_base_dim", "use_l2wrap", "param_dtype", "use_overflow_v_key_weighting"}
"""Of training alone, or read by none of their mixers."""

IGNORED_PREFIXES = ("lact_", "kda_", "gated_deltanet_")
"""Fields of mixers that memkit has not; the mixers themselves are refused by name."""

HUGGING_FACE = frozenset(
    word
    for line in (
        "_name_or_path add_cross_attention architectures attn_implementation auto_map bad_words_ids",
        "begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size",
        "decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size",
        "eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id",
        "id2label is_decoder is_encoder_decoder label2id length_penalty max_length max_position_embeddings",
        "min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences",
        "output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads",
        "remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens",
        "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings",
        "tie_worhidden_sizedings tokenizer_class top_k top_p torch_dtype torchscript transformers_version",
        "transformers_weights typical_p use_bfloat16 use_cache",
    )
    for word in line.split()
)
"""What transformers adds to a config.json, whatever the model (one name is misspelt in the published files)."""


def load_model(config: Mapping[str, Any], tensors: Mapping[str, Tensor], bf16_rounding: bool = False) -> MemoryLM:
    """The authors' model: its configuration (a mapping with their field names, or their YAML's, with a `model:`
    section) and its weights by their names.

    bf16_rounding: round cos, sin and slot values to bfloat16 as the released checkpoints were trained; a property of
    the model that comes back, saved along with it. Raises `ModelError` naming what does not fit.
    """
    ranks = {name: int(tensor.shape[0]) for name, tensor in tensors.items() if name.endswith("1.weight")}
    spec = model_spec(config, bf16_rounding, ranks)
    with torch.device("meta"):
        model = MemoryLM(spec)
    wanted = dict(model.named_parameters())
    names = weight_names(spec)
    assert set(names) == set(wanted)
    missing = sorted(theirs for theirs in names.values() if theirs not in tensors)
    if missing:
        raise ModelError(f"weights: missing {_some(missing)}; they must be those of this configuration")
    spare = set(tensors) - set(names.values()) - _unread(config)
    if spare:
        raise ModelError(f"weights: no place for {_some(sorted(spare))}; they must be those of this configuration")
    state: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        given, shape = tensors[theirs], wanted[ours].shape
        if given.numel() != shape.numel() or given.squeeze().shape != torch.Size(n for n in shape if n != 1):
            raise ModelError(f"weights: {theirs} must have shape {tuple(shape)}, got {tuple(given.shape)}")
        state[ours] = given.detach().clone().view(shape)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def import_files(config: str | Path, weights: str | Path, bf16_rounding: bool = False) -> MemoryLM:
    """`load_model` from files: their YAML or config.json, and safetensors (one file, or a folder of shards)."""
    return load_model(_read_config(Path(config)), _read_weights(Path(weights)), bf16_rounding)


def model_spec(
    config: Mapping[str, Any], bf16_rounding: bool = False, ranks: Mapping[str, int] | None = None
) -> ModelSpec:
    """What a configuration declares. ranks: of low-rank maps, by the name of their first weight, where not usual."""
    fields = _Fields(config)
    every = fields.integer("alt_layer_every")
    if every == 1:
        raise ModelError("alt_layer_every must be at least 2, or below 1 for no alternate layers, got 1")
    heads = [fields.integer("d_head", None), fields.integer("d_qk_head", None), fields.integer("d_v_head", None)]
    if heads[2] is not None and heads[2] != (heads[1] or heads[0] or fields.integer("hidden_size") // fields.heads):
        raise ModelError(f"d_v_head must be the width of queries and keys, got {heads[2]}; values are as wide as keys")
    try:
        main = fields.mixer(fields.mixers()[0], alternate=False, ranks=ranks or {})
        overrides: list[dict[str, Any]] = []
        if every > 1:
            alternate = fields.mixer(fields.mixers()[1], alternate=True, ranks=ranks or {})
            overrides = [{"every": every, "mixer": alternate}]
        declared: dict[str, Any] = {
            "vocabulary": fields.integer("vocab_size"),
            "width": fields.width,
            "depth": fields.integer("num_hidden_layers"),
            "heads": fields.heads,
            "kv_heads": fields.integer("num_key_value_heads", None),
            "head_width": heads[1] or heads[0],
            "rotary": fields.rotary(alternate=False),
            "mlp": {"expansion": fields.number("ffn_expansion"), "token_shift": fields.switch("use_tokenshift_ffn")},
            "residual_scale": fields.number("residual_scale"),
            "rounding": "bfloat16" if bf16_rounding else "none",
            "layers": {"default": main, "overrides": overrides},
        }
        return ModelSpec(**declared)
    except ModelError:
        raise
    except MemkitError as error:
        raise ModelError(f"this configuration has no counterpart in memkit: {error}") from None


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
    learned = mixer.policy.build().learned
    if "a memory-key LayerNorm" in learned:
        names |= {f"attention.learned.key_norm_{part}": f"ln_s_k.{part}" for part in ("weight", "bias")}
    if "temperatures" in learned:
        names["attention.learned.temperature_window"] = "front_head_temp"
        names["attention.learned.temperature_memory"] = "state_head_temp"
    if "merge weights" in learned:
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


class _Fields:
    """A configuration, checked: every field is known, and every value of the right kind."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        section = config.get("model", config)
        if not isinstance(section, Mapping):
            raise ModelError(f"config: model must be a mapping of fields, got {type(section).__name__}")
        self.config = dict(section)
        known = {*DEFAULTS, *FIXED, *CLASS_PATHS, *IGNORED}
        for name, value in self.config.items():
            if name in FIXED and value is not None and value != FIXED[name]:
                raise ModelError(f"config: {name} must be {FIXED[name]}, for memkit has no such part, got {value!r}")
            if name not in known and name not in HUGGING_FACE and not str(name).startswith(IGNORED_PREFIXES):
                raise ModelError(f"config: unknown field {name}{nearest_name(str(name), known)}")

    @property
    def heads(self) -> int:
        return self.integer("num_attention_heads")

    def value(self, name: str) -> Any:
        """The field; its default where it is left out or null."""
        value = self.config.get(name)
        return DEFAULTS[name] if value is None else value

    def number(self, name: str) -> float:
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelError(f"config: {name} must be a number, got {value!r}")
        return float(value)

    def integer(self, name: str, *missing: None) -> Any:
        """A whole number; None where it is left out and that is allowed."""
        value = self.value(name)
        if value is None and missing:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise ModelError(f"config: {name} must be a whole number, got {value!r}")
        return int(value)

    def switch(self, name: str) -> bool:
        value = self.value(name)
        if value not in (0, 1):
            raise ModelError(f"config: {name} must be 0 or 1, got {value!r}")
        return bool(value)

    def mixers(self) -> tuple[str, str]:
        """Names of the main and the alternate mixer."""
        names: list[str] = []
        for path, field in CLASS_PATHS.items():
            name = self.value(field)
            given = self.config.get(path)
            if given is not None:  # model.kvm_triton_mixer.SequenceMixer: the same mathematics, faster
                name = str(given).removeprefix("model.").removesuffix("_mixer.SequenceMixer").removesuffix("_triton")
            if name not in MIXERS and (field == "token_mixer" or self.integer("alt_layer_every") > 1):
                raise ModelError(
                    f"config: {path if given is not None else field} must be one of {', '.join(MIXERS)}, "
                    f"got {given if given is not None else name!r}"
                )
            names.append(name)
        return names[0], names[1]

    def mixer(self, name: str, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        return MIXERS[name](self, alternate, ranks)

    def rotary(self, alternate: bool) -> dict[str, Any]:
        prefix = "alt_" if alternate else ""
        return {
            "width": self.integer(f"{prefix}rope_partial_dim"),
            "theta": self.number(f"{prefix}rope_theta"),
            "pairing": "adjacent",
            "spacing": "closed",
            "clockwise": True,
        }

    def attention(
        self, name: str, alternate: bool, ranks: Mapping[str, int], policy: dict[str, Any], **parts: Any
    ) -> dict[str, Any]:
        """An attention mixer; `name` is whose modes it has."""
        fallback = "gptalpha" if name.startswith("gptalpha") else name
        modes: dict[str, str] = {}
        for part, known in (("value_residual", {"rwkv": "gated", "linear": "linear"}), ("token_shift", TOKEN_SHIFTS)):
            given = self.value(f"{name}_{part}_mode") or self.value(f"{fallback}_{part}_mode") or "rwkv"
            if given not in known:
                raise ModelError(f"config: {name}_{part}_mode must be {' or '.join(known)}, got {given!r}")
            modes[part] = known[given]
        residual = modes["value_residual"] if self.switch("use_value_residual") else "none"
        mixer = {
            "kind": "attention",
            "policy": policy,
            "rotary": self.rotary(alternate) if alternate else None,
            "token_shift": modes["token_shift"] == "shifted" and self.switch("use_tokenshift_att"),
            "value_residual": residual,
            **parts,
        }
        if residual == "gated":
            mixer["value_residual_rank"] = self._rank(ranks, alternate, "v_gate1", rank(self.width, 1.3, 0.5))
        return mixer

    @property
    def width(self) -> int:
        return self.integer("hidden_size")

    def _rank(self, ranks: Mapping[str, int], alternate: bool, name: str, usual: int) -> int | None:
        """A low-rank map's rank as its weights have it; None where it is the usual one."""
        layer = 1 if self.integer("alt_layer_every") > 1 and not alternate else 0
        found = ranks.get(f"transformer.h.{layer}.attn.{name}.weight", usual)
        return None if found == usual else found

    def kvm(self, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        chunk = self.integer("chunk_len")
        keys, values = self.switch("kvm_use_merge_gate_keys"), self.switch("kvm_use_merge_gate_values")
        whole = self.switch("kvm_apply_merge_gate_to_initial_state")
        if whole and keys != values:
            raise ModelError(
                "config: kvm_apply_merge_gate_to_initial_state weighs keys and values alike, so it needs "
                "kvm_use_merge_gate_keys and kvm_use_merge_gate_values to be equal, "
                f"got {int(keys)} and {int(values)}"
            )
        founders = self.switch("kvm_apply_merge_gate_to_appends")
        weigh = {"keys": keys, "values": values, "founders": founders, "first_chunk": whole}
        # Their mixer zeroes rope_partial_dim channels (all, where that is 0), alternate layer or not.
        zeroed = self.integer("rope_partial_dim")
        rotary = {"kind": "zero", "width": zeroed} if zeroed > 0 else {"kind": "zero", "share": 1.0}
        policy = {
            "chunker": {"kind": "fixed", "size": chunk},
            "window": {"kind": "block", "chunks": self.integer("n_bswa_chunks")},
            "sinks": self.integer("sink_len"),
            "growth": {**self._budget(chunk), "first_chunk": "whole"},
            "admission": {"kind": "novelty"},
            "routing": {"kind": "nearest", "similarity": "dot"},
            "merging": {"kind": "weighted-mean", "weight": "learned", "weigh": weigh} if keys or values else MEAN,
            "readout": {
                "key": "layer-norm",
                "value": "birth-radius" if self.switch("kvm_use_vlens") else "count-mean",
                "temperatures": self.switch("kvm_use_head_temps"),
            },
            "rotary": rotary,
        }
        return self.attention("kvm", alternate, ranks, policy)

    def _budget(self, chunk: int) -> dict[str, Any]:
        cap = chunk * self.integer("n_max_d_chunks")
        least = min(max(self.integer("state_min_len"), 0), cap)
        bounds = {"floor": least, "cap": cap, "round_down": self.integer("state_round_down")}
        mode = self.value("state_budget_mode")
        match mode:
            case "fixed":
                return {"kind": "fixed", "slots": least}
            case "power_law":
                factor, exponent = self.number("state_growth_factor"), self.number("state_growth_exponent")
                if exponent == 0.5:
                    return {"kind": "sqrt", "factor": factor, **bounds}
                return {"kind": "power", "factor": factor, "exponent": exponent, **bounds}
            case "kvm_saturation":
                return {"kind": "saturating", "limit": self.integer("state_saturation_n"), **bounds}
            case _:
                raise ModelError(f"config: state_budget_mode must be fixed, power_law or kvm_saturation, got {mode!r}")

    def full(self, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        return self.attention("gptalpha", alternate, ranks, {})

    def block_window(self, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        policy = {
            "chunker": {"kind": "fixed", "size": self.integer("chunk_len")},
            "window": {"kind": "block", "chunks": self.integer("n_bswa_chunks")},
            "sinks": self.integer("sink_len"),
        }
        return self.attention("gptalpha_bswa", alternate, ranks, policy)

    def sliding_window(self, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        size = self.integer("swa_window_size")
        size = size if size > 0 else self.integer("chunk_len")
        return self.attention("swa", alternate, ranks, {"window": {"kind": "sliding", "size": size}})

    def ovq(self, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        for name in ("ovq_normalize_centroids", "ovq_use_delta_rule"):
            if self.switch(name):
                raise ModelError(
                    f"config: {name} must be 0, got 1; with it, what a slot holds is no sum or mean of its tokens"
                )
        limit = self.integer("ovq_max_centroids")
        growth = {"kind": "saturating", "limit": limit}
        if self.switch("ovq_use_min_state_size"):
            growth = {"kind": "fixed", "slots": limit}
        policy = {
            "chunker": {"kind": "fixed", "size": self.integer("ovq_chunk_size")},
            "window": {"kind": "block", "chunks": 1},
            "growth": {**growth, "counts": "absorbed"},
            "admission": {"kind": "novelty"},
            "routing": {"kind": "nearest", "similarity": "dot", "new_slots": False},
            "merging": MEAN,
            "readout": {"key": "mean", "value": "mean", "count_bias": not self.switch("ovq_use_counts_for_lr_only")},
        }
        return self.attention("ovq", alternate, ranks, policy, qk_norm="unit", rotary={"width": 0})

    def rwkv7(self, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
        for name in ("d_head", "d_qk_head"):
            given = self.integer(name, None)
            if given is not None and given * self.heads != self.width:
                raise ModelError(f"config: {name} must be hidden_size / num_attention_heads in rwkv7, got {given}")
        usual = {
            "decay_rank": ("w1", rank(self.width, 1.8, 0.5)),
            "rate_rank": ("a1", rank(self.width, 1.8, 0.5)),
            "value_rank": ("v1", rank(self.width, 1.3, 0.5)),
            "gate_rank": ("g1", rank(self.width, 0.6, 0.8)),
        }
        sizes = {ours: self._rank(ranks, alternate, *theirs) for ours, theirs in usual.items()}
        return {"kind": "rwkv7", "token_shift": self.switch("use_tokenshift_att"), **sizes}


MEAN = {"kind": "mean"}
TOKEN_SHIFTS = {"rwkv": "shifted", "none": "none"}
MIXERS: dict[str, Callable[[_Fields, bool, Mapping[str, int]], dict[str, Any]]] = {
    "kvm": _Fields.kvm,
    "gptalpha": _Fields.full,
    "gptalpha_bswa": _Fields.block_window,
    "swa": _Fields.sliding_window,
    "ovq": _Fields.ovq,
    "rwkv7": _Fields.rwkv7,
}


def _unread(config: Mapping[str, Any]) -> set[str]:
    """Weights that their code makes and never reads: the value residual's x_v without a token shift."""
    fields = _Fields(config)
    layers = range(fields.integer("num_hidden_layers"))
    return set() if fields.switch("use_tokenshift_att") else {f"transformer.h.{layer}.attn.x_v" for layer in layers}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_config(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        config = yaml12.read(path, ModelError)
    else:
        try:
            config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path}: cannot be read as a configuration: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: a configuration is a mapping of fields, got {type(config).__name__}")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's pairs as a mapping, each name given once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice; leave one of them out")
    return found


def _read_weights(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"{path}: no safetensors files in this folder")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(str(file))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read as safetensors: {error}") from None
    return tensors
