from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from memkit import InputError
from memkit.lm import ByteTokenizer, MemoryLM, load_model_spec


@pytest.fixture(scope="module")
def made() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(load_model_spec("tiny-kvm-sqrt", {"width": 32, "depth": 1, "heads": 2, "rotary.width": 8}))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))


def test_targets_alone_count(made: MemoryLM, ids: torch.Tensor):
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, [3, 39]] = targets[1, 17] = True
    logits = made(ids)[0]
    by_hand = [cross_entropy(logits[row, at - 1], ids[row, at]) for row, at in ((0, 3), (0, 39), (1, 17))]
    torch.testing.assert_close(made.loss(ids, targets=targets), torch.stack(by_hand).mean())


def test_all_targets_are_the_plain_loss(made: MemoryLM, ids: torch.Tensor):
    assert torch.equal(made.loss(ids, targets=torch.ones_like(ids, dtype=torch.bool)), made.loss(ids))


def test_targets_and_padding_both_count(made: MemoryLM, ids: torch.Tensor):
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[:, 5:] = True
    found = made.loss(ids, lengths=torch.tensor([40, 9]), targets=targets)
    parts = [made.loss(ids[:1], targets=targets[:1]) * 35, made.loss(ids[1:, :9], targets=targets[1:, :9]) * 4]
    torch.testing.assert_close(found, torch.stack(parts).sum() / 39)


def test_targets_that_do_not_fit(made: MemoryLM, ids: torch.Tensor):
    with pytest.raises(InputError, match=r"targets must be true or false for each of ids, \(2, 40\), got torch.int64"):
        made.loss(ids, targets=ids)
    with pytest.raises(InputError, match=r"got torch.bool \(2, 39\)"):
        made.loss(ids, targets=torch.ones(2, 39, dtype=torch.bool))
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    with pytest.raises(InputError, match="at least one token after a row's first"):
        made.loss(ids, targets=first)


@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((2, 1), {}),
        ((2, 0), {}),
        ((0, 5), {}),
        ((2, 9), {"lengths": [1, 0]}),
        ((1, 5), {"documents": torch.arange(5)[None]}),
        ((1, 5), {"lengths": [2], "targets": torch.tensor([[False, False, False, True, True]])}),
        ((1, 4), {"documents": torch.tensor([[0, 0, 1, 1]]), "targets": torch.tensor([[True, False, True, False]])}),
    ],
)
def test_nothing_to_predict(made: MemoryLM, shape: tuple[int, int], given: dict[str, Any]):
    with pytest.raises(InputError, match=r"a loss needs at least one token .*, got none in ids"):
        made.loss(torch.zeros(shape, dtype=torch.long), **given)


def test_one_token_to_predict_will_do(made: MemoryLM, ids: torch.Tensor):
    expected = made.loss(ids[:1, :2])
    torch.testing.assert_close(made.loss(ids, lengths=[2, 1]), expected)
    documents = torch.arange(2, 42).expand(2, -1).clone()
    documents[0, 1] = 2
    torch.testing.assert_close(made.loss(ids, documents=documents), expected)


def test_bytes_are_tokens():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("né") == [110, 195, 169]
    assert tokenizer.decode(torch.tensor([110, 195, 169])) == "né"
    assert tokenizer.decode([110, 195]) == "n\N{REPLACEMENT CHARACTER}"
