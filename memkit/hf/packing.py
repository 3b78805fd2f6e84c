"""Texts packed into one row, as a padding-free collator hands them over: each is read as a row of its own.

Where texts begin is told by positions that start again at 0, by `cu_seq_lens_q` (how many tokens of all rows together
stand before each text, and how many there are), or by both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memkit.errors import InputError, shown

__all__ = ["KEYWORDS", "Packed", "find_packed"]

KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What a collator may say of packed texts; the lengths, and numbers of texts, follow from where they begin."""


class Packed:
    """Texts in rows [b, t], `lengths` [n] tokens each, one behind the other in the rows; each becomes a row, padded."""

    def __init__(self, lengths: Tensor, rows: int, columns: int) -> None:
        self.lengths, self.rows, self.columns = lengths, rows, columns
        ends = lengths.cumsum(0)
        offsets = torch.arange(int(lengths.max()), device=lengths.device)
        self.tokens = ((ends - lengths)[:, None] + offsets).clamp(max=rows * columns - 1)  # [n, longest]
        self.texts = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # [b · t]
        self.positions = torch.arange(rows * columns, device=lengths.device) - (ends - lengths)[self.texts]

    def to_the_left(self, tensor: Tensor) -> Tensor:
        """[b, h, t, d] → [n, h, longest, d], a text in each row."""
        flat = tensor.transpose(1, 2).flatten(0, 1)
        return flat[self.tokens.to(tensor.device)].transpose(1, 2)

    def back(self, tensor: Tensor) -> Tensor:
        """[n, h, longest, d] → [b, h, t, d], texts where they stood."""
        found = tensor.transpose(1, 2)[self.texts.to(tensor.device), self.positions.to(tensor.device)]
        return found.unflatten(0, (self.rows, self.columns)).transpose(1, 2)


def find_packed(given: dict[str, Any], rows: int, columns: int, device: torch.device) -> Packed | None:
    """The texts packed into a call's rows [b, t], or None where each row is one text.

    given: the call's arguments; what tells of packing is taken out, position_ids only where they tell it.
    Raises `InputError` where it does not fit the rows, or contradicts itself.
    """
    told = {name: each for name in KEYWORDS if (each := given.pop(name, None)) is not None}
    positions = given.get("position_ids")
    by_positions = None if positions is None else _by_positions(positions, rows, columns)
    begins: Tensor | None = None
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name not in told:
            continue
        here = _by_sums(name, told[name], rows, columns)
        if begins is not None and not torch.equal(begins, here):
            raise InputError("cu_seq_lens_q and cu_seq_lens_k must be equal, as texts attend to themselves; got two")
        begins = here
    if begins is None:
        begins = by_positions
    elif by_positions is not None and not torch.equal(begins, by_positions.cpu()):
        raise InputError(
            "position_ids must start again at 0 where cu_seq_lens_q says that a text begins, got other places; "
            "leave one of them out"
        )
    if begins is None or len(begins) == rows:
        return None
    if by_positions is not None:
        del given["position_ids"]
    begins = begins.to(device)
    return Packed(torch.diff(begins, append=begins.new_tensor([rows * columns])), rows, columns)


def _by_positions(positions: Tensor, rows: int, columns: int) -> Tensor | None:
    """Where texts begin, [n], among all tokens; None where positions are no texts' behind each other."""
    if positions.ndim != 2 or not columns or positions.shape not in ((rows, columns), (1, columns)):
        return None
    begin = positions == 0
    goes_on = torch.diff(positions, dim=1) == 1
    if not bool(begin[:, 0].all() and (begin[:, 1:] | goes_on).all()):
        return None
    return begin.expand(rows, columns).flatten().nonzero().flatten()


def _by_sums(name: str, sums: Any, rows: int, columns: int) -> Tensor:
    """The same of `cu_seq_lens_q`, on the CPU; a row begins a text in any case."""
    if not isinstance(sums, Tensor) or sums.ndim != 1 or sums.is_floating_point() or len(sums) < 2:
        what = f"{sums.dtype} {tuple(sums.shape)}" if isinstance(sums, Tensor) else shown(sums)
        raise InputError(f"{name} must be a tensor of whole numbers, one more than there are texts, got {what}")
    sums = sums.cpu().long()
    if int(sums[0]) or int(sums[-1]) != rows * columns or not bool((torch.diff(sums) > 0).all()):
        raise InputError(
            f"{name} must rise from 0 to the call's {rows * columns} tokens, got {shown(sums.tolist())}; say where "
            "each text begins, and where the last one ends"
        )
    edges = torch.arange(0, rows * columns, columns)
    if not bool(torch.isin(edges, sums).all()):
        raise InputError(f"{name} must begin a text with each of the {rows} rows; pack texts within a row")
    return sums[:-1]
