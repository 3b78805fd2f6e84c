"""Generation: token after token, from prompts of unequal length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memkit.errors import InputError, shown, unknown_name
from memkit.lm.boundaries import UNWANTED
from memkit.lm.memory import ModelMemory
from memkit.lm.spec import ModelSpec
from memkit.whole import SEEDS, is_finite, whole_number, whole_numbers

__all__ = ["Prompts", "Reader", "Settings", "sample", "stream"]

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
    boundary_ids: Collection[int]
    pad_id: int
    seed: int | None


class Reader(Protocol):
    """What generates: a model that reads token ids, goes on from a memory, and has a head."""

    spec: ModelSpec
    takes_boundaries: bool

    @property
    def head(self) -> nn.Linear:
        """States [b, width] → logits [b, vocabulary]."""
        ...

    def read(
        self,
        ids: Tensor,
        memory: ModelMemory | None = None,
        lengths: Tensor | None = None,
        boundaries: Tensor | None = None,
    ) -> tuple[Tensor, ModelMemory]:
        """ids [b, t] → what `head` takes, [b, t, width], and the memory to go on with."""
        ...


def stream(model: Reader, prompts: Prompts, **settings: Unpack[Settings]) -> Iterator[Tensor]:
    """New tokens as they come, [b] each. Bad settings raise `InputError` here, before the first token is asked for."""
    if "max_new_tokens" not in settings:
        raise InputError("max_new_tokens is required: how many tokens to generate at most")
    if unknown := settings.keys() - Settings.__annotations__.keys():
        raise InputError(unknown_name("setting", sorted(unknown)[0], Settings.__annotations__))
    checked = _checked(settings, model.spec.vocabulary)
    if checked["boundary_ids"] and not model.takes_boundaries:
        raise InputError(f"boundary_ids {UNWANTED}")
    device = model.head.weight.device
    ids, lengths = _right_padded(prompts, settings.get("mask"), settings.get("lengths"), device, model.spec.vocabulary)
    return _steps(model, ids, lengths, **checked)


@torch.no_grad()
def _steps(
    model: Reader,
    ids: Tensor,
    valid: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_ids: list[int],
    boundary_ids: list[int],
    pad_id: int,
    seed: int | None,
) -> Iterator[Tensor]:
    """New tokens after prompts `ids` [b, t] of `valid` [b] tokens, padded on the right. Everything is checked."""
    device = ids.device
    generator = None
    if seed is not None:
        generator = torch.Generator(device=device).manual_seed(seed)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    boundaries = torch.tensor(sorted(boundary_ids), dtype=torch.long, device=device)

    def ends(ids: Tensor) -> Tensor | None:
        return torch.isin(ids, boundaries) if boundary_ids else None

    x, memory = model.read(ids, lengths=None if bool((valid == ids.shape[1]).all()) else valid, boundaries=ends(ids))
    x = x[torch.arange(len(valid), device=device), valid - 1]
    going = torch.ones_like(valid, dtype=torch.bool)
    for step in range(max_new_tokens):
        chosen = sample(model.head(x), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield torch.where(going, chosen, pad_id)
        going &= ~torch.isin(chosen, stops)
        if step == max_new_tokens - 1 or not going.any():
            return
        new = chosen[:, None]
        x, memory = model.read(new, memory, None if bool(going.all()) else going.long(), ends(new))
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
    # From the likeliest down, so that no temperature makes an infinite score of it; 1/tiny is finite yet.
    scale = max(temperature, torch.finfo(torch.float32).tiny)
    ranked, order = ((logits - logits.amax(-1, keepdim=True)) / scale).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = -torch.inf
    chances = ranked.softmax(-1)
    if top_p is not None:
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]


def _checked(settings: Settings, vocabulary: int) -> dict[str, Any]:
    """What `_steps` wants, of settings that are in order."""
    temperature, top_k, top_p = (settings.get(name) for name in ("temperature", "top_k", "top_p"))
    temperature = 0.0 if temperature is None else temperature
    if not is_finite(temperature) or temperature < 0:
        raise InputError(
            f"temperature must be at least 0 (0: the likeliest token) and finite, got {shown(temperature)}"
        )
    if top_k is not None:
        top_k = min(whole_number("top_k", top_k, 1, remedy="; leave it out to draw from all tokens"), vocabulary)
    if top_p is not None and not (is_finite(top_p) and 0 < top_p <= 1):
        raise InputError(f"top_p must be more than 0 and at most 1, got {shown(top_p)}")
    seed = settings.get("seed")
    stop_ids, boundary_ids = (
        list(each) if isinstance(each, (set, frozenset)) else each
        for each in (settings.get("stop_ids", ()), settings.get("boundary_ids", ()))
    )
    return {
        "max_new_tokens": whole_number("max_new_tokens", settings["max_new_tokens"], 0),
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": None if top_p is None else float(top_p),
        "stop_ids": whole_numbers("stop_ids", stop_ids, 0, vocabulary - 1, remedy="; [] for none").tolist(),
        "boundary_ids": whole_numbers("boundary_ids", boundary_ids, 0, vocabulary - 1, remedy="; [] for none").tolist(),
        "pad_id": whole_number("pad_id", settings.get("pad_id", 0), -(2**63), 2**63 - 1),
        "seed": None if seed is None else whole_number("seed", seed, *SEEDS),
    }


def _right_padded(
    prompts: Prompts,
    mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    device: torch.device,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Prompts as ids [b, t], padded on the right, and their lengths [b]."""
    if not isinstance(prompts, Tensor):
        for name, given in (("mask", mask), ("lengths", lengths)):
            if given is not None:
                raise InputError(f"a list of prompts needs no {name}; leave it out")
        if not isinstance(prompts, (list, tuple)):
            raise InputError(f"prompts must be ids [batch, tokens] or a list of lists, got {shown(prompts)}")
        rows = [_ids(number, prompt, vocabulary) for number, prompt in enumerate(prompts)]
    else:
        if prompts.ndim != 2 or prompts.is_floating_point() or prompts.is_complex() or prompts.dtype == torch.bool:
            raise InputError(
                f"prompts must be ids [batch, tokens] or a list of lists, "
                f"got shape {tuple(prompts.shape)} of {prompts.dtype}"
            )
        if mask is not None and lengths is not None:
            raise InputError("prompts are padded as mask or as lengths say, got both; leave one out")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != prompts.shape):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else shown(mask)
            raise InputError(f"mask must be as the prompts, {tuple(prompts.shape)}, got {got}")
        rows = [row if mask is None else row[mask[index].bool()] for index, row in enumerate(prompts)]
        if lengths is not None:
            limits = f"be whole numbers between 0 and the prompts' {prompts.shape[1]} tokens"
            wanted = whole_numbers(
                "lengths", lengths, 0, prompts.shape[1], count=len(rows), per="prompt", limits=limits
            )
            rows = [row[:length] for row, length in zip(rows, wanted.tolist(), strict=True)]
        rows = [_ids(number, row, vocabulary) for number, row in enumerate(rows)]
    if not rows or any(not len(row) for row in rows):
        raise InputError(f"every prompt needs at least one token, got lengths {[len(row) for row in rows]}")
    counts = torch.tensor([len(row) for row in rows], device=device)
    return pad_sequence([row.to(device) for row in rows], batch_first=True), counts


def _ids(number: int, prompt: Any, vocabulary: int) -> Tensor:
    """One prompt's token ids."""
    hint = "; a single prompt is a list of one list" if isinstance(prompt, int) else ""
    return whole_numbers(f"prompts[{number}]: ids", prompt, 0, vocabulary - 1, remedy=hint)
