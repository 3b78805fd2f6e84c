"""torch.compile and autocast: the same results, with one break in the graph per attention layer."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import memkit

EPS = torch.finfo(torch.float32).eps
SMALL = {"chunker.size": 8, "growth.factor": 2, "growth.floor": 4}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _layer() -> memkit.MemoryAttention:
    torch.manual_seed(0)
    return memkit.MemoryAttention(memkit.load_policy("kvm-sqrt-16", SMALL), width=32, heads=4, kv_heads=2)


def _model() -> memkit.MemoryLM:
    torch.manual_seed(0)
    model = memkit.load_model("tiny-kvm-sqrt")
    with torch.no_grad():
        for parameter in model.parameters():  # fresh output projections are 0 and would hide the attention
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
    return model


def _breaks(module: nn.Module, given: Tensor) -> Counter[str]:
    """Where the graph breaks, by function and what stands there."""
    explained = torch._dynamo.explain(module)(given)
    frames = [reason.user_stack[-1] for reason in explained.break_reasons]
    return Counter(f"{frame.name}: {frame.line}" for frame in frames)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["layer", pytest.param("model", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str, kind: str) -> None:
    module = _layer() if kind == "layer" else _model()
    given = torch.randn(2, 50, 32) if kind == "layer" else torch.randint(0, 256, (2, 50))
    wanted, _ = module(given)
    cotangent = torch.randn_like(wanted)
    wanted.backward(cotangent)
    gradients = {name: each.grad for name, each in module.named_parameters()}
    module.zero_grad()

    compiled = torch.compile(module, backend=backend)
    output, _ = compiled(given)
    output.backward(cotangent)
    # Sums of at most a few hundred products, fused and ordered anew by the compiler.
    _agree(output, wanted, 256 * EPS)
    largest = max(float(each.abs().max()) for each in gradients.values() if each is not None)
    for name, each in module.named_parameters():
        if (wanted_gradient := gradients[name]) is not None:
            assert each.grad is not None
            # Against the largest gradient of all: some are 0 but for rounding.
            assert (each.grad - wanted_gradient).abs().max() <= 1024 * EPS * largest

    with torch.no_grad():
        first, memory = compiled(given[:, :44])
        outputs = [first]
        for t in range(44, 50):
            output, memory = compiled(given[:, t : t + 1], memory)
            outputs.append(output)
    _agree(torch.cat(outputs, 1), wanted, 1024 * EPS)


def _agree(one: Tensor, other: Tensor, tolerance: float) -> None:
    assert (one - other).abs().max() <= tolerance * other.abs().max()


def test_a_layer_breaks_the_graph_at_attend_alone() -> None:
    breaks = _breaks(_layer(), torch.randn(2, 50, 32))
    call = "(_attend_outside_graphs if torch.compiler.is_compiling() else _attend)(given, backend)"
    assert set(breaks) == {f"attend: return {call}"}


def test_a_model_breaks_the_graph_at_attend_and_at_its_check_of_ids() -> None:
    breaks = _breaks(_model(), torch.randint(0, 256, (2, 50)))
    places = {place.partition(":")[0] for place in breaks}
    assert places == {"attend", "_span"}


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_projections_and_nothing_in_the_engine(compiled: bool) -> None:
    layer = _layer()
    x = torch.randn(2, 50, 32)
    wanted, _ = layer(x)
    module = torch.compile(layer, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, memory = module(x)
        again, _ = layer(x)
    assert output.dtype == torch.bfloat16
    assert memory.sums.dtype == torch.float32
    # Projections in bfloat16, four of them one after the other.
    assert (output.float() - wanted).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    assert (output - again).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    output.float().sum().backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in layer.parameters())


def test_attend_is_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    policy = memkit.load_policy("kvm-sqrt-16", SMALL).build()
    tensors = [torch.randn(2, 4, 50, 8, requires_grad=True) for _ in range(3)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output, memory = memkit.attend(policy, *tensors)
            results.append((output, memory.sums, *torch.autograd.grad(output.sum(), tensors)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
