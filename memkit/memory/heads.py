"""The memory of a layer whose heads have unequal numbers of slots: one memory for each run of heads that are alike.

Nothing is padded to the longest head: each run of heads has tensors of its own, and a call costs what its rows cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from memkit.memory import file
from memkit.memory.cuts import Cuts
from memkit.memory.memory import Memory
from memkit.pieces.statistics import Statistic
from memkit.policy import Policy

__all__ = ["HeadsMemory", "side_by_side"]


class HeadsMemory(Memory):
    """The memory of heads with unequal numbers of slots, put together of `parts`: key/value heads in order.

    What is asked per row (`seen`, `held_rows`) is the same for all heads; `slots` has a column for each head; tensors
    of all heads together (`keys`, `values`, `counts`, `number`) are copies, made when they are asked for.
    """

    def __init__(self, policy: Policy, parts: Sequence[Memory]) -> None:
        self.policy, self.parts, self.lost = policy, tuple(parts), None

    # What a caller asks

    @property
    def seen_rows(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Tokens of each row so far, [b] int64."""
        return self.parts[0].seen_rows

    @property
    def cuts(self) -> Cuts | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where each row's chunks begin, None where positions tell; with the first part's slots."""
        return self.parts[0].cuts

    @property
    def heads_of_parts(self) -> list[int]:
        """Key/value heads of each part."""
        return [part.keys.shape[1] for part in self.parts]

    @property
    def slots(self) -> Tensor:
        """Slots of each row and head, sinks included, [b, g] int64."""
        each = [
            part.slots[:, None].expand(-1, heads) for part, heads in zip(self.parts, self.heads_of_parts, strict=True)
        ]
        return torch.cat(each, dim=1)

    @property
    def counts(self) -> Tensor:
        """Tokens in each slot, [b, g, m] int64; 0 past a head's slots."""
        return side_by_side([part.counts for part in self.parts])

    @property
    def live_rows(self) -> np.ndarray:
        """The most slots that any head of a row has, [b] int64."""
        return np.max([part.live_rows for part in self.parts], axis=0)

    @property
    def keys(self) -> Tensor:
        """The windows' keys, [b, g, room, d], the newest last."""
        return self._windows("keys")

    @property
    def values(self) -> Tensor:
        """The windows' values, [b, g, room, v], the newest last."""
        return self._windows("values")

    @property
    def head_widths(self) -> tuple[int, int]:
        """Width of keys and of values."""
        return self.parts[0].head_widths

    @property
    def sums(self) -> Tensor:
        """What slots sum of keys and values, [b, g, M, d + v]; 0 past a head's slots."""
        return side_by_side([part.sums for part in self.parts])

    def number(self, statistic: Statistic) -> Tensor:
        """One of the numbers that slots keep, [b, g, M]; 0 past a head's slots."""
        return side_by_side([part.number(statistic) for part in self.parts])

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return sum(self.heads_of_parts)

    @property
    def observed_heads(self) -> int | None:
        """Query heads that are observed; None where none are."""
        each = [part.observed_heads for part in self.parts]
        return None if None in each else sum(heads for heads in each if heads)

    @property
    def dtype(self) -> torch.dtype:
        """The keys' and values' dtype."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.parts[0].device

    # What a caller does

    def reorder(self, rows: Tensor | list[int]) -> Memory:
        """A memory whose row i is this one's row rows[i]; rows may repeat (beam search) or be left out."""
        self.check_usable()
        return HeadsMemory(self.policy, [part.reorder(rows) for part in self.parts])

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file; its policy travels along."""
        self.check_usable()
        file.write(path, self.policy, [part.contents() for part in self.parts])

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without history."""
        detached = self.detach()
        assert isinstance(detached, HeadsMemory)
        return {"policy": self.policy, "parts": detached.parts, "lost": None}

    # What the engine asks

    @property
    def taken(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a later call has taken a part of it over."""
        return any(part.taken for part in self.parts)

    def call_failed(self, error: BaseException) -> None:
        """A call has failed after some heads have gone on."""
        self.lost = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    @property
    def frozen(self) -> bool:
        """Whether it was made in inference mode, and this is outside: then nothing may be written into it."""
        return any(part.frozen for part in self.parts)

    def check_usable(self) -> None:
        """Raise where a later call has taken this memory, or one of its parts, over."""
        super().check_usable()
        for part in self.parts:
            part.check_usable()

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow into this memory."""
        return any(part.requires_grad for part in self.parts)

    def tensors(self) -> list[Tensor]:
        """All tensors held, working copies included."""
        return [tensor for part in self.parts for tensor in part.tensors()]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Memory:
        return HeadsMemory(self.policy, [part._mapped(change) for part in self.parts])

    def _windows(self, name: str) -> Tensor:
        held = int(self.held_rows.max(initial=0))
        return torch.cat([part.window.last(held)[name] for part in self.parts], dim=1)

    def __repr__(self) -> str:
        ends = ", lost" if self.lost else ", taken over" if self.taken else ""
        return (
            f"Memory({self.policy.name or 'a policy without a name'}, {len(self.seen_rows)} rows × "
            f"{sum(self.heads_of_parts)} heads, seen {self.seen_rows.tolist()}, window {self.held_rows.tolist()}, "
            f"slots of each head {self.slots.tolist()}, {self.bytes:,} bytes{ends})"
        )


def side_by_side(each: Sequence[Tensor]) -> Tensor:
    """[b, heads, m, …] of each part → all heads side by side, [b, g, M, …], with 0 up to the most slots."""
    most = max(tensor.shape[2] for tensor in each)
    return torch.cat([pad(tensor, (0, 0) * (tensor.ndim - 3) + (0, most - tensor.shape[2])) for tensor in each], dim=1)


Memory.of_parts = HeadsMemory
