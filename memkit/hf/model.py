"""`MemoryLM` as a Hugging Face model: `AutoModelForCausalLM`, `generate`, `Trainer`, `save_pretrained`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from memkit.errors import InputError, MemoryStateError, ModelError
from memkit.hf.cache import CarryingLayer
from memkit.hf.names import CACHE, NAMES, take_cache
from memkit.lm import MemoryLM, ModelMemory, ModelSpec

__all__ = ["MemkitConfig", "MemkitForCausalLM"]


class MemkitConfig(PretrainedConfig):
    """A `ModelSpec` as plain data, beside what transformers wants to know (special ids, dtype, …)."""

    model_type = "memkit"
    keys_to_ignore_at_inference = list(NAMES)  # noqa: RUF012 (as transformers declares it)

    def __init__(self, spec: ModelSpec | dict[str, Any] | None = None, use_cache: bool = True, **kwargs: Any) -> None:
        """spec: the declaration; None only for transformers, which compares with a config of defaults."""
        self.spec = ModelSpec(**spec).model_dump(mode="json") if isinstance(spec, dict) else None
        if isinstance(spec, ModelSpec):
            self.spec = spec.model_dump(mode="json")
        self.use_cache = use_cache
        super().__init__(**kwargs)

    @property
    def model_spec(self) -> ModelSpec:
        """The declaration."""
        if self.spec is None:
            raise ModelError("this config declares no model; make it with MemkitConfig(spec=memkit.lm.ModelSpec(…))")
        return ModelSpec(**self.spec)

    @property
    def vocab_size(self) -> int | None:
        """Token ids."""
        return None if self.spec is None else self.spec["vocabulary"]

    @property
    def hidden_size(self) -> int | None:
        """Channels of the residual stream."""
        return None if self.spec is None else self.spec["width"]

    @property
    def num_hidden_layers(self) -> int | None:
        """Blocks."""
        return None if self.spec is None else self.spec["depth"]

    @property
    def num_attention_heads(self) -> int | None:
        """Query heads of a layer."""
        return None if self.spec is None else self.spec["heads"]


class ModelLayer(CarryingLayer):
    """The whole model's memory, as the one layer of a transformers cache."""

    memory: ModelMemory | None


class MemkitForCausalLM(PreTrainedModel, GenerationMixin):
    """A `MemoryLM`, `model`, behind transformers' interface.

    ```python
    wrapped = memkit.hf.MemkitForCausalLM.wrap(memkit.load_model("tiny-kvm-sqrt"))
    wrapped.generate(ids, attention_mask=mask, max_new_tokens=20, num_beams=4)
    wrapped.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # once memkit.hf is imported
    ```

    A fresh one is initialised as `MemoryLM` is. Its cache (`past_key_values`, from transformers 5.24 on
    `cache`) is a Cache whose one layer holds the `ModelMemory`; it cannot be cropped, so assisted decoding is refused.
    """

    config_class = MemkitConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False  # by transformers' way; MemoryLM.activation_checkpointing is ours
    _no_split_modules = ["Block"]  # noqa: RUF012 (as transformers declares it)

    def __init__(self, config: MemkitConfig) -> None:
        super().__init__(config)
        self.model = MemoryLM(config.model_spec)
        self._filled_from_files = self.model.head.weight.is_meta
        self.post_init()

    @classmethod
    def wrap(cls, model: MemoryLM, **kwargs: Any) -> MemkitForCausalLM:
        """The same model, its parameters shared, behind this interface. kwargs: of the config (`eos_token_id`, …)."""
        with torch.device("meta"):
            wrapped = cls(MemkitConfig(model.spec, **kwargs))
        wrapped.model = model
        return wrapped.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        # MemoryLM initialises itself. What is still to do once files were read is what they lacked.
        own = module.parameters(recurse=False)
        if self._filled_from_files and not all(getattr(each, "_is_hf_initialized", False) for each in own):
            raise ModelError(
                f"the files lack weights of a {type(module).__name__}; they must be of this config's model"
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the vocabulary is part of the declaration."""
        raise ModelError(
            f"the vocabulary is declared, {self.config.vocab_size}; declare another model, with another vocabulary"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [b, t] → logits [b, t, vocabulary] (0 at padding), the cache, and the loss of labels.

        past_key_values, cache: the cache to go on with, by whichever name transformers has for it.
        attention_mask: over this call's tokens, or over all so far; 0 where there is no token, anywhere in a row. A
        row's tokens follow each other as if the others were not there, so padding on the left or right changes nothing.
        labels [b, t]: input_ids themselves, −100 where not to learn; next to padding nothing is learned either.
        logits_to_keep: so many columns of logits, the last ones; 0: all.

        Raises `InputError` for what the model has not: `inputs_embeds`, `position_ids`, `output_attentions`, ….
        """
        for name, given in others.items():
            if given is not None and given is not False:
                raise InputError(f"a memkit model has no {name}; leave it out")
        given = take_cache({"past_key_values": past_key_values, "cache": cache})
        cache = self._own_cache(given, self.config.use_cache if use_cache is None else use_cache)
        memory = None if cache is None else cache.layers[0].memory
        before = 0 if cache is None else cache.layers[0].columns
        now = _present(attention_mask, input_ids, memory, before)
        if now is None:
            x, memory = self.model.read(input_ids, memory)
        else:
            x, memory = self._read_present(input_ids, memory, now)
        if cache is not None:
            cache.layers[0].memory, cache.layers[0].columns = memory, before + input_ids.shape[1]
        if isinstance(logits_to_keep, Tensor):
            kept = logits_to_keep
        else:
            kept = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = self.model.head(x[:, kept])
        if now is not None:
            logits = logits.masked_fill(~now[:, kept, None], 0)
        loss = None
        if labels is not None:
            if now is not None:
                labels = labels.masked_fill(~now, -100)
                labels[:, 1:] = labels[:, 1:].masked_fill(~now[:, :-1], -100)
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    def _read_present(self, ids: Tensor, memory: ModelMemory | None, now: Tensor) -> tuple[Tensor, ModelMemory]:
        """`MemoryLM.read` of the tokens that are there [b, t], moved to the left for it and back again."""
        lengths = now.sum(1)
        order = (~now).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]
        x, memory = self.model.read(ids.gather(1, order), memory, lengths)
        if not x.shape[1]:
            return x.new_zeros(*ids.shape, x.shape[2]), memory
        places = (now.cumsum(1) - 1).clamp(min=0)
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[2])), memory

    # Not `_cache`: some releases of transformers keep a static cache in the model by that name.
    def _own_cache(self, given: Cache | None, wanted: bool) -> Cache | None:
        """The cache to read into: the one given, made ours if it is new; None where none is kept."""
        if given is None:
            return Cache(layers=[ModelLayer()]) if wanted else None
        if given.layers and all(isinstance(layer, ModelLayer) for layer in given.layers):
            return given
        if type(given) is not DynamicCache or given.offloading or given.get_seq_length():
            raise InputError(
                f"{CACHE} must be empty or from this model, got a {type(given).__name__} of "
                f"{given.get_seq_length()} tokens; leave {CACHE} and cache_implementation out"
            )
        # `generate` makes its empty cache before the first call: it becomes ours in place.
        given.layers = [ModelLayer()]
        return given


def _present(mask: Tensor | None, ids: Tensor, memory: ModelMemory | None, before: int) -> Tensor | None:
    """Which tokens of this call are there, [b, t]; None where all are."""
    if mask is None:
        return None
    rows, columns = ids.shape
    if mask.shape not in ((rows, columns), (rows, before + columns)):
        raise InputError(
            f"attention_mask must cover this call's tokens, shape ({rows}, {columns}), or all tokens so far, "
            f"({rows}, {before + columns}), got {tuple(mask.shape)}"
        )
    mask = mask.bool()
    earlier, now = mask[:, : mask.shape[1] - columns], mask[:, mask.shape[1] - columns :]
    if memory is not None and earlier.shape[1]:
        marked = earlier.sum(1).tolist()
        if marked != memory.seen.tolist():
            raise MemoryStateError(
                f"attention_mask must mark the tokens already read, {memory.seen.tolist()} per row, got {marked}; "
                "give this call's columns only, or pass on the mask of the earlier calls"
            )
    return None if bool(now.all()) else now


AutoConfig.register("memkit", MemkitConfig)
AutoModelForCausalLM.register(MemkitConfig, MemkitForCausalLM)
