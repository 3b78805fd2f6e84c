"""What a whole model carries from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memkit.lm.parts import State
from memkit.lm.spec import ModelSpec
from memkit.memory import Memory, row_numbers

__all__ = ["ModelMemory"]


@dataclass(eq=False)
class ModelMemory:
    """Every layer's memory. Made by a model's call, and given to its next.

    layers: per layer, by name: the policy's `memory` or RWKV-7's `state`, and the last tokens that token shifts want.
    seen [b] int64: tokens of each row so far, on the CPU.
    """

    spec: ModelSpec
    seen: Tensor
    layers: list[State]

    @property
    def memories(self) -> list[Memory | None]:
        """Each layer's policy memory, first layer first; None for layers of another kind."""
        found = [layer.get("memory") for layer in self.layers]
        return [memory if isinstance(memory, Memory) else None for memory in found]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(
            each.bytes if isinstance(each, Memory) else each.untyped_storage().nbytes()
            for layer in self.layers
            for each in layer.values()
        )

    def fork(self) -> ModelMemory:
        """A copy that shares nothing with this memory."""
        return self._mapped(Memory.fork, torch.Tensor.clone)

    def detach(self) -> ModelMemory:
        """The same memory without its history: gradients stop here."""
        return self._mapped(Memory.detach, torch.Tensor.detach)

    def to(self, device: torch.device | str) -> ModelMemory:
        """The memory on another device."""
        return self._mapped(lambda memory: memory.to(device), lambda tensor: tensor.to(device))

    def reorder(self, rows: Tensor | list[int]) -> ModelMemory:
        """A memory whose row i is this one's row rows[i]; rows may repeat (beam search) or be left out."""
        index = row_numbers(rows, len(self.seen))
        chosen = self._mapped(
            lambda memory: memory.reorder(index), lambda tensor: tensor.index_select(0, index.to(tensor.device))
        )
        chosen.seen = self.seen[index]
        return chosen

    def _mapped(self, memories: Callable[[Memory], Memory], tensors: Callable[[Tensor], Tensor]) -> ModelMemory:
        def mapped(each: Any) -> Any:
            return memories(each) if isinstance(each, Memory) else tensors(each)

        layers: list[State] = [{name: mapped(each) for name, each in layer.items()} for layer in self.layers]
        return ModelMemory(self.spec, self.seen.clone(), layers)

    def __repr__(self) -> str:
        name = f"'{self.spec.name}'" if self.spec.name else "without a name"
        return f"ModelMemory(model {name}, seen {self.seen.tolist()}, {len(self.layers)} layers, {self.bytes:,} bytes)"
