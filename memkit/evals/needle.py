"""A sentence hidden in real text, and asked for at its end: a number (passkey) or a word (needle)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from memkit.errors import InputError
from memkit.evals.over_text import DepthSetting, OverText, drawn_depth
from memkit.evals.task import Batch
from memkit.lm import Tokenizer
from memkit.pieces.registry import register

__all__ = ["NeedleSpec", "PasskeySpec"]

PLACES = ("harbour", "orchard", "library", "bakery", "chapel", "station", "market", "garden")
THINGS = ("compass", "lantern", "violin", "anchor", "ladder", "mirror", "basket", "hammer", "kettle", "saddle")


class _Hidden(OverText):
    """A sentence in the text, and a question behind it."""

    settings: tuple[DepthSetting, ...] = Field(
        default=tuple(DepthSetting(tokens=512, depth=depth) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)),
        description="lengths and depths, one drawn per batch",
    )

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> tuple[str, str, str]:
        """The sentence, the question and the answer."""

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        chosen = self.settings[setting]
        made: list[tuple[Tensor, Tensor, float]] = []
        for _ in range(rows):
            sentence, question, answer = (tokenizer.encode(each) for each in self._draw(generator))
            room = chosen.tokens - len(sentence) - len(question) - len(answer)
            if room < 1:
                raise InputError(
                    f"settings.{setting}.tokens: must leave room for text besides the sentence and its question, "
                    f"{chosen.tokens - room} tokens, got {chosen.tokens}"
                )
            words = self.stretch(room, generator, tokenizer)
            depth = drawn_depth(chosen.depth, generator)
            at = round(depth * room)
            ids = torch.tensor([*words[:at], *sentence, *words[at:], *question, *answer])
            made.append((ids, torch.arange(len(ids)) >= len(ids) - len(answer), depth))
        ids, targets, depths = zip(*made, strict=True)
        return Batch(torch.stack(ids), torch.stack(targets), setting, torch.tensor(depths))


@register
class PasskeySpec(_Hidden):
    """A sentence names a random number; at the end it is asked for."""

    kind: Literal["passkey"] = "passkey"
    digits: int = Field(default=5, ge=1, le=18, description="digits of the number")

    def _draw(self, generator: torch.Generator) -> tuple[str, str, str]:
        digits = torch.randint(10, (self.digits,), generator=generator).tolist()
        key = "".join(str(digit) for digit in digits)
        return f"\n\nThe pass key is {key}. Remember it.\n\n", "\n\nWhat is the pass key? The pass key is", f" {key}"


@register
class NeedleSpec(_Hidden):
    """A sentence says what was left where; at the end the thing is asked for."""

    kind: Literal["needle"] = "needle"

    def _draw(self, generator: torch.Generator) -> tuple[str, str, str]:
        place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
        thing = THINGS[int(torch.randint(len(THINGS), (), generator=generator))]
        return f"\n\nAt the {place} she left a {thing}.\n\n", f"\n\nWhat did she leave at the {place}? A", f" {thing}"
