"""One layer over several processes: heads that live elsewhere, and texts whose stretches do.

Heads never see each other, so either way attention itself is what one process would do, for some of the heads and all
of the text. `memkit.lm.split_heads` and `split_text` put a model on these.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from memkit.errors import InputError

__all__ = ["HeadExchange", "is_split", "local", "whole_tensors"]

Given = TypeVar("Given", bound=Tensor | None)
Map = Callable[[Tensor], Tensor]


def is_split(parameter: Tensor) -> bool:
    """Whether it is a DTensor, asked without importing what is slow to import."""
    return hasattr(parameter, "device_mesh")


def local(parameter: Given) -> Given:
    """What this process has of a parameter that may be split or copied over processes (DTensor), or the tensor itself.

    A copied one is used for this process's heads alone, so its gradient is the sum over processes.
    """
    if parameter is None or not is_split(parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    gradient = [Partial() if placement.is_replicate() else placement for placement in parameter.placements]
    return cast(Given, parameter.to_local(grad_placements=gradient))


@contextmanager
def whole_tensors(tensors: Mapping[str, Tensor]) -> Generator[dict[str, Tensor] | None]:
    """Tensors put together where they are split over processes (DTensor): on the first of these, None on the others.

    Every process enters, and leaves once the first has. Where no tensor is split nobody waits, and all have theirs.
    """
    meshes = [cast(Any, tensor).device_mesh for tensor in tensors.values() if is_split(tensor)]
    first = not meshes or not any(meshes[0].get_coordinate())
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if is_split(tensor):
            whole = cast(Any, whole).full_tensor()  # with the other processes, which need it not
        if first:
            own[name] = whole.contiguous()
    try:
        yield own if first else None
    finally:
        for group in meshes[0].get_all_groups() if meshes else ():
            distributed.barrier(group)


class HeadExchange:
    """A text in equal stretches over a group's processes, in the order of their ranks; heads are exchanged for tokens.

    group: of `torch.distributed`; left out, all processes.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise InputError(
                "a text is split over processes, got one; torch.distributed.init_process_group comes first"
            )
        self.group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)

    def check(self, tokens: int) -> None:
        """Raise where stretches are not equally long; every process does."""
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, tokens, group=self.group)
        if len(set(every)) > 1:
            raise InputError(f"each process must have as many tokens of a text as the others, got {every}")

    def heads_of(self, heads: int) -> slice:
        """This process's share of so many heads."""
        share = heads // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of this process's tokens, [b, h, t / n, …], for all tokens of its heads, [b, h / n, t, …]."""
        return cast(Tensor, _Linear.apply(x, self._heads_for_tokens, self._tokens_for_heads))

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back: [b, h / n, t, …] → [b, h, t / n, …]."""
        return cast(Tensor, _Linear.apply(x, self._tokens_for_heads, self._heads_for_tokens))

    def newest(self, x: Tensor) -> list[Tensor]:
        """The last token of every process's stretch x [b, t / n, c], each [b, 1, c]; gradients flow to where it is."""
        return list(cast(Tensor, _Linear.apply(x[:, -1:], self._gathered, self._summed_at_home)))

    def following(self, ids: Tensor) -> Tensor:
        """The first of the next process's ids [b, t / n], [b, 1]; −100 for the last process."""
        every = self._gathered(ids[:, :1])
        return every[self.rank + 1] if self.rank + 1 < self.size else torch.full_like(ids[:, :1], -100)

    def _gathered(self, x: Tensor) -> Tensor:
        every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(every, x.contiguous(), group=self.group)
        return torch.stack(every)

    def _given_away(self, parts: Tensor) -> Tensor:
        """parts [n, …], one for each process → [n, …], one from each."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=self.group)
        return received

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)
        return self._given_away(parts).movedim(0, 2).flatten(2, 3)

    def _tokens_for_heads(self, x: Tensor) -> Tensor:
        parts = x.unflatten(2, (self.size, -1)).movedim(2, 0)
        return self._given_away(parts).movedim(0, 1).flatten(1, 2)

    def _summed_at_home(self, every: Tensor) -> Tensor:
        """every [n, …]: of each process's tensor → the sum over processes of what they have for this one's."""
        return self._given_away(every).sum(0)


class _Linear(torch.autograd.Function):
    """A linear map between processes, and the one that takes its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Map, back: Map) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None
