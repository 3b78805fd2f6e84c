"""Bytes as tokens: the tokenizer that needs no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["BYTES", "ByteTokenizer", "Tokenizer"]

BYTES = 256
"""Token ids of the byte tokenizer."""


class Tokenizer(Protocol):
    """What training and judging want of a tokenizer."""

    @property
    def vocabulary(self) -> int:
        """Token ids, 0 … vocabulary − 1."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special ones among them."""
        ...

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of some ids."""
        ...


class ByteTokenizer:
    """A token is a byte of the text in UTF-8, its id the byte; the vocabulary is 256."""

    vocabulary = BYTES

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of some bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(int(each) for each in ids).decode("utf-8", errors="replace")
