"""What a configuration means: the model it declares, and the policy of each of its mixers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from memkit.errors import MemkitError, ModelError, shown
from memkit.interop.kvm_paper.fields import CLASS_PATHS, Fields
from memkit.lm.parts import rank
from memkit.lm.spec import ModelSpec

__all__ = ["model_spec"]

MEAN = {"kind": "mean"}
TOKEN_SHIFTS = {"rwkv": "shifted", "none": "none"}


def model_spec(
    config: Mapping[str, Any], bf16_rounding: bool = False, ranks: Mapping[str, int] | None = None
) -> ModelSpec:
    """What a configuration declares. ranks: of low-rank maps, by the name of their first weight, where not usual."""
    fields = Fields(config)
    every = fields.integer("alt_layer_every")
    if every == 1:
        raise ModelError("alt_layer_every must be at least 2, or below 1 for no alternate layers, got 1")
    heads = [fields.integer("d_head", None), fields.integer("d_qk_head", None), fields.integer("d_v_head", None)]
    if heads[2] is not None and heads[2] != (heads[1] or heads[0] or fields.integer("hidden_size") // fields.heads):
        raise ModelError(f"d_v_head must be the width of queries and keys, got {heads[2]}; values are as wide as keys")
    main_name, alternate_name = mixers_of(fields)
    try:
        main = MIXERS[main_name](fields, False, ranks or {})
        overrides: list[dict[str, Any]] = []
        if every > 1:
            alternate = MIXERS[alternate_name](fields, True, ranks or {})
            overrides = [{"every": every, "mixer": alternate}]
        declared: dict[str, Any] = {
            "vocabulary": fields.integer("vocab_size"),
            "width": fields.width,
            "depth": fields.integer("num_hidden_layers"),
            "heads": fields.heads,
            "kv_heads": fields.integer("num_key_value_heads", None),
            "head_width": heads[1] or heads[0],
            "rotary": rotary_of(fields, alternate=False),
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


def mixers_of(fields: Fields) -> tuple[str, str]:
    """Names of the main and the alternate mixer."""
    names: list[str] = []
    for path, field in CLASS_PATHS.items():
        name = fields.value(field)
        given = fields.config.get(path)
        if given is not None:  # model.kvm_triton_mixer.SequenceMixer: the same mathematics, faster
            name = str(given).removeprefix("model.").removesuffix("_mixer.SequenceMixer").removesuffix("_triton")
        if not _known(name, MIXERS) and (field == "token_mixer" or fields.integer("alt_layer_every") > 1):
            raise ModelError(
                f"config: {path if given is not None else field} must be one of {', '.join(MIXERS)}, "
                f"got {shown(name if given is None else given)}"
            )
        names.append(name)
    return names[0], names[1]


def _known(name: Any, names: Mapping[str, Any]) -> bool:
    """Whether what a field holds, which may be anything, is one of the names."""
    return isinstance(name, str) and name in names


def rotary_of(fields: Fields, alternate: bool) -> dict[str, Any]:
    """Rotary embedding of the main layers, or of the alternate ones."""
    prefix = "alt_" if alternate else ""
    return {
        "width": fields.integer(f"{prefix}rope_partial_dim"),
        "theta": fields.number(f"{prefix}rope_theta"),
        "pairing": "adjacent",
        "spacing": "closed",
        "clockwise": True,
    }


def attention_of(
    fields: Fields, name: str, alternate: bool, ranks: Mapping[str, int], policy: dict[str, Any], **parts: Any
) -> dict[str, Any]:
    """An attention mixer; `name` is whose modes it has."""
    fallback = "gptalpha" if name.startswith("gptalpha") else name
    modes: dict[str, str] = {}
    for part, known in (("value_residual", {"rwkv": "gated", "linear": "linear"}), ("token_shift", TOKEN_SHIFTS)):
        given = fields.value(f"{name}_{part}_mode") or fields.value(f"{fallback}_{part}_mode") or "rwkv"
        if not _known(given, known):
            raise ModelError(f"config: {name}_{part}_mode must be {' or '.join(known)}, got {shown(given)}")
        modes[part] = known[given]
    residual = modes["value_residual"] if fields.switch("use_value_residual") else "none"
    mixer = {
        "kind": "attention",
        "policy": policy,
        "rotary": rotary_of(fields, alternate) if alternate else None,
        "token_shift": modes["token_shift"] == "shifted" and fields.switch("use_tokenshift_att"),
        "value_residual": residual,
        **parts,
    }
    if residual == "gated":
        mixer["value_residual_rank"] = rank_of(fields, ranks, alternate, "v_gate1", rank(fields.width, 1.3, 0.5))
    return mixer


def rank_of(fields: Fields, ranks: Mapping[str, int], alternate: bool, name: str, usual: int) -> int | None:
    """A low-rank map's rank as its weights have it; None where it is the usual one."""
    layer = 1 if fields.integer("alt_layer_every") > 1 and not alternate else 0
    found = ranks.get(f"transformer.h.{layer}.attn.{name}.weight", usual)
    return None if found == usual else found


def kvm(fields: Fields, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Key-Value Means."""
    chunk = fields.integer("chunk_len")
    keys, values = fields.switch("kvm_use_merge_gate_keys"), fields.switch("kvm_use_merge_gate_values")
    whole = fields.switch("kvm_apply_merge_gate_to_initial_state")
    if whole and keys != values:
        raise ModelError(
            "config: kvm_apply_merge_gate_to_initial_state weighs keys and values alike, so it needs "
            "kvm_use_merge_gate_keys and kvm_use_merge_gate_values to be equal, "
            f"got {int(keys)} and {int(values)}"
        )
    founders = fields.switch("kvm_apply_merge_gate_to_appends")
    weigh = {"keys": keys, "values": values, "founders": founders, "first_chunk": whole}
    # Their mixer zeroes rope_partial_dim channels (all, where that is 0), alternate layer or not.
    zeroed = fields.integer("rope_partial_dim")
    rotary = {"kind": "zero", "width": zeroed} if zeroed > 0 else {"kind": "zero", "share": 1.0}
    policy = {
        "chunker": {"kind": "fixed", "size": chunk},
        "window": {"kind": "block", "chunks": fields.integer("n_bswa_chunks")},
        "sinks": fields.integer("sink_len"),
        "growth": {**budget_of(fields, chunk), "first_chunk": "whole"},
        "admission": {"kind": "novelty"},
        "routing": {"kind": "nearest", "similarity": "dot"},
        "merging": {"kind": "weighted-mean", "weight": "learned", "weigh": weigh} if keys or values else MEAN,
        "readout": {
            "key": "layer-norm",
            "value": "birth-radius" if fields.switch("kvm_use_vlens") else "count-mean",
            "temperatures": fields.switch("kvm_use_head_temps"),
        },
        "rotary": rotary,
    }
    return attention_of(fields, "kvm", alternate, ranks, policy)


def budget_of(fields: Fields, chunk: int) -> dict[str, Any]:
    """Growth: how many slots after n tokens."""
    cap = chunk * fields.integer("n_max_d_chunks")
    least = min(max(fields.integer("state_min_len"), 0), cap)
    bounds = {"floor": least, "cap": cap, "round_down": fields.integer("state_round_down")}
    mode = fields.value("state_budget_mode")
    match mode:
        case "fixed":
            return {"kind": "fixed", "slots": least}
        case "power_law":
            factor, exponent = fields.number("state_growth_factor"), fields.number("state_growth_exponent")
            if exponent == 0.5:
                return {"kind": "sqrt", "factor": factor, **bounds}
            return {"kind": "power", "factor": factor, "exponent": exponent, **bounds}
        case "kvm_saturation":
            return {"kind": "saturating", "limit": fields.integer("state_saturation_n"), **bounds}
        case _:
            raise ModelError(f"config: state_budget_mode must be fixed, power_law or kvm_saturation, got {mode!r}")


def full(fields: Fields, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Full attention."""
    return attention_of(fields, "gptalpha", alternate, ranks, {})


def block_window(fields: Fields, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Attention over the newest chunks and the sinks."""
    policy = {
        "chunker": {"kind": "fixed", "size": fields.integer("chunk_len")},
        "window": {"kind": "block", "chunks": fields.integer("n_bswa_chunks")},
        "sinks": fields.integer("sink_len"),
    }
    return attention_of(fields, "gptalpha_bswa", alternate, ranks, policy)


def sliding_window(fields: Fields, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Attention over the newest tokens."""
    size = fields.integer("swa_window_size")
    size = size if size > 0 else fields.integer("chunk_len")
    return attention_of(fields, "swa", alternate, ranks, {"window": {"kind": "sliding", "size": size}})


def ovq(fields: Fields, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Online vector quantisation: a slot is the mean of its tokens."""
    for name in ("ovq_normalize_centroids", "ovq_use_delta_rule"):
        if fields.switch(name):
            raise ModelError(
                f"config: {name} must be 0, got 1; with it, what a slot holds is no sum or mean of its tokens"
            )
    limit = fields.integer("ovq_max_centroids")
    growth = {"kind": "saturating", "limit": limit}
    if fields.switch("ovq_use_min_state_size"):
        growth = {"kind": "fixed", "slots": limit}
    policy = {
        "chunker": {"kind": "fixed", "size": fields.integer("ovq_chunk_size")},
        "window": {"kind": "block", "chunks": 1},
        "growth": {**growth, "counts": "absorbed"},
        "admission": {"kind": "novelty"},
        "routing": {"kind": "nearest", "similarity": "dot", "new_slots": False},
        "merging": MEAN,
        "readout": {"key": "mean", "value": "mean", "count_bias": not fields.switch("ovq_use_counts_for_lr_only")},
    }
    return attention_of(fields, "ovq", alternate, ranks, policy, qk_norm="unit", rotary={"width": 0})


def rwkv7(fields: Fields, alternate: bool, ranks: Mapping[str, int]) -> dict[str, Any]:
    """RWKV-7, which has no policy."""
    for name in ("d_head", "d_qk_head"):
        given = fields.integer(name, None)
        if given is not None and given * fields.heads != fields.width:
            raise ModelError(f"config: {name} must be hidden_size / num_attention_heads in rwkv7, got {given}")
    usual = {
        "decay_rank": ("w1", rank(fields.width, 1.8, 0.5)),
        "rate_rank": ("a1", rank(fields.width, 1.8, 0.5)),
        "value_rank": ("v1", rank(fields.width, 1.3, 0.5)),
        "gate_rank": ("g1", rank(fields.width, 0.6, 0.8)),
    }
    sizes = {ours: rank_of(fields, ranks, alternate, *theirs) for ours, theirs in usual.items()}
    return {"kind": "rwkv7", "token_shift": fields.switch("use_tokenshift_att"), **sizes}


MIXERS: dict[str, Callable[[Fields, bool, Mapping[str, int]], dict[str, Any]]] = {
    "kvm": kvm,
    "gptalpha": full,
    "gptalpha_bswa": block_window,
    "swa": sliding_window,
    "ovq": ovq,
    "rwkv7": rwkv7,
}
