"""The kernels for GPUs say what PyTorch says: on one, or else in Triton's interpreter; and they compile without one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import memkit
from memkit.engine import forward, fused, together
from memkit.memory.rows import SlotRules

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where `conftest.py` asks for the interpreter
EPS = torch.finfo(torch.float32).eps
POLICIES: dict[str, dict[str, Any]] = {
    "kvm-fixed-256": {"growth.slots": 40},
    "kvm-sqrt-16": {"growth.factor": 3.0, "growth.floor": 16},
    "kvm-log-256": {},
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Chunks are folded together, by kernels where these can; whether they could, of all times."""
    monkeypatch.setattr(forward, "TOGETHER", {DEVICE: 48})
    monkeypatch.setattr(forward, "UNEQUAL_SLOTS", {DEVICE})
    monkeypatch.setattr(together, "FOLDED_TOGETHER", {DEVICE})
    for name, size in (("TOKENS", 16), ("SLOTS", 16), ("UNFOLDED", 16)):
        monkeypatch.setattr(fused, name, size)
    found: set[bool] = set()
    fold_fused = together.fold_fused

    def noting(*given: Any) -> Any:
        result = fold_fused(*given)
        found.add(result is not None)
        return result

    monkeypatch.setattr(together, "fold_fused", noting)
    return found


def everything(policy: memkit.Policy, heads: int, kv_heads: int, width: int, value_width: int) -> list[Tensor]:
    """Outputs, sums, numbers and all gradients of a training step; and outputs and sums of a prefill in two parts."""
    torch.manual_seed(0)
    rows, tokens, cut = 2, 131, 67
    shapes = [(rows, heads, tokens, width), (rows, kv_heads, tokens, width), (rows, kv_heads, tokens, value_width)]
    leaves = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in shapes]
    weights = (torch.rand(rows, kv_heads, tokens, device=DEVICE) + 0.5).requires_grad_()
    parameters = memkit.PolicyParameters(policy, heads, width).to(DEVICE)
    with torch.no_grad():
        for each in parameters.tensors():
            each += 0.2 * torch.randn_like(each)
    output, memory = memkit.attend(policy, *leaves, weights=weights, parameters=parameters)
    loss = output.square().sum() + memory.sums.square().mean() + memory.store.numbers.square().mean()
    found = [output, memory.sums, memory.store.numbers]
    found += torch.autograd.grad(loss, [*leaves, weights, *parameters.parameters()])
    memory = None
    for span in (slice(0, cut), slice(cut, None)):
        some = [tensor.detach()[:, :, span] for tensor in (*leaves, weights)]
        with torch.no_grad():
            output, memory = memkit.attend(policy, *some[:3], weights=some[3], parameters=parameters, memory=memory)
        found.append(output)
    assert memory is not None
    return [tensor.detach() for tensor in (*found, memory.sums)]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("sizes", [(2, 2, 16, 16), (4, 2, 24, 40)])
def test_kernels_say_what_pytorch_says(
    name: str, sizes: tuple[int, int, int, int], kernels: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = memkit.load_policy(name, {"chunker.size": 16, **POLICIES[name]}).build()
    wanted = everything(policy, *sizes)
    assert not kernels
    monkeypatch.setattr(fused, "FUSED_ON", {DEVICE})
    found = everything(policy, *sizes)
    assert True in kernels, "no chunk was folded by them"
    # The same sums in another order: of 131 products at most, of numbers of order 1.
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 256 * EPS * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kvm-sqrt-16", {"routing.similarity": "cosine"}),
        ("kvm-sqrt-16", {"rotary.kind": "unrotate", "readout.value": "mean"}),
        ("kvm-sqrt-16", {"admission.kind": "recency"}),
        ("kvm-sqrt-16", {"routing.least": 0.5}),
        ("ovq-1024", {}),
        ("block-mean-8", {}),
    ],
)
def test_other_memories_are_left_to_pytorch(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = memkit.load_policy(name, changes).build()
    rules = SlotRules(policy, 8, torch.float32, None, None, True)
    monkeypatch.setattr(fused, "FUSED_ON", {"cpu"})
    assert not fused.fuses(rules, torch.zeros(1, 1, 1, 16))


def test_an_empty_memory_that_takes_some_of_its_first_chunk_is_left_to_pytorch(
    kernels: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"chunker.size": 16, "growth.slots": 40, "growth.first_chunk": "budget"}
    policy = memkit.load_policy("kvm-fixed-256", changes | {"growth.slots": 9}).build()
    wanted = everything(policy, 2, 2, 16, 16)
    monkeypatch.setattr(fused, "FUSED_ON", {DEVICE})
    found = everything(policy, 2, 2, 16, 16)
    assert kernels == {True, False}
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 256 * EPS * max(1.0, float(other.abs().max()))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter says so
@pytest.mark.usefixtures("kernels")
def test_rows_of_the_batch_know_nothing_of_one_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FUSED_ON", {DEVICE})
    policy = memkit.load_policy("kvm-fixed-256", {"chunker.size": 16, "growth.slots": 40}).build()
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 2, 99, 16, device=DEVICE) for _ in range(3))
    broken = keys.clone()
    broken[1, 0, 20] = torch.nan
    with torch.no_grad():
        wanted, memory = memkit.attend(policy, queries, keys, values)
        found, other = memkit.attend(policy, queries, broken, values)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(other.store.numbers[0], memory.store.numbers[0])


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from memkit.engine import fused, kernels

SIZES = {"width": 128, "padded": 128, "values": 64, "padded_values": 64, "padded_chunk": 256, "sinks": 1,
         "epsilon": 1e-5, "shortest": 1e-12, "tokens": fused.TOKENS, "slots": fused.SLOTS, "keeps": True}
TYPES = {"slot": "*i64", "founded": "*u8", "place": "*i32",
         **dict.fromkeys(("view_keys", "view_values", "grad_keys", "grad_values"), "*bf16"),
         **dict.fromkeys(kernels.VARYING + ["heads", "sinks"], "i32")}
for architecture in (80, 90):
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        sizes = SIZES if name != "unfold" else SIZES | {"slots": fused.UNFOLDED}
        names = kernel.arg_names
        types = {n: "constexpr" if n in sizes else TYPES.get(n, "i32" if "stride" in n else "*fp32") for n in names}
        constants = {(names.index(n),): value for n, value in sizes.items() if n in names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        options = {"num_warps": fused.WARPS}
        made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        assert made.metadata.shared <= 99 * 1024, (name, made.metadata.shared)  # what a block has on any GPU since 2020
        print(architecture, name, len(made.asm["cubin"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_for_gpus() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 10
