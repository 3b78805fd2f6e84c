"""Run every attention layer of a stock Hugging Face decoder on a memory policy.

Three seams that transformers and torch offer carry it, and nothing is patched:

- the attention registry of transformers gets one more attention function, `memkit`, which calls `attend`.
  It has no mask function, so that no `[tokens, tokens]` mask is built;
- a transformers `Cache` is a list of layers of any kind: ours hold one `Memory` each;
- a forward pre-hook on the decoder puts such a cache in, reads off the attention mask which tokens are there, sets the
  positions, and hands the lot to every layer as one keyword argument. Forward hooks note when a call ran to its end.

When the `with` block ends, hooks and setting are gone; the function stays in the registry, where nothing else names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkit.engine import attend, compress, next_readers
from memkit.engine.autocast import autocasts
from memkit.errors import InputError, MemoryStateError, ModelError, shown
from memkit.hf.cache import CarryingLayer, check_whole, layers_of, mark_complete
from memkit.hf.masks import present_tokens
from memkit.hf.names import CACHE, cache_argument, take_cache
from memkit.layers import AnyLayers, LayerFunction, layer_policies
from memkit.pieces.rotary import Rotation

if TYPE_CHECKING:
    from memkit.memory import Memory
    from memkit.policy import Policy

Prefill = Literal["policy", "full"]

__all__ = ["Prefill", "attach", "check_policy", "memories"]

NAME = "memkit"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# The keyword by which a model with a head hands its decoder a list; the decoder notes the cache of the call there.
WAITING = "memkit_waiting"
# Rotary frequencies that change with the length read: a key would be un-rotated by other angles than it was rotated by.
MOVING_FREQUENCIES = ("dynamic", "longrope")


@contextmanager
def attach(
    model: PreTrainedModel, policy: AnyLayers | LayerFunction, *, prefill: Prefill = "policy"
) -> Generator[PreTrainedModel]:
    """Inside the `with` block, every attention layer of `model` remembers as `policy` says.

    ```python
    with memkit.hf.attach(model, "untrained-kvm-sqrt"):
        model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
    ```

    `model(...)` prefills, and continues with any number of tokens when its cache is passed on (`past_key_values`, from
    transformers 5.24 on `cache`); however a text is split, the result is the same. `model.generate(...)` works as
    usual: greedy, sampling, beams. Gradients flow. `memories(cache)` gives each layer's memory. Groups of query heads
    share their key/value head's memory. When the block ends, by an error too, the model is as it was; a cache made
    inside is of no use outside.

    prefill: `policy`: bounded from the first chunk on. `full`: the first call of a cache, the prompt, is read exactly,
    and all that is older than the window then leaves at once (`memkit.compress`); from there on the policy goes on.
    What rows are worth is asked as `observe.readers` says. Rows must then be of equal length in the first call.

    Where the policy says `heads: {profile: auto}` and a head profile of this model is shipped, it is put in.

    Rows of unequal length are padded, on the left, on the right or anywhere, with a 2D `attention_mask` over this
    call's tokens or over all so far: a row's tokens are read as if they stood alone, and the next call continues each
    row at its own position. `generate` reads the last column of the logits, so it needs padding on the left
    (`tokenizer.padding_side = "left"`), as pipelines set it.

    Raises `ModelError` for a model outside the Llama family (llama, mistral, qwen2, qwen3), with sliding-window
    layers, or attached already, and for a policy with learned parts, which no stock model has; `InputError` inside the
    block for calls that the engine cannot serve (4D masks, positions of one's own, …).
    """
    attachment = _Attachment(model, policy, prefill)
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(NAME)
        decoder = model.base_model
        for module, before, after in (
            (model, _before_model, _after_model),
            (decoder, attachment.before_decoder, attachment.after_decoder),
        ):
            undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield model


def check_policy(policy: Policy) -> None:
    """Raise `ModelError` where a policy needs what no stock model has learned."""
    if policy.learned:
        raise ModelError(
            f"a stock model runs policies without learned parts, got {_name(policy)}, which needs "
            f"{', '.join(need.phrase for need in policy.learned)}; use an untrained-* policy, or train a "
            "model with this one"
        )


def memories(past_key_values: Cache) -> list[Memory]:
    """Each layer's memory, first layer first, out of the cache that an attached model returned."""
    layers = getattr(past_key_values, "layers", None)
    if not layers or not all(isinstance(layer, MemoryLayer) and layer.memory is not None for layer in layers):
        raise MemoryStateError(
            f"{CACHE} must be what an attached model returned, got {past_key_values}; "
            "call the model inside memkit.hf.attach(model, policy) first"
        )
    return [layer.memory for layer in layers]


def _name(policy: Policy) -> str:
    return policy.name or "without a name"


class MemoryLayer(CarryingLayer):
    """A decoder layer's `Memory`; new keys and values pass on to the attention function."""

    memory: Memory | None

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    @property
    def memories(self) -> list[Memory]:
        return [] if self.memory is None else [self.memory]

    def __repr__(self) -> str:
        return f"MemoryLayer({self.memory if self.memory is not None else self.policy})"

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Only attention functions that want a mask ask, and ours does not: the model is not attached.
        raise MemoryStateError(
            f"{CACHE} made under policy {_name(self.policy)} hold no keys that stock attention could read; "
            f"pass them on inside memkit.hf.attach only, or start without {CACHE}"
        )


@dataclass(frozen=True)
class _Call:
    """What one forward call of the decoder tells its attention layers.

    waiting: where to note the cache once the decoder has run, if a head is to run after it.
    """

    attachment: _Attachment
    cache: Cache | None
    present: _Present | None
    waiting: list[Cache] | None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    memkit_call: _Call | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface on `attend`: [b, h, t, d] in, [b, t, h, d] out."""
    if memkit_call is None:
        raise ModelError(
            "this model shares its config with an attached model, but is not attached itself; give it a copy.deepcopy"
        )
    if dropout:
        raise ModelError(f"attention dropout must be 0 on a memory, got {dropout}; set config.attention_dropout to 0")
    call = memkit_call
    if autocasts(query.device):
        # As PyTorch's own attention does: rotation made queries and keys float32, while values are of autocast's dtype.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (each if each.dtype == torch.float64 else each.to(dtype) for each in (query, key, value))
    layer = None if call.cache is None else call.cache.layers[module.layer_idx]
    present = call.present
    if present is not None:
        query, key, value = (present.to_the_left(each) for each in (query, key, value))
    attachment = call.attachment
    policy = attachment.policies[module.layer_idx]
    rotation = attachment.rotation if policy.needs_rotation else None
    if attachment.prefill == "full" and (layer is None or layer.memory is None):
        output, memory = attend("full", query, key, value, scale=scaling)
        if layer is not None:
            asks = policy.observes and policy.spec.observe.readers == "next"
            readers = next_readers(query, attachment.readers) if asks else None
            memory = compress(policy, query, key, value, rotation=rotation, scale=scaling, readers=readers)
    else:
        output, memory = attend(
            policy,
            query,
            key,
            value,
            rotation=rotation,
            scale=scaling,
            memory=None if layer is None else layer.memory,
            lengths=None if present is None else present.lengths,
        )
    if present is not None:
        output = present.back(output)
    if layer is not None:
        layer.memory, layer.columns = memory, layer.columns + query.shape[2]
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


class _Attachment:
    """A policy on a model: what is checked once, and what is prepared before each forward call.

    policies: of each layer; rotation: how keys are rotated, where the policy asks; readers: how queries are turned to
    those who go on with the text, where they are asked once a prompt was read in full.
    """

    def __init__(self, model: PreTrainedModel, policy: AnyLayers | LayerFunction, prefill: Prefill = "policy") -> None:
        if prefill not in ("policy", "full"):
            raise InputError(f"prefill must be 'policy' or 'full', got {shown(prefill)}")
        check_model(model)
        self.prefill: Prefill = prefill
        self.layers, config = model.config.num_hidden_layers, model.config
        windows = windows_of(config)
        self.policies = layer_policies(policy, self.layers, kv_heads_of(config), facts_of(config), windows)
        for each in dict.fromkeys(self.policies):
            check_policy(each)
        self.rotation = fixed_rotation(model) if any(each.needs_rotation for each in self.policies) else None
        asks = [each.observes and each.spec.observe.readers == "next" for each in self.policies]
        self.readers = fixed_rotation(model) if prefill == "full" and any(asks) else None
        forward = type(model.base_model).forward
        self.signature, self.cache_name = inspect.signature(forward), cache_argument(forward)

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The decoder's arguments as it needs them on our engine."""
        arguments = self.signature.bind(decoder, *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["self"]
        if arguments.get("output_attentions", decoder.config.output_attentions):
            raise InputError("attention weights are never computed as a matrix; leave output_attentions out")
        if arguments.get("is_causal") is False:
            raise InputError("a memory is causal, got is_causal False; leave it out")
        tokens = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
        rows, columns = tokens.shape[:2]

        given, layers = take_cache(arguments), None
        waiting = arguments.pop(WAITING, None)
        if given is not None:
            layers = self.layers_of(given)
        seen, before = torch.zeros(rows, dtype=torch.long, device=tokens.device), 0
        if layers is not None and layers[0].memory is not None:
            seen, before = layers[0].memory.seen.to(tokens.device), layers[0].columns
            if len(seen) != rows:
                raise InputError(
                    f"a call must have the rows of its {CACHE}, {len(seen)}, got {rows}; select or repeat the cache's "
                    "rows with its batch_select_indices or batch_repeat_interleave"
                )
        now = present_tokens(
            arguments.pop("attention_mask", None), rows, columns, seen, before, "; a policy makes its own causal mask"
        )
        if self.prefill == "full" and now is not None and not before:
            raise InputError(
                "prefill='full' needs rows of equal length in the first call, got padding; read one row at a time, "
                "or leave prefill out"
            )
        places = torch.arange(columns, device=seen.device) if now is None else (now.cumsum(1) - 1).clamp(min=0)
        positions = seen[:, None] + places
        _check_positions(arguments.get("position_ids"), positions, now)
        arguments["position_ids"] = positions

        cache = given
        if decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled():
            if given is not None:
                raise InputError(f"gradient checkpointing runs layers twice; leave {CACHE} out while training")
            arguments["use_cache"] = False
        elif given is None:
            wanted = arguments.get("use_cache")
            if decoder.config.use_cache if wanted is None else wanted:
                cache = Cache(layers=self.memory_layers())
        elif layers is None:
            given.layers = self.memory_layers()  # only now that nothing is refused any more
        arguments[self.cache_name] = cache
        arguments["memkit_call"] = _Call(self, cache, None if now is None else _Present(now), waiting)
        return (), arguments

    def after_decoder(self, _decoder: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        """The decoder ran to its end. So did the call, unless a head is still to come."""
        call = kwargs["memkit_call"]
        if call.cache is None:
            return
        if call.waiting is None:
            mark_complete(call.cache.layers)
        else:
            call.waiting.append(call.cache)

    def layers_of(self, given: Any) -> list[MemoryLayer] | None:
        """The layers of the cache given, checked; None where it is empty."""
        layers = layers_of(given, MemoryLayer, "this attached model")
        if layers is None:
            return None
        if len(layers) != self.layers:
            raise MemoryStateError(
                f"{CACHE} must be of a model of {self.layers} layers, got {len(layers)}; start without {CACHE}"
            )
        for layer, policy in zip(layers, self.policies, strict=True):
            if layer.policy is not policy and layer.policy.spec != policy.spec:
                raise MemoryStateError(
                    f"{CACHE} must be of the attached policy, {_name(policy)}, got {_name(layer.policy)}; "
                    f"start without {CACHE}"
                )
        check_whole(layers)
        return layers

    def memory_layers(self) -> list[Any]:
        return [MemoryLayer(policy) for policy in self.policies]


def fixed_rotation(model: PreTrainedModel) -> Rotation:
    """How a model of the Llama family rotates its keys. Raises `ModelError` where that changes with the length read."""
    rotary: Any = model.base_model.rotary_emb
    if rotary.rope_type in MOVING_FREQUENCIES:
        raise ModelError(
            f"un-rotating keys needs fixed rotary frequencies, got rope type {rotary.rope_type}; "
            "use a policy with rotary: {kind: keep}"
        )
    # `attention_scaling` (YaRN) needs nothing: turning back keeps a key's length, and merging is linear in it.
    frequencies = rotary.inv_freq.detach().clone()
    return Rotation("half-split", 2 * len(frequencies), frequencies)


FACTS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def kv_heads_of(config: Any) -> int:
    """Key/value heads of each layer."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def facts_of(config: Any) -> dict[str, int | str]:
    """By what a head profile knows the model that it was measured on."""
    return {name: getattr(config, name) for name in FACTS} | {"num_key_value_heads": kv_heads_of(config)}


def check_model(model: PreTrainedModel) -> None:
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise ModelError(f"model must be of the Llama family ({', '.join(FAMILIES)}), got {family}; see memkit.hf.load")
    if model.config._attn_implementation == NAME:
        raise ModelError(
            "a model (or a config shared by two) carries one policy at a time, got a second attach; "
            "leave the first `with` block before"
        )


def windows_of(config: Any) -> list[int | None]:
    """Tokens that each layer of a stock model sees, the query's own included; None: all."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


class _Present:
    """Which tokens of a call are there, `now` [b, t]: those of a row are moved to the left for us, and back again.

    lengths [b]: how many; order [b, t]: the columns, those with a token first; None where they already stand so.
    """

    def __init__(self, now: Tensor) -> None:
        self.lengths = now.sum(1)
        beyond = torch.arange(now.shape[1], device=now.device) >= self.lengths[:, None]
        self.order = None if torch.equal(now, ~beyond) else (~now).long().argsort(dim=1, stable=True)

    def to_the_left(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] with each row's tokens first."""
        return tensor if self.order is None else self._at(tensor, self.order)

    def back(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] with each row's tokens where they stood."""
        return tensor if self.order is None else self._at(tensor, self.order.argsort(dim=1))

    @staticmethod
    def _at(tensor: Tensor, columns: Tensor) -> Tensor:
        return tensor.gather(
            2, columns.to(tensor.device)[:, None, :, None].expand(-1, *tensor.shape[1:2], -1, tensor.shape[3])
        )


def _check_positions(given: Tensor | None, positions: Tensor, now: Tensor | None) -> None:
    """Positions of one's own would be another text than the memory holds (packed rows, for one)."""
    if given is None:
        return
    wrong = given.to(positions.device) != positions
    if now is not None:
        wrong &= now
    if wrong.any():
        row, column = (int(each) for each in wrong.nonzero()[0])
        raise InputError(
            f"position_ids must count each row's tokens, got {int(given.expand_as(positions)[row, column])} instead of "
            f"{int(positions[row, column])} in row {row}, column {column}; leave position_ids out, and give packed "
            "texts a row each"
        )


def _before_model(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Before a decoder that has a head."""
    # `generate` keeps the last column's logits alone; for a padded row they predict nothing.
    keep, mask = kwargs.get("logits_to_keep"), kwargs.get("attention_mask")
    if isinstance(keep, int) and keep > 0 and mask is not None and mask.ndim == 2 and not mask[:, -1].all():
        raise InputError(
            f"logits_to_keep {keep} (as generate sets it) needs a token in every row's last column, got padding in row "
            f"{int((mask[:, -1] == 0).nonzero()[0])}; pad on the left (tokenizer.padding_side = 'left')"
        )
    # Keyword arguments that a head does not know it hands to the decoder, and to the loss, where there is one.
    if model.base_model is not model and kwargs.get("labels") is None:
        return args, kwargs | {WAITING: []}
    return None


def _after_model(_model: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
    """The head ran to its end: the caller has the result, and what was read counts."""
    for cache in kwargs.get(WAITING, ()):
        mark_complete(cache.layers)
