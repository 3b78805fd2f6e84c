"""Recall: pairs of a key and a value are read, and later a key asks for its value."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from memkit.evals.task import Batch, SettingSpec, TaskSpec
from memkit.lm import Tokenizer
from memkit.pieces.registry import register

__all__ = ["MqarSpec", "NoisyRecallSpec", "NoisySetting", "PairsSetting", "ScatteredPairsSpec"]


class PairsSetting(SettingSpec):
    """So many pairs in so many tokens."""

    pairs: int = Field(ge=1, le=2**18, description="pairs of a key and a value, each asked for once")


class _Vocabulary(TaskSpec):
    """Token ids 0 … fillers − 1 are filler; of the others the lower half are keys, the rest values."""

    vocabulary: int = Field(default=256, ge=4, le=2**20, description="token ids")
    fillers: int = Field(
        default=1, ge=1, le=2**19, description="token ids that mean nothing, drawn at random; 1: a constant"
    )

    @model_validator(mode="after")
    def _room(self) -> _Vocabulary:
        if self.vocabulary - self.fillers < 2:
            raise ValueError(
                f"vocabulary must leave a key and a value besides {self.fillers} fillers, got {self.vocabulary}"
            )
        return self

    @property
    def needed_vocabulary(self) -> int:
        return self.vocabulary

    @property
    def keys(self) -> int:
        """How many keys there are; all other tokens after the fillers are values."""
        return (self.vocabulary - self.fillers) // 2

    def _filler(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randint(self.fillers, shape, generator=generator)

    def _pairs(self, rows: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Keys [rows, pairs], none twice in a row, and their values, drawn with replacement."""
        keys = torch.stack([torch.randperm(self.keys, generator=generator)[:pairs] for _ in range(rows)])
        values = torch.randint(self.fillers + self.keys, self.vocabulary, (rows, pairs), generator=generator)
        return keys + self.fillers, values

    def _check_pairs(self, pairs: int, index: int) -> None:
        if pairs > self.keys:
            raise ValueError(
                f"settings.{index}.pairs: must be at most the {self.keys} keys that a vocabulary of {self.vocabulary} "
                f"has, got {pairs}; raise vocabulary"
            )


class _Pairs(_Vocabulary):
    """Pairs, each of which comes twice."""

    settings: tuple[PairsSetting, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> _Pairs:
        for index, each in enumerate(self.settings):
            self._check_pairs(each.pairs, index)
            if 4 * each.pairs > each.tokens:
                raise ValueError(
                    f"settings.{index}.tokens: must be at least 4 × pairs, {4 * each.pairs}, got {each.tokens}"
                )
        return self


@register
class MqarSpec(_Pairs):
    """Multi-query associative recall with the distribution of Zoology (arXiv 2312.04927).

    All pairs stand at the beginning, k₁ v₁ k₂ v₂ …. Then each key comes once more, its value behind it, at places drawn
    without replacement with probability ∝ x^(power − 1), x = 1 the first place after the pairs; elsewhere there is
    filler. Here the answer stands in the text behind its key, as language models read it; Zoology has it as a label
    alone.
    """

    kind: Literal["mqar"] = "mqar"
    settings: tuple[PairsSetting, ...] = Field(
        default=tuple(PairsSetting(tokens=128, pairs=pairs) for pairs in (4, 8, 16, 24)),
        description="difficulties, one drawn per batch",
    )
    power: float = Field(default=0.01, gt=0, le=10, description="of the distribution of gaps; small: early, as in text")

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        tokens, pairs = self.settings[setting].tokens, self.settings[setting].pairs
        keys, values = self._pairs(rows, pairs, generator)
        ids = self._filler((rows, tokens), generator)
        ids[:, 0 : 2 * pairs : 2], ids[:, 1 : 2 * pairs : 2] = keys, values
        places = (tokens - 2 * pairs) // 2
        chances = torch.arange(1, places + 1, dtype=torch.float64) ** (self.power - 1)
        gaps = torch.multinomial(chances.expand(rows, -1), pairs, generator=generator)
        at = 2 * pairs + 2 * gaps
        ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
        return Batch(ids, torch.zeros_like(ids, dtype=torch.bool).scatter_(1, at + 1, True), setting)


@register
class ScatteredPairsSpec(_Pairs):
    """Pairs stand anywhere in filler; at the end each key comes once more, in another order, its value behind it.

    Late chunks hold pairs as early ones do, so a memory needs slots that it founds late.
    """

    kind: Literal["scattered-pairs"] = "scattered-pairs"
    settings: tuple[PairsSetting, ...] = Field(
        default=tuple(
            PairsSetting(tokens=tokens, pairs=pairs) for tokens, pairs in ((64, 4), (128, 8), (192, 16), (256, 32))
        ),
        description="difficulties, one drawn per batch",
    )

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        tokens, pairs = self.settings[setting].tokens, self.settings[setting].pairs
        keys, values = self._pairs(rows, pairs, generator)
        body = tokens - 2 * pairs
        ids = self._filler((rows, tokens), generator)
        at = scattered(rows, pairs, body, generator)
        ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
        order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
        ids[:, body::2], ids[:, body + 1 :: 2] = keys.gather(1, order), values.gather(1, order)
        targets = torch.zeros_like(ids, dtype=torch.bool)
        targets[:, body + 1 :: 2] = True
        return Batch(ids, targets, setting)


class NoisySetting(SettingSpec):
    """So many keys, and so much noise between their occurrences."""

    keys: int = Field(ge=1, le=2**18, description="keys of a sequence, each with one value, drawn again and again")
    noise: float = Field(default=0.2, ge=0, le=0.9, description="share of the tokens that are filler")


@register
class NoisyRecallSpec(_Vocabulary):
    """A stream of pairs whose keys come again and again, with noise between them (after MAD, arXiv 2403.17844).

    Every value counts whose key came before in the sequence.
    """

    kind: Literal["noisy-recall"] = "noisy-recall"
    settings: tuple[NoisySetting, ...] = Field(
        default=(NoisySetting(tokens=128, keys=8), NoisySetting(tokens=128, keys=16)),
        description="difficulties, one drawn per batch",
    )

    @model_validator(mode="after")
    def _fits(self) -> NoisyRecallSpec:
        for index, each in enumerate(self.settings):
            self._check_pairs(each.keys, index)
            if _stream_pairs(each) <= each.keys:
                raise ValueError(
                    f"settings.{index}.tokens: must hold more pairs than keys, {each.keys}, got room for "
                    f"{_stream_pairs(each)}; raise tokens"
                )
        return self

    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        chosen = self.settings[setting]
        keys, values = self._pairs(rows, chosen.keys, generator)
        pairs = _stream_pairs(chosen)
        drawn = torch.randint(chosen.keys, (rows, pairs), generator=generator)
        ids = self._filler((rows, chosen.tokens), generator)
        at = scattered(rows, pairs, chosen.tokens, generator)
        ids.scatter_(1, at, keys.gather(1, drawn)).scatter_(1, at + 1, values.gather(1, drawn))
        again = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(-1)
        return Batch(ids, torch.zeros_like(ids, dtype=torch.bool).scatter_(1, at + 1, again), setting)


def _stream_pairs(setting: NoisySetting) -> int:
    """Pairs that stand in a sequence besides its noise."""
    return (setting.tokens - round(setting.noise * setting.tokens)) // 2


def scattered(rows: int, pairs: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Where pairs begin, [rows, pairs] ascending: two tokens each, anywhere in so many, all places equally likely."""
    places = torch.rand(rows, tokens - pairs, generator=generator).argsort(dim=1)[:, :pairs].sort(dim=1).values
    return places + torch.arange(pairs)
