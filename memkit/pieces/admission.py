"""Admission: which tokens of a leaving chunk found a slot of their own.

How many may is growth's decision; which ones is a score: the tokens with the highest score found, ties to the earliest.
Sinks found in any case and are no part of the choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import avg_pool1d

from memkit.pieces.chunk import ChunkContext, Count
from memkit.pieces.evidence import output_errors
from memkit.pieces.registry import FamilySpec, register

__all__ = [
    "Admission",
    "AdmissionSpec",
    "AttentionSpec",
    "Expectation",
    "ExpectedAttentionSpec",
    "KeyDifferenceSpec",
    "KeyNormSpec",
    "NoAdmissionSpec",
    "NoveltySpec",
    "OutputErrorSpec",
    "RecencySpec",
    "StrideSpec",
    "mean_of_neighbours",
]


@dataclass(frozen=True)
class Expectation:
    """What readers who are still to come are taken for: normally distributed, as queries of the text are.

    future: over how many places behind the text they are spread; covariance: whether they differ from their mean.
    """

    future: int
    covariance: bool


class Admission(ABC):
    """Says how much each token of a chunk deserves a slot."""

    compares: ClassVar[bool] = False
    """Whether the score looks at the slots. In an empty memory token 0 then founds the first slot, and the rest are
    compared with it."""

    rates_slots: ClassVar[bool] = False
    """Whether the score means something for slots too, so that they can compete with tokens (`eviction: weakest`)."""
    needs_evidence: ClassVar[bool] = False
    """Whether the score looks at what observed queries told (`chunk.evidence`)."""
    needs_errors: ClassVar[bool] = True
    """Whether, if it does, it looks at errors there, and not at shares alone: a second reading tells nothing else."""
    fills_up: ClassVar[bool] = False
    """Whether rows of the batch may have unequal numbers of tokens: `chunk.absent` are none, and no token's score
    depends on them. Where not, rows with unequal numbers are scored one after the other."""
    pools_errors: bool = False
    """Whether the score averages errors over neighbouring rows, so that nobody else need."""
    expects: Expectation | None = None
    """Readers of whom the share of attention is what they are expected to pay; None: what observed queries paid."""

    @abstractmethod
    def score(self, chunk: ChunkContext) -> Tensor:
        """How much each token deserves a slot, the highest first; broadcastable to [b, g, c].

        Those that found in any case (`chunk.sink_tokens`) may be given any score.
        """

    def missed(self, shares: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
        """What the observed queries of a chunk would miss without each row, [b, g, n], at least 0: the error in its
        evidence. Here the mean of p²·‖v − o‖² over them; an admission may say otherwise.

        Args:
            shares: p, of their softmax over the n rows that there are then, [b, g, q, n]: those of a group's first head
                first, each head's in their order; 0 where a query stands too near a row (`observe.apart`). Given
                without a gradient.
            values: of the rows, [b, g, n, v].
            outputs: what the queries read, [b, g, q, v].

        A row's number may depend on no other row's column, for there may be columns that only fill up. None of these
        tensors may be written into.
        """
        return output_errors(shares, values, outputs)


class AdmissionSpec(FamilySpec):
    """Declares an admission."""

    family: ClassVar[str] = "admission"

    @abstractmethod
    def build(self) -> Admission | None:
        """The admission; None where the routing says who founds."""


@register
class NoveltySpec(AdmissionSpec):
    """The tokens that the memory stands for least: lowest best similarity to any slot (arXiv 2605.09877)."""

    kind: Literal["novelty"] = "novelty"

    def build(self) -> Novelty:
        return Novelty()


class Novelty(Admission):
    """score_j = −max_i similarity(key_j, slot_i), sinks included."""

    compares = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return -chunk.redundancy


@register
class RecencySpec(AdmissionSpec):
    """The last tokens of the chunk."""

    kind: Literal["recency"] = "recency"

    def build(self) -> Recency:
        return Recency()


class Recency(Admission):
    """score_j = j."""

    rates_slots = fills_up = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return chunk.offsets


@register
class StrideSpec(AdmissionSpec):
    """Tokens at even distances: offsets ⌊i·C/g⌋ for i = 0 … g − 1."""

    kind: Literal["stride"] = "stride"

    def build(self) -> Stride:
        return Stride()


class Stride(Admission):
    """score_j = 1 where j = ⌊i·C/g⌋ for a whole i, else 0; j, C and g count what is no sink."""

    def score(self, chunk: ChunkContext) -> Tensor:
        offsets, new = chunk.offsets - chunk.sink_tokens, chunk.new_slots - chunk.sink_tokens
        size = _at_least_one(chunk.keys.shape[2] - chunk.sink_tokens)
        turn = -(-offsets * new // size)  # the first i with ⌊i·C/g⌋ ≥ offset
        return (turn * size // _at_least_one(new) == offsets).long()


def _is_odd(pool: int) -> int:
    if pool % 2 == 0:
        raise ValueError(f"pool must be odd, for a row stands in the middle of its neighbours, got {pool}")
    return pool


@register
class OutputErrorSpec(AdmissionSpec):
    """The rows without which the observed queries' outputs would change most (CAOTE, arXiv 2504.14051)."""

    kind: Literal["output-error"] = "output-error"
    pool: int = Field(
        default=1,
        ge=1,
        le=2**10,
        description="so many neighbouring rows, odd, have the mean of their errors' roots; 1: each row its own",
    )
    difference: float = Field(
        default=0.0,
        ge=0,
        le=16,
        description="how far a row counts for what readers may find in it who have not been heard yet: the exponent of "
        "(1 − cosine(k, k̄))·‖v − v̄‖, k̄ and v̄ the means over the rows that compete, by which the root of the error is "
        "multiplied; 0: not at all",
    )

    _odd = field_validator("pool")(_is_odd)

    def build(self) -> OutputError:
        return OutputError(self.pool, self.difference)


class OutputError(Admission):
    """score_j = error_j = mean_r p_rj²·‖v_j − o_r‖², over the row's life.

    With `pool`, the mean of its root over neighbouring rows. With `difference` s, the root times
    ((1 − cosine(k_j, k̄))·‖v_j − v̄‖)^s, k̄ and v̄ the means over the rows that compete: readers whom nobody has heard yet
    find a row the better the more its key differs from the others', and read v_j where they would have read about v̄.
    """

    rates_slots = needs_evidence = fills_up = True

    def __init__(self, pool: int = 1, difference: float = 0.0) -> None:
        self.pool, self.pools_errors, self.difference = pool, pool > 1, difference

    def score(self, chunk: ChunkContext) -> Tensor:
        assert chunk.evidence is not None
        error = chunk.evidence.error
        if self.pool == 1 and not self.difference:
            return error
        root = error.sqrt() if self.pool == 1 else mean_of_neighbours(error.sqrt(), self.pool, chunk.absent)
        return root * _difference(chunk) ** self.difference if self.difference else root


def mean_of_neighbours(numbers: Tensor, pool: int, absent: Tensor | None = None) -> Tensor:
    """Numbers [b, g, c], each the mean over `pool` of them with it in the middle, as many as there are.

    absent [b, 1, c]: which are none.
    """
    if absent is None:
        return avg_pool1d(numbers, pool, stride=1, padding=pool // 2, count_include_pad=False)
    present = (~absent).to(numbers.dtype)
    total, count = (avg_pool1d(each, pool, stride=1, padding=pool // 2) for each in (numbers * present, present))
    return total / count.clamp(min=1 / (2 * pool))


@register
class AttentionSpec(AdmissionSpec):
    """The rows that queries attend to most (H2O, arXiv 2306.14048; SnapKV, 2404.14469; TOVA, 2401.06104)."""

    kind: Literal["attention"] = "attention"
    value_norm: bool = Field(default=False, description="whether the share is multiplied by the value's norm")
    pool: int = Field(
        default=1,
        ge=1,
        le=2**10,
        description="mean over so many neighbouring rows, odd, zeros beyond the ends; 1: none",
    )

    _odd = field_validator("pool")(_is_odd)

    def build(self) -> Attention:
        return Attention(self.value_norm, self.pool)


class Attention(Admission):
    """score_j = share_j (· ‖v_j‖), smoothed over neighbouring rows."""

    rates_slots = needs_evidence = fills_up = True
    needs_errors = False

    def __init__(self, value_norm: bool, pool: int) -> None:
        self.value_norm, self.pool = value_norm, pool

    def score(self, chunk: ChunkContext) -> Tensor:
        assert chunk.evidence is not None and chunk.values is not None
        score = chunk.evidence.share
        if chunk.absent is not None:  # what stands there is none's
            score = score.masked_fill(chunk.absent, 0)
        if self.pool > 1:
            score = avg_pool1d(score, self.pool, stride=1, padding=self.pool // 2)
        return score * chunk.values.norm(dim=-1) if self.value_norm else score


@register
class ExpectedAttentionSpec(AdmissionSpec):
    """The rows that queries to come are expected to attend to most (Expected Attention, arXiv 2510.00636)."""

    kind: Literal["expected-attention"] = "expected-attention"
    future: int = Field(
        default=512, ge=1, le=2**20, description="places behind the text over which the queries to come are spread"
    )
    covariance: bool = Field(
        default=True, description="whether queries differ from their mean; false: the mean query stands for all"
    )
    value_norm: bool = Field(default=True, description="whether the share is multiplied by the value's norm")

    def build(self) -> ExpectedAttention:
        return ExpectedAttention(self)


class ExpectedAttention(Attention):
    """score_j = share_j (· ‖v_j‖), where share = softmax_j of log E exp(scale · q·k_j) over normally distributed q.

    Mean and covariance of q are those of queries of the text, turned to the places behind it; sinks are no part of the
    softmax. What such readers give a row is part of its evidence, and PLAN finds it there (`memkit.engine.expected`).
    """

    def __init__(self, spec: ExpectedAttentionSpec) -> None:
        super().__init__(spec.value_norm, pool=1)
        self.expects = Expectation(spec.future, spec.covariance)


@register
class KeyNormSpec(AdmissionSpec):
    """The rows with the shortest keys (arXiv 2406.11430)."""

    kind: Literal["key-norm"] = "key-norm"

    def build(self) -> KeyNorm:
        return KeyNorm()


class KeyNorm(Admission):
    """score_j = −‖k_j‖, summed in float64: as long in whatever order its numbers are added."""

    rates_slots = fills_up = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return -chunk.keys.norm(dim=-1, dtype=torch.float64).to(chunk.keys.dtype)


@register
class KeyDifferenceSpec(AdmissionSpec):
    """The rows whose keys point away from the others' (KeyDiff, arXiv 2504.15364)."""

    kind: Literal["key-difference"] = "key-difference"

    def build(self) -> KeyDifference:
        return KeyDifference()


class KeyDifference(Admission):
    """score_j = −cosine(k_j, mean_i k_i / ‖k_i‖)."""

    rates_slots = True

    def score(self, chunk: ChunkContext) -> Tensor:
        return -_likeness(chunk)


@register
class NoAdmissionSpec(AdmissionSpec):
    """Nobody is admitted by a score; the routing says who founds (`segment`: the first token of each run)."""

    kind: Literal["none"] = "none"

    def build(self) -> None:
        return None


def _likeness(chunk: ChunkContext) -> Tensor:
    """cosine(k_j, mean_i k_i / ‖k_i‖), [b, g, c]; the mean over the rows that are there."""
    keys, tiny = chunk.keys, torch.finfo(chunk.keys.dtype).tiny
    lengths = keys.norm(dim=-1).clamp(min=tiny)
    mean = _mean_of_rows(keys, chunk.absent, 1 / lengths)
    return (keys @ mean.mT).squeeze(-1) / (lengths * mean.norm(dim=-1)).clamp(min=tiny)


def _difference(chunk: ChunkContext) -> Tensor:
    """(1 − cosine(k_j, k̄))·‖v_j − v̄‖, [b, g, c], of the rows that are there; 0 at least."""
    assert chunk.values is not None
    apart = (chunk.values - _mean_of_rows(chunk.values, chunk.absent)).norm(dim=-1)
    return (1 - _likeness(chunk)).clamp(min=0) * apart


def _mean_of_rows(vectors: Tensor, absent: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """The mean of vectors [b, g, c, d], times their weights [b, g, c], over those that are there, [b, g, 1, d].

    absent [b, 1, c]: which are not. A product, for it needs no copy of the vectors.
    """
    there = vectors.new_ones(vectors.shape[:3]) if absent is None else (~absent).to(vectors.dtype)
    counted = there if weights is None else there * weights
    return counted.unsqueeze(-2) @ vectors / there.sum(-1)[..., None, None].clamp(min=1)


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
