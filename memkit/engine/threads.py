"""How many threads there are: one where operations are small, for two would wait for each other at each of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

import torch

__all__ = ["SMALL", "in_threads", "one_thread"]

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


def in_threads(work: Callable[[], None], count: int) -> None:
    """Have so many threads do the work, this one among them, each computing alone; if one, with all there are."""
    if count < 2:
        work()
        return

    def alone() -> None:
        torch.set_num_threads(1)
        work()

    with one_thread(0, torch.device("cpu")):
        others = list[Future[None]]()
        try:
            with suppress(RuntimeError):  # no thread can be had any more, where the interpreter is about to end
                others.extend(_helpers(count - 1).submit(alone) for _ in range(count - 1))
            work()
        finally:
            wait(others)
        for each in others:
            each.result()


@functools.cache
def _helpers(count: int) -> ThreadPoolExecutor:
    """Threads that wait for work, for as long as the process lives."""
    return ThreadPoolExecutor(count, "memkit")


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_helpers.cache_clear)
