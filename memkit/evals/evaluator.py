"""How well a model does a task: accuracy and loss on its answers, setting by setting, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from memkit.errors import InputError
from memkit.evals.reading import losses, read, vocabulary_of
from memkit.evals.task import TaskSpec, task
from memkit.lm import ByteTokenizer, Tokenizer
from memkit.whole import whole_number

__all__ = ["JUDGING_SEED", "Evaluation", "Score", "evaluate"]

JUDGING_SEED = 2**40
"""The stream that models are judged on; training has seeds below 2^32."""


@dataclass(frozen=True)
class Score:
    """What a model did on one setting.

    setting: its label. accuracy: share of answer tokens that are the likeliest; error: its standard error over
    sequences. exact: share of sequences whose answers are all right. nats: loss per answer token, and its error.
    sequences, answers: how many. bytes: what the memories of all layers hold per sequence once it is read.
    """

    setting: str
    accuracy: float
    error: float
    exact: float
    nats: float
    nats_error: float
    sequences: int
    answers: int
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """A task's kind, its score on every setting, and the seed of the sequences."""

    task: str
    scores: tuple[Score, ...]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def evaluate(
    model: Any,
    on: TaskSpec | Mapping[str, Any],
    *,
    sequences: int = 64,
    batch: int = 16,
    seed: int = JUDGING_SEED,
    tokenizer: Tokenizer | None = None,
) -> Evaluation:
    """Judge a model on every setting of a task.

    Args:
        model: a `MemoryLM`, its Hugging Face wrapper, or a stock causal language model, attached or not.
        on: a task, or a mapping with its `kind`.
        sequences: of each setting; batch: how many are read at once. They do not depend on `batch`'s neighbours.
        seed: of the sequences.
        tokenizer: of tasks over text; None: bytes.

    Raises `InputError`, and `ModelError` where the model is none that predicts tokens.
    """
    chosen, tokenizer = task(on), ByteTokenizer() if tokenizer is None else tokenizer
    sequences, batch = whole_number("sequences", sequences, 2), whole_number("batch", batch, 1)
    needed, there = chosen.needed_vocabulary or tokenizer.vocabulary, vocabulary_of(model)
    if needed > there:
        raise InputError(f"the model must have the task's {needed} token ids, got {there}")
    scores = tuple(
        _score(model, chosen, setting, sequences, batch, seed, tokenizer) for setting in range(len(chosen.settings))
    )
    return Evaluation(chosen.kind, scores, seed)


def _score(
    model: Any, chosen: TaskSpec, setting: int, sequences: int, batch: int, seed: int, tokenizer: Tokenizer
) -> Score:
    nats: list[float] = []
    right: list[float] = []
    answers = held = 0
    for begin in range(0, sequences, batch):
        # One sequence per index, so that they are the same however many are read at once.
        drawn = [
            chosen.batch(1, seed=seed, index=index, setting=setting, tokenizer=tokenizer)
            for index in range(begin, min(begin + batch, sequences))
        ]
        ids, targets = (torch.cat([getattr(each, name) for each in drawn]) for name in ("ids", "targets"))
        found = read(model, ids)
        each_nats, each_right = losses(found, ids, targets)
        counts = targets.sum(1).tolist()
        nats += [float(part.mean()) for part in each_nats.split(counts)]
        right += [float(part.mean()) for part in each_right.split(counts)]
        answers += sum(counts)
        held = max(held, found.bytes // len(ids))
    accuracy, error = mean_and_error(right)
    loss, loss_error = mean_and_error(nats)
    exact = sum(each == 1 for each in right) / len(right)
    label = chosen.settings[setting].label
    return Score(label, accuracy, error, exact, loss, loss_error, sequences, answers, held)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error; 0 for a single value."""
    tensor = torch.tensor(values, dtype=torch.float64)
    error = tensor.std() / len(values) ** 0.5 if len(values) > 1 else torch.zeros(())
    return float(tensor.mean()), float(error)
