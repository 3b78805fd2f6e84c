"""How many threads a step takes: one where its operations are small, for two would wait for each other at each."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

__all__ = ["FEW", "SMALL", "one_thread"]

SMALL = 2**19
"""Scores of a step, and of a fold, below which its operations are small. With half as many (9 query and 3 key/value
heads, 64 tokens, 512 rows) two threads take 1.1 to 1.6 times as long as one; with twice as many, 0.7 to 0.95 times."""

FEW = 2**16
"""The same where compiled loops do all that is small, and PyTorch products and softmax: 9 and 3 heads, 64 tokens and
192 rows, 2^17 scores, take two threads 0.9 times as long as one, 512 rows 0.82 times."""


@contextmanager
def one_thread(numbers: int, device: torch.device, few: int = SMALL) -> Generator[None]:
    """In the block this thread computes alone, where `numbers` scores are fewer than `few` and `device` is the CPU.

    PyTorch has one setting for the thread that asks and for threads that begin later; it is as before afterwards.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or numbers >= few or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
