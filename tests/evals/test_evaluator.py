import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from memkit import InputError, MemoryLM, ModelError, PolicySpec, hf, load_policy
from memkit.catalog import policy_names
from memkit.evals import MqarSpec, PairsSetting, documents_of, evaluate, loss_by_position, stretches, without_slots
from memkit.lm import load_model_spec
from tests.hf.tiny import randomised, tiny_config

SMALL = {"width": 32, "depth": 1, "heads": 2, "rotary.width": 8}
TASK = MqarSpec(vocabulary=64, settings=(PairsSetting(tokens=32, pairs=4), PairsSetting(tokens=48, pairs=8)))


@pytest.fixture(scope="module")
def made() -> MemoryLM:
    torch.manual_seed(0)
    return MemoryLM(load_model_spec("tiny-kvm-sqrt", SMALL)).eval()


class Knows(torch.nn.Module):
    """Answers rightly: what stood behind the same token before."""

    def __init__(self, spec):
        super().__init__()
        self.spec = spec

    def answers(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, self.spec.vocabulary)
        for row, tokens in enumerate(ids.tolist()):
            for at, token in enumerate(tokens):
                before = [j for j in range(at) if tokens[j] == token]
                if before:
                    logits[row, at, tokens[before[-1] + 1]] = 9.0
        return logits


def test_one_who_knows_is_always_right(made: MemoryLM, monkeypatch: pytest.MonkeyPatch):
    oracle = Knows(made.spec)
    read = made.read
    monkeypatch.setattr(made, "read", lambda ids: (oracle.answers(ids), read(ids)[1]))
    monkeypatch.setattr(made.head, "forward", lambda x: x)
    found = evaluate(made, TASK, sequences=6, batch=4)
    assert [(score.accuracy, score.error, score.exact) for score in found.scores] == [(1.0, 0.0, 1.0)] * 2


@torch.no_grad()
def test_accuracy_and_loss_by_hand(made: MemoryLM):
    found = evaluate(made, TASK, sequences=5, batch=2, seed=7)
    for setting, score in enumerate(found.scores):
        nats, right = [], []
        for index in range(5):
            drawn = TASK.batch(1, seed=7, index=index, setting=setting)
            logits = made(drawn.ids)[0][0]
            at = drawn.targets[0].nonzero()[:, 0]
            nats.append(float(cross_entropy(logits[at - 1], drawn.ids[0, at])))
            right.append(float((logits[at - 1].argmax(-1) == drawn.ids[0, at]).float().mean()))
        assert score.nats == pytest.approx(sum(nats) / 5, rel=1e-5)
        assert score.accuracy == pytest.approx(sum(right) / 5)
        assert score.error == pytest.approx(float(torch.tensor(right).std()) / 5**0.5, abs=1e-6)
        assert score.answers == 5 * TASK.settings[setting].pairs
        _, memory = made(TASK.batch(1, seed=7, index=0, setting=setting).ids)
        assert score.bytes == memory.bytes


def test_how_many_are_read_at_once_changes_nothing(made: MemoryLM):
    one, three = (evaluate(made, TASK, sequences=4, batch=batch) for batch in (1, 3))
    for a, b in zip(one.scores, three.scores, strict=True):
        assert a.nats == pytest.approx(b.nats, rel=1e-5)
        assert a.accuracy == b.accuracy


def test_wrapped_attached_and_stock_models(made: MemoryLM):
    own = evaluate(made, TASK, sequences=2)
    assert evaluate(hf.MemkitForCausalLM.wrap(made), TASK, sequences=2) == own
    stock = randomised(LlamaForCausalLM(tiny_config()))
    plain = evaluate(stock, TASK, sequences=2)
    with hf.attach(stock, "full"):
        attached = evaluate(stock, TASK, sequences=2)
    assert attached.scores[0].nats == pytest.approx(plain.scores[0].nats, rel=1e-4)
    # Two layers, two key/value heads of 8 channels, keys and values, float32.
    assert plain.scores[0].bytes == 32 * 2 * 2 * 8 * 2 * 4
    window = {"chunker": {"kind": "fixed", "size": 4}, "window": {"kind": "block", "chunks": 2}}
    with hf.attach(stock, PolicySpec(**window)):
        less = evaluate(stock, TASK, sequences=2)
    assert less.scores[1].nats != plain.scores[1].nats


def test_errors(made: MemoryLM):
    with pytest.raises(InputError, match="the model must have the task's 999 token ids, got 256"):
        evaluate(made, {"kind": "mqar", "vocabulary": 999})
    with pytest.raises(InputError, match="sequences must be a whole number, at least 2"):
        evaluate(made, TASK, sequences=1)
    with pytest.raises((ModelError, AttributeError)):
        evaluate(torch.nn.Linear(2, 2), TASK)


# Loss by position


def test_loss_by_position_is_the_loss(made: MemoryLM):
    documents = documents_of(range(200), 90, 2)
    assert documents.shape == (2, 90)
    found = loss_by_position(made, documents, batch=1)
    assert found.shape == (2, 89)
    assert float(found.mean()) == pytest.approx(made.loss(documents).item(), rel=1e-5)


def test_stretches_average_positions_and_then_documents():
    values = torch.tensor([[1.0, 2.0, 3.0, 5.0], [3.0, 4.0, 5.0, 9.0]], dtype=torch.float64)
    first, second = stretches(values, [1, 3])
    assert (first.first, first.last, first.mean, first.documents) == (1, 2, 2.5, 2)
    assert (second.first, second.last, second.mean) == (3, 4, 5.5)
    assert first.error == pytest.approx(1.0)
    assert second.error == pytest.approx(1.5)


def test_pairs_of_documents_cancel_what_they_share():
    noise = torch.randn(20, 8, dtype=torch.float64)
    (only,) = stretches(noise + 0.25, [1], against=noise)
    assert only.mean == pytest.approx(0.25)
    assert only.error == pytest.approx(0, abs=1e-12)


def test_stretches_that_do_not_fit():
    values = torch.zeros(2, 4)
    for edges in ([], [0], [3, 3], [5, 9]):
        with pytest.raises(InputError, match="edges must ascend"):
            stretches(values, edges)
    with pytest.raises(InputError, match="against must be of the same documents"):
        stretches(values, [1], against=torch.zeros(3, 4))
    with pytest.raises(InputError, match="the text must have tokens × documents, 20 tokens, got 9"):
        documents_of(range(9), 10, 2)


def test_without_slots_nothing_old_is_left(made: MemoryLM):
    spec = without_slots("kvm-sqrt-16")
    assert spec.growth.kind == "none"
    assert spec.name == "kvm-sqrt-16, no slots"
    assert spec.build().sinks_only


@pytest.mark.parametrize("name", [*policy_names(), "untrained-kvm-sqrt"])
def test_every_shipped_policy_may_lose_its_slots(name: str):
    spec, own = without_slots(name), load_policy(name)
    assert (spec.growth.kind, spec.observe.queries, spec.eviction) == ("none", 0, "never")
    assert (spec.window, spec.sinks, spec.rotary) == (own.window, own.sinks, own.rotary)
    assert spec.build().sinks_only
