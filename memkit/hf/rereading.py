"""A text read twice: text, connecting words, text. The second reading's queries say what the first one's rows are
worth, for a reader who may ask for anything; then all of it but the first is forgotten.

Both readings are one call of the decoder. Attention is causal, so that the first is what it would be by itself. A
prompt that is read in full is read twice as a whole (`observe.readers: repeat`). A text that is read under its policy
is read again in portions (`memkit.hf.portions`).
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

__all__ = ["WORDS", "Rereading", "asks_again", "connecting_ids", "connecting_words", "first_reading", "twice"]

WORDS = "\n\nRepeat the previous text:\n\n"
"""What stands between the readings, where a tokenizer says what it is in tokens."""


@dataclass(frozen=True)
class Rereading:
    """Of a call's columns, the first `tokens` are the text's first reading, and the last `again` a second one, of these
    or of more that stood before them."""

    tokens: int
    columns: int
    again: int

    def first(self, tensor: Tensor) -> Tensor:
        """The first reading's part of [b, h, t, d]."""
        return tensor[:, :, : self.tokens]

    def behind(self, tensor: Tensor) -> Tensor:
        """What stands behind the first reading, of [b, h, t, d]."""
        return tensor[:, :, self.tokens :]

    def second(self, tensor: Tensor) -> Tensor:
        """The second reading's part of [b, h, t, d]."""
        return tensor[:, :, self.columns - self.again :]


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
    where there are not so many, and where other arguments say something of each token.
    """
    ids = arguments.get("input_ids")
    name, text = ("inputs_embeds", arguments["inputs_embeds"]) if ids is None else ("input_ids", ids)
    rows, tokens = text.shape[:2]
    columns = 2 * tokens + len(words)
    if longest is not None and columns > longest:
        raise InputError(
            f"observe.readers repeat and mixed read a prompt twice, here {columns} tokens, and the model knows "
            f"{longest} positions; use readers: next, or a shorter prompt"
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
    arguments[name] = torch.cat((text, between if ids is not None else embed(between).to(text.dtype), text), dim=1)
    arguments["position_ids"] = torch.arange(columns, device=text.device).expand(rows, -1)
    return Rereading(tokens, columns, tokens)


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
