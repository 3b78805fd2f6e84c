"""Attention masks, as both kinds of models take them: 1 where a token is, 0 where padding is."""

from __future__ import annotations

from torch import Tensor

from memkit.errors import InputError, MemoryStateError

__all__ = ["present_tokens"]


def present_tokens(
    mask: Tensor | None, rows: int, columns: int, seen: Tensor, before: int, hint: str = ""
) -> Tensor | None:
    """Which tokens of this call are there, bool [rows, columns]; None where all are.

    Args:
        mask: [rows, columns] of this call, or [rows, before + columns] of all tokens so far, nonzero for a token.
        rows, columns: of this call's ids.
        seen: [rows], the tokens that each row's memory has read.
        before: columns of the earlier calls.
        hint: ends the message where the shape is another.

    Raises:
        InputError: the mask has another shape.
        MemoryStateError: the columns of earlier calls mark other tokens than were read.
    """
    if mask is None:
        return None
    if mask.shape not in ((rows, columns), (rows, before + columns)):
        raise InputError(
            f"attention_mask must cover this call's tokens, shape ({rows}, {columns}), or all tokens so far, "
            f"({rows}, {before + columns}), got {tuple(mask.shape)}{hint}"
        )
    earlier, now = mask.bool().tensor_split([mask.shape[1] - columns], dim=1)
    marked = earlier.sum(1)
    if earlier.shape[1] and (marked != seen.to(marked.device)).any():
        raise MemoryStateError(
            f"attention_mask must mark the tokens already read, {seen.tolist()} per row, got {marked.tolist()}; "
            "give this call's columns only, or pass on the mask of the earlier calls"
        )
    return None if bool(now.all()) else now
