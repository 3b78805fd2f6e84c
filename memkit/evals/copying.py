"""Selective copy: some tokens of a long text are wanted, in their order, and the rest is not."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from memkit.evals.task import Batch, SettingSpec, TaskSpec
from memkit.lm import Tokenizer
from memkit.pieces.registry import register

__all__ = ["CopySetting", "SelectiveCopySpec"]

FILLER, MARKER, FIRST = 0, 1, 2


class CopySetting(SettingSpec):
    """So many items among so many tokens."""

    items: int = Field(ge=1, le=2**18, description="tokens that are wanted")


@register
class SelectiveCopySpec(TaskSpec):
    """Items stand anywhere in constant filler (id 0); after a marker (id 1) they come once more, in order.

    As in Mamba (arXiv 2312.00752), but that the items stand behind the marker for the model to read on from.
    """

    kind: Literal["selective-copy"] = "selective-copy"
    vocabulary: int = Field(default=32, ge=4, le=2**20, description="token ids; items are 2 … vocabulary − 1")
    settings: tuple[CopySetting, ...] = Field(
        default=(CopySetting(tokens=128, items=8), CopySetting(tokens=256, items=16)),
        description="difficulties, one drawn per batch",
    )

    @model_validator(mode="after")
    def _fits(self) -> SelectiveCopySpec:
        for index, each in enumerate(self.settings):
            if 2 * each.items + 1 > each.tokens:
                raise ValueError(
                    f"settings.{index}.tokens: must be at least 2 × items + 1, {2 * each.items + 1}, got {each.tokens}"
                )
        return self

    @property
    def needed_vocabulary(self) -> int:
        return self.vocabulary

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        tokens, items = self.settings[setting].tokens, self.settings[setting].items
        body = tokens - items - 1
        wanted = torch.randint(FIRST, self.vocabulary, (rows, items), generator=generator)
        places = torch.rand(rows, body, generator=generator).argsort(dim=1)[:, :items].sort(dim=1).values
        ids = torch.full((rows, tokens), FILLER).scatter_(1, places, wanted)
        ids[:, body], ids[:, body + 1 :] = MARKER, wanted
        targets = torch.zeros_like(ids, dtype=torch.bool)
        targets[:, body + 1 :] = True
        return Batch(ids, targets, setting)
