"""Gradients that were wrong without an error: each as it was met, and its kind."""

from __future__ import annotations

import gc
import weakref
from typing import Literal

import pytest
import torch
from torch import Tensor

import memkit
from memkit.pieces import Merging, MergingSpec
from tests.engine.cases import CHUNK, Case, make_case, small

NAMES = memkit.policy_names()


class HalvingSpec(MergingSpec):
    """Not registered, so that it stands in nobody's way."""

    kind: Literal["test-halving"] = "test-halving"

    def build(self) -> Halving:
        return Halving()


class Halving(Merging):
    additive = False

    def combine(self, slot: Tensor, token: Tensor) -> Tensor:
        return (slot + token) / 2


def specs() -> list[memkit.PolicySpec]:
    """Every shipped policy, and one whose rule is not additive."""
    halving = memkit.load_policy(small("untrained-kvm-fixed"), {"merging": HalvingSpec()}).named("halving")
    return [*(small(name) for name in NAMES), halving]


@pytest.fixture(params=range(len(NAMES) + 1), ids=[*NAMES, "halving"])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(specs()[request.param], 5 * CHUNK + 3).leaves()


def test_what_was_changed_in_place_before_backward_is_noticed(case: Case):
    everything = case.tensors | case.learned
    for name, tensor in everything.items():
        output, _ = case.attend()
        with torch.no_grad():
            tensor.mul_(1.5)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            output.sum().backward()
        with torch.no_grad():
            tensor.div_(1.5)
        assert name in everything


def test_an_optimiser_step_between_two_backward_passes_is_noticed():
    layer = memkit.MemoryAttention(small("kvm-sqrt-16"), width=16, heads=2)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 5 * CHUNK, 16)
    first, second = layer(x)[0].sum(), layer(2 * x)[0].sum()
    first.backward()
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_saved_tensors_go_through_the_hooks_and_come_back(case: Case):
    right = torch.autograd.grad(case.attend()[0].square().sum(), [*case.tensors.values(), *case.learned.values()])
    packed: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor.clone()):
        output = case.attend()[0].square().sum()
    found = torch.autograd.grad(output, [*case.tensors.values(), *case.learned.values()])
    assert packed
    for got, expected in zip(found, right, strict=True):
        torch.testing.assert_close(
            got, expected
        )  # a clone may be laid out otherwise, and products then round otherwise


def test_what_backward_needed_is_freed_after_it(case: Case):
    alive: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach().clone()
        alive.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, memory = case.attend()
    loss = output.sum()
    loss.backward()
    del memory
    gc.collect()
    assert alive
    assert not [ref for ref in alive if ref() is not None]
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_graph_may_be_walked_twice(case: Case):
    inputs = [*case.tensors.values(), *case.learned.values()]
    loss = case.attend()[0].square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(loss, inputs), first, strict=True):
        assert torch.equal(got, expected)


def test_differentiating_twice_is_an_error_that_names_it(case: Case):
    keys, queries = case.tensors["keys"], case.tensors["queries"]
    expected = torch.autograd.grad(case.attend()[0].sum(), keys)[0]
    output = case.attend()[0]
    gradient = torch.autograd.grad(output.sum(), keys, create_graph=True)[0]
    assert torch.equal(gradient, expected)  # create_graph alone does no harm
    for of in (keys, queries):
        with pytest.raises(memkit.InputError, match="no second derivative"):
            torch.autograd.grad(gradient.square().sum(), of, retain_graph=True)
    penalised = output.sum() + gradient.square().sum()
    with pytest.raises(memkit.InputError, match="no second derivative"):
        penalised.backward()


@pytest.mark.parametrize("name", NAMES)
def test_a_float64_layer_passes_gradcheck(name: str):
    torch.manual_seed(1)
    layer = memkit.MemoryAttention(small(name), width=4, heads=2, head_width=6, value_width=3).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(1, 3 * CHUNK + 2, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_a_float64_model_computes_its_loss_in_float64():
    model = memkit.load_model("tiny-kvm-sqrt", {"depth": 1}).double()
    assert model.loss(torch.randint(256, (1, 50))).dtype == torch.float64
