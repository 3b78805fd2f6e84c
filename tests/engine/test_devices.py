"""What a GPU adds: chunks read together, no waiting for the device, other fused kernels.

Without a GPU: reading together is tested on the CPU; a tensor on the `meta` device has no numbers at all, so that
whatever looks at one fails there; and the kernels' shapes are those that PyTorch declares for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit.engine import forward, keysets, lanes, read, together
from memkit.engine.keysets import KeySets
from memkit.memory import slots
from memkit.pieces import Need

PLANNED = [name for name in memkit.policy_names() if memkit.load_policy(name).build().plans_ahead]

HEADS, WIDTH = 4, 8
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def operations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which lanes are not for."""
    monkeypatch.setattr(lanes, "ENABLED", False)


def _small(name: str) -> memkit.PolicySpec:
    sliding = memkit.load_policy(name).window.kind == "sliding"
    return memkit.load_policy(name, {"window.size": 20} if sliding else {"chunker.size": 8})


def _given(
    name: str, rows: int, kv_heads: int, tokens: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[memkit.Policy, list[Tensor], dict[str, Any]]:
    """A policy, queries, keys and values, and what it needs besides."""
    torch.manual_seed(0)
    policy = _small(name).build()
    shapes = [(rows, HEADS, tokens, WIDTH), (rows, kv_heads, tokens, WIDTH), (rows, kv_heads, tokens, WIDTH)]
    tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    learned = Need.MERGE_WEIGHTS in policy.needs
    more: dict[str, Any] = {"weights": torch.rand(shapes[1][:3], device=device) if learned else None}
    if policy.learned:
        more["parameters"] = memkit.PolicyParameters(policy, HEADS, WIDTH).to(device)
    if Need.ROTATION in policy.needs:
        more["rotation"] = memkit.Rotation("adjacent", WIDTH, 1 / torch.logspace(0, 2, WIDTH // 2, device=device))
    return policy, tensors, more


def _everything(policy: memkit.Policy, tensors: list[Tensor], more: dict[str, Any]) -> list[Tensor]:
    """Outputs of a prefill in two parts, its slots, and outputs and gradients of a training step."""
    weights = more.pop("weights")
    first, second = slice(0, 11), slice(11, None)
    results: list[Tensor] = []
    with torch.no_grad():
        memory = None
        for span in (first, second):
            some = None if weights is None else weights[:, :, span]
            output, memory = memkit.attend(
                policy, *[tensor[:, :, span] for tensor in tensors], weights=some, memory=memory, **more
            )
            results.append(output)
        assert memory is not None
        results.append(memory.sums)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, _ = memkit.attend(policy, *leaves, weights=weights, **more)
    return [*results, output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize(("rows", "kv_heads"), [(1, 4), (3, 2)])
def test_chunks_read_together_read_the_same(
    name: str, rows: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    of_many = KeySets.of_many

    def counting(self: KeySets, steps: Any, *rest: Any) -> Any:
        groups.append(len(steps))
        return of_many(self, steps, *rest)

    folds: list[int] = []
    slots_after = together.slots_after

    def folding(stretch: Any, rows: Any) -> Any:
        folds.append(len(stretch.sizes))
        return slots_after(stretch, rows)

    monkeypatch.setattr(KeySets, "of_many", counting)
    monkeypatch.setattr(together, "slots_after", folding)
    monkeypatch.setattr(forward, "UNEQUAL_SLOTS", {"cpu"})
    monkeypatch.setattr(keysets, "JOINED", {})
    monkeypatch.setattr(forward, "TOGETHER", {})
    apart = _everything(*_given(name, rows, kv_heads, 203))
    assert not groups
    monkeypatch.setattr(forward, "TOGETHER", {"cpu": 48})
    for folded, most in ((set[str](), 2**30), ({"cpu"}, 2**30), ({"cpu"}, 1)):
        groups.clear()
        folds.clear()
        monkeypatch.setattr(together, "FOLDED_TOGETHER", folded)
        monkeypatch.setattr(forward, "MOST_BYTES", most)
        monkeypatch.setattr(slots, "BY_PRODUCT", {"cpu": (512 if folded else 0, 2**26)})
        found = _everything(*_given(name, rows, kv_heads, 203))
        assert bool(groups) == (_small(name).window.kind == "block")
        keeps = _small(name).build().slots_after(203) > 0
        assert max(groups, default=6) == (1 if keeps and most == 1 and groups else 6)
        assert bool(folds) == bool(folded and keeps and groups)
        # The same sums in another order: of 203 products at most, of numbers of order 1.
        for one, other in zip(apart, found, strict=True):
            if one.numel():
                assert (one - other).abs().max() <= 256 * EPS * max(1.0, float(one.detach().abs().max()))


def test_many_slots_are_folded_one_chunk_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "FOLDED_TOGETHER", {"cpu"})
    folds: list[object] = []
    slots_after = together.slots_after
    monkeypatch.setattr(together, "slots_after", lambda *given: folds.append(given) or slots_after(*given))
    policy, tensors, more = _given("kvm-fixed-256", 1, 2, 203)
    results: list[Tensor] = []
    with torch.no_grad():
        for little in (2**26, 1):
            monkeypatch.setattr(together, "LITTLE", little)
            results.append(memkit.attend(policy, *tensors, **more)[0])
            assert bool(folds) == (little > 1)
            folds.clear()
    assert (results[0] - results[1]).abs().max() <= 256 * EPS


@pytest.mark.parametrize("weigh", [{"founders": True, "first_chunk": True}, {"founders": True}, {"first_chunk": True}])
@pytest.mark.parametrize("split", [0, 60])
def test_the_first_chunk_is_weighed_the_same_together(
    weigh: dict[str, bool], split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "TOGETHER", {"cpu": 48})
    torch.manual_seed(0)
    changes = {"chunker.size": 8, "window.chunks": 1, "growth.factor": 2.0, "growth.floor": 8, "merging.weigh": weigh}
    policy = memkit.load_policy("kvm-sqrt-16", changes).build()
    tensors = [torch.randn(1, 2, 120, WIDTH, dtype=torch.float64) for _ in range(3)]
    weights = torch.rand(1, 2, 120, dtype=torch.float64) + 0.5
    results: list[list[Tensor]] = []
    for folded in (set[str](), {"cpu"}):
        monkeypatch.setattr(together, "FOLDED_TOGETHER", folded)
        leaves = [tensor.clone().requires_grad_() for tensor in (*tensors, weights)]
        memory, outputs = None, list[Tensor]()
        for span in (slice(0, split), slice(split, None)):
            *some, of_some = (leaf[:, :, span] for leaf in leaves)
            output, memory = memkit.attend(policy, *some, weights=of_some, memory=memory)
            outputs.append(output)
        loss = sum(output.square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_rows_are_not_summed_by_products_that_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "BY_PRODUCT", {"cpu": (512, 2**26)})
    store, slot = slots.SlotStore(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 1)), torch.tensor([[[2, 0, 2]]])
    takes = store._takes(slot)
    assert takes is not None
    assert takes[0, 0].tolist() == [[False, True, False], [False] * 3, [True, False, True], [False] * 3]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert store._takes(slot) is None
    finally:
        torch.set_float32_matmul_precision(before)
    assert store._takes(slot) is not None


def test_rows_of_one_phase_but_unequal_slots_are_not_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rows have whole chunks behind them, so that columns agree; slots do not."""
    monkeypatch.setattr(forward, "UNEQUAL_SLOTS", {"cpu"})
    results: list[Tensor] = []
    for at_once in ({}, {"cpu": 48}):
        monkeypatch.setattr(forward, "TOGETHER", at_once)
        policy, tensors, more = _given("kvm-sqrt-16", 2, 2, 96)
        del more["weights"]
        first, second = ([tensor[:, :, span] for tensor in tensors] for span in (slice(0, 48), slice(48, None)))
        with torch.no_grad():
            _, memory = memkit.attend(policy, *first, lengths=torch.tensor([24, 48]), **more)
            results.append(memkit.attend(policy, *second, memory=memory, **more)[0])
    assert (results[0] - results[1]).abs().max() <= 256 * EPS


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("even", [True, False])
def test_nothing_waits_for_a_number(name: str, even: bool) -> None:
    policy, tensors, more = _given(name, 2, 2, 44, device="meta")
    lengths = None if even else torch.tensor([44, 31])
    with torch.no_grad():
        output, memory = memkit.attend(policy, *tensors, lengths=lengths, **more)
    assert output.shape == tensors[0].shape
    assert memory.seen.tolist() == [44, 44 if even else 31]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output, _ = memkit.attend(policy, *leaves, lengths=lengths, **more)
    output.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)
    if policy.chunk:
        made = memkit.plan(
            policy, tensors[1], lengths=lengths, **{name: each for name, each in more.items() if name != "scale"}
        )
        assert made.slot.shape[:2] == (2, 2)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("name", PLANNED)
def test_the_kernels_for_gpus_are_called_as_declared(name: str, even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes alone; the numbers need a GPU (`test_cuda_agrees_with_cpu`)."""
    calls: set[str] = set()

    def kernel(layout: Any) -> str:
        name = "efficient" if layout.bias is not None else "gpu flash"
        calls.add(name)
        return name

    monkeypatch.setattr(read, "_kernel", kernel)
    monkeypatch.setattr(forward, "TOGETHER", {"meta": 48})
    monkeypatch.setattr(forward, "UNEQUAL_SLOTS", {"meta"})
    policy, tensors, more = _given(name, 2, 2, 44, device="meta", dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    output, _ = memkit.attend(policy, *leaves, lengths=None if even else torch.tensor([44, 31]), **more)
    output.sum().backward()
    assert output.shape == tensors[0].shape
    assert output.dtype == torch.bfloat16
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)
    assert "gpu flash" in calls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "kv_heads"), [(1, 4), (3, 2)])
def test_cuda_agrees_with_cpu(
    name: str, rows: int, kv_heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tensors, more = _given(name, rows, kv_heads, 203, dtype=dtype)
    plan = memkit.plan(policy, tensors[1], **more) if policy.chunk else None
    leaves = [tensor.requires_grad_() for tensor in tensors]
    wanted, _ = memkit.attend(policy, *leaves, plan=plan, **more)
    gradients = torch.autograd.grad(wanted.square().sum(), leaves)

    on_gpu = {
        key: each.to("cuda") if isinstance(each, (Tensor, torch.nn.Module)) else each for key, each in more.items()
    }
    if (rotation := more.get("rotation")) is not None:
        on_gpu["rotation"] = dataclasses.replace(rotation, frequencies=rotation.frequencies.to("cuda"))
    found: list[list[Tensor]] = []
    # PyTorch's own kernels take a gradient's parts as they come, unless told otherwise.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            moved = [leaf.detach().to("cuda").requires_grad_() for leaf in leaves]
            torch.cuda.set_sync_debug_mode("error")
            output, _ = memkit.attend(policy, *moved, plan=plan, **on_gpu)
            torch.cuda.set_sync_debug_mode("default")
            found.append([output, *torch.autograd.grad(output.square().sum(), moved)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), "two runs differ"
    # Sums of hundreds of products; in half precision, of outputs rounded by two kernels each in its own order.
    allowed = 1024 * EPS if dtype == torch.float32 else 16 * torch.finfo(dtype).eps
    for one, other in zip(found[0], [wanted, *gradients], strict=True):
        assert (one.cpu() - other).abs().max() <= allowed * max(1.0, float(other.abs().max()))
