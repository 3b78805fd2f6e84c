"""A passage of real text that comes twice: what a memory of its first coming is worth at the second."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from memkit.evals.over_text import DepthSetting, OverText, drawn_depth
from memkit.evals.task import Batch
from memkit.lm import Tokenizer
from memkit.pieces.registry import register

__all__ = ["PassageSetting", "RepeatedPassageSpec"]


class PassageSetting(DepthSetting):
    """How long the text is, how long the passage, and where it stands first."""

    passage: int = Field(ge=2, le=2**19, description="tokens of the passage")

    @property
    def label(self) -> str:
        return f"{super().label}, passage of {self.passage}"


@register
class RepeatedPassageSpec(OverText):
    """A passage of the text comes once more at its end; all of it is asked for but its first `cue` tokens.

    These say which passage it is. Part of a passage can be foretold without its first coming, as any text can: how
    much, a window says that does not reach so far back.
    """

    kind: Literal["repeated-passage"] = "repeated-passage"
    cue: int = Field(default=8, ge=1, le=2**19, description="first tokens of the second coming that are not asked for")
    settings: tuple[PassageSetting, ...] = Field(
        default=tuple(PassageSetting(tokens=256, passage=32, depth=depth) for depth in (0.1, 0.5, 0.9)),
        description="lengths, passages and depths, one drawn per batch",
    )

    @model_validator(mode="after")
    def _fits(self) -> RepeatedPassageSpec:
        for index, each in enumerate(self.settings):
            if 2 * each.passage > each.tokens:
                raise ValueError(
                    f"settings.{index}.tokens: must be at least 2 × passage, {2 * each.passage}, got {each.tokens}"
                )
            if self.cue >= each.passage:
                raise ValueError(
                    f"settings.{index}.passage: must be more than the {self.cue} tokens of the cue, got {each.passage}"
                )
        return self

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        tokens, passage = self.settings[setting].tokens, self.settings[setting].passage
        ids, depths = torch.empty(rows, tokens, dtype=torch.long), torch.empty(rows)
        for row in range(rows):
            depth = drawn_depth(self.settings[setting].depth, generator)
            words = torch.tensor(self.stretch(tokens - passage, generator, tokenizer))
            at = round(depth * (tokens - 2 * passage))
            ids[row] = torch.cat((words, words[at : at + passage]))
            depths[row] = depth
        targets = (torch.arange(tokens) >= tokens - passage + self.cue).expand(rows, -1).clone()
        return Batch(ids, targets, setting, depths)
