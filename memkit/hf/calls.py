"""Calls of an attached model: what is prepared before each, and noted once it has run to its end."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memkit.budgets import Budget
from memkit.errors import InputError, MemoryStateError, ModelError, shown
from memkit.hf.asked import OUTER, Asked, Standing
from memkit.hf.attention import Call, Outer, Prefill, Present, asks_next
from memkit.hf.boundaries import boundary_ids, ends_of_chunks
from memkit.hf.cache import MemoryLayer, check_whole, layers_of, mark_complete, named
from memkit.hf.decoder import NAME, Decoder, facts_of, kv_heads_of
from memkit.hf.fitting import check_policy, check_rotation
from memkit.hf.kept import MemoryCache
from memkit.hf.names import CACHE, cache_argument, without_cache
from memkit.hf.portions import Portions, joined, portion_size
from memkit.hf.probe import probe
from memkit.hf.rereading import Rereading, asks_again, connecting_words, first_reading, twice
from memkit.hf.sizes import Sizes
from memkit.layers import AnyLayers, LayerFunction

if TYPE_CHECKING:
    from memkit.policy import Policy

__all__ = ["Calls"]


class Calls:
    """Policies on a model: what is checked once, and what is prepared before each forward call.

    policies, facts: of each attention layer, by its number.
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: AnyLayers | LayerFunction,
        prefill: Prefill,
        budget: Budget,
        profile: str | Path | None,
        croppable: bool,
        connecting: Sequence[int] | None,
        boundaries: Collection[int] | None,
    ) -> None:
        if prefill not in ("policy", "full"):
            raise InputError(f"prefill must be 'policy' or 'full', got {shown(prefill)}")
        self.prefill: Prefill = prefill
        self.croppable = croppable
        self.config, self.tower = decoder.config, decoder.module is not decoder.owner.base_model
        self.facts, self.model = probe(decoder), facts_of(self.config)
        self.layers = self.config.num_hidden_layers
        self.sizes = Sizes(policy, budget, profile, self.layers, kv_heads_of(self.config), self.model, self.facts)
        self.rows = self.sizes.rows(decoder.module.dtype)
        self.policies = self.sizes.policies(self.rows)
        for layer, each in self.policies.items():
            check_policy(each)
            if each.needs_rotation or (prefill == "full" and asks_next(each)):
                check_rotation(decoder, layer, self.facts[layer])
        self.connecting = connecting_words(connecting, self.config.vocab_size)
        self.rereads = prefill == "full" and any(asks_again(each) for each in self.policies.values())
        if self.rereads and len(self.facts) < self.layers:
            raise ModelError(
                f"observe.readers repeat and mixed read a prompt twice, and {self.layers - len(self.facts)} of "
                f"{self.layers} layers carry a state that would remember the second reading; use readers: next"
            )
        self.again = portion_size(self.policies, self.layers, croppable)
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
        if isinstance(keep, int) and keep > 0 and mask is not None and mask.ndim == 2:
            _check_ends(mask, known, keep)
        # Keyword arguments that a head does not know it hands to the decoder, and to the loss, where there is one.
        takes = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in signature.parameters.values())
        if takes and OUTER not in kwargs and (self.tower or known.get("labels") is None):
            kinds = known.get("token_type_ids")
            # A prompt that is read in full must be known to end before them: assisted decoding has a cache at hand.
            told = not torch.is_grad_enabled() and (self.prefill == "policy" or known.get(self.cache_name) is not None)
            spare = keep - 1 if told and isinstance(keep, int) and keep > 1 else 0
            images = kinds is not None and bool((kinds != 0).any())
            return args, kwargs | {OUTER: Outer(mask, images, spare, known.get("input_ids"))}
        return None

    def after_outer(self, _model: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        """A head ran to its end: the caller has the result, and what was read counts."""
        if OUTER in kwargs:
            for cache in kwargs[OUTER].caches:
                mark_complete(layers_in(cache))

    def before_decoder(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The decoder's arguments as it needs them on our engine. Of a call that is cut in pieces all but the last are
        read here."""
        if "memkit_call" in kwargs:  # a piece of a call that was prepared below
            return args, kwargs
        implementation = decoder.config._attn_implementation
        if implementation != NAME:
            raise ModelError(
                f"attention must stay as attach() has set it, got {implementation!r}, which no policy sees; detach the "
                "model first, or leave set_attn_implementation out"
            )
        self._check_depth()
        asked = Asked.of(self.signature.bind(decoder, *args, **kwargs), decoder.config, self.layers_of)
        standing = asked.standing()
        self._check_standing(asked, standing)
        arguments, policies = asked.arguments, self._policies_of(asked)
        arguments["position_ids"] = standing.positions
        cache, given = self._cache_for(asked, standing, policies, decoder), asked.cache
        reading = self._read_twice(asked, cache, decoder)
        portions = self._portions(asked, standing, cache, decoder)
        unasked = portions is not None and cache is None
        if unasked:  # the pieces of a call go on from each other
            cache = self._new_cache(policies)
        ends = None if self.boundaries is None else ends_of_chunks(self.boundaries, asked.ids, asked.tokens)
        # Only now that nothing is refused any more.
        if given is not None and asked.layers is None:
            there = given.layers if len(given.layers) == self.layers else DynamicCache(config=self.config).layers
            given.layers, given.layer_class_to_replicate = self.fresh_layers(there, policies), None
        elif asked.layers is not None and not asked.begun:  # emptied: another prompt may have another number of rows
            for layer, policy in zip(asked.layers, policies.values(), strict=True):
                layer.policy = policy
        arguments[self.cache_name] = cache
        present = standing.packed if standing.now is None else Present(standing.now)
        call = Call(policies, self.facts, self.prefill, cache, present, asked.outer, reading, boundaries=ends)
        if portions is None:
            return (), arguments | {"memkit_call": call}
        call = dataclasses.replace(call, waiting=portions.then(asked.tokens), unasked=unasked)
        if reading is not None or (self.prefill == "full" and not asked.before):
            return (), arguments | {"memkit_call": call}
        return (), _all_but_the_last(decoder, arguments, call, portions)

    def after_decoder(self, _decoder: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The decoder ran to its end. So did the call, unless a head or another piece is still to come; its output
        without a second reading and with the pieces before it, None where it is as it should be."""
        call: Call = kwargs["memkit_call"]
        if call.cache is None:
            return None
        if not call.piece:
            if call.waiting is not None:
                layers_in(call.cache)[0].waiting = call.waiting
            if call.outer is None:
                mark_complete(layers_in(call.cache))
            else:
                call.outer.caches.append(call.cache)
        if call.reading is None and not call.earlier and not call.unasked:
            return None
        output = output if call.reading is None else first_reading(output, call.reading)
        output = joined([*call.earlier, output])
        return without_cache(output, call.cache) if call.unasked and not call.piece else output

    def _check_depth(self) -> None:
        """All layers must read. Early exit lets the config name fewer, and does not set it back after an error."""
        depth = self.config.num_hidden_layers
        if depth != self.layers:
            self.config.num_hidden_layers = self.layers
            raise InputError(
                f"an attached model reads all of its {self.layers} layers, got num_hidden_layers {depth} in its "
                "config, as generate sets it for assistant_early_exit; it is set back now. Assist by another model "
                "(assistant_model), or by the prompt (prompt_lookup_num_tokens)"
            )

    def _check_standing(self, asked: Asked, standing: Standing) -> None:
        """Padding and packed texts are nothing for layers with a state of their own, nor for a prompt read in full."""
        full, stateful = self.prefill == "full" and not asked.before, self.layers - len(self.facts)
        if standing.packed is not None:
            if self.prefill == "full":
                raise InputError("prefill='full' needs a text per row, got texts packed into one; leave prefill out")
            if stateful:
                raise InputError(
                    f"{stateful} of {self.layers} layers are no attention and would read packed texts as one; give "
                    "each text a row"
                )
        elif standing.now is not None:
            if full:
                raise InputError(
                    "prefill='full' needs rows of equal length in the first call, got padding; read one row at a "
                    "time, or leave prefill out"
                )
            if stateful:
                raise InputError(
                    f"{stateful} of {self.layers} layers are no attention and would read padding as text; read rows "
                    "of equal length together"
                )

    def _policies_of(self, asked: Asked) -> Mapping[int, Policy]:
        """What each attention layer follows in a call: what its cache began with; else the share of its prompt."""
        if asked.layers is not None and asked.begun:
            return dict(zip(self.policies, (layer.policy for layer in asked.layers), strict=True))
        if self.sizes.budget.share is not None:
            return self.sizes.of_prompt(asked.columns - asked.spare)
        return self.policies

    def _cache_for(self, asked: Asked, standing: Standing, policies: Mapping[int, Policy], decoder: Any) -> Any:
        """The cache that a call writes into: the one given, a new one where it wants one, or None."""
        arguments = asked.arguments
        if gradients_are_checkpointed(decoder):
            if asked.cache is not None:
                raise InputError(f"gradient checkpointing runs layers twice; leave {CACHE} out while training")
            arguments["use_cache"] = False
        elif standing.packed is not None:
            arguments["use_cache"] = False
        elif asked.cache is None:
            wanted = arguments.get("use_cache")
            if decoder.config.use_cache if wanted is None else wanted:
                return self._new_cache(policies)
        return asked.cache

    def _new_cache(self, policies: Mapping[int, Policy]) -> MemoryCache:
        return MemoryCache(self.fresh_layers(DynamicCache(config=self.config).layers, policies))

    def _read_twice(self, asked: Asked, cache: Any, decoder: Any) -> Rereading | None:
        """Both readings of a prompt that is read in full and judged by who reads it again."""
        if not self.rereads or asked.before or cache is None:
            return None
        if asked.spare:
            raise InputError(
                f"observe.readers repeat and mixed read a prompt twice, and {asked.spare} tokens that an assistant "
                "proposes stand behind it; generate without assisted decoding, or use readers: next"
            )
        longest = getattr(self.config, "max_position_embeddings", None)
        return twice(asked.arguments, self.connecting, decoder.get_input_embeddings(), longest)

    def _portions(self, asked: Asked, standing: Standing, cache: Any, decoder: Any) -> Portions | None:
        """How a call is cut whose text is read again as it is read."""
        if not self.again or (self.prefill == "full" and cache is None):
            return None
        if standing.packed is not None or standing.now is not None or gradients_are_checkpointed(decoder):
            raise InputError(
                "observe.again cuts calls where portions end, the same in all rows and once, got padding, packed "
                "texts or gradient checkpointing; read rows of equal length together, or set observe.again: 0"
            )
        taken_back = asked.spare > 0 or any(layer.record_past for layer in asked.layers or ())
        waiting = None if asked.layers is None else asked.layers[0].waiting
        return Portions.of(asked.arguments, waiting, asked.before, self.again, self.connecting, taken_back)

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
            if not self.sizes.same(layer.policy, policy):
                raise MemoryStateError(
                    f"{CACHE} must be of the attached policy, {named(policy)}, got {named(layer.policy)}; "
                    f"start without {CACHE}"
                )
        check_whole(layers)
        if self.croppable:
            for layer in layers:
                layer.activate_past_recording()
        return layers

    def fresh_layers(self, stock: list[Any], policies: Mapping[int, Policy]) -> list[Any]:
        """A cache's layers to begin with: ours where a layer attends, the model's own elsewhere."""
        records = self.croppable or any(getattr(each, "record_past", False) for each in stock)
        return [
            MemoryLayer(policies[layer], self.model, records) if layer in policies else each
            for layer, each in enumerate(stock)
        ]


def gradients_are_checkpointed(decoder: Any) -> bool:
    """Whether layers run once more in the backward pass."""
    return getattr(decoder, "gradient_checkpointing", False) and decoder.training and torch.is_grad_enabled()


def _all_but_the_last(decoder: Any, arguments: dict[str, Any], call: Call, portions: Portions) -> dict[str, Any]:
    """Read all pieces of a call but the last, whose arguments these are."""
    outputs: list[Any] = []
    *earlier, last = portions.pieces(arguments["input_ids"].shape[1])
    for begin, end in earlier:
        piece, reading = portions.piece(arguments, begin, end)
        outputs.append(decoder(**piece, memkit_call=dataclasses.replace(call, reading=reading, piece=True)))
    piece, reading = portions.piece(arguments, *last)
    return piece | {"memkit_call": dataclasses.replace(call, reading=reading, earlier=tuple(outputs))}


def layers_in(cache: Any) -> list[MemoryLayer]:
    """Our layers in a cache."""
    return [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]


def _check_ends(mask: Tensor, known: Mapping[str, Any], keep: int) -> None:
    """Every row that has a token in this call must have one in the last column, where logits are wanted."""
    tokens = known.get("input_ids") if known.get("inputs_embeds") is None else known["inputs_embeds"]
    columns = mask.shape[1] if tokens is None else tokens.shape[1]
    wrong = (mask[:, -1] == 0) & mask[:, -columns:].bool().any(1)
    if wrong.any():
        raise InputError(
            f"logits_to_keep {keep} (as generate sets it) needs a token in every row's last column, got padding in "
            f"row {int(wrong.nonzero()[0])}; pad on the left (tokenizer.padding_side = 'left')"
        )
