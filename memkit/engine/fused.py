"""PLAN and FOLD of many chunks on a GPU, by the kernels of `kernels.py`: what `together.py` does, in few launches.

They know one kind of memory, that of Key-Value Means: plain sums, read by a LayerNorm and a radius; a chunk's most
novel tokens found slots, and the others join the most similar one. Everything else is PyTorch's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from memkit.engine.schedule import LeavingChunk, Step
from memkit.engine.stretch import Stretch
from memkit.memory.rows import Chunk, SlotRules, SlotView, contributions, memory_keys, read_slots, read_tokens
from memkit.memory.slots import flat_slots
from memkit.pieces.admission import Novelty
from memkit.pieces.readout import LAYER_NORM_EPS, SHORTEST
from memkit.pieces.routing import Nearest
from memkit.pieces.statistics import RADIUS

__all__ = ["FUSED_ON", "Unfold", "fold_fused", "fuses"]

FUSED_ON: set[str] = set()
"""Devices on which these kernels are used, where Triton is installed; take it out, and PyTorch does all."""

TOKENS, SLOTS, UNFOLDED, WARPS = 32, 32, 16, 8
"""Tokens and slots of which a program has a tile, slots of the gradient's, and warps that share it: with heads of 128
nearly all stays in registers."""

WIDEST, LONGEST = 128, 1024
"""Channels of a head, and tokens of a chunk, that a program can hold on any GPU since 2020."""


@functools.cache
def _kernels() -> Any:
    """The kernels' module; None where Triton is not installed."""
    return importlib.import_module("memkit.engine.kernels") if importlib.util.find_spec("triton") else None


def fuses(rules: SlotRules, sums: Tensor) -> bool:
    """Whether the kernels know this memory, which sums [b, g, m, d + v], and this device."""
    policy, routing, spec = rules.policy, rules.policy.routing, rules.policy.readout.spec
    joins = type(routing) is Nearest and routing.similarity == "dot" and routing.new_slots and routing.least is None
    read = spec.key == "layer-norm" and spec.value == "birth-radius" and spec.bias == "none"
    summed = policy.merging.additive and policy.merging.joins and policy.merging.of == "both"
    fits = (
        max(rules.width, sums.shape[-1] - rules.width) <= WIDEST
        and policy.chunk <= LONGEST
        and rules.dtype != torch.float64
    )
    known = type(policy.admission) is Novelty and joins and read and summed and not policy.rotary.rotates_slots
    return known and fits and sums.device.type in FUSED_ON and _kernels() is not None


def _there(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's GPU while this lasts: Triton takes the current one."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def fold_fused(
    rules: SlotRules, steps: Sequence[Step], chunk: Chunk, stretch: Stretch
) -> tuple[Stretch, SlotView, Tensor, Tensor] | None:
    """The stretch with its tokens placed; slots as each of k steps reads them, [b·k, g, m, …]; last sums and numbers.

    chunk: the stretch's tokens. None where that is for PyTorch: not one chunk before each step, sinks among the tokens,
    or a memory that has no slot which they may join and does not take a chunk whole. Keys that are the same to the last
    bit may join another slot than in PyTorch, for a founder's key is read by PyTorch's LayerNorm here.
    """
    leaving = [each for step in steps for each in step.leaving]
    if len(leaving) != len(steps) or any(not _simple(each, rules.policy.sinks) for each in leaving):
        return None
    with _there(stretch.sums):
        return _folded(rules, leaving, chunk, stretch)


def _folded(
    rules: SlotRules, leaving: list[LeavingChunk], chunk: Chunk, stretch: Stretch
) -> tuple[Stretch, SlotView, Tensor, Tensor]:
    size, width, device = leaving[0].size, rules.width, stretch.sums.device
    chunk.memory_keys = keys = memory_keys(rules, chunk).contiguous()
    everyone = torch.ones(chunk.keys.shape[:3], dtype=torch.bool, device=device)
    alone, joining = contributions(rules, chunk, everyone), contributions(rules, chunk, None)
    some_found = any(0 < int(each.new_slots[0]) < size for each in leaving)
    as_slots = read_tokens(rules, chunk).contiguous() if some_found else keys
    batch, heads, tokens = keys.shape[:3]
    slot = torch.empty(batch, heads, tokens, dtype=torch.long, device=device)
    founded = torch.zeros(batch, heads, tokens, dtype=torch.uint8, device=device)
    sums = stretch.sums.clone(memory_format=torch.contiguous_format)
    fold = _Fold(rules, stretch, (alone, joining), slot, founded, sums, kept=False)
    kernels, rows = _kernels(), batch * heads
    best_of_all, best = torch.empty(2, rows, size, dtype=torch.float32, device=device)
    place = torch.empty(rows, size, dtype=torch.int32, device=device)
    grid, tiles = (rows, -(-size // TOKENS)), {"width": width, "padded": _power(width), "tokens": TOKENS}
    tiles["num_warps"] = WARPS
    for number, each in enumerate(leaving):
        here = slice(number * size, (number + 1) * size)
        live, new = int(each.slots_before[0]), int(each.new_slots[0])
        goes, founds, asks = slot[:, :, here], founded[:, :, here], keys[:, :, here]
        if new == size:
            goes.copy_(torch.arange(live, live + size, device=device))
            founds.fill_(1)
        else:
            strides = (tokens * width, fold.room * width, tokens)
            tensors = (asks, fold.route, best_of_all, best, goes)
            kernels.nearest[grid](*tensors, live, size, *strides, sinks=rules.policy.sinks, **tiles, slots=SLOTS)
        if 0 < new < size:
            facts = (new, live, size, tokens)
            kernels.found[(rows,)](best_of_all, founds, place, *facts, padded_chunk=_power(size), tokens=TOKENS)
            tensors = (asks, as_slots[:, :, here], founds, place, best, goes)
            kernels.join[grid](*tensors, size, tokens * width, tokens, **tiles)
        fold.run(number, 1, live + new)
    founders = founded.view(torch.bool)
    placed = dataclasses.replace(stretch, slot=slot, founders=founders)
    numbers, room = stretch.numbers, fold.room
    added = torch.where(founders.unsqueeze(-1), alone[1], joining[1]).flatten(0, 2)
    numbers = numbers.flatten(0, 2).index_put((flat_slots(slot, room),), added, accumulate=True).view_as(numbers)
    return placed, fold.view(), sums, numbers


class _Fold:
    """What the kernel `fold` is given, but for which chunks: see there.

    kept: whether what each step holds is kept, and `sums` are left as they are.
    """

    def __init__(
        self,
        rules: SlotRules,
        stretch: Stretch,
        rows: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        slot: Tensor,
        founded: Tensor,
        sums: Tensor,
        kept: bool,
    ) -> None:
        (alone, numbers), (joining, _) = rows
        device, wide = sums.device, torch.float32
        self.batch, self.heads, self.room, both = sums.shape
        self.count, self.width, self.values = len(stretch.sizes), rules.width, both - rules.width
        radius = rules.policy.statistics.index(RADIUS)
        reach, self.radii = (each[..., radius].to(wide).contiguous() for each in (numbers, stretch.numbers))
        held = (sums, self.radii)
        self.route = sums if kept else read_slots(rules, sums, stretch.numbers).route.contiguous()
        self.norm = [each.detach().to(wide).contiguous() for each in rules.key_norm or ()]
        self.norm = self.norm or [torch.ones(self.width, device=device), torch.zeros(self.width, device=device)]
        shape = (self.batch, self.count, self.heads, self.room)
        self.keys = torch.zeros(*shape, self.width, dtype=rules.dtype, device=device)
        self.seen = torch.zeros(*shape, self.values, dtype=rules.dtype, device=device)
        self.kept = (sums.new_empty(*shape, both), sums.new_empty(shape)) if kept else held
        read = (self.route, *self.norm, self.keys, self.seen, *self.kept)
        self.tensors = (alone.contiguous(), joining.contiguous(), reach, slot, founded, *held, *read)
        self.size, self.tokens, self.keeps = stretch.sizes[0], slot.shape[2], kept
        self.widths = {
            "width": self.width,
            "values": self.values,
            "padded": _power(self.width),
            "padded_values": _power(self.values),
            "epsilon": LAYER_NORM_EPS,
            "shortest": SHORTEST,
        }

    def run(self, first: int, chunks: int, after: int) -> None:
        """Fold some chunks in, after which there are so many slots."""
        _kernels().fold[self.batch * self.heads, -(-after // SLOTS)](
            *self.tensors,
            *(first, chunks, after, self.size, self.count, self.heads),
            *(self.tokens * (self.width + self.values), self.tokens, self.room),
            **self.widths,
            tokens=TOKENS,
            keeps=self.keeps,
            slots=SLOTS,
            num_warps=WARPS,
        )

    def view(self) -> SlotView:
        """The slots as each step reads them, [b·k, g, m, …]."""
        keys = self.keys.flatten(0, 1)
        return SlotView(keys, keys, self.seen.flatten(0, 1), None)


class Unfold:
    """The way back through a stretch: its chunks folded again, as each step read them; then their gradients.

    chunk: the stretch's tokens.
    """

    def __init__(self, rules: SlotRules, stretch: Stretch, chunk: Chunk) -> None:
        self.rules, self.stretch = rules, stretch
        rows = contributions(rules, chunk, stretch.founders)
        founded = stretch.founders
        if founded is None:
            founded = torch.zeros_like(stretch.slot, dtype=torch.bool)
        self.fold = _Fold(
            rules, stretch, (rows, rows), stretch.slot, founded.view(torch.uint8), stretch.sums, kept=True
        )
        with _there(stretch.sums):
            self.fold.run(0, self.fold.count, self.fold.room)

    @classmethod
    def of(cls, rules: SlotRules, stretch: Stretch, chunk: Chunk) -> Unfold | None:
        """None where that is for PyTorch: chunks of several lengths, or none, and tokens that may go nowhere."""
        alike = len(set(stretch.sizes)) == 1 and stretch.sizes[0] > 0 and not stretch.drops
        return cls(rules, stretch, chunk) if alike and fuses(rules, stretch.sums) else None

    def back(self, of_slots: Sequence[Tensor], grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of what each token adds, [b, g, n, d + v] and [b, g, n, s], and of the LayerNorm, if it is learned.

        of_slots: those of how slots' keys and values read, [b·k, g, m, …]; grads: those of sums and numbers,
        [b, g, m, …], after the last step, which become those before the first.
        """
        with _there(grads[0]):
            return self._back(of_slots, *grads)

    def _back(self, of_slots: Sequence[Tensor], sums: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        fold, (kept, radii) = self.fold, self.fold.kept
        radius = self.rules.policy.statistics.index(RADIUS)
        of_sums, of_radii = sums.float().contiguous(), numbers[..., radius].float().contiguous()
        tiles = -(-fold.room // UNFOLDED)
        of_norm = sums.new_empty(fold.batch * fold.heads, tiles, 2, fold.width, dtype=torch.float32)
        _kernels().unfold[fold.batch * fold.heads, tiles](
            *(kept, radii, *(each.contiguous() for each in of_slots), of_sums, of_radii, fold.norm[0], of_norm),
            *(fold.count, fold.heads, fold.room),
            **fold.widths,
            slots=UNFOLDED,
            num_warps=WARPS,
        )
        where = self.stretch.places()
        shape = self.stretch.slot.shape
        rows = kept.flatten(0, 3)[where].view(*shape, -1)
        flat = flat_slots(self.stretch.slot, fold.room)
        of_numbers = numbers.flatten(0, 2)[flat].view(*shape, -1)
        of_numbers[..., radius] = radii.flatten()[where].view(shape).to(numbers.dtype)
        sums.copy_(of_sums)
        numbers[..., radius] = of_radii.to(numbers.dtype)
        return rows, of_numbers, list(of_norm.sum((0, 1)).unbind()) if self.rules.key_norm is not None else []


def _simple(leaving: LeavingChunk, sinks: int) -> bool:
    """Whether all of a chunk's tokens found, or some slot is there that they may join, and no sink is among them."""
    live, new, own_sinks = (int(each[0]) for each in (leaving.slots_before, leaving.new_slots, leaving.sink_tokens))
    return new == leaving.size or (live > sinks and not own_sinks)


def _power(number: int) -> int:
    """The power of two, 16 at least, that is no smaller."""
    return max(16, 1 << (number - 1).bit_length())
