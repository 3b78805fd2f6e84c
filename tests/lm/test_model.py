"""Whole models: the laws that hold through every layer, training, and packed documents."""

import functools
from typing import Any

import pytest
import torch

from memkit import InputError, MemoryStateError, load_policy
from memkit.lm import MemoryLM, ModelSpec

KVM = load_policy(load_policy("kvm-sqrt-16"), {"chunker.size": 4, "growth.factor": 2, "growth.floor": 4})
OVQ = load_policy(load_policy("ovq-1024"), {"chunker.size": 4})
SLIDING = load_policy("window-512", {"window.size": 5})
STREAMING = load_policy("streaming-4-512", {"window.size": 4, "sinks": 2})
POOLED = load_policy(load_policy("block-mean-8"), {"chunker.size": 4, "growth.fraction": 0.25})

KINDS: dict[str, dict[str, Any]] = {
    "kvm": {"kind": "attention", "policy": KVM},
    "full": {"kind": "attention", "policy": "full", "value_residual": "linear"},
    "ovq": {"kind": "attention", "policy": OVQ, "qk_norm": "unit", "rotary": {"width": 0}},
    "streaming": {"kind": "attention", "policy": STREAMING, "token_shift": False, "value_residual": "none"},
    "pooled": {"kind": "attention", "policy": POOLED, "qk_norm": "none", "kv_heads": 1},
    "rwkv7": {"kind": "rwkv7"},
}
HYBRID = {
    "default": KINDS["kvm"],
    "overrides": [
        {"every": 2, "mixer": KINDS["rwkv7"]},
        {"at": [-1], "mixer": {"kind": "attention", "policy": SLIDING, "rotary": {"width": 8, "theta": 50.0}}},
    ],
}
LAYERS: dict[str, dict[str, Any]] = {**{name: {"default": kind} for name, kind in KINDS.items()}, "hybrid": HYBRID}


@functools.cache
def model(name, dtype=torch.float32) -> MemoryLM:
    torch.manual_seed(0)
    declared: dict[str, Any] = {"vocabulary": 19, "width": 16, "depth": 4 if name == "hybrid" else 2, "heads": 2}
    made = MemoryLM(ModelSpec(**declared, layers=LAYERS[name])).to(dtype).eval()
    with torch.no_grad():  # away from the initialisation, where every block adds nothing
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def text(rows=2, tokens=30, seed=3):
    return torch.randint(19, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", LAYERS)
def test_split_equals_whole(name):
    made, ids = model(name), text()
    with torch.no_grad():
        whole, end = made(ids)
        memory, parts = None, []
        for part in ids.split([9, 1, 1, 12, 7], dim=1):
            logits, memory = made(part, memory)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
    assert memory is not None
    assert memory.seen.tolist() == end.seen.tolist() == [30, 30]


@pytest.mark.parametrize("name", LAYERS)
def test_split_equals_whole_with_gradients(name):
    made, ids = model(name, torch.float64), text()
    gradients = []
    for lengths in ([30], [9, 1, 20]):
        memory, parts = None, []
        for part in ids.split(lengths, dim=1):
            logits, memory = made(part, memory)
            parts.append(logits)
        loss = torch.cat(parts, 1).square().mean()
        gradients.append(torch.autograd.grad(loss, list(made.parameters()), allow_unused=True))
    for (name_, _), one, other in zip(made.named_parameters(), *gradients, strict=True):
        assert one is not None, name_
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_unequal_length_do_not_depend_on_each_other(name):
    made, ids = model(name), text(rows=3)
    first, second = torch.tensor([17, 3, 0]), torch.tensor([1, 13, 9])
    with torch.no_grad():
        one, memory = made(ids[:, :17], lengths=first)
        two, memory = made(ids[:, 17:], memory, lengths=second)
        for row in range(3):
            tokens = torch.cat((ids[row, : first[row]], ids[row, 17 : 17 + second[row]]))
            alone, _ = made(tokens[None])
            together = torch.cat((one[row, : first[row]], two[row, : second[row]]))
            torch.testing.assert_close(together, alone[0], atol=2e-5, rtol=1e-4)
            assert not one[row, first[row] :].any()
    assert memory.seen.tolist() == [18, 16, 9]


@pytest.mark.parametrize("name", LAYERS)
def test_causality(name):
    made, ids = model(name), text()
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 19
    with torch.no_grad():
        one, two = made(ids)[0], made(other)[0]
    torch.testing.assert_close(one[:, :20], two[:, :20], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[:, 20:], two[:, 20:], atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_do_not_see_each_other(name):
    made, ids = model(name), text(rows=2, tokens=24)
    documents = torch.tensor([[0] * 7 + [1] * 1 + [2] * 16, [5] * 24])
    with torch.no_grad():
        packed = made.read_packed(ids, documents)
        for row, begin, stop in ((0, 0, 7), (0, 7, 8), (0, 8, 24), (1, 0, 24)):
            alone, _ = made(ids[row : row + 1, begin:stop])
            torch.testing.assert_close(packed[row, begin:stop], alone[0], atol=2e-5, rtol=1e-4)
        # The same number again is another document, unless it goes on.
        again = made.read_packed(ids, torch.tensor([[0] * 7 + [1] + [0] * 16, [5] * 24]))
    torch.testing.assert_close(again, packed)
    loss = made.loss(ids, documents=documents)
    logits = packed[0].log_softmax(-1), packed[1].log_softmax(-1)
    terms = [-logits[0][t, ids[0, t + 1]] for t in range(23) if t not in (6, 7)]
    terms += [-logits[1][t, ids[1, t + 1]] for t in range(23)]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)


def test_loss_counts_valid_tokens_alone():
    made, ids = model("hybrid"), text()
    lengths = torch.tensor([30, 11])
    parts = [made.loss(ids[:1]) * 29, made.loss(ids[1:, :11]) * 10]
    torch.testing.assert_close(made.loss(ids, lengths=lengths), sum(parts) / 39)


@pytest.mark.parametrize("name", LAYERS)
def test_activation_checkpointing_changes_no_gradient(name):
    made, ids = model(name, torch.float64), text()
    expected = torch.autograd.grad(made.loss(ids), list(made.parameters()))
    made.activation_checkpointing = True
    try:
        found = torch.autograd.grad(made.loss(ids), list(made.parameters()))
    finally:
        made.activation_checkpointing = False
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


def zero_at_first(name: str, made: MemoryLM) -> str | None:
    """Why a parameter's gradient is zero in the first step, if the mathematics makes it so."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return None
    if "mixer_norm" in name or "mlp_norm" in name:
        return "what follows it ends in an output projection that starts at zero"
    if parts[2] in ("mixer", "mlp") and not name.endswith(("output.weight", "mlp.down.weight")):
        return "its block's output projection starts at zero"
    return None


def zero_for_good(name: str, made: MemoryLM) -> str | None:
    """Why a parameter's gradient stays zero."""
    layer = name.split(".")[1] if name.startswith("blocks") else ""
    if layer and "residual" in name and made._first_of_kind[int(layer)] == int(layer) == 0:
        return "layer 0's values are the first values: the residual mixes them with themselves"
    return None


@pytest.mark.parametrize("name", LAYERS)
def test_one_step_from_the_initialisation(name):
    torch.manual_seed(0)
    made = MemoryLM(model(name).spec).double().train()
    ids = text(rows=3)
    made.loss(ids).backward()
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        reason = zero_at_first(key, made)
        assert (parameter.grad != 0).any() == (reason is None), (key, reason)
    # Once no weight stands at zero, only what is zero for good has no gradient.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.zero_grad()
    made.loss(ids).backward()
    for key, parameter in made.named_parameters():
        reason = zero_for_good(key, made)
        largest = float(parameter.grad.abs().max())  # type: ignore[union-attr]
        assert (largest > 1e-12) == (reason is None), (key, largest, reason)


def test_training_learns():
    torch.manual_seed(0)
    made = MemoryLM(model("hybrid").spec)
    ids = (torch.arange(16) * 3 % 19).repeat(2, 1)  # the next token follows from this one
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = made.loss(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["hybrid", "ovq"])
def test_autocast(name):
    torch.manual_seed(0)
    made, ids = model(name), text()
    expected = made(ids)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, memory = made(ids[:, :20])
        two, memory = made(ids[:, 20:], memory)
        loss = made.loss(ids)
    found = torch.cat((one, two), 1).float()
    assert (found - expected).abs().median() < 0.02 * expected.abs().max()
    grads = torch.autograd.grad(loss, list(made.parameters()))
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("name", ["hybrid", "streaming"])
def test_a_whole_model_in_bfloat16(name):
    made = MemoryLM(model(name).spec).bfloat16()
    with torch.no_grad():
        logits, memory = made(text())
        logits, memory = made(text(), memory)
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


def test_memory_can_be_forked_reordered_and_moved():
    made, ids = model("hybrid"), text(rows=3)
    with torch.no_grad():
        _, memory = made(ids[:, :20])
        copy = memory.fork()
        swapped = memory.reorder([2, 0, 0])
        expected, _ = made(ids[:, 20:], memory)
        again, _ = made(ids[:, 20:], copy.to("cpu"))
        reordered, after = made(ids[[2, 0, 0], 20:], swapped)
        torch.testing.assert_close(again, expected)
        torch.testing.assert_close(reordered, expected[[2, 0, 0]], atol=1e-5, rtol=1e-4)
        with pytest.raises(MemoryStateError, match="taken over"):
            made(ids[:, 20:], memory)
    assert after.seen.tolist() == [30, 30, 30]
    assert after.bytes > 0
    assert "ModelMemory(model without a name, seen [30, 30, 30], 4 layers" in repr(after)
    with pytest.raises(MemoryStateError, match="rows must be a list of numbers from 0 to 2"):
        after.reorder([3])


def test_gradients_stop_at_a_detached_memory():
    made, ids = model("hybrid"), text()
    _, memory = made(ids[:, :20])
    detached = memory.detach()
    tensors = [each for layer in detached.layers for each in layer.values()]
    assert not any(each.requires_grad for each in tensors)
    logits, _ = made(ids[:, 20:], detached)
    logits.sum().backward()
    made.zero_grad()


def test_errors():
    made, ids = model("full"), text()
    with pytest.raises(InputError, match=r"ids must be whole numbers \[batch, tokens\], got torch.float32"):
        made(ids.float())
    with pytest.raises(InputError, match="ids must lie between 0 and 18, got 0 … 19"):
        made(torch.tensor([[0, 19]]))
    with pytest.raises(InputError, match="lengths must lie between 0 and the call's 30 tokens"):
        made(ids, lengths=torch.tensor([31, 2]))
    with pytest.raises(InputError, match=r"lengths must be one whole number per row, shape \(2,\)"):
        made(ids, lengths=torch.tensor([3]))
    with pytest.raises(InputError, match="documents must be as ids"):
        made.read_packed(ids, ids[:1])
    with torch.no_grad():
        _, memory = made(ids)
    with pytest.raises(InputError, match="memory is for 2 rows, got ids of 1"):
        made(ids[:1], memory)
    with pytest.raises(MemoryStateError, match="belongs to another model"):
        model("kvm")(ids, memory)
