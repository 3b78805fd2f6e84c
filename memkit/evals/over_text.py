"""Tasks over real text: a stretch of it from anywhere, into which a task puts what it asks for."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from pydantic import Field, model_validator

from memkit.errors import InputError
from memkit.evals.task import SettingSpec, TaskSpec
from memkit.lm import Tokenizer
from memkit.texts import default_text, read_text

__all__ = ["DepthSetting", "OverText", "drawn_depth"]

LEAST_TOKENS = 64
LONGEST_TOKEN = 16
"""Characters: tokens are seldom longer, and their mean never is."""


class DepthSetting(SettingSpec):
    """How long the text is, and where in it stands what is asked for."""

    tokens: int = Field(ge=LEAST_TOKENS, le=2**20, description="tokens of the text, question and answer included")
    depth: float | None = Field(
        default=None, ge=0, le=1, description="0: the beginning, 1: just before the question; left out: anywhere"
    )

    @property
    def label(self) -> str:
        return f"{self.tokens} tokens" + ("" if self.depth is None else f", depth {self.depth:g}")


class OverText(TaskSpec):
    """A task over a stretch of `text`, which begins anywhere."""

    text: str = Field(default="default", description="a UTF-8 file; default: the topics of Python's own help")

    @model_validator(mode="after")
    def _not_empty(self) -> OverText:
        if not self.text:
            raise ValueError("text must be a file's path or 'default', got ''")
        return self

    @property
    def needed_vocabulary(self) -> int:
        return 0

    def stretch(self, tokens: int, generator: torch.Generator, tokenizer: Tokenizer) -> list[int]:
        """So many tokens of the text, from any place with as many after it, each as likely."""
        source = _text(self.text)
        begin = len(source)
        while begin:  # where too few tokens follow, too few follow any later place
            begin = int(torch.randint(begin, (), generator=generator))
            words = tokenizer.encode(source[begin : begin + LONGEST_TOKEN * tokens])
            if len(words) >= tokens:
                return words[:tokens]
        raise InputError(
            f"{self.text}: must have at least {tokens} tokens, got {len(tokenizer.encode(source))}; "
            "give a longer text, or lower settings' tokens"
        )


def drawn_depth(depth: float | None, generator: torch.Generator) -> float:
    """A depth, 0 … 1: the one that is given, or any."""
    drawn = torch.rand((), generator=generator).item()
    return drawn if depth is None else depth


@cache
def _text(source: str) -> str:
    return default_text() if source == "default" else read_text(Path(source))
