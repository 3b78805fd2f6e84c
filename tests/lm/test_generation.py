import math
from typing import Any

import pytest
import torch

from memkit import InputError, load_model
from memkit.lm.generation import sample

NAMES = ["tiny-kvm-rwkv7", "tiny-ovq", "tiny-full"]
PROMPTS = [[7, 1, 200, 13, 5, 5, 90], [3], [44, 45, 46]]


def model(name) -> Any:
    # 40 generated tokens leave windows of 8: the memory is in use.
    small = {"tiny-kvm-rwkv7": "layers.default.policy", "tiny-ovq": "layers.default.policy"}
    overrides: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8}
    if name in small:
        source = "kvm-sqrt-16" if "kvm" in name else "ovq-1024"
        overrides[small[name]] = {"from": source, "chunker.size": 4}
        if "kvm" in name:
            overrides[small[name]] |= {"growth.factor": 2, "growth.floor": 4}
    made = load_model(name, overrides)
    with torch.no_grad():  # away from the initialisation, where every block adds nothing
        torch.manual_seed(5)
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def by_whole_calls(made, prompt, tokens):
    """Greedy generation that reads everything anew for each token."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            logits, _ = made(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_batches_of_unequal_prompts(name):
    made = model(name)
    expected = [by_whole_calls(made, prompt, 20) for prompt in PROMPTS]
    assert made.generate(PROMPTS, max_new_tokens=20).tolist() == expected
    longest = max(len(prompt) for prompt in PROMPTS)
    for left in (True, False):
        padding = [[99] * (longest - len(prompt)) for prompt in PROMPTS]
        ids = [pad + row if left else row + pad for row, pad in zip(PROMPTS, padding, strict=True)]
        ones = [[1] * len(row) for row in PROMPTS]
        zeros = [[0] * len(pad) for pad in padding]
        mask = [zero + one if left else one + zero for one, zero in zip(ones, zeros, strict=True)]
        found = made.generate(torch.tensor(ids), mask=torch.tensor(mask), max_new_tokens=20)
        assert found.tolist() == expected
        if not left:
            lengths = [len(prompt) for prompt in PROMPTS]
            for given in (lengths, torch.tensor(lengths)):
                assert made.generate(torch.tensor(ids), lengths=given, max_new_tokens=20).tolist() == expected


def test_stop_ids_end_a_row_and_leave_the_others_alone():
    made = model("tiny-kvm-rwkv7")
    expected = made.generate(PROMPTS, max_new_tokens=12).tolist()
    stop = expected[1][3]
    first = [row.index(stop) if stop in row else 11 for row in expected]
    found = made.generate(PROMPTS, max_new_tokens=12, stop_ids=[stop], pad_id=255).tolist()
    for row, full, end in zip(found, expected, first, strict=True):
        assert row[: end + 1] == full[: min(end + 1, len(row))]
        assert set(row[end + 1 :]) <= {255}
    alone = made.generate(PROMPTS[1:2], max_new_tokens=12, stop_ids=[stop])
    assert alone.tolist() == [expected[1][: first[1] + 1]]


def test_streaming_gives_the_same_tokens_one_by_one():
    made = model("tiny-kvm-rwkv7")
    steps = made.stream(PROMPTS, max_new_tokens=6)
    first = next(steps)
    assert torch.is_grad_enabled()
    assert first.shape == (3,)
    together = torch.stack([first, *steps], dim=1)
    assert torch.equal(together, made.generate(PROMPTS, max_new_tokens=6))


def test_sampling_is_repeatable_and_spread():
    made = model("tiny-full")
    settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}
    one = made.generate([[1, 2]] * 64, **settings)
    assert torch.equal(one, made.generate([[1, 2]] * 64, **settings))
    assert not torch.equal(one, made.generate([[1, 2]] * 64, **{**settings, "seed": 4}))
    assert len(one[:, 0].unique()) > 5
    assert torch.equal(
        made.generate([[1, 2]], max_new_tokens=8, temperature=1.0, top_k=1), made.generate([[1, 2]], max_new_tokens=8)
    )


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_a_temperature_near_0_draws_the_likeliest(temperature):
    settings = {"temperature": temperature, "seed": 1, "max_new_tokens": 6}
    made = model("tiny-full")
    expected = made.generate(PROMPTS, max_new_tokens=6)
    assert torch.equal(made.generate(PROMPTS, **settings), expected)
    assert torch.equal(made.generate(PROMPTS, **settings, top_k=3, top_p=0.9), expected)
    torch.testing.assert_close(
        drawn([2.0, 2.0, -1.0], temperature=temperature), torch.tensor([0.5, 0.5, 0]), atol=0.03, rtol=0
    )


def test_an_id_that_marks_padding_need_not_be_a_token():
    made = model("tiny-full")
    expected = made.generate(PROMPTS, max_new_tokens=6)
    stop = int(expected[1, 1])
    found = made.generate(PROMPTS, max_new_tokens=6, stop_ids={stop}, pad_id=-100)
    kept = found != -100
    assert not kept.all()
    assert torch.equal(found[kept], expected[:, : found.shape[1]][kept])


def drawn(logits, **settings):
    generator = torch.Generator().manual_seed(0)
    tokens = sample(torch.tensor([logits]).repeat(4000, 1), generator=generator, **settings)
    return tokens.bincount(minlength=len(logits)) / 4000


def test_temperature_top_k_and_top_p():
    chances = [0.5, 0.25, 0.15, 0.1]
    logits = [math.log(chance) for chance in chances]
    torch.testing.assert_close(drawn(logits, temperature=1.0), torch.tensor(chances), atol=0.03, rtol=0)
    torch.testing.assert_close(
        drawn(logits, temperature=1.0, top_k=2), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.03, rtol=0
    )
    # 0.5 + 0.25 falls short of 0.8: the token that reaches it belongs to them.
    expected = torch.tensor([0.5, 0.25, 0.15, 0]) / 0.9
    torch.testing.assert_close(drawn(logits, temperature=1.0, top_p=0.8), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn(logits, temperature=1.0, top_p=0.1), torch.tensor([1.0, 0, 0, 0]))
    flat = torch.tensor(chances).sqrt()
    torch.testing.assert_close(drawn(logits, temperature=2.0), flat / flat.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": math.inf}, "temperature must be at least 0 .* and finite, got inf"),
        ({"temperature": math.nan}, "temperature must be at least 0 .* and finite, got nan"),
        ({"temperature": "hot"}, "temperature must be at least 0 .* and finite, got 'hot'"),
        ({"top_k": 1.5}, "top_k must be a whole number, at least 1, got 1.5"),
        ({"top_p": "all"}, "top_p must be more than 0 and at most 1, got 'all'"),
        ({"stop_ids": 5}, "stop_ids must be a list of whole numbers, got 5"),
        ({"stop_ids": [256]}, r"stop_ids must lie between 0 and 255, got \[256\]"),
        ({"pad_id": 2**70}, "pad_id must be a whole number, at most"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number"),
        ({"stop_id": 3}, "unknown setting 'stop_id'; did you mean 'stop_ids'?"),
        ({"top_k": 0}, "top_k must be a whole number, at least 1, got 0; leave it out"),
        ({"top_p": 0.0}, "top_p must be more than 0 and at most 1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number, at least 0"),
        ({"mask": torch.ones(1, 2)}, "a list of prompts needs no mask"),
        ({"lengths": [1]}, "a list of prompts needs no lengths"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(InputError, match=message):
        model("tiny-full").generate([[1]], **{"max_new_tokens": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": torch.ones(2, 3), "lengths": [1, 2]}, "got both; leave one out"),
        ({"mask": torch.ones(2, 2)}, r"mask must be as the prompts, \(2, 3\), got \(2, 2\)"),
        ({"lengths": [1]}, r"one whole number per prompt, shape \(2,\), got \[1\]"),
        ({"lengths": torch.tensor(3)}, r"one whole number per prompt, shape \(2,\), got torch.int64 \(\)"),
        ({"lengths": [1, 4]}, r"between 0 and the prompts' 3 tokens, got \[1, 4\]"),
        ({"lengths": [1.0, 2.0]}, r"one whole number per prompt, shape \(2,\), got \[1\.0, 2\.0\]"),
        ({"lengths": [0, 2]}, r"every prompt needs at least one token, got lengths \[0, 2\]"),
    ],
)
def test_errors_of_padding(settings, message):
    with pytest.raises(InputError, match=message):
        model("tiny-full").generate(torch.ones(2, 3, dtype=torch.long), max_new_tokens=2, **settings)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2], r"prompts\[0\]: ids must be a list of whole numbers, got 1; a single prompt is a list of one list"),
        ([[1], [2.0]], r"prompts\[1\]: ids must be a list of whole numbers, got \[2.0\]"),
        ([[1], [256]], r"prompts\[1\]: ids must lie between 0 and 255, got \[256\]"),
        ("hello", "prompts must be ids .* or a list of lists, got 'hello'"),
        (torch.ones(1, 2), r"prompts must be ids .* got shape \(1, 2\) of torch.float32"),
        (torch.ones(1, 2).bool(), r"prompts must be ids .* got shape \(1, 2\) of torch.bool"),
        (torch.ones(2).long(), r"prompts must be ids .* got shape \(2,\) of torch.int64"),
    ],
)
def test_prompts_are_ids(prompts, message):
    with pytest.raises(InputError, match=message):
        model("tiny-full").generate(prompts, max_new_tokens=2)


def test_empty_prompts_are_refused():
    with pytest.raises(InputError, match=r"every prompt needs at least one token, got lengths \[1, 0\]"):
        model("tiny-full").generate([[1], []], max_new_tokens=2)
    assert model("tiny-full").generate([[1], [2]], max_new_tokens=0).shape == (2, 0)
