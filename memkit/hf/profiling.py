"""Measure a head profile: how many rows each layer and head of a model needs, by what leaving them out would cost.

A document is read with full attention. Its reader is somebody who goes on with it (queries of the text, turned to
positions behind its end) or somebody who reads it again (queries of a second reading). They meet every key, and tell
what each row is worth (`memkit.pieces.evidence`: the error of the output, were it left out). All heads then share one
budget by one threshold on that error, after each has had half of its even share. The profile is how many times the even
share a head gets, averaged over documents, lengths and budgets. (In a short text a head that copies from far back has
nothing more to keep; the longer the text, the more of the rows it needs.) Layers that slide in the stock model, or do
not attend, read as they do there, and have no part in it: their ratios are 1.

Errors of a head's own output do not say what later layers make of them. Where it is asked for (`ablate`), a row's error
e_j counts as its part of what the loss L rises by where that head h alone is blind to far rows (`memkit.hf.ablation`):

    worth_j = e_j · (L_h − L) / Σ_i e_i

and each head has a quarter of its even share in any case.

Neither says what is wanted of a text that was read once and is then asked about: readers `asked` hide facts in it, and
ask (`memkit.hf.asking`). The mean with another profile (`beside`) is for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memkit.engine.compress import ASKED, FIRST, next_readers, repeat_readers, row_worth
from memkit.errors import InputError, ModelError, shown
from memkit.hf.ablation import SINKS, WINDOW, head_costs
from memkit.hf.asking import FACTS, needs_of_answers
from memkit.hf.attachment import check_free
from memkit.hf.decoder import facts_of, find_decoder, kv_heads_of
from memkit.hf.fitting import check_rotation
from memkit.hf.loading import LoadedModel
from memkit.hf.logits import output_head
from memkit.hf.probe import LayerFacts, attention_function, probe
from memkit.hf.rereading import connecting_ids
from memkit.hf.watched import NAME, watching
from memkit.pieces.readout import TINY
from memkit.profiles import HeadProfile, fitting_profile, load_profile
from memkit.whole import whole_number

__all__ = ["Measured", "measure_profile"]

LEAST = 0.5
"""Of its even share, what a head gets whatever its rows are worth."""
LEAST_WEIGHED = 0.25
"""The same, where it is known what its rows cost, or what they are asked for."""
STEP = 0.125
"""Ratios are rounded to this: heads that hardly differ then go side by side."""
LEAST_COST = 5e-4
"""Nats per token that a head costs at least: what is below is the text's accident."""
ABLATED = 640
"""So many tokens of a document are read again and again, each time with another head blind."""
ROWS = (256, 512)
"""How many rows each head would have on average, where nothing else is asked for."""

Progress = Callable[[str, int, int], None]
"""Called with what is measured, layers done, and how many there are in all documents."""


@dataclass(frozen=True)
class Measured:
    """A profile, and the ratios [documents, layers, heads] of each document by itself."""

    profile: HeadProfile
    each: Tensor

    @property
    def stability(self) -> float:
        """The correlation of a document's ratios with another's, averaged over pairs; 1 where there is one document."""
        flat = self.each.flatten(1)
        if len(flat) < 2:
            return 1.0
        return float(torch.corrcoef(flat)[*torch.triu_indices(len(flat), len(flat), 1)].mean())


def check_settings(
    tokens: int | Sequence[int],
    readers: str,
    rows: Sequence[int] = ROWS,
    ablate: bool = False,
    beside: str | Path | None = None,
) -> tuple[list[int], list[int]]:
    """The lengths and rows that `measure_profile` is given, checked before a model is loaded.

    Raises `InputError`, and `PolicyError` for a profile beside it that is not there or not right.
    """
    if readers not in ("next", "repeat", "mixed", "asked"):
        raise InputError(f"readers must be 'next', 'repeat', 'mixed' or 'asked', got {shown(readers)}")
    if ablate and readers == "asked":
        raise InputError("readers asked say what answers need, and have no loss to weigh it by; leave ablate out")
    if beside is not None:
        load_profile(beside)
    budgets = [whole_number("rows", each, 4 * SINKS) for each in rows]
    given, least = tokens if isinstance(tokens, Sequence) else [tokens], 2 * max(ASKED, *budgets)
    lengths = [whole_number("tokens", each, least, 2**20) for each in given]
    if not lengths:
        raise InputError("tokens must be one length at least, got none")
    return lengths, budgets


@torch.no_grad()
def measure_profile(
    loaded: LoadedModel,
    documents: Sequence[str],
    *,
    tokens: int | Sequence[int] = 2048,
    rows: Sequence[int] = ROWS,
    names: Sequence[str] = (),
    readers: Literal["next", "repeat", "mixed", "asked"] = "next",
    ablate: bool = False,
    beside: str | Path | None = None,
    progress: Progress | None = None,
) -> Measured:
    """Measure a model's head profile on some texts.

    documents: of each the first `tokens` tokens are read; names: what to call them in the profile.
    tokens: one length, or several, each of which is read; the ratios are averaged over these.
    rows: how many rows each head would have on average, sinks and window included; the ratios are averaged over these.
    readers: who says what rows are worth: `next`, somebody who goes on with the text; `repeat`, somebody who reads it
    again, behind the words of `connecting_ids`; `mixed`: the mean of both; `asked`: who answers questions about facts
    that are hidden in it.
    ablate: whether errors are weighed by what the loss of these readers rises by where a head is blind to far rows: one
    more reading of `ABLATED` tokens of each document per head.
    beside: another profile of this model, a shipped one's name or a path; the ratios are the mean of both.

    Raises `InputError` for a text that is too short, or too long to be read twice, `ModelError` for a model that
    `hf.attach` refuses, or none of whose layers attends to everything, `PolicyError` for a profile of another model.
    """
    decoder = find_decoder(loaded.model)
    check_free(decoder)
    facts = probe(decoder)
    measured_layers = [layer for layer, each in facts.items() if each.window is None]
    if not measured_layers:
        raise ModelError("no layer of this model attends to everything, so there are no rows to share; leave heads out")
    for layer in measured_layers:
        check_rotation(decoder, layer, facts[layer])
    lengths, budgets = check_settings(tokens, readers, rows, ablate)
    longest = max(lengths)
    config = decoder.config
    layers, heads = config.num_hidden_layers, kv_heads_of(config)
    other = None if beside is None else fitting_profile(beside, layers, heads, facts_of(config))
    words = [] if readers in ("next", "asked") else connecting_ids(loaded.tokenizer)
    positions, known = 2 * longest + len(words), getattr(config, "max_position_embeddings", None)
    if words and known is not None and positions > known:
        raise InputError(f"readers {readers} take {positions} positions, and the model knows {known}; lower tokens")
    if not documents:
        raise InputError("documents must be one text at least, got none")
    logits, least = output_head(loaded.model) if ablate else None, LEAST
    if ablate or readers == "asked":
        least = LEAST_WEIGHED
    readings = len(lengths) * (len(FACTS) if readers == "asked" else 1)
    readings += heads * ablate * (2 if readers == "mixed" else 1)
    every = len(measured_layers) * readings
    steps = itertools.count(1)

    def done() -> None:
        if progress is not None:
            progress("head profile", next(steps), len(documents) * every)

    found: list[Tensor] = []
    for number, text in enumerate(documents):
        ids = loaded.tokenizer(text[: 16 * longest], verbose=False)["input_ids"][:longest]
        if len(ids) < longest:
            raise InputError(
                f"each document must have {longest} tokens at least, got one of {len(ids)}; give longer texts, or "
                f"fewer tokens (at least {2 * max(ASKED, *budgets):,})"
            )
        if readers == "asked":
            needs = [
                needs_of_answers(decoder.module, loaded.tokenizer, ids[:length], facts, measured_layers, number, done)
                for length in lengths
            ]
            found.append(torch.stack([each.ratios(budget, least) for each in needs for budget in budgets]).mean(0))
            continue
        worths = [_worth(loaded, decoder.module, facts, ids[:length], words, readers, done) for length in lengths]
        if logits is not None:
            blind = [(layer, head) for layer in measured_layers for head in range(heads)]
            read = _ablated(ids, words, readers)
            costs = torch.tensor([head_costs(decoder.module, logits, *each, facts, blind, done) for each in read])
            worths = [_weighed(worth, costs.mean(0).view(-1, heads)) for worth in worths]
        found.append(torch.stack([_ratios(worth, budget, least) for worth in worths for budget in budgets]).mean(0))
    each = torch.ones(len(found), layers, heads)
    each[:, measured_layers] = torch.stack(found)
    ratios = torch.ones(layers, heads, dtype=torch.float64)
    mean = each[:, measured_layers].mean(0).double()
    if other is not None:
        mean = (mean + torch.tensor(other.ratios, dtype=torch.float64)[measured_layers]) / 2
    ratios[measured_layers] = _rounded(mean)
    by = (
        "root of the output error"
        + ", weighed by the loss with the head blind" * ablate
        + ", one threshold over all heads"
    )
    if readers == "asked":
        by = "what answers need of the facts they are about, spent where a row gains most"
    measured: dict[str, Any] = {
        "texts": list(names) if names else f"{len(documents)} texts",
        "tokens": longest if len(lengths) == 1 else lengths,
        "rows": budgets,
        "by": f"{by}, at least {least:g} of the even share",
    }
    if beside is not None:
        measured["beside"] = str(beside)
    profile = HeadProfile(
        model=facts_of(config),
        readers=readers,
        measured=measured,
        ratios=tuple(tuple(row) for row in ratios.tolist()),
    )
    return Measured(profile, each)


def _worth(
    loaded: LoadedModel,
    decoder: nn.Module,
    facts: Mapping[int, LayerFacts],
    ids: list[int],
    words: list[int],
    readers: str,
    done: Callable[[], None],
) -> Tensor:
    """The roots of each row's errors [layers, g, n] as readers tell them, of the layers that attend to everything."""
    tokens, scores = len(ids), list[Tensor]()

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, _output: Tensor) -> None:
        here = facts[layer]
        if here.window is not None:
            return
        assert here.rotation is not None  # checked before
        asked: list[Tensor] = []
        if readers != "repeat":
            asked.append(next_readers(query[:, :, :tokens], here.rotation))
        if readers != "next":
            asked.append(repeat_readers(query[:, :, -tokens:]))
        roots = [row_worth(each, key[:, :, :tokens], value[:, :, :tokens], scale)[0][0] for each in asked]
        scores.append(torch.stack(roots).square().mean(0).sqrt())
        done()

    given = ids if readers == "next" else [*ids, *words, *ids]
    with attention_function(decoder, NAME):
        decoder(torch.tensor([given], device=loaded.model.device), use_cache=False, **watching(look, facts))
    return torch.stack(scores)


def _ablated(ids: list[int], words: list[int], readers: str) -> Sequence[tuple[list[int], int]]:
    """What is read with a head blind, and from which token on the loss counts, for each of the readers."""
    some = ids[:ABLATED]
    goes_on = ids[: 2 * ABLATED], 2 * WINDOW
    again = [*some, *words, *some], len(some) + len(words) + FIRST
    return {"next": [goes_on], "repeat": [again], "mixed": [goes_on, again]}[readers]


def _weighed(scores: Tensor, costs: Tensor) -> Tensor:
    """The roots of each row's part of its head's cost: scores [layers, g, n] are roots of errors, costs [layers, g]."""
    errors = scores[..., SINKS:].square().sum(-1)
    return scores * (costs.to(scores.dtype).clamp(min=LEAST_COST) / errors.clamp(min=TINY)).sqrt()[..., None]


def _ratios(scores: Tensor, rows: int, least: float = LEAST) -> Tensor:
    """How many times the even share each head gets, [layers, g], of scores [layers, g, n] with so many rows a head, and
    at least so much of it for each."""
    window = rows // 8
    share = rows - SINKS - window
    candidates = scores[..., SINKS : scores.shape[-1] - window].flatten(0, 1)
    given = int(least * share)
    ranked = candidates.sort(dim=1, descending=True).values[:, given:]
    free = (share - given) * len(ranked)
    threshold = ranked.flatten().sort(descending=True).values[free - 1]
    return ((ranked >= threshold).sum(1) + given).view(scores.shape[:2]) / share


def _rounded(ratios: Tensor) -> Tensor:
    """Multiples of STEP whose mean stays 1: rounded down, and one step more for those that lost most by it."""
    steps = ratios.flatten().double() / STEP
    whole = steps.floor()
    missing = round(len(steps) / STEP - float(whole.sum()))
    whole[(steps - whole).argsort(descending=True, stable=True)[:missing]] += 1
    return (whole * STEP).view_as(ratios)
