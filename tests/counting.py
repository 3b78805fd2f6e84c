"""How much work a call is, in numbers that are the same on every machine."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["BytesHeld", "NumbersMade", "calls_made"]


def calls_made(do: Callable[[], Any]) -> int:
    """How many functions `do` calls, those of C included: a loop over a million tokens makes a million."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        do()
    finally:
        sys.setprofile(before)
    return made


class BytesHeld(TorchDispatchMode):
    """While it lasts: the bytes of all tensors that operations made and that are still there.

    most: the most at any moment; largest: of a single one. What an operation takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self.largest = self._now = 0
        self._tensors: dict[int, int] = {}  # of each storage: how many tensors are in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.untyped_storage().nbytes():
                self._note(each)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        at, size = storage.data_ptr(), storage.nbytes()
        self._now += 0 if self._tensors.get(at) else size
        self._tensors[at] = self._tensors.get(at, 0) + 1
        self.most, self.largest = max(self.most, self._now), max(self.largest, size)
        weakref.finalize(tensor, self._forget, at, size)

    def _forget(self, at: int, size: int) -> None:
        self._tensors[at] -= 1
        self._now -= 0 if self._tensors[at] else size


class NumbersMade(TorchDispatchMode):
    """While it lasts: how many numbers the results of all operations have, views aside; backward passes' too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += sum(each.numel() for each in tree_leaves(made) if isinstance(each, Tensor))
        return made
