"""Laws of merge rules: gradients are finite and exact."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from memkit.pieces.merging import Merging
from memkit.testing.agreement import by_differences, show
from memkit.testing.law import Broken, law
from memkit.testing.laws.merging.tokens import Merge, fold

__all__ = ["merge_gradients"]


@law("gradients", "merging")
def merge_gradients(rule: Merging, example: Merge) -> None:
    """The gradient through a slot is finite, and exact: it is the limit of differences.

    d output / d (keys, values, weights) against (f(x + h) − f(x − h)) / 2h in float64, the plan held still. Otherwise
    the layer that makes the keys learns to please another memory than the one it has.
    """
    tokens = example.tokens(rule)
    leaves = [tokens.keys, tokens.values, *([] if tokens.weights is None else [tokens.weights])]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def output(leaves: list[Tensor]) -> Tensor:
        weights = leaves[2] if len(leaves) > 2 else None
        return fold(rule, dataclasses.replace(tokens, keys=leaves[0], values=leaves[1], weights=weights))[1].sum()

    result = output(leaves)
    if not bool(result.isfinite()):
        raise Broken(f"the sum of what is read of slots is {float(result.detach())} for tokens of\n{show(leaves[0])}")
    found = torch.autograd.grad(result, leaves, allow_unused=True)
    for name, leaf, gradient in zip(("keys", "values", "weights"), leaves, found, strict=False):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        if not bool(gradient.isfinite().all()):
            raise Broken(f"gradient of {name}:\n{show(gradient)}\nat\n{show(leaf)}")
        if {example.keys, example.values} != {"normal"} or example.dtype != "float64" or example.weights == "some-zero":
            continue
        with torch.no_grad():

            def moved(changed: Tensor, leaf: Tensor = leaf) -> Tensor:
                return output([changed if other is leaf else other.detach() for other in leaves])

            numeric = by_differences(moved, leaf, 1e-5)
        wrong = (gradient - numeric).abs()
        # h² from the difference's own error, eps/h from rounding: 1e-10 and 2e-11 of the second derivatives and values.
        if not bool((wrong <= 1e-6 * (1 + numeric.abs().max())).all()):
            raise Broken(f"gradient of {name}:\n{show(gradient)}\nby differences:\n{show(numeric)}")
