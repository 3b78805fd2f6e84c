"""What a task is: a generator of token sequences with marked answers, declared in YAML, and drawn from a seed."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from memkit.errors import InputError, shown
from memkit.lm import ByteTokenizer, Tokenizer
from memkit.pieces.registry import AnyOf, FamilySpec, Spec, SpecError
from memkit.whole import SEEDS, whole_number

__all__ = ["MOST_TOKENS", "Batch", "SettingSpec", "TaskSpec", "batch_generator", "task"]

MOST_TOKENS = 2**20
"""Tokens of one sequence of a task."""
STREAMS = 2**31 - 1
"""Seeds of single batches are drawn below this."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one setting.

    ids [b, t]: tokens. targets [b, t] bool: tokens that are answers, to be predicted from all before them; never the
    first. setting: which of the task's settings it is. depths [b]: where in the text the answer stood, 0 … 1, for tasks
    that have such a place.
    """

    ids: Tensor
    targets: Tensor
    setting: int
    depths: Tensor | None = None


class SettingSpec(Spec):
    """How hard a task is: each kind of task has its own fields besides the length."""

    tokens: int = Field(ge=4, le=MOST_TOKENS, description="tokens of a sequence, answers included")

    @property
    def label(self) -> str:
        """The setting in a few words, for tables."""
        return ", ".join(f"{value:g} {name}" for name, value in self.model_dump().items())


class TaskSpec(FamilySpec):
    """Declares a task. Training draws one of its settings per batch; judging goes through them one by one."""

    family: ClassVar[str] = "task"
    settings: tuple[SettingSpec, ...]

    @field_validator("settings", mode="before")
    @classmethod
    def _from_list(cls, given: Any) -> Any:
        """A YAML list of mappings → a tuple of this kind's settings."""
        if not isinstance(given, (list, tuple)):
            return given
        if not given:
            raise ValueError("must hold at least one setting, got none")
        kind = cls.model_fields["settings"].annotation.__args__[0]  # type: ignore[union-attr]
        made: list[Any] = []
        for index, each in enumerate(given):
            try:
                made.append(kind(**each) if isinstance(each, Mapping) else each)
            except SpecError as error:
                raise SpecError([(f"{index}.{path}", text) for path, text in error.problems]) from None
        return tuple(made)

    @property
    @abstractmethod
    def needed_vocabulary(self) -> int:
        """Token ids that a model must have; 0: those of the tokenizer."""

    @abstractmethod
    def sample(self, setting: int, rows: int, generator: torch.Generator, tokenizer: Tokenizer) -> Batch:
        """`rows` sequences of one setting, drawn from the generator alone."""

    def batch(
        self, rows: int, *, seed: int, index: int, setting: int | None = None, tokenizer: Tokenizer | None = None
    ) -> Batch:
        """Batch number `index` of the stream that `seed` names; the same whatever was drawn before.

        Args:
            rows: sequences.
            seed: of the stream; training and judging take different ones.
            index: of the batch in the stream.
            setting: which setting; None: one is drawn, all equally likely.
            tokenizer: for tasks over text; None: bytes.

        Raises `InputError`.
        """
        rows, index = whole_number("rows", rows, 1, 2**20), whole_number("index", index, 0)
        generator = batch_generator(whole_number("seed", seed, *SEEDS), index)
        if setting is None:
            setting = int(torch.randint(len(self.settings), (), generator=generator))
        setting = whole_number("setting", setting, 0, len(self.settings) - 1)
        return self.sample(setting, rows, generator, ByteTokenizer() if tokenizer is None else tokenizer)


def batch_generator(seed: int, index: int) -> torch.Generator:
    """A generator of its own for each batch of a stream, so that batches may be drawn in any order."""
    stream = torch.Generator().manual_seed(seed % 2**32)
    first, second = torch.randint(STREAMS, (2,), generator=stream).tolist()
    # PyTorch's generators heed 32 bits of a seed; what a larger seed has besides moves its stream elsewhere.
    plain = 0 <= seed < 2**32
    digest = bytes(4) if plain else hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    single = (first * 2**31 + second + 0x9E3779B1 * index) % 2**32
    return torch.Generator().manual_seed(single ^ int.from_bytes(digest, "big"))


def task(declared: Mapping[str, Any] | TaskSpec) -> TaskSpec:
    """A task from a mapping with its `kind`, as YAML has it. Raises `InputError`: field, what is allowed."""
    if isinstance(declared, TaskSpec):
        return declared
    if not isinstance(declared, Mapping):
        raise InputError(f"a task must be a mapping with its kind, got {shown(declared)}; as in {{kind: mqar}}")
    try:
        return AnyOf("task").parse(dict(declared))
    except SpecError as error:
        raise InputError(f"task: {error}") from None
