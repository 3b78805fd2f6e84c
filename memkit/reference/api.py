"""`attend` and `plan` by the book: every row, every head, one token after another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from memkit.engine.inputs import AttendInputs, Plan
from memkit.memory import Memory
from memkit.memory.cuts import Cuts
from memkit.memory.slots import SlotStore
from memkit.memory.window import Window
from memkit.reference.head import Head
from memkit.reference.observing import Observing
from memkit.reference.rules import Rules
from memkit.reference.words import definitely, stacked

__all__ = ["ask_again", "attend", "plan"]


def attend(inputs: AttendInputs) -> tuple[Tensor, Memory]:
    """Outputs [b, h, t, v] in the inputs' dtype and the memory after the call, by the book."""
    queries, memory = inputs.queries, inputs.memory
    assert queries is not None and inputs.values is not None
    if memory is not None:
        memory.check_usable()
        memory.taken = not (inputs.differentiable or memory.requires_grad)
    group = queries.shape[1] // inputs.keys.shape[1]
    with torch.set_grad_enabled(inputs.differentiable):
        rules = Rules(inputs)
        heads = [[Head(rules, inputs, r, g) for g in range(inputs.keys.shape[1])] for r in range(queries.shape[0])]
        silence = inputs.values.new_zeros(inputs.values.shape[-1], dtype=torch.float64)
        outputs: list[Tensor] = []
        for r, row in enumerate(heads):
            for i in range(queries.shape[2]):
                if i >= inputs.row_lengths[r]:  # padding
                    outputs += [silence] * queries.shape[1]
                    continue
                for head in row:
                    head.arrive(head.seen + i)
                for h in range(queries.shape[1]):
                    head, query = row[h // group], queries[r, h, i].double()
                    outputs.append(head.read(query, h, head.seen + i))
                    if head.observing is not None:
                        at = head.seen + i
                        head.observing.hear(query.detach(), h, at, head.chunk_begin(at))
                for head in row:
                    head.observe(head.seen + i)
        shape = (queries.shape[0], queries.shape[2], queries.shape[1], len(silence))
        output = stacked(outputs, silence).reshape(shape).transpose(1, 2).to(queries.dtype)
        return output, written(rules, inputs, heads)


@torch.no_grad()
def plan(inputs: AttendInputs) -> Plan:
    """Where each token goes that leaves the window during the inputs. Memory is only read."""
    rules = Rules(inputs)
    rows, heads = inputs.keys.shape[:2]
    states = [[Head(rules, inputs, r, g) for g in range(heads)] for r in range(rows)]
    begin = np.array([row[0].left for row in states], dtype=np.int64)
    for r, row in enumerate(states):
        for head in row:
            for i in range(int(inputs.row_lengths[r])):
                head.arrive(head.seen + i)
    length = np.array([row[0].left for row in states], dtype=np.int64) - begin
    most = int(length.max())
    slot = torch.full((rows, heads, most), -1, dtype=torch.int64)
    founded = torch.zeros(rows, heads, most, dtype=torch.bool)
    for r, row in enumerate(states):
        for g, head in enumerate(row):
            for j, (where, founds) in enumerate(head.record):
                slot[r, g, j], founded[r, g, j] = where, founds
    counts = [row[0].counts or [len(row[0].slots)] for row in states]
    chunks = max(len(row[0].counts) for row in states)
    slots = [(each + each[-1:] * chunks)[:chunks] for each in counts]
    return Plan(
        slot=slot.to(inputs.keys.device),
        founded=founded.to(inputs.keys.device),
        begin=begin,
        length=length,
        slots=np.array(slots, dtype=np.int64).reshape(rows, chunks),
    )


@torch.no_grad()
def ask_again(inputs: AttendInputs, readers: Tensor) -> Memory:
    """A memory once readers [b, h, n, d] who have read its text again have said what its rows are worth.

    inputs: a call of no tokens, with that memory; it is left as it is.
    """
    assert inputs.memory is not None
    rules, group = Rules(inputs), readers.shape[1] // inputs.keys.shape[1]
    heads = [[Head(rules, inputs, r, g) for g in range(inputs.keys.shape[1])] for r in range(len(readers))]
    for r, row in enumerate(heads):
        for g, head in enumerate(row):
            queries = [
                (readers[r, h, i].double(), h)
                for i in range(readers.shape[2])
                for h in range(g * group, (g + 1) * group)
            ]
            asked = [head.shares(query, h, head.seen - 1) for query, h in queries]
            observing(head).ask_again(asked, range(head.left, head.seen))
    return written(rules, inputs, heads)


def written(rules: Rules, inputs: AttendInputs, heads: list[list[Head]]) -> Memory:
    """The memory after the call, in the layout that `Memory` describes."""
    keys, before = inputs.keys, inputs.memory
    first = [row[0] for row in heads]
    seen = np.array(
        [head.seen + int(length) for head, length in zip(first, inputs.row_lengths, strict=True)], dtype=np.int64
    )
    keep = max(int(tokens) - head.left for tokens, head in zip(seen, first, strict=True))

    def window(row: Callable[[Head], Tensor], dtype: torch.dtype) -> Tensor:
        """What each head's window holds, newest last, zeros before it."""
        return torch.stack(
            [torch.stack([newest(row(head)[head.left - head.origin :]) for head in r]) for r in heads]
        ).to(dtype)

    def newest(held: Tensor) -> Tensor:
        return torch.cat((held.new_zeros(keep - len(held), *held.shape[1:]), held))

    most = max(len(head.slots) for row in heads for head in row)
    count = len(rules.policy.statistics)

    def filled(head: Head) -> Tensor:
        rows = [rules.row(slot) for slot in head.slots]
        return torch.stack(rows + [rules.row(head.nothing())] * (most - len(rows))) if most else head.keys[:0]

    sums_width = keys.shape[-1] + first[0].values.shape[-1]
    rows = torch.stack([torch.stack([filled(head) for head in row]) for row in heads])
    if most == 0:
        rows = rows.new_zeros(*rows.shape[:2], 0, sums_width + count)
    streams = {
        "keys": window(lambda head: head.keys, keys.dtype),
        "values": window(lambda head: head.values, keys.dtype),
    }
    next_positions = None
    if first[0].weights is not None:
        dtype = keys.dtype if inputs.weights is None else inputs.weights.dtype
        if before is not None:
            dtype = torch.promote_types(dtype, before.window.streams["weights"].dtype)
        streams["weights"] = window(lambda head: definitely(head.weights), dtype)
    if first[0].places is not None:
        streams["positions"] = window(lambda head: definitely(head.places), torch.float64)[:, :1]
        next_positions = torch.stack([going_on(inputs, head, r) for r, head in enumerate(first)])
    sums = rows[..., :sums_width].to(torch.promote_types(keys.dtype, torch.float32))
    store, observed = SlotStore(sums, rows[..., sums_width:]), None
    if rules.policy.observes:
        wide = torch.promote_types(keys.dtype, torch.float32)
        streams["evidence"] = window(lambda head: observing(head).held(head.origin, len(head.keys)), wide)
        store.evidence = torch.stack(
            [torch.stack([observing(head).slots_filled(most) for head in row]) for row in heads]
        ).to(wide)
        observed = torch.stack([heard(row, int(seen[r])) for r, row in enumerate(heads)]).to(keys.dtype)
    cuts = None
    if rules.cut_by_caller:
        cuts = Cuts(
            tuple(tuple(head.chunks) for head in first),
            tuple(head.ended for head in first),
            tuple(len(head.slots) for head in first),
        )
    return Memory(rules.policy, seen, Window(streams, keep), store, next_positions, observed, cuts=cuts)


def observing(head: Head) -> Observing:
    """What a head's readers have told."""
    assert head.observing is not None
    return head.observing


def heard(heads: list[Head], seen: int) -> Tensor:
    """A row's observed queries of its incomplete chunk, [h, n, d]."""
    return torch.cat([observing(head).waiting(head.open_chunk(seen)) for head in heads])


def going_on(inputs: AttendInputs, head: Head, row: int) -> Tensor:
    """The position of a row's next token."""
    if inputs.row_lengths[row]:
        return definitely(head.places)[-1] + 1
    if inputs.memory is not None and inputs.memory.next_positions is not None:
        return inputs.memory.next_positions[row]
    return head.keys.new_zeros(())
