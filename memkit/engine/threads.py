"""How many threads a step takes: one where its operations are small, for two would wait for each other at each."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

__all__ = ["SMALL", "one_thread"]

SMALL = 2**19
"""Scores of a step, and of a fold, below which its operations are small. With half as many (9 query and 3 key/value
heads, 64 tokens, 512 rows) two threads take 1.1 to 1.6 times as long as one; with twice as many, 0.7 to 0.95 times."""


@contextmanager
def one_thread(numbers: int, device: torch.device) -> Generator[None]:
    """In the block this thread computes alone, where `numbers` scores are few and `device` is the CPU.

    PyTorch has one setting for the thread that asks and for threads that begin later; it is as before afterwards.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or numbers >= SMALL or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
