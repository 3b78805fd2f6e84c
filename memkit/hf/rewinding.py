"""Taking the newest tokens back, as assisted decoding does with candidates that the model did not choose.

A memory cannot forget what it has merged. So a layer that is to be cropped keeps a memory as it was some tokens ago,
and the queries, keys and values of the tokens since: reading these once more, up to any of them, gives the memory that
there was then. The older memory follows in steps of STEP columns, at least KEEP columns behind the newest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from memkit.errors import InputError

if TYPE_CHECKING:
    from memkit.hf.attention import Reader, Tokens
    from memkit.memory import Memory

__all__ = ["KEEP", "STEP", "Past"]

KEEP = 64
"""Columns that may always be taken back, if so many were read."""
STEP = 64
"""Columns by which the older memory moves on: each token is read a second time, once."""


class Past:
    """A memory as it was after `columns` columns (None: before the first), and all tokens read since."""

    def __init__(self, memory: Memory | None, columns: int) -> None:
        self.memory, self.columns = memory, columns
        self.tokens: Tokens | None = None

    @property
    def behind(self) -> int:
        """Columns read since."""
        return 0 if self.tokens is None else self.tokens.columns

    def add(self, tokens: Tokens) -> None:
        """Tokens were read. Their history is not kept."""
        tokens = tokens.detach()
        self.tokens = tokens if self.tokens is None else self.tokens.then(tokens)

    @torch.no_grad()
    def follow(self, reader: Reader, least: int) -> None:
        """Move the older memory on, by whole steps, as long as KEEP and `least` columns stay behind the newest."""
        while self.tokens is not None and self.behind - STEP >= max(KEEP, least):
            _, self.memory = reader.read(self.memory, self.tokens.part(0, STEP))
            self.columns += STEP
            self.tokens = self.tokens.part(STEP, self.behind)

    @torch.no_grad()
    def at(self, reader: Reader, columns: int) -> Memory | None:
        """The memory as it was after so many columns; those after it are forgotten.

        Raises `InputError` where that is further back than was kept.
        """
        back = columns - self.columns
        if back < 0:
            raise InputError(
                f"a memory goes back by {self.behind} columns at most by now, asked for {self.behind - back}; crop "
                "after every call, copy.deepcopy the cache before what may be taken back, or read the text anew"
            )
        self.tokens = None if self.tokens is None or not back else self.tokens.part(0, back)
        memory = None if self.memory is None else self.memory.fork()
        return memory if self.tokens is None else reader.read(memory, self.tokens)[1]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as what was row rows[i]."""
        self.memory = None if self.memory is None else self.memory.reorder(rows)
        self.tokens = None if self.tokens is None else self.tokens.rows(rows)
