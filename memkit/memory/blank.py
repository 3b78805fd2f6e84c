"""A memory as a prefill leaves it, all its numbers 0: how much it holds, and what decoding on it will."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memkit.memory.cuts import Cuts
from memkit.memory.held import HeldSlots
from memkit.memory.memory import Memory
from memkit.memory.rows import SlotRules
from memkit.memory.slots import SlotStore
from memkit.memory.window import Window, room_for, stream_forms
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.pieces.window import BlockWindow
from memkit.policy import Policy

__all__ = ["blank"]


def blank(
    policy: Policy,
    tokens: int,
    *,
    rows: int,
    heads: int,
    kv_heads: int,
    head_width: int,
    value_width: int,
    dtype: torch.dtype,
    rotation: Rotation | None,
    device: str = "meta",
) -> Memory:
    """The memory after a prefill of `tokens` tokens in every row; on the device `meta` it takes no room at all.

    None of the tokens is a boundary. heads, kv_heads: query heads, and key/value heads; rotation: as the calls that go
    on with it will give it.
    """
    held = tokens - int(policy.window.begin(tokens - 1))
    room, slots, wide = room_for(policy, held), policy.slots_after(tokens), torch.promote_types(dtype, torch.float32)

    def new(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=like, device=device)

    forms = stream_forms(policy, rows, kv_heads, room, (head_width, value_width), dtype)
    streams = {name: new(*shape, like=own) for name, (shape, own) in forms.items()}
    numbers = new(rows, kv_heads, slots, len(policy.statistics), like=wide if policy.replaces else torch.float64)
    evidence = new(rows, kv_heads, slots, policy.observation.numbers, like=wide) if policy.observes else None
    store: SlotStore | HeldSlots = SlotStore(
        new(rows, kv_heads, slots, head_width + value_width, like=wide), numbers, evidence=evidence
    )
    if policy.holds_once_in(dtype):
        rules = SlotRules(policy, head_width, dtype, None, rotation, valued=True)
        store = HeldSlots.of(rules, store, slots, ())
    observed = new(rows, heads, len(policy.observation.waits), head_width) if policy.observes else None
    cuts = None
    if policy.takes_boundaries and isinstance(policy.window, BlockWindow):
        cuts = Cuts.without_boundaries(rows, tokens, policy.chunk, policy.window.chunks, slots)
    return Memory(
        policy=policy,
        seen_rows=np.full(rows, tokens, dtype=np.int64),
        window=Window(streams, held),
        store=store,
        next_positions=new(rows, like=torch.float64) if Need.ROTATION in policy.needs else None,
        observed=observed,
        cuts=cuts,
    )
