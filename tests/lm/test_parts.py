"""What mixers and blocks share."""

from __future__ import annotations

import torch

from memkit.lm.parts import Mlp, MlpSpec, Span


def test_the_mlps_activation_has_first_and_second_derivatives():
    torch.manual_seed(0)
    mlp = Mlp(MlpSpec(expansion=2, multiple_of=4), 4).double()
    torch.nn.init.normal_(mlp.down.weight)
    assert mlp.shift is not None
    span = Span(None, None)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    up = torch.nn.functional.linear(mlp.shift(x, span.previous(x, None, "zero")), mlp.up.weight)
    expected = torch.nn.functional.linear(up.relu().square(), mlp.down.weight)
    assert torch.equal(mlp(x, {}, span)[0], expected)
    assert torch.autograd.gradcheck(lambda x: mlp(x, {}, span)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: mlp(x, {}, span)[0], (x,))
