"""How far is a memory from full attention? Errors of attention outputs, and where the softmax looks, head by head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine import attend, plan
from memkit.errors import InputError
from memkit.evals.bound import error_bound
from memkit.evals.recording import Call, recorded_calls
from memkit.memory import Memory
from memkit.memory.held import HeldSlots
from memkit.memory.rows import SlotRules, SlotView
from memkit.policy import Policy, PolicySpec
from memkit.whole import whole_number

__all__ = ["HeadFidelity", "fidelity", "fidelity_of_call"]


@dataclass(frozen=True)
class HeadFidelity:
    """One query head of one layer, asked by the tokens that follow after `tokens` have been read.

    error: ‖ô − o‖ / ‖o‖ over these queries, ô read from the memory, o by full attention over the same queries, keys and
    values. sinks, slots, window: shares of ô's softmax, the mean over the queries; they add up to 1. merges: how many
    tokens joined a slot so far. bound: `memkit.evals.bound.error_bound`, as a share of o in the same way; None
    where window and slots are asked with different queries, or not every token is in a slot.
    """

    layer: int
    head: int
    tokens: int
    error: float
    sinks: float
    slots: float
    window: float
    merges: int
    bound: float | None


def fidelity(
    model: Any, ids: Tensor, policy: str | Path | PolicySpec | Policy | None = None, *, every: int, queries: int = 16
) -> list[HeadFidelity]:
    """Compare a memory with full attention in every attention layer of a model that reads a text.

    Each layer's queries, keys and values are those of the model as it reads: a stock model with full attention, a
    `MemoryLM` with its memories.

    Args:
        model: a `MemoryLM`, its Hugging Face wrapper, or a stock model of the Llama family.
        ids: [1, t], t > every.
        policy: of the memory, for a stock model, each layer with its ratios of the head profile, if one is named; None
            for a `MemoryLM`, which has its own.
        every: tokens between the places at which is measured.
        queries: how many tokens ask at each place; fewer where a chunk leaves the window before.

    Raises `InputError`; `PolicyError` for a head profile of another model; `ModelError` for other models.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        raise InputError("ids must be one text, a tensor [1, tokens]; read several one by one")
    every, queries = whole_number("every", every, 1), whole_number("queries", queries, 1)
    if every >= ids.shape[1]:
        raise InputError(f"every must be less than the text's {ids.shape[1]} tokens, got {every}")
    found: list[HeadFidelity] = []
    for layer, call in recorded_calls(model, ids, None if policy is None else as_policy(policy)):
        found += fidelity_of_call(call, every=every, queries=queries, layer=layer)
    return found


@torch.no_grad()
def fidelity_of_call(call: Call, *, every: int, queries: int = 16, layer: int = 0) -> list[HeadFidelity]:
    """The same for one layer's call; heads with unequal shares of the slots have memories of their own."""
    if call.policy.head_policies:
        of_runs = [
            (first, fidelity_of_call(part, every=every, queries=queries, layer=layer))
            for first, part in call.by_heads()
        ]
        heads = [replace(each, head=first + each.head) for first, of_run in of_runs for each in of_run]
        return sorted(heads, key=lambda each: (each.tokens, each.head))
    policy, tokens = call.policy, call.keys.shape[2]
    memory: Memory | None = None
    done, found = 0, list[HeadFidelity]()
    for read in range(every, tokens, every):
        # Tokens of one chunk see the same slots, and the memory after them holds these.
        until = min(read + queries, (read // policy.chunk + 1) * policy.chunk if policy.chunk else tokens, tokens)
        if done < read:
            _, memory = attend(policy, **call.part(done, read), memory=memory)
        output, memory = attend(policy, **call.part(read, until), memory=memory)
        place = _Place(call, memory, read, until)
        found += [place.of_head(head, output[0, head].double(), layer) for head in range(call.queries.shape[1])]
        done = until
    return found


class _Place:
    """The tokens read … until − 1, which ask a memory that has read them."""

    def __init__(self, call: Call, memory: Memory, read: int, until: int) -> None:
        self.call, self.policy, self.read, self.until = call, call.policy, read, until
        self.scale = call.keys.shape[-1] ** -0.5 if call.scale is None else call.scale
        positions = torch.arange(read, until)
        tokens = torch.arange(until)
        self.seen = tokens <= positions[:, None]
        begins = torch.tensor([int(self.policy.window.begin(position)) for position in positions.tolist()])
        self.windowed = self.seen & (tokens >= begins[:, None])
        self.left = int(begins[0])
        asked = call.queries[:, :, read:until]
        self.queries = asked[0].double()
        self.remembering = self.policy.rotary.memory_queries(asked, call.rotation, positions[None, None])
        self.alike = self.remembering is asked and not self._scaled
        self.view = self._slots(memory)
        counts = memory.counts[0]
        self.joined = (counts.sum(-1) - counts.shape[-1]).clamp(min=0).tolist()
        self.slot = self._slot_of_tokens() if self.alike else None

    @property
    def _scaled(self) -> bool:
        parameters = self.call.parameters
        return parameters is not None and parameters.query_scale_window is not None

    def of_head(self, head: int, output: Tensor, layer: int) -> HeadFidelity:
        """One query head's numbers; output [n, v]: what the memory gave."""
        group = head // (self.call.queries.shape[1] // self.call.keys.shape[1])
        keys, values = (each[0, group, : self.until].double() for each in (self.call.keys, self.call.values))
        window_scale, memory_scale = self._scales(head)
        scores = self.scale * window_scale * self.queries[head] @ keys.T
        exact = scores.masked_fill(~self.seen, -torch.inf).softmax(-1) @ values
        visible = scores.masked_fill(~self.windowed, -torch.inf)
        many = sinks = 0
        if self.view is not None:
            slot_scores = (
                self.scale * memory_scale * self.remembering[0, head].double() @ self.view.keys[0, group].double().T
            )
            if self.view.bias is not None:
                slot_scores = slot_scores + self.view.bias[0, group].double()
            many, sinks = slot_scores.shape[1], min(self.policy.spec.sinks, slot_scores.shape[1])
            visible = torch.cat((slot_scores, visible), dim=1)
        shares = visible.softmax(-1)
        of_sinks, of_slots, of_window = (
            float(part.sum(-1).mean()) for part in (shares[:, :sinks], shares[:, sinks:many], shares[:, many:])
        )
        bound = self._bound(head, group, keys, values)
        return HeadFidelity(
            layer=layer,
            head=head,
            tokens=self.read,
            error=float((output - exact).norm() / exact.norm()),
            sinks=of_sinks,
            slots=of_slots,
            window=of_window,
            merges=self.joined[group],
            bound=None if bound is None else float(bound.norm() / exact.norm()),
        )

    def _scales(self, head: int) -> tuple[float, float]:
        """What a head's queries are multiplied by for the window, and for the slots."""
        parameters = self.call.parameters
        if parameters is None or parameters.query_scale_window is None:
            return 1.0, 1.0
        window, memory = parameters.query_scale_window, parameters.query_scale_memory
        slots = window if self.policy.sinks_only or memory is None else memory
        return window[head].item(), slots[head].item()

    def _slots(self, memory: Memory) -> SlotView | None:
        """The slots as they are read; None where there is none."""
        live = int(memory.live_rows[0])
        if not live:
            return None
        call = self.call
        key_norm = None if call.parameters is None else call.parameters.key_norm
        rules = SlotRules(self.policy, call.keys.shape[-1], call.keys.dtype, key_norm, call.rotation, valued=True)
        store = memory.store.opened() if isinstance(memory.store, HeldSlots) else memory.store
        return store.read(rules).first(live)

    def _slot_of_tokens(self) -> Tensor | None:
        """The slot of each token that left the window, [g, n]; None where that cannot be said of every one."""
        if self.view is None or self.policy.sinks_only or not self.policy.plans_ahead:
            return None
        given = self.call.part(0, self.until)
        made = plan(
            self.policy,
            given["keys"],
            weights=given["weights"],
            parameters=given["parameters"],
            rotation=given["rotation"],
        )
        slot = made.slot[0, :, : self.left]
        return None if slot.shape[1] < self.left or bool((slot < 0).any()) else slot

    def _bound(self, head: int, group: int, keys: Tensor, values: Tensor) -> Tensor | None:
        """The bound for each query, [n]; each sees its own part of the window."""
        if self.slot is None or self.view is None:
            return None
        view, left = self.view, self.left
        bias = torch.zeros(view.keys.shape[2]) if view.bias is None else view.bias[0, group]
        slots = (view.keys[0, group].double(), view.values[0, group].double(), bias.double())
        merged = (keys[:left], values[:left], self.slot[group])
        return torch.cat(
            [
                error_bound(query[None], (keys[left:end], values[left:end]), merged, slots, self.scale)
                for query, end in zip(self.queries[head], range(self.read + 1, self.until + 1), strict=True)
            ]
        )
