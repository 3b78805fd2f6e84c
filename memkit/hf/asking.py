"""How many rows each head must keep, so that what a text said once is still there when somebody asks for it.

Facts are hidden in a text that is read with full attention, and asked for at its end. Whatever head the answers read
them by needs their rows: row j is demanded by

    D_j = Σ_r p_rj² · ‖v_j − o_r‖² / ‖o_r‖²         r over the queries that say an answer, j over the rows of its fact,

the squared change of the head's output without it, of its own length. But a memory does not know what will be asked: it
keeps the rows that the text's own queries said most of (`observe: {aggregate: max, apart: 8}`). With k rows a head so
keeps the demand of those among its first k, and heads share the rows where a row more gains most.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memkit.engine import attend
from memkit.engine.compress import NEIGHBOURS
from memkit.errors import InputError
from memkit.hf.ablation import SINKS
from memkit.hf.probe import LayerFacts, attention_function
from memkit.hf.watched import NAME, watching
from memkit.pieces.admission import OutputErrorSpec, mean_of_neighbours
from memkit.pieces.chunking import FixedChunkerSpec
from memkit.pieces.evidence import Evidence
from memkit.pieces.growth import FixedGrowthSpec
from memkit.pieces.merging import DropSpec
from memkit.pieces.observation import ObservationSpec
from memkit.pieces.readout import TINY
from memkit.pieces.window import BlockWindowSpec
from memkit.policy import PolicySpec

__all__ = ["FACTS", "Needs", "needs_of_answers"]

FACTS = (
    (
        "\n\nMartha's phone number is {number}. Write it down. {number} is Martha's phone number.\n\n",
        "\n\nWhat is Martha's phone number? Martha's phone number is",
    ),
    (
        "\n\nThe safe opens with the code {number}. Keep it. {number} is the code of the safe.\n\n",
        "\n\nWhat is the code of the safe? The safe opens with the code",
    ),
    (
        "\n\nThe ticket to Lisbon costs {number} dollars. Note it. {number} dollars is what the ticket costs.\n\n",
        "\n\nWhat does the ticket to Lisbon cost? The ticket to Lisbon costs",
    ),
    (
        "\n\nThe library owns {number} books. Mark it. {number} is how many books the library owns.\n\n",
        "\n\nHow many books does the library own? The library owns",
    ),
)
"""What is hidden, and how it is asked for; none is what `memkit compare --passkey` hides."""

CHUNK, APART = 32, 8
"""The text's own queries are asked chunk by chunk, and of rows that stand so far before them."""


@dataclass(frozen=True)
class Needs:
    """Of each head: where demanded rows rank among the text's rows by what its own queries said of them (0: first), and
    their demand, both [layers, g, n]."""

    ranks: Tensor
    demand: Tensor

    def ratios(self, rows: int, least: float) -> Tensor:
        """How many times the even share each head gets, [layers, g], with so many rows a head, and at least so much of
        it for each."""
        share = rows - SINKS - rows // 8
        given = least * share
        slots = torch.full(self.ranks.shape[:2], given, dtype=torch.float64)
        free = (share - given) * slots.numel()
        steps = [
            (gain / more, more, layer, head)
            for layer, ranks in enumerate(self.ranks.tolist())
            for head, _ in enumerate(ranks)
            for more, gain in _steps(ranks[head], self.demand[layer, head].tolist(), given)
        ]
        for _, more, layer, head in sorted(steps, reverse=True):
            spent = min(more, free)
            slots[layer, head] += spent
            free -= spent
        return ((slots + free / slots.numel()) / share).float()


def _steps(ranks: list[float], demand: list[float], given: float) -> list[tuple[float, float]]:
    """(rows, gain) of one head, from `given` rows on, falling in gain per row: the hull of all ways to spend rows."""
    points, total = [(given, 0.0)], 0.0
    for rank, more in sorted(zip(ranks, demand, strict=True)):
        if rank < given or not more:
            continue
        total += more
        points.append((rank + 1, total))
    above = points[:1]
    for point in points[1:]:
        while len(above) > 1 and _slope(above[-2], above[-1]) <= _slope(above[-1], point):
            above.pop()
        above.append(point)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(above)]


def _slope(begin: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - begin[1]) / max(end[0] - begin[0], TINY)


@torch.no_grad()
def needs_of_answers(
    decoder: nn.Module,
    tokenizer: Any,
    ids: list[int],
    facts: Mapping[int, LayerFacts],
    layers: list[int],
    seed: int,
    done: Callable[[], None] = lambda: None,
) -> Needs:
    """What the answers of questions about facts need that are hidden in a text, for some of a decoder's layers.

    ids: the text's tokens, of which as many are read as there is room for beside the facts; seed: of the numbers;
    done: called after each layer of each question.

    Raises `InputError` where the facts take more than half of the text.
    """
    text, hidden = _with_facts(tokenizer, ids, seed)
    device = next(decoder.parameters()).device
    ranks: dict[int, Tensor] = {}
    demand = {layer: list[Tensor]() for layer in layers}
    wanted = torch.tensor([row for rows, _, _ in hidden for row in rows], device=device)

    for rows, question, answer in hidden:
        own = torch.tensor([int(row) in rows for row in wanted.tolist()], device=device)

        def look(
            layer: int,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            scale: float,
            _output: Tensor,
            answers: int = len(answer),
            own: Tensor = own,
        ) -> None:
            if layer not in demand:
                return
            if layer not in ranks:
                ranks[layer] = _ranks(query, key, value, scale, len(text))[:, wanted]
            asked = _demand(query[:, :, -answers:], key, value, scale)[:, wanted]
            demand[layer].append(torch.where(own, asked, 0))
            done()

        given = torch.tensor([[*text, *question, *answer[:-1]]], device=device)
        with attention_function(decoder, NAME):
            decoder(given, use_cache=False, **watching(look, facts))
    return Needs(
        torch.stack([ranks[layer] for layer in layers]),
        torch.stack([torch.stack(demand[layer]).sum(0) for layer in layers]),
    )


def _with_facts(
    tokenizer: Any, ids: list[int], seed: int
) -> tuple[list[int], list[tuple[range, list[int], list[int]]]]:
    """The text with a fact in the middle of each part; of each fact its rows, its question, and the answer's tokens."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    numbers = random.Random(seed)
    chosen = [(fact, question, str(numbers.randrange(10_000, 100_000))) for fact, question in FACTS]
    facts = [tokens(fact.format(number=number)) for fact, _, number in chosen]
    room = len(ids) - sum(map(len, facts))
    if room < len(ids) // 2:
        raise InputError(f"facts to ask for take {len(ids) - room} of {len(ids)} tokens; raise tokens")
    text, hidden, last = list[int](), list[tuple[range, list[int], list[int]]](), 0
    for nth, (fact, (_, question, number)) in enumerate(zip(facts, chosen, strict=True)):
        at = (2 * nth + 1) * room // (2 * len(facts))
        text += ids[last:at]
        hidden.append((range(len(text), len(text) + len(fact)), tokens(question), tokens(f" {number}")))
        text += fact
        last = at
    return text + ids[last:room], hidden


def _demand(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Σ_r p²·‖v − o‖²/‖o‖² of the last queries [1, h, n, d] for every row, [g, t]."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    grouped = queries.to(wide).reshape(1, keys.shape[1], -1, queries.shape[-1])
    scores = grouped @ keys.to(wide).mT * scale
    n = queries.shape[2]
    later = torch.ones(n, n, dtype=torch.bool, device=keys.device).triu(1)
    scores[..., -n:].masked_fill_(later.repeat(scores.shape[2] // n, 1), -torch.inf)
    shares, values = scores.softmax(-1), values.to(scores.dtype)
    outputs = shares @ values
    sizes = outputs.square().sum(-1, keepdim=True)
    apart = values.square().sum(-1).unsqueeze(-2) - 2 * outputs @ values.mT + sizes
    return (shares.square() * apart.clamp(min=0) / sizes.clamp(min=TINY)).sum(-2)[0]


def _ranks(queries: Tensor, keys: Tensor, values: Tensor, scale: float, tokens: int) -> Tensor:
    """Where each of the first `tokens` rows stands by the most that a chunk of the text's queries said of it, [g, t];
    sinks, which nobody has to keep, come first."""
    some = (tensor[:, :, :tokens] for tensor in (queries, keys, values))
    _, memory = attend(_watching(tokens), *some, scale=scale)
    error = Evidence.of(memory.window.last(tokens)["evidence"]).error
    worth = mean_of_neighbours(error.sqrt(), NEIGHBOURS)[0]
    worth[:, :SINKS] = torch.inf
    return worth.argsort(dim=-1, descending=True).argsort(dim=-1) - SINKS


def _watching(tokens: int) -> PolicySpec:
    """A memory of so many tokens that nothing leaves, and that hears what its queries say."""
    return PolicySpec(
        chunker=FixedChunkerSpec(size=CHUNK),
        window=BlockWindowSpec(chunks=-(-tokens // CHUNK)),
        growth=FixedGrowthSpec(slots=1),
        observe=ObservationSpec(queries=CHUNK, apart=APART, aggregate="max"),
        admission=OutputErrorSpec(),
        merging=DropSpec(),
    )
