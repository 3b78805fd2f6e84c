"""What is trained on: sequences of text, or batches that a task draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from memkit.errors import InputError
from memkit.evals import TaskSpec
from memkit.lm import Tokenizer

__all__ = ["IGNORED", "TaskBatches", "TextSequences", "collate_batches", "collate_sequences", "text_sequences"]

IGNORED = -100
"""The label of a token that is not to be predicted, in transformers' convention."""

Example = dict[str, Tensor]


class TextSequences(Dataset[Example]):
    """Sequences of token ids, of unequal length where documents end."""

    def __init__(self, sequences: Sequence[Tensor]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Example:
        return {"input_ids": self.sequences[index]}


class TaskBatches(Dataset[Example]):
    """Batch i of a task's stream, whole: its sequences share one setting."""

    def __init__(self, task: TaskSpec, rows: int, seed: int, batches: int, tokenizer: Tokenizer) -> None:
        self.task, self.rows, self.seed, self.batches, self.tokenizer = task, rows, seed, batches, tokenizer

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Example:
        drawn = self.task.batch(self.rows, seed=self.seed, index=index, tokenizer=self.tokenizer)
        return {"input_ids": drawn.ids, "labels": drawn.ids.masked_fill(~drawn.targets, IGNORED)}


def text_sequences(texts: Sequence[str], tokenizer: Tokenizer, length: int, packed: bool) -> TextSequences:
    """Texts as sequences of `length` tokens.

    packed: one text after another, cut into equal sequences; the rest of less than `length` tokens is left out. Else no
    sequence spans two texts, the last of each may be shorter, and those of a single token are left out.

    Raises `InputError` where nothing is left.
    """
    documents = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in texts]
    if packed:
        documents = [torch.cat(documents)] if documents else []
    pieces = [piece for document in documents for piece in document.split(length)]
    kept = [piece for piece in pieces if len(piece) == length or (not packed and len(piece) > 1)]
    if not kept:
        tokens = sum(len(document) for document in documents)
        raise InputError(f"the text must have {length if packed else 2} tokens at least, got {tokens}; give more of it")
    return TextSequences(kept)


def collate_sequences(examples: list[Example]) -> dict[str, Any]:
    """Sequences as one batch, padded on the right where they are unequal."""
    sequences = [each["input_ids"] for each in examples]
    lengths = torch.tensor([len(each) for each in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    present = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = ids.masked_fill(~present, IGNORED)
    labels[:, 0] = IGNORED  # nothing predicts it, and losses are divided by the number of labels
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(present.all()) else batch | {"attention_mask": present.long()}


def collate_batches(examples: list[Example]) -> dict[str, Any]:
    """The one batch that an item of `TaskBatches` is."""
    (only,) = examples
    return dict(only)
