"""A sentence hidden in real text, and asked for at its end: a number (passkey) or a word (needle)."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from memkit.errors import InputError
from memkit.evals.task import Batch, SettingSpec, TaskSpec
from memkit.lm import Tokenizer
from memkit.pieces.registry import register
from memkit.texts import default_text, read_text

__all__ = ["DepthSetting", "NeedleSpec", "PasskeySpec"]

PLACES = ("harbour", "orchard", "library", "bakery", "chapel", "station", "market", "garden")
THINGS = ("compass", "lantern", "violin", "anchor", "ladder", "mirror", "basket", "hammer", "kettle", "saddle")
LEAST_TOKENS = 64
LONGEST_TOKEN = 16
"""Characters: tokens are seldom longer, and their mean never is."""


class DepthSetting(SettingSpec):
    """How long the text is, and where in it the sentence stands."""

    tokens: int = Field(ge=LEAST_TOKENS, le=2**20, description="tokens of the text, question and answer included")
    depth: float | None = Field(
        default=None, ge=0, le=1, description="0: the beginning, 1: just before the question; left out: anywhere"
    )

    @property
    def label(self) -> str:
        return f"{self.tokens} tokens" + ("" if self.depth is None else f", depth {self.depth:g}")


class _OverText(TaskSpec):
    """A needle in `text`, which begins anywhere."""

    text: str = Field(default="default", description="a UTF-8 file; default: the topics of Python's own help")
    settings: tuple[DepthSetting, ...] = Field(
        default=tuple(DepthSetting(tokens=512, depth=depth) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)),
        description="lengths and depths, one drawn per batch",
    )

    @model_validator(mode="after")
    def _not_empty(self) -> _OverText:
        if not self.text:
            raise ValueError("text must be a file's path or 'default', got ''")
        return self

    @property
    def needed_vocabulary(self) -> int:
        return 0

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> tuple[str, str, str]:
        """The sentence, the question and the answer."""

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        chosen, source = self.settings[setting], _text(self.text)
        made: list[tuple[Tensor, Tensor, float]] = []
        for _ in range(rows):
            sentence, question, answer = (tokenizer.encode(each) for each in self._draw(generator))
            room = chosen.tokens - len(sentence) - len(question) - len(answer)
            if room < 1:
                raise InputError(
                    f"settings.{setting}.tokens: must leave room for text besides the sentence and its question, "
                    f"{chosen.tokens - room} tokens, got {chosen.tokens}"
                )
            words = self._filler(source, room, generator, tokenizer)
            drawn = torch.rand((), generator=generator).item()
            depth = drawn if chosen.depth is None else chosen.depth
            at = round(depth * room)
            ids = torch.tensor([*words[:at], *sentence, *words[at:room], *question, *answer])
            made.append((ids, torch.arange(len(ids)) >= len(ids) - len(answer), depth))
        ids, targets, depths = zip(*made, strict=True)
        return Batch(torch.stack(ids), torch.stack(targets), setting, torch.tensor(depths))

    def _filler(self, source: str, room: int, generator: torch.Generator, tokenizer: Tokenizer) -> list[int]:
        """At least so many tokens of the text, from any place with as many after it, each as likely."""
        begin = len(source)
        while begin:  # where too few tokens follow, too few follow any later place
            begin = int(torch.randint(begin, (), generator=generator))
            words = tokenizer.encode(source[begin : begin + LONGEST_TOKEN * room])
            if len(words) >= room:
                return words
        raise InputError(
            f"{self.text}: must have at least {room} tokens, got {len(tokenizer.encode(source))}; "
            "give a longer text, or lower settings' tokens"
        )


@register
class PasskeySpec(_OverText):
    """A sentence names a random number; at the end it is asked for."""

    kind: Literal["passkey"] = "passkey"
    digits: int = Field(default=5, ge=1, le=18, description="digits of the number")

    def _draw(self, generator: torch.Generator) -> tuple[str, str, str]:
        digits = torch.randint(10, (self.digits,), generator=generator).tolist()
        key = "".join(str(digit) for digit in digits)
        return f"\n\nThe pass key is {key}. Remember it.\n\n", "\n\nWhat is the pass key? The pass key is", f" {key}"


@register
class NeedleSpec(_OverText):
    """A sentence says what was left where; at the end the thing is asked for."""

    kind: Literal["needle"] = "needle"

    def _draw(self, generator: torch.Generator) -> tuple[str, str, str]:
        place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
        thing = THINGS[int(torch.randint(len(THINGS), (), generator=generator))]
        return f"\n\nAt the {place} she left a {thing}.\n\n", f"\n\nWhat did she leave at the {place}? A", f" {thing}"


@cache
def _text(source: str) -> str:
    return default_text() if source == "default" else read_text(Path(source))
