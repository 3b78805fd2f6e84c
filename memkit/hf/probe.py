"""Ask a model how its attention works, before a policy is put on it: heads, keywords, and how positions turn keys.

Rows of one token each, the same few tokens at several positions, go through the model. Such a token sees itself alone,
so its output is its value wherever it stands, and the rows' keys differ by what positions do to them and by nothing
else. A rotation is believed where the model's own frequencies, in one of the known pairings, turn the keys of position
0 into those of all the others.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkit.engine.autocast import autocasts, without_autocast
from memkit.errors import ModelError, short
from memkit.hf.decoder import Decoder, windows_of
from memkit.hf.keywords import check_keywords
from memkit.hf.names import with_cache
from memkit.pieces.rotary import Rotation
from memkit.processes import is_split

__all__ = ["LayerFacts", "attention_function", "probe"]

NAME = "memkit-probe"
POSITIONS = (0, 1, 2, 7, 37, 150, 317)
TOKENS = 4
PAIRINGS: tuple[Literal["half-split", "adjacent"], ...] = ("half-split", "adjacent")


@dataclass(frozen=True)
class LayerFacts:
    """What a layer's attention was seen to do.

    kv_heads: key/value heads; window: tokens that it sees in the stock model, None for all;
    rotation: how keys are turned, their channels taken from `offset` on; None where that is not known;
    heads: query heads; widths: channels of a head's keys and values.
    """

    kv_heads: int
    window: int | None
    rotation: Rotation | None
    offset: int
    heads: int
    widths: tuple[int, int]

    def turning_first(self, tensor: Tensor) -> Tensor:
        """Queries or keys [..., d] with the channels that turn in front: what scores they give is the same."""
        return tensor.roll(-self.offset, -1) if self.offset else tensor


@dataclass
class _Seen:
    """What a layer's attention function was handed: its module, keys [rows, g, d], query heads, the width of values,
    and keywords."""

    module: nn.Module
    keys: Tensor
    heads: int
    value_width: int
    keywords: dict[str, Any]


class _Record:
    """What is seen, by layer. No mapping: accelerate's hooks hand copies of these to modules on several devices."""

    def __init__(self) -> None:
        self.layers: dict[int, _Seen] = {}


def _look(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    memkit_seen: _Record | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of one token: its value, [b, 1, h, v]."""
    layer = getattr(module, "layer_idx", None)
    if memkit_seen is None or not isinstance(layer, int):
        missing = "the keyword arguments of the call" if memkit_seen is None else "its number (layer_idx)"
        raise ModelError(
            f"{type(module).__name__} must hand its attention function {missing}, by which a memory is found, and does "
            "not; use a model of another family"
        )
    if layer in memkit_seen.layers:
        raise ModelError(
            f"a layer must attend once, and {type(module).__name__} calls its attention function several times in "
            f"layer {layer}, where a memory would read the tokens as often; use another model"
        )
    if attention_mask is not None:
        keywords["attention_mask"] = attention_mask
    keywords = {name: each for name, each in keywords.items() if name not in ("scaling", "dropout")}
    keywords.setdefault("is_causal", getattr(module, "is_causal", True))
    memkit_seen.layers[layer] = _Seen(module, key[:, :, 0].detach(), query.shape[1], value.shape[-1], keywords)
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _look)


@contextmanager
def attention_function(module: Any, name: str) -> Generator[None]:
    """In the `with` block a decoder's attention is the registered function of that name; afterwards what it was."""
    before = module.config._attn_implementation
    try:
        module.set_attn_implementation(name)
        if module.config._attn_implementation != name:
            raise ModelError(
                f"attention must be a function that can be exchanged, and {type(module).__name__} "
                f"({module.config.model_type}) has its own; use another model"
            )
        yield
    finally:
        module.set_attn_implementation(before)


def probe(decoder: Decoder) -> dict[int, LayerFacts]:
    """Each attending layer's facts, by its number.

    Raises `ModelError` where the model cannot run, no layer attends, or attention does what a memory cannot.
    """
    config = decoder.config
    if getattr(config, "num_kv_shared_layers", None):
        raise ModelError(f"each layer must have keys of its own, got {config.num_kv_shared_layers} that share them")
    most = getattr(config, "max_position_embeddings", None) or POSITIONS[-1] + 1
    positions = torch.tensor([position for position in POSITIONS if position < most])
    seen = _seen(decoder, positions)
    if not seen:
        raise ModelError(
            f"attention must be a function that can be exchanged, and no layer of {type(decoder.module).__name__} "
            f"({config.model_type}) calls one; use another model"
        )
    windows, tables = windows_of(config, seen), list(_frequencies(decoder.module))
    facts: dict[int, LayerFacts] = {}
    for layer, each in sorted(seen.items()):
        check_keywords(each.module, windows[layer], each.keywords)
        rotation, offset = _rotation(each.keys.unflatten(0, (TOKENS, -1)), positions, tables)
        widths = each.keys.shape[-1], each.value_width
        facts[layer] = LayerFacts(each.keys.shape[1], windows[layer], rotation, offset, each.heads, widths)
    return facts


def _seen(decoder: Decoder, positions: Tensor) -> dict[int, _Seen]:
    """Let the decoder read TOKENS × positions rows of a token each."""
    module, seen = decoder.module, _Record()
    device, words = module.device, decoder.config.vocab_size
    ids = torch.linspace(1, words - 1, TOKENS).long().repeat_interleave(len(positions))[:, None].to(device)
    where = positions.repeat(TOKENS)[:, None].to(device)
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with attention_function(module, NAME), torch.no_grad(), _exactly(device):
            called = _called(decoder)
            called(input_ids=ids, position_ids=where, use_cache=False, memkit_seen=seen)
            if seen.layers:  # it must take a cache, too: one of its own, insisted on, could not be exchanged for ours
                cache = with_cache(module, DynamicCache(config=decoder.config))
                called(input_ids=ids[:1], use_cache=True, memkit_seen=_Record(), **cache)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(module).__name__} must read {len(ids)} rows of one token to show how it attends, and one with a "
            f"cache, got {type(error).__name__}: {short(' '.join(str(error).split()))}"
        ) from error
    finally:
        for each, training in modes.items():
            each.training = training
    return seen.layers


def _called(decoder: Decoder) -> Any:
    """What to call so that the decoder reads: the whole model where parameters are split over processes (FSDP2).

    The outermost module that was given to `fully_shard` has to be called first, and gathers what the others leave.
    """
    split = any(is_split(each) for each in decoder.module.parameters())
    return next(iter(decoder.outer), decoder.module) if split else decoder.module


@contextmanager
def _exactly(device: torch.device) -> Generator[None]:
    """Without autocast."""
    if not autocasts(device):
        yield
        return
    with without_autocast(device):
        yield


def _frequencies(module: nn.Module) -> Iterator[Tensor]:
    """The tables of rotary frequencies that a model holds, radians per position, each [pairs]."""
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and buffer.ndim == 1 and len(buffer):
            yield buffer.detach().clone()


def _rotation(keys: Tensor, positions: Tensor, tables: list[Tensor]) -> tuple[Rotation | None, int]:
    """How keys [tokens, positions, g, d] are turned, and the first channel that is; None where nothing fits."""
    exact = keys.double()
    still, size = exact[:, :1], exact.norm()
    # Angles are float32 numbers, products of a position and a frequency; then each operation rounds in the keys' dtype.
    allowed = float(positions[-1]) * torch.finfo(torch.float32).eps + 4 * torch.finfo(keys.dtype).eps
    where = positions.to(keys.device)[None, :, None]

    def error(rotation: Rotation, offset: int) -> float:
        turned = rotation.apply(still.roll(-offset, -1).expand_as(exact), where)
        return float((turned - exact.roll(-offset, -1)).norm() / size)

    best = Rotation("half-split", 2, torch.zeros(1, device=keys.device)), 0  # turns nothing
    least, width = error(*best), keys.shape[-1]
    for table in tables:
        turned = 2 * len(table)
        for pairing in PAIRINGS:
            for offset in {0, width - turned} if turned <= width else ():
                for sign in (1, -1):
                    tried = Rotation(pairing, turned, sign * table.to(keys.device)), offset
                    if (found := error(*tried)) < least:
                        best, least = tried, found
    return best if least <= allowed else (None, 0)
