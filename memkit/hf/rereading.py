"""A text read twice: text, connecting words, text. The second reading's queries say what the first one's rows are
worth, for a reader who may ask for anything; then all of it but the first is forgotten.

Both readings are one call of the decoder. Attention is causal, so that the first is what it would be by itself. A
prompt that is read in full (`observe.readers: repeat`) is read twice as a whole; a long one, or one for whose second
reading the model knows too few positions, in portions, as KVzip does (arXiv 2505.23416): each stands right behind the
text, at the same positions as the others, which it does not see. A text that is read under its policy is read again in
portions as it goes on (`memkit.hf.portions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from memkit.errors import InputError
from memkit.whole import whole_numbers

if TYPE_CHECKING:
    from memkit.policy import Policy

__all__ = [
    "WORDS",
    "Portion",
    "Rereading",
    "asks_again",
    "connecting_ids",
    "connecting_words",
    "first_reading",
    "twice",
]

WORDS = "\n\nRepeat the previous text:\n\n"
"""What stands between the readings, where a tokenizer says what it is in tokens."""

AT_ONCE = 2048
"""Tokens of a prompt that are read again at once, at most."""
FEWEST = 64
"""And at least: with fewer, most of what is read again would be the beginnings of portions, which know little."""
LEAD = 8
"""The newest tokens of a portion that stand before the next one, to say where it is."""


@dataclass(frozen=True)
class Portion:
    """Columns of a call that stand behind a text: `begin` … `end` − 1, of which those from `reads` on are read again,
    and the others lead to them."""

    begin: int
    reads: int
    end: int


@dataclass(frozen=True)
class Rereading:
    """Of a call's columns, the first `tokens` are the text's first reading, and the others a second one, of these or of
    more that stood before them, in portions."""

    tokens: int
    portions: tuple[Portion, ...]

    @property
    def columns(self) -> int:
        """Columns of both readings."""
        return self.portions[-1].end

    def first(self, tensor: Tensor) -> Tensor:
        """The first reading's part of [b, h, t, d]."""
        return tensor[:, :, : self.tokens]

    def behind(self, tensor: Tensor) -> list[Tensor]:
        """What stands behind the first reading, of [b, h, t, d], portion by portion."""
        return [tensor[:, :, each.begin : each.end] for each in self.portions]

    def second(self, tensor: Tensor) -> Tensor:
        """The second reading's part of [b, h, t, d]."""
        return torch.cat([tensor[:, :, each.reads : each.end] for each in self.portions], dim=2)


def connecting_ids(tokenizer: Any, words: str = WORDS) -> list[int]:
    """The tokens that lead from a text to its second reading, for `attach(connecting=…)`."""
    return list(tokenizer(words, add_special_tokens=False)["input_ids"])


def asks_again(policy: Policy) -> bool:
    """Whether a prompt that was read in full is judged by those who read it again."""
    return policy.observes and policy.spec.observe.readers in ("repeat", "mixed")


def connecting_words(given: Sequence[int] | None, vocabulary: int) -> tuple[int, ...]:
    """Connecting words as token ids, checked."""
    if given is None:
        return ()
    limits = f"be token ids from 0 to {vocabulary - 1}"
    return tuple(whole_numbers("connecting", list(given), 0, vocabulary - 1, limits=limits).tolist()) if given else ()


def twice(arguments: dict[str, Any], words: Sequence[int], embed: Any, longest: int | None) -> Rereading:
    """Make a decoder's arguments those of both readings: `input_ids` [b, t], or `inputs_embeds` [b, t, d].

    embed: the module that embeds ids; longest: positions that the model knows, None for any number. Raises `InputError`
    where too few are left behind the text, and where other arguments say something of each token.
    """
    ids = arguments.get("input_ids")
    name, text = ("inputs_embeds", arguments["inputs_embeds"]) if ids is None else ("input_ids", ids)
    rows, tokens = text.shape[:2]
    size = AT_ONCE if longest is None else min(AT_ONCE, longest - tokens - len(words))
    if size < tokens:
        size -= LEAD
        if size < FEWEST:
            raise InputError(
                f"observe.readers repeat and mixed read a prompt twice, the second time behind its {tokens} tokens, "
                f"{FEWEST} at a time at least, and the model knows {longest} positions; use readers: next, or a "
                "shorter prompt"
            )
    if arguments.get("output_router_logits"):
        raise InputError(
            "observe.readers repeat and mixed read a prompt twice, and so would the router whose logits are asked for; "
            "leave output_router_logits out, or use readers: next"
        )
    for other, each in arguments.items():
        if other not in (name, "position_ids") and isinstance(each, Tensor) and each.shape[:2] == (rows, tokens):
            raise InputError(
                f"observe.readers repeat and mixed read a prompt twice, and {other} says something of each of its "
                f"{tokens} tokens; leave {other} out, or use readers: next"
            )
    between = torch.tensor(words, dtype=torch.long, device=text.device).expand(rows, -1)
    between = between if ids is not None else embed(between).to(text.dtype)
    parts, portions, end = [text], list[Portion](), tokens
    for begin in range(0, max(tokens, 1), max(size, 1)):  # nothing, in an empty call
        again = text[:, max(0, begin - LEAD) : begin + size]
        parts += [between, again]
        begins, end = end, end + len(words) + again.shape[1]
        portions.append(Portion(begins, end - min(size, tokens - begin), end))
    arguments[name] = torch.cat(parts, dim=1)
    stand = [torch.arange(tokens), *(torch.arange(each.end - each.begin) + tokens for each in portions)]
    arguments["position_ids"] = torch.cat(stand).to(text.device).expand(rows, -1)
    return Rereading(tokens, tuple(portions))


def first_reading(output: Any, reading: Rereading) -> Any:
    """The decoder's output without the second reading: every tensor [b, t, …] of it, cut."""
    if isinstance(output, Tensor):
        whole = output.ndim == 3 and output.shape[1] == reading.columns
        return output[:, : reading.tokens] if whole else output
    if isinstance(output, ModelOutput):
        return type(output)(**{name: first_reading(each, reading) for name, each in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(first_reading(each, reading) for each in output)
    return output
