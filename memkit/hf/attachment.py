"""Run every attention layer of a stock Hugging Face decoder on a memory policy.

Three seams that transformers and torch offer carry it, and nothing is patched:

- the attention registry of transformers gets one more attention function, `memkit`, which calls `attend`.
  It has no mask function, so that no `[tokens, tokens]` mask is built;
- a transformers `Cache` is a list of layers of any kind: ours hold one `Memory` each;
- a forward pre-hook on the decoder puts such a cache in, reads off the attention mask which tokens are there, sets the
  positions, and hands the lot to every layer as one keyword argument. Forward hooks note when a call ran to its end.

What the model's attention does is asked of the model itself (`probe`). Once detached, hooks and setting are gone; the
function stays in the registry, where nothing else names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memkit.errors import InputError, MemoryStateError, ModelError, shown
from memkit.hf.attention import Call, Outer, Prefill, Present, asks_next
from memkit.hf.boundaries import boundary_ids, ends_of_chunks
from memkit.hf.cache import MemoryLayer, check_whole, layers_of, mark_complete, named
from memkit.hf.decoder import NAME, Decoder, facts_of, find_decoder, kv_heads_of
from memkit.hf.hooks import Life, hook, put_right, unhook
from memkit.hf.kept import MemoryCache
from memkit.hf.masks import present_tokens
from memkit.hf.names import CACHE, cache_argument, take_cache
from memkit.hf.probe import LayerFacts, probe
from memkit.layers import AnyLayers, LayerFunction, layer_policies

if TYPE_CHECKING:
    from memkit.policy import Policy

__all__ = ["Attached", "attach", "check_policy"]

# The keyword by which a call around the decoder's says what it notes.
OUTER = "memkit_outer"
# Rotary frequencies that change with the length read: a key would be un-rotated by other angles than it was rotated by.
MOVING_FREQUENCIES = ("dynamic", "longrope")


def attach(
    model: Any,
    policy: AnyLayers | LayerFunction,
    *,
    prefill: Prefill = "policy",
    boundaries: Collection[int] | None = None,
) -> Attached:
    """Every attention layer of `model` remembers as `policy` says, until the `with` block ends or `detach` is called.

    ```python
    with memkit.hf.attach(model, "untrained-kvm-sqrt"):
        model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)

    handle = memkit.hf.attach(model, {"default": "untrained-observed", "at": {"0,1,-1": "full"}})
    handle.detach()
    ```

    `model(...)` prefills, and continues with any number of tokens when its cache is passed on (`past_key_values`, from
    transformers 5.24 on `cache`); however a text is split, the result is the same. `model.generate(...)` works as
    usual: greedy, sampling, beams. Gradients flow. `memories(cache)` gives each layer's memory. Groups of query heads
    share their key/value head's memory. Once detached, be it by an error, the model is as it was; a cache made before
    is of no use then. A copy made meanwhile is under the policy as long as the model is.

    Rows of unequal length are padded, on the left, on the right or anywhere, with a 2D `attention_mask` over this
    call's tokens or over all so far: a row's tokens are read as if they stood alone, and the next call continues each
    row at its own position. `generate` reads the last column of the logits, so it needs padding on the left
    (`tokenizer.padding_side = "left"`), as pipelines set it.

    Args:
        model: a Hugging Face decoder, with a head or without; a model of text and images, of which the text is meant;
            or a wrapper with `get_base_model`, as peft's.
        policy: one for all layers that attend to everything, or a mapping, the path of its YAML file, or a function of
            the layer's number (`memkit.layers`). Where it says `heads: {profile: auto}` and a head profile of this
            model is shipped, it is put in.
        prefill: `policy`: bounded from the first chunk on. `full`: the first call of a cache, the prompt, is read
            exactly, and all that is older than the window then leaves at once (`memkit.compress`); from there on the
            policy goes on. What rows are worth is asked as `observe.readers` says. Rows must then be of equal length in
            the first call.
        boundaries: token ids that are the last of their chunk (ends of sentences, of messages), for policies with
            `chunker: boundaries`. Calls must then give `input_ids`.

    Raises:
        ModelError: no such model, one that is attached already, or one whose attention does what no memory can (soft
            caps, sinks in the softmax, an own attention function, an encoder, …); a policy with learned parts, or one
            that un-rotates keys where it is not known how they were rotated.
        PolicyError: a policy that is not there or not right, a layer that is not there.
        InputError: later, by calls that the engine cannot serve (4D masks, positions of one's own, …).
    """
    decoder = find_decoder(model)
    put_right(decoder.owner)
    check_free(decoder)
    return Attached(decoder, _Attachment(decoder, policy, prefill, boundaries))


class Attached:
    """A model that is attached; a context manager, and a handle with `detach`.

    model: what was given; policies: of each attention layer, by its number.
    """

    def __init__(self, decoder: Decoder, attachment: _Attachment) -> None:
        self._decoder, self._life = decoder, Life(decoder.module.config._attn_implementation)
        self.model, self.policies = decoder.given, attachment.policies
        decoder.module.set_attn_implementation(NAME)
        for module in decoder.outer:
            hook(module, self._life, attachment.before_outer, attachment.after_outer)
        hook(decoder.module, self._life, attachment.before_decoder, attachment.after_decoder)

    @property
    def attached(self) -> bool:
        """Whether it still is."""
        return not self._life.over

    def detach(self) -> None:
        """Leave the model as it was. Once is enough; more is no error."""
        if self._life.over:
            return
        self._life.over = True
        unhook([*self._decoder.outer, self._decoder.module], self._life)
        self._decoder.module.set_attn_implementation(self._life.implementation)

    def __enter__(self) -> Any:
        if self._life.over:
            raise ModelError("this handle was detached; attach the model anew")
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(named(policy) for policy in self.policies.values()))
        return f"Attached({type(self.model).__name__}, {names}{'' if self.attached else ', detached'})"


def check_free(decoder: Decoder) -> None:
    """Raise `ModelError` where a model is attached already."""
    if decoder.module.config._attn_implementation == NAME:
        raise ModelError(
            "a model (or a config shared by two) carries one policy at a time, got a second attach; "
            "leave the first `with` block, or detach its handle, before"
        )


def check_policy(policy: Policy) -> None:
    """Raise `ModelError` where a policy needs what no stock model has learned."""
    if policy.learned:
        raise ModelError(
            f"a stock model runs policies without learned parts, got {named(policy)}, which needs "
            f"{', '.join(need.phrase for need in policy.learned)}; use an untrained-* policy, or train a "
            "model with this one"
        )


class _Attachment:
    """Policies on a model: what is checked once, and what is prepared before each forward call.

    policies, facts: of each attention layer, by its number.
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: AnyLayers | LayerFunction,
        prefill: Prefill,
        boundaries: Collection[int] | None,
    ) -> None:
        if prefill not in ("policy", "full"):
            raise InputError(f"prefill must be 'policy' or 'full', got {shown(prefill)}")
        self.prefill: Prefill = prefill
        self.config, self.tower = decoder.config, decoder.module is not decoder.owner.base_model
        self.facts, self.model = probe(decoder), facts_of(self.config)
        self.layers = self.config.num_hidden_layers
        windows = [self.facts[layer].window if layer in self.facts else None for layer in range(self.layers)]
        chosen = layer_policies(policy, self.layers, kv_heads_of(self.config), self.model, windows)
        self.policies = {layer: chosen[layer] for layer in self.facts}
        for layer, each in self.policies.items():
            check_policy(each)
            if each.needs_rotation or (prefill == "full" and asks_next(each)):
                check_rotation(decoder, layer, self.facts[layer])
        cut = any(each.takes_boundaries for each in self.policies.values())
        self.boundaries = boundary_ids(boundaries, self.config, cut, prefill)
        forward = type(decoder.module).forward
        self.signature, self.cache_name = inspect.signature(forward), cache_argument(forward)

    def before_outer(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Before a call around the decoder's."""
        signature = inspect.signature(type(model).forward)
        known: dict[str, Any] = signature.bind_partial(model, *args, **kwargs).arguments
        known = known.get("kwargs", {}) | known
        keep, mask = known.get("logits_to_keep"), known.get("attention_mask")
        # `generate` keeps the last column's logits alone; for a padded row they predict nothing.
        if isinstance(keep, int) and keep > 0 and mask is not None and mask.ndim == 2 and not mask[:, -1].all():
            raise InputError(
                f"logits_to_keep {keep} (as generate sets it) needs a token in every row's last column, got padding in "
                f"row {int((mask[:, -1] == 0).nonzero()[0])}; pad on the left (tokenizer.padding_side = 'left')"
            )
        # Keyword arguments that a head does not know it hands to the decoder, and to the loss, where there is one.
        takes = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.parameters.values())
        if takes and OUTER not in kwargs and (self.tower or known.get("labels") is None):
            kinds = known.get("token_type_ids")
            images = kinds is not None and bool((kinds != 0).any())
            return args, kwargs | {OUTER: Outer(mask, images, known.get("input_ids"))}
        return None

    def after_outer(self, _model: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        """A head ran to its end: the caller has the result, and what was read counts."""
        if OUTER in kwargs:
            for cache in kwargs[OUTER].caches:
                mark_complete(layers_in(cache))

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The decoder's arguments as it needs them on our engine."""
        arguments: dict[str, Any] = self.signature.bind(decoder, *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["self"]
        if arguments.get("output_attentions", decoder.config.output_attentions):
            raise InputError("attention weights are never computed as a matrix; leave output_attentions out")
        if arguments.get("is_causal") is False:
            raise InputError("a memory is causal, got is_causal False; leave it out")
        tokens = arguments.get("input_ids") if arguments.get("input_ids") is not None else arguments["inputs_embeds"]
        rows, columns = tokens.shape[:2]
        ids = arguments.get("input_ids")

        given, layers = take_cache(arguments), None
        outer: Outer | None = arguments.pop(OUTER, None)
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
        mask = arguments.pop("attention_mask", None)
        if isinstance(mask, dict):  # masks of each kind of layer, of which transformers makes none for us
            if outer is None or outer.images:
                raise InputError(
                    "a memory is causal, got tokens of images that see each other both ways (token_type_ids); "
                    "read the text alone, or use a model whose images are causal, as llava's"
                )
            mask = outer.mask
        now = present_tokens(mask, rows, columns, seen, before, "; a policy makes its own causal mask")
        self._check_padding(now, before)
        places = torch.arange(columns, device=seen.device) if now is None else (now.cumsum(1) - 1).clamp(min=0)
        positions = seen[:, None] + places
        _check_positions(arguments.get("position_ids"), positions, now)
        arguments["position_ids"] = positions

        cache = given
        if getattr(decoder, "gradient_checkpointing", False) and decoder.training and torch.is_grad_enabled():
            if given is not None:
                raise InputError(f"gradient checkpointing runs layers twice; leave {CACHE} out while training")
            arguments["use_cache"] = False
        elif given is None:
            wanted = arguments.get("use_cache")
            if decoder.config.use_cache if wanted is None else wanted:
                cache = MemoryCache(self.fresh_layers(DynamicCache(config=self.config).layers))
        elif layers is None:
            # Only now that nothing is refused any more.
            there = given.layers if len(given.layers) == self.layers else DynamicCache(config=self.config).layers
            given.layers, given.layer_class_to_replicate = self.fresh_layers(there), None
        arguments[self.cache_name] = cache
        present = None if now is None else Present(now)
        ends = None
        if self.boundaries is not None:
            ends = ends_of_chunks(self.boundaries, ids if ids is not None or outer is None else outer.ids, tokens)
        if ends is not None and present is not None:
            ends = present.flags_to_the_left(ends)
        facts = (self.policies, self.facts, self.prefill)
        arguments["memkit_call"] = Call(*facts, cache, present, outer, boundaries=ends)
        return (), arguments

    def after_decoder(self, _decoder: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        """The decoder ran to its end. So did the call, unless a head is still to come."""
        call: Call = kwargs["memkit_call"]
        if call.cache is None:
            return
        if call.outer is None:
            mark_complete(layers_in(call.cache))
        else:
            call.outer.caches.append(call.cache)

    def _check_padding(self, now: Tensor | None, before: int) -> None:
        if now is None:
            return
        if self.prefill == "full" and not before:
            raise InputError(
                "prefill='full' needs rows of equal length in the first call, got padding; read one row at a time, "
                "or leave prefill out"
            )
        if len(self.facts) < self.layers:
            raise InputError(
                f"{self.layers - len(self.facts)} of {self.layers} layers are no attention and would read padding as "
                "text; read rows of equal length together"
            )

    def layers_of(self, given: Any) -> list[MemoryLayer] | None:
        """The layers of the cache given, checked; None where it is empty."""
        layers = layers_of(given, MemoryLayer, "this attached model")
        if layers is None:
            return None
        if len(layers) != len(self.policies):
            raise MemoryStateError(
                f"{CACHE} must be of a model of {len(self.policies)} layers, got {len(layers)}; start without {CACHE}"
            )
        other = {name: each for name, each in layers[0].model.items() if self.model.get(name) != each}
        if other:
            here = {name: self.model.get(name) for name in other}
            raise MemoryStateError(f"{CACHE} must be of this model, {here}, got {other}; start without {CACHE}")
        for layer, policy in zip(layers, self.policies.values(), strict=True):
            if layer.policy is not policy and layer.policy.spec != policy.spec:
                raise MemoryStateError(
                    f"{CACHE} must be of the attached policy, {named(policy)}, got {named(layer.policy)}; "
                    f"start without {CACHE}"
                )
        check_whole(layers)
        return layers

    def fresh_layers(self, stock: list[Any]) -> list[Any]:
        """A cache's layers to begin with: ours where a layer attends, the model's own elsewhere."""
        return [
            MemoryLayer(self.policies[layer], self.model) if layer in self.policies else each
            for layer, each in enumerate(stock)
        ]


def layers_in(cache: Any) -> list[MemoryLayer]:
    """Our layers in a cache."""
    return [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]


def check_rotation(decoder: Decoder, layer: int, facts: LayerFacts) -> None:
    """Raise `ModelError` where it is not known how a layer's keys were turned, at any length of the text."""
    for module in decoder.module.modules():
        kinds = getattr(module, "rope_type", None) or ()
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in MOVING_FREQUENCIES:
                raise ModelError(
                    f"un-rotating keys needs fixed rotary frequencies, got rope type {kind}; "
                    "use a policy with rotary: {kind: keep}"
                )
    if facts.rotation is None:
        raise ModelError(
            f"un-rotating keys needs to know how positions turn them, and those of layer {layer} of "
            f"{decoder.config.model_type} are not turned by the model's rotary frequencies alone; "
            "use a policy with rotary: {kind: keep}"
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
