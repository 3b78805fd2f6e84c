"""Calls of an attached model: what is prepared before each, and noted once it has run to its end."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from memkit.budgets import Budget
from memkit.errors import InputError, MemoryStateError, ModelError, shown
from memkit.hf.attention import Call, Outer, Prefill, Present, asks_next
from memkit.hf.boundaries import boundary_ids, ends_of_chunks
from memkit.hf.cache import MemoryLayer, check_whole, layers_of, mark_complete, named
from memkit.hf.decoder import NAME, Decoder, facts_of, kv_heads_of
from memkit.hf.fitting import check_policy, check_rotation
from memkit.hf.kept import MemoryCache
from memkit.hf.masks import present_tokens
from memkit.hf.names import CACHE, cache_argument, take_cache, without_cache
from memkit.hf.packing import KEYWORDS, Packed, find_packed
from memkit.hf.portions import Portions, joined, portion_size
from memkit.hf.probe import probe
from memkit.hf.rereading import asks_again, connecting_words, first_reading, twice
from memkit.hf.sizes import Sizes
from memkit.layers import AnyLayers, LayerFunction

if TYPE_CHECKING:
    from memkit.policy import Policy

__all__ = ["Calls"]

# The keyword by which a call around the decoder's says what it notes.
OUTER = "memkit_outer"


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
        self.sizes = Sizes(policy, budget, self.layers, kv_heads_of(self.config), self.model, self.facts)
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
        arguments: dict[str, Any] = self.signature.bind(decoder, *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        del arguments["self"]
        if arguments.get("output_attentions", decoder.config.output_attentions):
            raise InputError("attention weights are never computed as a matrix; leave output_attentions out")
        if arguments.get("is_causal") is False:
            raise InputError("a memory is causal, got is_causal False; leave it out")
        ids = arguments.get("input_ids")
        tokens = ids if ids is not None else arguments["inputs_embeds"]
        rows, columns = tokens.shape[:2]

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
        packed = self._packed(arguments, mask, rows, columns, given, tokens.device)
        now = present_tokens(mask, rows, columns, seen, before, "; a policy makes its own causal mask")
        self._check_padding(now, before)
        places = torch.arange(columns, device=seen.device) if now is None else (now.cumsum(1) - 1).clamp(min=0)
        positions = seen[:, None] + places if packed is None else packed.positions.view(rows, columns)
        _check_positions(arguments.get("position_ids"), positions, now)
        arguments["position_ids"] = positions

        policies, spare = self.policies, 0 if outer is None else outer.spare
        begun = layers is not None and layers[0].memory is not None
        if layers is not None and begun:
            policies = dict(zip(self.policies, (layer.policy for layer in layers), strict=True))
        elif self.sizes.budget.share is not None:
            policies = self.sizes.of_prompt(columns - spare)
        cache = given
        if gradients_are_checkpointed(decoder):
            if given is not None:
                raise InputError(f"gradient checkpointing runs layers twice; leave {CACHE} out while training")
            arguments["use_cache"] = False
        elif given is None:
            wanted = arguments.get("use_cache")
            if decoder.config.use_cache if wanted is None else wanted:
                cache = MemoryCache(self.fresh_layers(DynamicCache(config=self.config).layers, policies))
        reading = None
        if self.rereads and not before and cache is not None:
            if spare:
                raise InputError(
                    f"observe.readers repeat and mixed read a prompt twice, and {spare} tokens that an assistant "
                    "proposes stand behind it; generate without assisted decoding, or use readers: next"
                )
            longest = getattr(self.config, "max_position_embeddings", None)
            reading = twice(arguments, self.connecting, decoder.get_input_embeddings(), longest)
        portions, unasked = None, cache is None
        if self.again and (self.prefill == "policy" or cache is not None):
            if packed is not None or now is not None or gradients_are_checkpointed(decoder):
                raise InputError(
                    "observe.again cuts calls where portions end, the same in all rows and once, got padding, packed "
                    "texts or gradient checkpointing; read rows of equal length together, or set observe.again: 0"
                )
            taken_back = spare > 0 or any(layer.record_past for layer in layers or ())
            waiting = None if layers is None else layers[0].waiting
            portions = Portions.of(arguments, waiting, before, self.again, self.connecting, taken_back)
            if cache is None:  # the pieces of a call go on from each other
                cache = MemoryCache(self.fresh_layers(DynamicCache(config=self.config).layers, policies))
        ends = None
        if self.boundaries is not None:
            ends = ends_of_chunks(self.boundaries, ids if ids is not None or outer is None else outer.ids, tokens)
        # Only now that nothing is refused any more.
        if given is not None and layers is None:
            there = given.layers if len(given.layers) == self.layers else DynamicCache(config=self.config).layers
            given.layers, given.layer_class_to_replicate = self.fresh_layers(there, policies), None
        elif layers is not None and not begun:  # emptied: another prompt may have another number of rows
            for layer, policy in zip(layers, policies.values(), strict=True):
                layer.policy = policy
        arguments[self.cache_name] = cache
        present = packed if now is None else Present(now)
        call = Call(policies, self.facts, self.prefill, cache, present, outer, reading, boundaries=ends)
        if portions is None:
            return (), arguments | {"memkit_call": call}
        call = dataclasses.replace(call, waiting=portions.then(tokens), unasked=unasked)
        if reading is not None or (self.prefill == "full" and not before):
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

    def _packed(
        self, arguments: dict[str, Any], mask: Tensor | None, rows: int, columns: int, given: Any, device: torch.device
    ) -> Packed | None:
        """The texts packed into the rows of a call, which it returns no cache of; None where each row is one."""
        if given is not None and given.get_seq_length():
            return None
        if mask is not None and not bool(mask.all()):
            if any(arguments.get(name) is not None for name in KEYWORDS):
                raise InputError("packed rows have no padding, got an attention_mask with 0; leave attention_mask out")
            return None
        packed = find_packed(arguments, rows, columns, device)
        if packed is None:
            return None
        if given is not None or arguments.get("use_cache"):
            raise InputError(
                f"texts packed into one row are read from their beginnings to their ends, got {CACHE} or use_cache; "
                "leave both out, or give each text a row"
            )
        if self.prefill == "full":
            raise InputError("prefill='full' needs a text per row, got texts packed into one; leave prefill out")
        if len(self.facts) < self.layers:
            raise InputError(
                f"{self.layers - len(self.facts)} of {self.layers} layers are no attention and would read packed texts "
                "as one; give each text a row"
            )
        arguments["use_cache"] = False
        return packed

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


def _check_positions(given: Tensor | None, positions: Tensor, now: Tensor | None) -> None:
    """Positions of one's own would be another text than the memory holds (packed rows, for one)."""
    if given is None:
        return
    if given.ndim > 2:  # a place in time, height and width
        if not (given == given[:1]).all():
            raise InputError(
                "position_ids must count each row's tokens, got places of images, which differ by axis; read the text "
                "alone"
            )
        given = given[0]
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
