"""Is what was read once still there? A number hidden in a long text, and asked for at its end.

A sentence that names a random number is put into real text at evenly spaced depths. At the end the number is asked for;
counted are the placements at which greedy decoding would say it exactly, and the loss of its tokens.
"""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from memkit.budgets import Budget
from memkit.errors import InputError, shown
from memkit.layers import AnyLayers, LayerPoliciesSpec
from memkit.plain_json import as_json
from memkit.rendering import render
from memkit.subject import reading, subject
from memkit.whole import SEEDS, whole_number

if TYPE_CHECKING:
    from memkit.hf import LoadedModel

__all__ = ["ASKED_POLICIES", "Passkeys", "Retrieval", "find_passkeys"]

ASKED_POLICIES = ("untrained-recall", "untrained-observed", "caote-512", "streaming-4-512", "full")
"""Policies that are asked where none are named."""

NEEDLES = ("\n\nThe pass key is {key}.\n\n", "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
"""What is hidden, by how often it says the number. The second mention is a reader of the first."""
QUESTION = "\n\nWhat is the pass key? The pass key is"
DIGITS = 5
LEAST_TOKENS = 128

Progress = Callable[[str, int, int], None]
"""Called with (policy, placements done, placements in all)."""


@dataclass(frozen=True)
class Retrieval:
    """What one policy found.

    policy: its name; found: placements at which the number is said exactly; placements: how many there were;
    nats: loss per token of the number, the mean over placements; nats_error: its standard error (0 for one placement);
    bytes: what the memories held once the question was read, the most over placements;
    by_depth: for each placement its depth (0: the text's beginning, 1: its end), whether it was found, and the loss.
    """

    policy: str
    found: int
    placements: int
    nats: float
    nats_error: float
    bytes: int
    by_depth: tuple[tuple[float, bool, float], ...]


@dataclass(frozen=True)
class Passkeys:
    """What each policy found, in the order asked for, and the settings.

    settings: model, text, tokens, placements, mentions, prefill, rows, share, bytes, overrides, seed.
    """

    settings: dict[str, Any]
    policies: tuple[Retrieval, ...]

    def to_json(self) -> str:
        """`{"settings": {…}, "policies": [{"policy": …, "found": …, …}]}`."""
        data = {"settings": self.settings, "policies": [asdict(each) for each in self.policies]}
        return as_json(data)

    def table(self) -> Any:
        """A rich table, most found first: `rich.print(passkeys.table())`."""
        return render(self, "table")

    def _repr_html_(self) -> str:
        return render(self, "html")


def find_passkeys(
    policies: AnyLayers | Iterable[AnyLayers] | None = None,
    *,
    model: str | Path | LoadedModel | None = None,
    text: str | Path | None = None,
    tokens: int = 2048,
    placements: int = 8,
    mentions: int = 2,
    prefill: Literal["policy", "full"] = "policy",
    rows: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Passkeys:
    """Hide a number in a text of `tokens` tokens, once at each of `placements` depths, and ask each policy for it.

    policies: as for `memkit.compare`; None: `ASKED_POLICIES`. model, text, overrides: as there. mentions: how often the
    hidden sentence says the number, 1 or 2. prefill: `full`: all but the question is read exactly and then compressed
    at once. rows: slots and window of each head, for policies that have a number of them; share, bytes: as for
    `memkit.compare`, the share of `tokens`. seed: of the numbers; every policy is asked for the same ones at the same
    places.

    Raises `InputError` for numbers that do not fit, `PolicyError` and `ModelError` as `compare` does.
    """
    tokens = whole_number("tokens", tokens, LEAST_TOKENS, 2**24)
    placements = whole_number("placements", placements, 1, 2**16)
    mentions = whole_number("mentions", mentions, 1, len(NEEDLES))
    seed = whole_number("seed", seed, *SEEDS)
    if prefill not in ("policy", "full"):
        raise InputError(f"prefill must be 'policy' or 'full', got {shown(prefill)}")
    budget = Budget.of(rows, share, bytes, prefill)
    asked = subject(ASKED_POLICIES if policies is None else policies, overrides, budget, tokens, model, text)
    from memkit.hf.logits import output_head  # only now: `subject` says what to install where transformers is missing

    loaded = asked.loaded
    hidden = _hidden(loaded, asked.text, tokens, placements, NEEDLES[mentions - 1], seed)
    found: list[Retrieval] = []
    with reading(loaded, seed):
        head = output_head(loaded.model)
        for label, policy in asked.policies:
            each: list[tuple[float, bool, float]] = []
            most = 0
            for number, (exact, nats, held) in enumerate(_answers(loaded, head, policy, prefill, hidden)):
                each.append((hidden[number].depth, exact, nats))
                most = max(most, held)
                if progress is not None:
                    progress(label, number + 1, placements)
            losses = [nats for _, _, nats in each]
            error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
            found.append(
                Retrieval(
                    policy=label,
                    found=sum(exact for _, exact, _ in each),
                    placements=placements,
                    nats=statistics.mean(losses),
                    nats_error=error,
                    bytes=most,
                    by_depth=tuple(each),
                )
            )
    settings = {
        "model": loaded.name,
        "text": asked.source,
        "tokens": tokens,
        "placements": placements,
        "mentions": mentions,
        "prefill": prefill,
        "rows": rows,
        "share": share,
        "bytes": bytes,
        "overrides": dict(overrides or {}),
        "seed": seed,
    }
    return Passkeys(settings, tuple(found))


@dataclass(frozen=True)
class _Hidden:
    """A text with a number in it.

    depth: where it stands, from 0 to 1; before [1, a]: the text's tokens up to it, with which those of every deeper
    number begin; behind [1, n − a]: the sentence that says it, and the rest of the text; question [1, q]; key [k]: the
    number's tokens.
    """

    depth: float
    before: Tensor
    behind: Tensor
    question: Tensor
    key: Tensor

    @property
    def prompt(self) -> Tensor:
        """All but the question, [1, n]."""
        return torch.cat((self.before, self.behind), dim=1)


def _hidden(loaded: LoadedModel, filler: str, tokens: int, placements: int, sentence: str, seed: int) -> list[_Hidden]:
    """The text of each placement, none less deep than the one before it."""

    def ids(text: str, special: bool = False) -> list[int]:
        return loaded.tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"]

    draw, made = random.Random(seed), list[_Hidden]()
    question, words = ids(QUESTION), ids(filler[: 16 * tokens])
    # What a tokenizer puts before a text stands before the filler alone; what it puts behind one, nowhere.
    marked = ids(filler[: 16 * tokens], special=True)
    begins = (n for n in range(len(marked)) if marked[n : n + len(words)] == words)
    words = marked[: next(begins, 0)] + words
    for number in range(placements):
        key = str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        needle, answer = ids(sentence.format(key=key)), ids(f" {key}")
        room = tokens - len(needle) - len(question) - len(answer)
        if room < 1 or len(words) < room:
            raise InputError(f"the text must have {room} tokens at least, got {len(words)}; give a longer one")
        depth = (number + 0.5) / placements
        at = round(depth * room)
        parts = (words[:at], needle + words[at:room], question, answer)
        tensors = [torch.tensor(each, dtype=torch.long, device=loaded.model.device) for each in parts]
        before, behind, asked = (each[None] for each in tensors[:3])
        made.append(_Hidden(depth, before, behind, asked, tensors[3]))
    return sorted(made, key=lambda each: each.before.shape[1])


def _answers(
    loaded: LoadedModel,
    head: Callable[[Tensor], Tensor],
    policy: LayerPoliciesSpec,
    prefill: Literal["policy", "full"],
    hidden: list[_Hidden],
) -> Iterator[tuple[bool, float, int]]:
    """Of each placement whether the number is said exactly, its loss per token, and the bytes held.

    What stands before the numbers is read once, and what stands behind one by a copy of what was kept of that: a memory
    says the same however its text is cut. A prompt that is read in full is compressed as a whole, and read as a whole.
    """
    from memkit import hf
    from memkit.hf.names import returned_cache, with_cache

    model: Any = loaded.model
    words = hf.connecting_ids(loaded.tokenizer)

    def read(tokens: Tensor, cache: Any) -> Any:
        if not tokens.numel():
            return cache
        given = {} if cache is None else with_cache(model.base_model, cache)
        return returned_cache(model.base_model(tokens, use_cache=True, **given))

    before, read_already = None, 0
    with hf.attach(model, policy, prefill=prefill, connecting=words):
        for each in hidden:
            if prefill == "full":
                cache = read(each.prompt, None)
            else:
                before = read(each.before[:, read_already:], before)
                read_already = each.before.shape[1]
                cache = read(each.behind, copy.deepcopy(before))
            asked = torch.cat((each.question, each.key[None, :-1]), dim=1)
            output = model.base_model(asked, use_cache=True, **with_cache(model.base_model, cache))
            held = sum(memory.bytes for memory in hf.memories(returned_cache(output)))
            logits = head(output.last_hidden_state[0, each.question.shape[1] - 1 :]).float()
            nats = float(nn.functional.cross_entropy(logits, each.key))
            yield bool((logits.argmax(-1) == each.key).all()), nats, held
