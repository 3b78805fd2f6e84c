"""A text read again as it is read (`observe.again`): calls are cut where portions end, and each portion is read once
more as soon as it is there, by the same call of the decoder.

Portions are counted from the text's beginning, so that nothing depends on how it came: the tokens of a portion that
goes on wait in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from memkit.errors import InputError, MemoryStateError, ModelError
from memkit.hf.names import CACHE
from memkit.hf.rereading import Portion, Rereading

if TYPE_CHECKING:
    from memkit.policy import Policy

__all__ = ["Portions", "joined", "portion_size"]


def portion_size(policies: Mapping[int, Policy], layers: int, croppable: bool) -> int:
    """Tokens that are read again at a time, the same in all layers that do; 0: none are.

    policies: of each of the layers that attend, of `layers` in all; croppable: whether caches are. Raises `InputError`
    and `ModelError` where nothing can be read again.
    """
    sizes = sorted({each.observation.again for each in policies.values()} - {0})  # tokens
    if not sizes:
        return 0
    if len(sizes) > 1:
        raise InputError(
            f"all layers read a text again at once, got observe.again of {' and '.join(map(str, sizes))} tokens; set "
            "the same number in every layer's policy, or 0"
        )
    if len(policies) < layers:
        raise ModelError(
            f"observe.again reads a text a second time, and {layers - len(policies)} of {layers} layers carry a state "
            "that would remember it; set observe.again: 0"
        )
    if croppable:
        raise InputError("what was read again cannot be taken back; leave croppable out, or set observe.again: 0")
    return sizes[0]


@dataclass(frozen=True)
class Portions:
    """A call cut where portions of `again` tokens end, each of which is then read again.

    waiting: tokens of the portion that goes on, [b, n], read by earlier calls; before: tokens read in all; words: the
    tokens that stand before a second reading.
    """

    again: int
    words: Sequence[int]
    waiting: Tensor
    before: int

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        waiting: Tensor | None,
        before: int,
        again: int,
        words: Sequence[int],
        taken_back: bool,
    ) -> Portions:
        """How a call of a decoder with these arguments is cut. taken_back: whether its newest tokens may be.

        Raises `InputError` for a call that cannot be, `MemoryStateError` where it is not known what waits.
        """
        ids, rest = arguments.get("input_ids"), "or set observe.again: 0"
        if ids is None:
            raise InputError(f"observe.again reads token ids a second time, got inputs_embeds; give input_ids, {rest}")
        if taken_back:
            raise InputError(
                "observe.again reads tokens a second time that may be taken back, as an assistant's candidates are; "
                f"generate without one, keep one token's logits or all (logits_to_keep), {rest}"
            )
        if arguments.get("output_router_logits"):
            raise InputError(
                f"observe.again would have the router choose twice; leave output_router_logits out, {rest}"
            )
        for name, each in arguments.items():
            own = name in ("input_ids", "position_ids") or not isinstance(each, Tensor)
            if not own and each.shape[:2] == ids.shape and ids.shape[1] > 1:
                raise InputError(
                    f"observe.again reads tokens a second time, and {name} says something of each; leave it out, {rest}"
                )
        waiting = ids[:, :0] if waiting is None else waiting
        if before % again != waiting.shape[1]:
            raise MemoryStateError(
                f"{CACHE} must know the {before % again} tokens that are still to be read again, got "
                f"{waiting.shape[1]}; start without {CACHE}"
            )
        return cls(again, words, waiting, before)

    def pieces(self, tokens: int) -> list[tuple[int, int]]:
        """From where to where the pieces of a call of so many tokens go; an empty call is one."""
        first = self.again - self.waiting.shape[1]
        ends = [*range(first, tokens, self.again), tokens]
        return [(begin, end) for begin, end in zip((0, *ends), ends, strict=False)]

    def piece(self, arguments: dict[str, Any], begin: int, end: int) -> tuple[dict[str, Any], Rereading | None]:
        """The decoder's arguments for one piece of a call with `input_ids` and `position_ids` [b, t], and both
        readings, where it ends a portion."""
        ids, first = arguments["input_ids"], slice(begin, end)
        cut = arguments | {name: arguments[name][:, first] for name in ("input_ids", "position_ids")}
        if not end or (self.before + end) % self.again:
            return cut, None
        between = torch.tensor(self.words, dtype=torch.long, device=ids.device).expand(len(ids), -1)
        text = self.text(ids[:, :end])[:, -self.again :]
        cut["input_ids"] = torch.cat((ids[:, first], between, text), dim=1)
        columns = cut["input_ids"].shape[1]
        stand = self.before + begin + torch.arange(columns, device=ids.device)
        cut["position_ids"] = stand.expand(len(ids), -1)
        return cut, Rereading(end - begin, (Portion(end - begin, columns - self.again, columns),))

    def text(self, ids: Tensor) -> Tensor:
        """The tokens [b, n] that stand from the last portion's end before this call up to the end of `ids`."""
        return torch.cat((self.waiting.to(ids.device), ids), dim=1)

    def then(self, ids: Tensor) -> Tensor:
        """What waits once a call has read these ids."""
        text = self.text(ids)
        return text[:, text.shape[1] - (self.before + ids.shape[1]) % self.again :]


def joined(outputs: Sequence[Any]) -> Any:
    """The decoder's outputs for pieces of a call, as one: tensors [b, t, …] side by side; of all else the last."""
    last = outputs[-1]
    if isinstance(last, Tensor):
        return torch.cat(list(outputs), dim=1) if last.ndim == 3 else last
    if isinstance(last, ModelOutput):
        return type(last)(**{name: joined([each.get(name) for each in outputs]) for name in last})
    if isinstance(last, (tuple, list)):
        return type(last)(joined(parts) for parts in zip(*outputs, strict=True))
    return last
