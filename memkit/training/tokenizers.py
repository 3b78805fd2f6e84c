"""Hugging Face tokenizers by path; bytes where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from memkit.errors import InputError, short
from memkit.lm import ByteTokenizer, Tokenizer

__all__ = ["HuggingFaceTokenizer", "load_tokenizer", "save_tokenizer"]


class HuggingFaceTokenizer:
    """A tokenizer of transformers, without special tokens."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def vocabulary(self) -> int:
        """Token ids, added ones included."""
        return len(self.inner)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of some ids."""
        return self.inner.decode([int(each) for each in ids])


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """The tokenizer in a folder on this machine, or bytes where the path is None. Raises `InputError`."""
    if path is None:
        return ByteTokenizer()
    try:
        return HuggingFaceTokenizer(AutoTokenizer.from_pretrained(Path(path), local_files_only=True))
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"tokenizer {short(str(path))}: must be a folder with a tokenizer that transformers reads, got: "
            f"{short(reason[0])}; leave it out for bytes"
        ) from None


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face tokenizer into a model's folder; bytes need no file."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.inner.save_pretrained(folder)
