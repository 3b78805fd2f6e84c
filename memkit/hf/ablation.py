"""What a head's far rows are worth to the loss: a text is read with one head that sees nothing but the sinks and the
newest tokens, and all others as they are.

Errors of a head's own output do not say what later layers make of them. A few heads of the first layers, on which many
later ones depend, have small errors and cost most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from memkit.engine import attend
from memkit.hf.probe import LayerFacts, attention_function
from memkit.hf.watched import NAME, watching
from memkit.pieces.window import SlidingWindowSpec
from memkit.policy import PolicySpec

__all__ = ["head_costs"]

SINKS = 4
WINDOW = 128
"""What a blind head still sees: so many first and newest tokens."""
AT_ONCE = 256
"""Tokens whose logits are taken at once: a vocabulary is large."""

BLIND = PolicySpec(window=SlidingWindowSpec(size=WINDOW), sinks=SINKS)


@torch.no_grad()
def head_costs(
    decoder: nn.Module,
    logits: Callable[[Tensor], Tensor],
    ids: Sequence[int],
    first: int,
    facts: Mapping[int, LayerFacts],
    heads: Sequence[tuple[int, int]],
    done: Callable[[], None] = lambda: None,
) -> list[float]:
    """By how much the loss of tokens `first` … rises, in nats per token, with each of some heads blind.

    decoder, logits: a stock model's, and what it makes of last hidden states; ids: the text; facts: of each attention
    layer; heads: (layer, key/value head) each, none of a layer that slides; done: called after each.
    """
    assert list(heads) == sorted(heads)  # layers before the blind one are not read again
    device = next(decoder.parameters()).device
    text = torch.tensor([list(ids)], device=device)

    def loss(blind: tuple[int, int] | None) -> float:
        def look(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor) -> None:
            if blind is not None and blind[0] == layer:
                group, head = query.shape[1] // key.shape[1], blind[1]
                readers, rows = slice(head * group, (head + 1) * group), slice(head, head + 1)
                output[:, readers], _ = attend(BLIND, query[:, readers], key[:, rows], value[:, rows], scale=scale)

        states = decoder(text, use_cache=False, **watching(look, facts)).last_hidden_state[0, first - 1 : -1]
        pairs = zip(states.split(AT_ONCE), text[0, first:].split(AT_ONCE), strict=True)
        losses = [nn.functional.cross_entropy(logits(part).float(), to, reduction="sum") for part, to in pairs]
        return float(torch.stack(losses).sum()) / len(states)

    with attention_function(decoder, NAME), ExitStack() as undo:
        layers, outputs = _layers(decoder), list[Any]()
        hooks = [layer.register_forward_hook(lambda *call: outputs.append(call[-1])) for layer in layers]
        whole, costs = loss(None), list[float]()
        for hook in hooks:
            hook.remove()
        for each in heads:
            _answer_again(layers[: each[0]], outputs, undo)
            costs.append(loss(each) - whole)
            done()
    return costs


def _layers(decoder: nn.Module) -> list[nn.Module]:
    """A decoder's layers in their order; none where they are not in a list named `layers`: then all read each time."""
    found = getattr(decoder, "layers", ())
    return list(found) if isinstance(found, nn.ModuleList) else []


def _answer_again(layers: Sequence[nn.Module], outputs: Sequence[Any], undo: ExitStack) -> None:
    """Let layers return what they returned before: nothing changes before a blind head."""
    for each, output in zip(layers, outputs, strict=False):
        if "forward" not in vars(each):
            each.forward = lambda *_, output=output, **__: output
            undo.callback(delattr, each, "forward")
