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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memkit.engine import attend
from memkit.hf.attention import as_in_stock
from memkit.hf.probe import LayerFacts, attention_function
from memkit.pieces.window import SlidingWindowSpec
from memkit.policy import PolicySpec

__all__ = ["head_costs"]

NAME = "memkit-ablation"
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
        given: dict[str, Any] = {"memkit_blind": blind, "memkit_facts": facts}
        states = decoder(text, use_cache=False, **given).last_hidden_state[0, first - 1 : -1]
        pairs = zip(states.split(AT_ONCE), text[0, first:].split(AT_ONCE), strict=True)
        losses = [nn.functional.cross_entropy(logits(part).float(), to, reduction="sum") for part, to in pairs]
        return float(torch.stack(losses).sum()) / len(states)

    with attention_function(decoder, NAME), _Layers(decoder) as layers:
        whole, costs = loss(None), list[float]()
        layers.keep = False
        for each in heads:
            layers.begin_with(each[0])
            costs.append(loss(each) - whole)
            done()
    return costs


class _Layers:
    """A decoder's layers, which remember what they returned while `keep` is set: before a blind head, nothing changes.
    Where they are not in a list named `layers`, all of them read each time."""

    def __init__(self, decoder: nn.Module) -> None:
        found = getattr(decoder, "layers", ())
        self.layers: list[nn.Module] = list(found) if isinstance(found, nn.ModuleList) else []
        self.outputs: list[Any] = [None] * len(self.layers)
        self.keep, self.undo = True, ExitStack()

    def __enter__(self) -> _Layers:
        for number, layer in enumerate(self.layers):
            self.undo.callback(layer.register_forward_hook(self._note(number)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def _note(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_layer: nn.Module, _given: Any, output: Any) -> None:
            if self.keep:
                self.outputs[number] = output

        return note

    def begin_with(self, layer: int) -> None:
        """Let the layers before this one return what they returned."""
        for each, output in zip(self.layers[:layer], self.outputs, strict=False):
            if "forward" not in vars(each):
                each.forward = lambda *_, output=output, **__: output
                self.undo.callback(delattr, each, "forward")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    memkit_blind: tuple[int, int] | None,
    memkit_facts: Mapping[int, LayerFacts],
    **_: Any,
) -> tuple[Tensor, None]:
    """The stock model's attention, one head of which may be blind: [b, h, t, d] in, [b, t, h, d] out."""
    facts = memkit_facts[module.layer_idx]
    query, key = facts.turning_first(query), facts.turning_first(key)
    output, _memory = attend(as_in_stock(facts.window), query, key, value, scale=scaling)
    if memkit_blind is not None and memkit_blind[0] == module.layer_idx:
        group, head = query.shape[1] // key.shape[1], memkit_blind[1]
        readers, rows = slice(head * group, (head + 1) * group), slice(head, head + 1)
        output[:, readers], _memory = attend(BLIND, query[:, readers], key[:, rows], value[:, rows], scale=scaling)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
