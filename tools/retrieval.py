"""A number hidden in a text, and asked for: every policy, every number of rows, every kind of readers.

    python tools/retrieval.py perldiag.pod --tokens 2048 --rows 256 512 1024 --placements 50
    python tools/retrieval.py perldiag.pod --tokens 7168 --rows 1024 --placements 50 --prefill full

What `memkit compare --passkey` measures, for a table of many cells. With `--prefill full` each placement's prompt is
read once, and once more for readers who repeat it, and then compressed under every policy in turn: a policy that
observes readers of its own is asked with each kind of them, as `NAME:next`, `NAME:repeat`, `NAME:mixed`. A line per
cell: how many numbers are said exactly, and the loss in nats per token of the number with its standard error. `--out`
gets a line of JSON for each placement as soon as it is asked.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import memkit
from memkit import hf, passkey
from memkit.budgets import sized
from memkit.engine import compress
from memkit.hf import attention
from memkit.hf.logits import output_head
from memkit.hf.names import returned_cache, with_cache
from memkit.layers import LayerPoliciesSpec, as_layers
from memkit.pieces.evidence import Missed
from memkit.policy import Policy
from memkit.texts import read_text

POLICIES = ("streaming-4-512", "caote-512", "snapkv-512", "untrained-observed", "untrained-recall")
READERS = ("next", "repeat", "mixed")
JUDGES = {"repeat": slice(0, 1), "next": slice(1, 2), "mixed": slice(0, 2)}
"""Of the readers that a prompt is read for, those who repeat it and those who go on, who is asked."""


@dataclass(frozen=True)
class Cell:
    """A policy with so many rows, whose readers, where it has a choice of them, are of one kind."""

    label: str
    rows: int | None
    layers: LayerPoliciesSpec
    readers: str | None


def cells(names: Sequence[str], rows: Sequence[int], whole: bool) -> Iterator[Cell]:
    """Full attention, and every policy with every number of rows. whole: whether prompts are read in full."""
    yield Cell("full", None, as_layers("full"), None)
    for name in names:
        name, _, kind = name.partition(":")
        layers = as_layers(name)
        own = layers.policies[0].observe
        chooses = whole and own.queries and layers.policies[0].admission.kind != "expected-attention"
        kinds = (kind,) if kind else READERS if chooses and name.startswith("untrained") else (own.readers,)
        for each in kinds if chooses else (None,):
            asked = layers if each is None else as_layers(name, {"observe.readers": each})
            for number in rows:
                yield Cell(name if each is None else f"{name}:{each}", number, sized(asked, number), each)


class Judgement:
    """What readers say of a layer's rows, remembered: policies of one layer ask the same readers."""

    def __init__(self) -> None:
        self.module: Any = importlib.import_module("memkit.engine.compress")
        self.asked, self.said = self.module.row_worth, dict[Any, tuple[Tensor, Tensor]]()

    def __call__(
        self,
        readers: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        hidden: Tensor | None,
        neighbours: int,
        missed: Missed,
    ) -> tuple[Tensor, Tensor]:
        """`row_worth`; who asks for the same tensors again, all of which live until `forget`, hears the same."""
        if hidden is not None:
            return self.asked(readers, keys, values, scale, hidden, neighbours, missed)
        what = (readers.data_ptr(), readers.shape, keys.data_ptr(), keys.shape, neighbours, missed)
        if what not in self.said:
            self.said[what] = self.asked(readers, keys, values, scale, hidden, neighbours, missed)
        return self.said[what]

    def forget(self) -> None:
        """Another layer's rows come."""
        self.said.clear()


@torch.no_grad()
def compressed(
    loaded: hf.LoadedModel, chosen: Sequence[Cell], hidden: Sequence[passkey._Hidden]
) -> Iterator[tuple[Cell, bool, float]]:
    """Of each placement and each cell whether the number is said, and its loss; each prompt is read once for all."""
    model: Any = loaded.model
    words, head = hf.connecting_ids(loaded.tokenizer), output_head(loaded.model)
    policies: list[Sequence[Policy]] = []
    for cell in chosen:
        handle = hf.attach(model, cell.layers, prefill="full", connecting=words)
        policies.append(list(handle.policies.values()))
        handle.detach()
    again = any(cell.readers in ("repeat", "mixed") for cell in chosen)
    reads = as_layers("untrained-recall", {"observe.readers": "mixed" if again else "next", "heads": {}})
    judgement = Judgement()
    for each in hidden:
        memories: list[list[memkit.Memory]] = [[] for _ in chosen]

        def compress_all(
            _: Policy, *tokens: Tensor, readers: Sequence[Tensor], rotation: Any, scale: float | None
        ) -> memkit.Memory:
            layer = len(memories[0])  # noqa: B023
            judgement.forget()
            for cell, own, made in zip(chosen, policies, memories, strict=True):  # noqa: B023
                judges = readers if len(readers) == 1 else readers[JUDGES[cell.readers or "next"]]
                given = {"readers": judges if cell.readers else None, "scale": scale}
                turned = rotation if own[layer].needs_rotation else None
                made.append(compress(own[layer], *tokens, rotation=turned, **given))
            return memories[0][layer]  # noqa: B023

        with (
            hf.attach(model, reads, prefill="full", connecting=words),
            mock.patch.object(attention, "compress", compress_all),
            mock.patch.object(judgement.module, "row_worth", judgement),
        ):
            cache: Any = returned_cache(model.base_model(each.prompt, use_cache=True))
        asked = torch.cat((each.question, each.key[None, :-1]), dim=1)
        for cell, own, made in zip(chosen, policies, memories, strict=True):
            mine = copy.copy(cache)
            mine.layers = [copy.copy(layer) for layer in cache.layers]
            for layer, policy, memory in zip(mine.layers, own, made, strict=True):
                layer.policy, layer.memory = policy, memory
            with hf.attach(model, cell.layers, prefill="full", connecting=words):
                states = model.base_model(asked, **with_cache(model.base_model, mine)).last_hidden_state
            logits = head(states[0, each.question.shape[1] - 1 :]).float()
            yield cell, bool((logits.argmax(-1) == each.key).all()), float(cross_entropy(logits, each.key))


def bounded(
    loaded: hf.LoadedModel, chosen: Sequence[Cell], text: str, given: argparse.Namespace, tokens: int
) -> Iterator[tuple[Cell, bool, float]]:
    """The same, cell by cell, of prompts that are read under their policy."""
    for cell in chosen:
        found = passkey.find_passkeys(
            cell.layers,
            model=loaded,
            text=text,
            tokens=tokens,
            placements=given.placements,
            mentions=given.mentions,
        )
        yield from ((cell, exact, nats) for _, exact, nats in found.policies[0].by_depth)


def line(tokens: int, cell: Cell, found: Sequence[tuple[bool, float]]) -> str:
    """What a table says of a cell."""
    losses = [nats for _, nats in found]
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    said = f"{sum(exact for exact, _ in found)}/{len(found)}"
    return f"{tokens:6} {cell.rows or '':5} {cell.label:28} {said:>6}  {statistics.mean(losses):.2f} ± {error:.2f}"


def main() -> None:
    """Print a line per cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", help="left out: the topics of Python's own help")
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="NAME[:READERS]")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--placements", type=int, default=50)
    parser.add_argument("--mentions", type=int, default=2)
    parser.add_argument("--prefill", choices=("policy", "full"), default="policy")
    parser.add_argument("--model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="a line of JSON for each placement, added to the file")
    given = parser.parse_args()
    loaded = hf.load(given.model, dtype=getattr(torch, given.dtype))
    source = memkit.texts.default_text() if given.text is None else read_text(given.text)
    whole = given.prefill == "full"
    chosen = list(cells(given.policies, given.rows, whole))
    sentence = passkey.NEEDLES[given.mentions - 1]
    out: TextIO | None = None if given.out is None else given.out.open("a")
    for tokens in given.tokens:
        found: dict[int, list[tuple[bool, float]]] = {id(cell): [] for cell in chosen}
        if whole:
            hidden = passkey._hidden(loaded, source, tokens, given.placements, sentence, 0)
            answers = compressed(loaded, chosen, hidden)
        else:
            answers = bounded(loaded, chosen, source, given, tokens)
        for cell, exact, nats in answers:
            mine = found[id(cell)]
            mine.append((exact, nats))
            if out is not None:
                place = {"tokens": tokens, "rows": cell.rows, "policy": cell.label, "prefill": given.prefill}
                out.write(json.dumps(place | {"placement": len(mine) - 1, "found": exact, "nats": nats}) + "\n")
                out.flush()
            if len(mine) == given.placements:
                print(line(tokens, cell, mine), flush=True)


if __name__ == "__main__":
    main()
