"""Where chunks end, as a memory carries it on: for policies that let the caller say so (`chunker: boundaries`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

__all__ = ["Cuts"]

NONE = -1
"""Where a row of a table has fewer chunks than another."""


@dataclass(frozen=True)
class Cuts:
    """What is known of each row's chunks after some tokens: whole numbers on the host, which never change.

    begins: positions at which the chunks in its window begin, the oldest first; none before its first token;
    ended: whether a boundary has ended its newest chunk, so that the next token begins another;
    slots: how many there are.
    """

    begins: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    slots: tuple[int, ...]

    @classmethod
    def fresh(cls, rows: int) -> Cuts:
        """Those of rows without a token."""
        return cls(((),) * rows, (False,) * rows, (0,) * rows)

    @classmethod
    def without_boundaries(cls, rows: int, tokens: int, most: int, chunks: int, slots: int) -> Cuts:
        """Those of rows of `tokens` tokens, in chunks of `most`, of which a window sees so many, none having ended."""
        begins = tuple(range(0, tokens, most)[-chunks:])
        return cls((begins,) * rows, (False,) * rows, (slots,) * rows)

    @property
    def left(self) -> np.ndarray:
        """Tokens that have left each row's window, [b]."""
        return np.array([row[0] if row else 0 for row in self.begins], dtype=np.int64)

    @property
    def newest(self) -> np.ndarray:
        """Where each row's newest chunk begins, [b]; 0 where there is none."""
        return np.array([row[-1] if row else 0 for row in self.begins], dtype=np.int64)

    @property
    def alike(self) -> bool:
        """Whether the chunks of all rows are the same."""
        return len(set(zip(self.begins, self.ended, self.slots, strict=True))) <= 1

    def opens(self, seen: np.ndarray, most: int) -> np.ndarray:
        """Rows, [b], whose next token begins a chunk, after so many tokens, of which a chunk has `most` at most."""
        return np.array(self.ended, dtype=bool) | (seen == 0) | (seen - self.newest >= most)

    def ending(self, rows: np.ndarray) -> Cuts:
        """The same once a boundary ends the newest chunk of these rows, [b] bool."""
        return replace(self, ended=tuple(bool(row) for row in np.array(self.ended, dtype=bool) | rows))

    def of_rows(self, rows: Sequence[int]) -> Cuts:
        """Those of some rows, in this order."""
        return Cuts(
            tuple(self.begins[row] for row in rows),
            tuple(self.ended[row] for row in rows),
            tuple(self.slots[row] for row in rows),
        )

    def tensors(self, chunks: int) -> dict[str, Tensor]:
        """As a file holds them: begins [b, chunks] with −1 where there is none, ended [b] bool, slots [b]."""
        table = [[*row, *[NONE] * (chunks - len(row))] for row in self.begins]
        return {
            "chunk_begins": torch.tensor(table, dtype=torch.long).reshape(len(table), chunks),
            "chunk_ended": torch.tensor(self.ended, dtype=torch.bool),
            "chunk_slots": torch.tensor(self.slots, dtype=torch.long),
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Cuts:
        """Those that a file holds."""
        begins = [tuple(begin for begin in row if begin != NONE) for row in tensors["chunk_begins"].tolist()]
        return cls(tuple(begins), tuple(tensors["chunk_ended"].tolist()), tuple(tensors["chunk_slots"].tolist()))
