"""A number hidden in a text: where it stands, who is asked, and what counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import rich.console
import torch

import memkit
from memkit import comparison, hf, passkey
from memkit.hf.names import returned_cache, with_cache
from memkit.passkey import find_passkeys
from memkit.viz.passkeys import table
from tests.hf.tiny import Letters, randomised, tiny_config

SENTENCE = passkey.NEEDLES[1]
OPTIONS: dict[str, Any] = {"tokens": 300, "placements": 3}
WINDOW = memkit.load_policy("window-512", {"window.size": 20})


@pytest.fixture(scope="module")
def loaded() -> hf.LoadedModel:
    from transformers import LlamaForCausalLM

    return hf.LoadedModel(randomised(LlamaForCausalLM(tiny_config())), Letters(), "tiny", 0.0)


@pytest.mark.parametrize("sentence", passkey.NEEDLES)
def test_the_number_stands_at_even_depths_once(loaded: hf.LoadedModel, sentence: str):
    def letters(text: str) -> list[int]:
        return Letters()(text)["input_ids"]

    hidden = passkey._hidden(loaded, comparison.default_text(), 300, 3, sentence, seed=0)
    assert [each.depth for each in hidden] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    filler = letters(comparison.default_text()[:400])
    for each in hidden:
        words = each.prompt[0].tolist()
        assert len(words) + each.question.shape[1] + len(each.key) == 300
        number = "".join(chr(token - 3) for token in each.key.tolist()).strip()
        needle = letters(sentence.format(key=number))
        at = next(i for i in range(len(words)) if words[i : i + len(needle)] == needle)
        assert at == round(each.depth * (len(words) - len(needle))) == each.before.shape[1]
        assert words[:at] + words[at + len(needle) :] == filler[: len(words) - len(needle)]
    assert len({tuple(each.key.tolist()) for each in hidden}) == 3


class Framed(Letters):
    """Letters with a token before every text and one behind it, where these are not left out."""

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        found = super().__call__(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return {"input_ids": [1, *found, 2] if add_special_tokens else found}


def test_what_a_tokenizer_puts_around_texts_stands_before_the_filler_alone(loaded: hf.LoadedModel):
    framed = hf.LoadedModel(loaded.model, Framed(), "framed", 0.0)
    for filler in (comparison.default_text(), comparison.default_text()[:400]):
        for each, plain in zip(
            passkey._hidden(framed, filler, 300, 3, SENTENCE, seed=0),
            passkey._hidden(loaded, filler, 300, 3, SENTENCE, seed=0),
            strict=True,
        ):
            assert each.prompt[0, 0] == 1
            assert not ((each.prompt[0, 1:] == 1) | (each.prompt[0, 1:] == 2)).any()
            assert torch.equal(each.question, plain.question)
            assert torch.equal(each.key, plain.key)


@torch.no_grad()
def test_what_counts_is_the_numbers_loss_and_whether_it_would_be_said(loaded: hf.LoadedModel):
    result = find_passkeys(["full"], model=loaded, **OPTIONS).policies[0]
    for (depth, found, nats), each in zip(
        result.by_depth, passkey._hidden(loaded, comparison.default_text(), 300, 3, SENTENCE, seed=0), strict=True
    ):
        key = each.key
        logits = loaded.model(torch.cat((each.prompt, each.question, key[None]), 1)).logits[0, -len(key) - 1 : -1]
        assert depth == each.depth
        assert nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits, key)), abs=1e-4)
        assert found == bool((logits.argmax(-1) == key).all())
    assert result.nats == pytest.approx(sum(nats for *_, nats in result.by_depth) / 3)
    assert result.found == sum(found for _, found, _ in result.by_depth)


def test_reading_in_full_forgets_nothing_before_the_end(loaded: hf.LoadedModel):
    spec = memkit.load_policy("caote-512", {"chunker.size": 8, "observe.queries": 8, "growth.slots": 20})
    result = find_passkeys(["full", spec, WINDOW], model=loaded, prefill="full", **OPTIONS)
    full, compressed, window = result.policies
    assert full.nats != compressed.nats != window.nats
    assert full.bytes > compressed.bytes
    assert full.nats == pytest.approx(find_passkeys(["full"], model=loaded, **OPTIONS).policies[0].nats, abs=1e-4)


def test_a_prompt_is_read_again_with_connecting_words(loaded: hf.LoadedModel):
    few = {"tokens": 200, "placements": 1, "model": loaded, "prefill": "full"}
    specs = [
        memkit.load_policy(
            "caote-512", {"chunker.size": 8, "observe.queries": 8, "growth.slots": 20, "observe.readers": readers}
        ).named(readers)
        for readers in ("next", "repeat", "mixed")
    ]
    found = find_passkeys(specs, **few).policies
    assert len({each.nats for each in found}) == 3
    each = passkey._hidden(loaded, comparison.default_text(), 200, 1, SENTENCE, seed=0)[0]
    words = Letters()("\n\nRepeat the previous text:\n\n")["input_ids"]
    with torch.no_grad(), hf.attach(loaded.model, specs[1], prefill="full", connecting=words) as model:
        cache = returned_cache(model(each.prompt))
        logits = _asked(model, each, cache)
    assert found[1].nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits, each.key)), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"observe.again": 2, "observe.readers": "repeat"}], ids=["once", "again"])
def test_what_stands_before_the_numbers_is_read_once(loaded: hf.LoadedModel, changes: dict[str, Any]):
    # Of a letter that stands twice the first layer has one key: who joins which would be decided by rounding.
    spec = memkit.load_policy("caote-512", {"chunker.size": 8, "observe.queries": 8, "growth.slots": 20, **changes})
    read = list[int]()
    count = loaded.model.base_model.register_forward_pre_hook(
        lambda _module, args, kwargs: read.append((args[0] if args else kwargs["input_ids"]).shape[1]), with_kwargs=True
    )
    try:
        result = find_passkeys([spec], model=loaded, **OPTIONS).policies[0]
    finally:
        count.remove()
    hidden = passkey._hidden(loaded, comparison.default_text(), 300, 3, SENTENCE, seed=0)
    words = Letters()("\n\nRepeat the previous text:\n\n")["input_ids"]
    for (_, found, nats), each in zip(result.by_depth, hidden, strict=True):
        with hf.attach(loaded.model, spec, connecting=words) as model:
            logits = _asked(model, each, returned_cache(model(each.prompt, use_cache=True)))
        assert nats == pytest.approx(float(torch.nn.functional.cross_entropy(logits, each.key)), abs=1e-4)
        assert found == bool((logits.argmax(-1) == each.key).all())
    questions = sum(each.question.shape[1] + len(each.key) - 1 for each in hidden)
    once = hidden[-1].before.shape[1] + sum(each.behind.shape[1] for each in hidden) + questions
    assert once < sum(each.prompt.shape[1] for each in hidden) + questions
    text = sum(read[read.index(hidden[0].before.shape[1]) :])  # attaching tries the model on a few tokens
    assert text > once if changes else text == once


def _asked(model: Any, each: passkey._Hidden, cache: Any) -> torch.Tensor:
    """The logits of the number's tokens, [k, vocabulary]."""
    asked = torch.cat((each.question, each.key[None, :-1]), dim=1)
    return model(asked, **with_cache(model, cache)).logits[0, each.question.shape[1] - 1 :]


def test_the_table_and_the_file(loaded: hf.LoadedModel):
    result = find_passkeys(["full", WINDOW], model=loaded, seed=3, **OPTIONS)
    console = rich.console.Console(width=90, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(result))
    text = console.export_text()
    for word in ("full", "window-512", f"{result.policies[0].found}/3", "300 tokens", "seed 3", "tiny"):
        assert word in text
    data = json.loads(result.to_json())
    assert [row["policy"] for row in data["policies"]] == ["full", "window-512"]
    assert data["settings"]["placements"] == 3
    assert "said twice, among 300 tokens" in text
    once = find_passkeys(["full"], model=loaded, seed=3, mentions=1, **OPTIONS)
    assert once.policies[0].by_depth != result.policies[0].by_depth
    again = find_passkeys(["full", WINDOW], model=loaded, seed=3, **OPTIONS)
    assert again == result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 5}, "tokens must be"),
        ({"placements": 0}, "placements must be"),
        ({"mentions": 3}, "mentions must be"),
        ({"text": "short"}, "tokens at least, got 5"),
        ({"prefill": "some"}, "prefill must be"),
        ({"rows": 0}, "rows must be"),
    ],
)
def test_what_does_not_fit_is_refused(loaded: hf.LoadedModel, options: dict[str, Any], message: str):
    with pytest.raises(memkit.InputError, match=message):
        find_passkeys(["full"], model=loaded, **(OPTIONS | options))


def test_the_model_is_left_as_it_was(loaded: hf.LoadedModel):
    loaded.model.train()
    state = torch.random.get_rng_state()
    find_passkeys([WINDOW], model=loaded, **OPTIONS)
    assert loaded.model.training
    assert torch.equal(state, torch.random.get_rng_state())
    loaded.model.eval()
