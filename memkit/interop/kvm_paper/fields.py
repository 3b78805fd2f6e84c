"""The fields of the authors' configuration: which there are, and what they are where left out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from memkit.errors import ModelError, nearest_name, shown

__all__ = ["CLASS_PATHS", "Fields"]

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


class Fields:
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

    @property
    def width(self) -> int:
        return self.integer("hidden_size")

    def value(self, name: str) -> Any:
        """The field; its default where it is left out or null."""
        value = self.config.get(name)
        return DEFAULTS[name] if value is None else value

    def number(self, name: str) -> float:
        value = self.value(name)
        if not _is_number(value):
            raise ModelError(f"config: {name} must be a finite number, got {shown(value)}")
        return float(value)

    def integer(self, name: str, *missing: None) -> Any:
        """A whole number; None where it is left out and that is allowed."""
        value = self.value(name)
        if value is None and missing:
            return None
        if not _is_number(value) or value != int(value):
            raise ModelError(f"config: {name} must be a whole number, got {shown(value)}")
        return int(value)

    def switch(self, name: str) -> bool:
        value = self.value(name)
        if value not in (0, 1):
            raise ModelError(f"config: {name} must be 0 or 1, got {value!r}")
        return bool(value)


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number that float has: neither infinite nor none."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
