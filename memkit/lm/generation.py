"""Generation: token after token, from prompts of unequal length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memkit.errors import InputError

if TYPE_CHECKING:
    from memkit.lm.model import MemoryLM

__all__ = ["Prompts", "Settings", "sample", "stream"]

Prompts = Tensor | Sequence[Sequence[int]]


class Settings(TypedDict, total=False):
    """How to generate; see `MemoryLM.generate`."""

    max_new_tokens: Required[int]
    mask: Tensor | None
    lengths: Tensor | Sequence[int] | None
    temperature: float
    top_k: int | None
    top_p: float | None
    stop_ids: Collection[int]
    pad_id: int
    seed: int | None


def stream(model: MemoryLM, prompts: Prompts, **settings: Unpack[Settings]) -> Iterator[Tensor]:
    """New tokens as they come, [b] each. Bad settings raise `InputError` here, before the first token is asked for."""
    _check(settings["max_new_tokens"], settings.get("temperature", 0.0), settings.get("top_k"), settings.get("top_p"))
    return _steps(model, prompts, **settings)


@torch.no_grad()
def _steps(
    model: MemoryLM,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
    seed: int | None = None,
) -> Iterator[Tensor]:
    device = model.head.weight.device
    ids, valid = _right_padded(prompts, mask, lengths, device)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=device).manual_seed(seed)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    x, memory = model.read(ids, lengths=None if bool((valid == ids.shape[1]).all()) else valid)
    x = x[torch.arange(len(valid), device=device), valid - 1]
    going = torch.ones_like(valid, dtype=torch.bool)
    for step in range(max_new_tokens):
        chosen = sample(model.head(x), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        chosen = torch.where(going, chosen, pad_id)
        yield chosen.clone()
        going &= ~torch.isin(chosen, stops)
        if step == max_new_tokens - 1 or not going.any():
            return
        x, memory = model.read(chosen[:, None], memory, None if bool(going.all()) else going.long())
        x = x[:, -1]


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits [b, vocabulary].

    temperature 0: the likeliest (the lowest id on ties). Otherwise drawn from softmax(logits / temperature) over the
    top_k likeliest, and of these the fewest that hold top_p of the probability, the one that reaches it included.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    chances = ranked.softmax(-1)
    if top_p is not None:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not temperature >= 0:
        raise InputError(f"temperature must be at least 0 (0: the likeliest token), got {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}; leave it out to draw from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be more than 0 and at most 1, got {top_p}")


def _right_padded(
    prompts: Prompts, mask: Tensor | None, lengths: Tensor | Sequence[int] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts as ids [b, t], padded on the right, and their lengths [b]."""
    if not isinstance(prompts, Tensor):
        for name, given in (("mask", mask), ("lengths", lengths)):
            if given is not None:
                raise InputError(f"a list of prompts needs no {name}; leave it out")
        rows = [torch.tensor(list(prompt), dtype=torch.long) for prompt in prompts]
    else:
        if prompts.ndim != 2:
            raise InputError(
                f"prompts must be ids [batch, tokens] or a list of lists, got shape {tuple(prompts.shape)}"
            )
        if mask is not None and lengths is not None:
            raise InputError("prompts are padded as mask or as lengths say, got both; leave one out")
        if mask is not None and mask.shape != prompts.shape:
            raise InputError(f"mask must be as the prompts, {tuple(prompts.shape)}, got {tuple(mask.shape)}")
        rows = [row if mask is None else row[mask[index].bool()] for index, row in enumerate(prompts)]
        if lengths is not None:
            wanted = torch.as_tensor(lengths).tolist()
            if not isinstance(wanted, list) or len(wanted) != len(rows):
                raise InputError(f"lengths must be one whole number per prompt, {len(rows)}, got {wanted}")
            if not all(isinstance(each, int) and 0 <= each <= prompts.shape[1] for each in wanted):
                raise InputError(
                    f"lengths must be whole numbers between 0 and the prompts' {prompts.shape[1]} tokens, got {wanted}"
                )
            rows = [row[:length] for row, length in zip(rows, wanted, strict=True)]
    if not rows or any(not len(row) for row in rows):
        raise InputError(f"every prompt needs at least one token, got lengths {[len(row) for row in rows]}")
    counts = torch.tensor([len(row) for row in rows], device=device)
    return pad_sequence([row.to(device) for row in rows], batch_first=True), counts
