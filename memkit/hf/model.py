"""`MemoryLM` as a Hugging Face model: `AutoModelForCausalLM`, `generate`, `Trainer`, `save_pretrained`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from memkit.errors import InputError, ModelError
from memkit.hf.cache import CarryingLayer, check_whole, layers_of, mark_complete
from memkit.hf.masks import present_tokens
from memkit.hf.names import CACHE, NAMES, take_cache
from memkit.lm import MemoryLM, ModelMemory, ModelSpec
from memkit.memory import Memory

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
    """The whole model's memory, as the one layer of a transformers cache.

    last [b, 1, width]: what the model made of each row's last token, short of the head; 0 for a row without one.
    """

    memory: ModelMemory | None

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    @property
    def memories(self) -> list[Memory]:
        found = [] if self.memory is None else self.memory.memories
        return [memory for memory in found if memory is not None]

    def reset(self) -> None:
        super().reset()
        self.last = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.last is not None:
            self.last = self.last.index_select(0, beam_idx.to(self.last.device))


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
        carry_logits: bool = False,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [b, t] → logits [b, t, vocabulary] (0 at padding), the cache, and the loss of labels.

        past_key_values, cache: the cache to go on with, by whichever name transformers has for it.
        attention_mask: over this call's tokens, or over all so far; 0 where there is no token, anywhere in a row. A
        row's tokens follow each other as if the others were not there, so padding on the left or right changes nothing.
        labels [b, t]: input_ids themselves, −100 where not to learn; next to padding nothing is learned either.
        logits_to_keep: so many columns of logits, the last ones; 0: all.
        carry_logits: at padding, instead of 0, the logits of the row's last token before it, be it of an earlier call:
        what comes next in the row. `generate` sets it.

        Raises `InputError` for what the model has not: `inputs_embeds`, `position_ids`, `output_attentions`, ….
        """
        for name, given in others.items():
            if given is not None and given is not False:
                raise InputError(f"a memkit model has no {name}; leave it out")
        given = take_cache({"past_key_values": past_key_values, "cache": cache})
        layers = None if given is None else layers_of(given, ModelLayer, "this model")
        layer = ModelLayer() if layers is None else layers[0]
        check_whole([layer])
        memory = layer.memory
        seen = torch.zeros(len(input_ids), dtype=torch.long) if memory is None else memory.seen
        now = present_tokens(attention_mask, *input_ids.shape, seen, layer.columns)
        shown = now
        if now is None:
            x, layer.memory = self.model.read(input_ids, memory)
        else:
            if carry_logits:
                shown = (now.cumsum(1) > 0) | (seen > 0).to(now.device)[:, None]
            x, layer.memory = self._read_present(input_ids, layer, now)
        layer.columns += input_ids.shape[1]
        if input_ids.shape[1]:
            layer.last = x[:, -1:].clone()
        if isinstance(logits_to_keep, Tensor):
            kept = logits_to_keep
        else:
            kept = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = self.model.head(x[:, kept])
        if shown is not None:
            logits = logits.masked_fill(~shown[:, kept, None], 0)
        loss = None
        if labels is not None:
            if now is not None:
                labels = labels.masked_fill(~now, -100)
                labels[:, 1:] = labels[:, 1:].masked_fill(~now[:, :-1], -100)
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch)
        mark_complete([layer])
        if given is not None:
            given.layers = [layer]
        elif self.config.use_cache if use_cache is None else use_cache:
            given = Cache(layers=[layer])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: given})
        return output.to_tuple() if return_dict is False else output

    def _read_present(self, ids: Tensor, layer: ModelLayer, now: Tensor) -> tuple[Tensor, ModelMemory]:
        """`MemoryLM.read` of the tokens that are there [b, t], moved to the left for it and back again.

        What stands at a column without a token is the output of the row's last token before it, 0 before the first.
        """
        lengths = now.sum(1)
        order = (~now).long().argsort(dim=1, stable=True)[:, : int(lengths.max())]
        x, memory = self.model.read(ids.gather(1, order), layer.memory, lengths)
        before = x.new_zeros(len(x), 1, x.shape[2]) if layer.last is None else layer.last
        # Column 0 is what came before this call, column i its i-th token.
        places = now.cumsum(1)[..., None].expand(-1, -1, x.shape[2])
        return torch.cat((before, x), dim=1).gather(1, places), memory

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As every model's; and `generate`, which looks at the last column, finds there what comes next in any row."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["carry_logits"] = True
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # The one step of every kind of generation that comes after the whole prompt is read and before it is continued.
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(1).all()):
            raise InputError(
                f"generate needs a token in every row, got an attention_mask of {len(mask)} rows, "
                f"{int((~mask.bool().any(1)).sum())} of them without one; leave these out"
            )
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


AutoConfig.register("memkit", MemkitConfig)
AutoModelForCausalLM.register(MemkitConfig, MemkitForCausalLM)
