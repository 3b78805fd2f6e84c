"""A text read a second time, while it is still in the window: what its readers then say of every row.

Whoever reads a text only once asks for little that lies far back, and says little of what somebody may ask for later.
So a model reads some tokens, reads them again behind the memory it has then, as if to repeat them, and hands the second
reading's queries here. The idea is KVzip's (arXiv 2505.23416), which reads a whole prompt in full first; here memory
stays bounded from the first chunk on. Of the second reading nothing is remembered but what it says of rows.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from memkit.engine.autocast import autocasts, without_autocast
from memkit.engine.checks import check, check_readers
from memkit.engine.forward import Pass
from memkit.engine.heads import by_heads
from memkit.engine.inputs import AttendInputs
from memkit.engine.keysets import Queries
from memkit.engine.observe import alike_rows
from memkit.errors import InputError, MemoryStateError
from memkit.memory import HeadsMemory, Memory
from memkit.memory.rows import on_device
from memkit.parameters import PolicyParameters
from memkit.pieces.evidence import ERROR, softmax_evidence
from memkit.pieces.rotary import Rotation

__all__ = ["ask_again"]


@torch.no_grad()
def ask_again(
    memory: Memory,
    readers: Tensor,
    *,
    parameters: PolicyParameters | None = None,
    rotation: Rotation | None = None,
    scale: float | None = None,
) -> None:
    """Let readers who have read a text again say what each of its rows, slot or window token, is worth; in place.

    Each reader's softmax is over all rows that the memory has now. The most that such readers ever said of a row counts
    from then on, beside what queries of the first reading say (`memkit.pieces.evidence`). No gradient flows into it.

    Args:
        memory: what `attend` returned, of a policy with `observe.again`; its evidence is written into.
        readers: queries [b, h, n, d] of the second reading, where they stand, behind the text; at least one.
        parameters, rotation, scale: as for the `attend` that made the memory.

    Raises `InputError` where these do not fit the memory, or its policy has no `observe.again`; `MemoryStateError` for
    a memory that a later call took over, or that was made in inference mode outside of it.
    """
    memory.check_usable()
    policy = memory.policy
    if not policy.observation.again:
        raise InputError(
            "readers are asked again under policies that keep what they say, and this one does not; "
            "set observe.again to the chunks that are read again at a time"
        )
    heads = memory.observed_heads
    assert heads is not None  # a policy that reads again observes
    check_readers(readers, len(memory.seen_rows), heads, memory.head_widths[0], memory.dtype)
    if memory.frozen:
        raise MemoryStateError(
            "this memory was made in inference mode and cannot be written into outside of it; fork() it, or ask inside"
        )
    none = memory.keys.new_empty(*memory.keys.shape[:2], 0, memory.keys.shape[3])
    values = memory.values.new_empty(*memory.values.shape[:2], 0, memory.values.shape[3])
    given = AttendInputs(policy, readers[:, :, :0], none, values, None, parameters, rotation, scale, memory, None, None)
    with without_autocast(readers.device) if autocasts(readers.device) else nullcontext():
        if isinstance(memory, HeadsMemory):
            for own, part in by_heads(given):
                _ask(check(part), readers[:, own])
        else:
            _ask(check(given), readers)


def _ask(inputs: AttendInputs, readers: Tensor) -> None:
    """Ask them about one memory, for the rows of the batch that have as many slots and tokens at a time."""
    run = Pass(inputs)
    memory, observer, store, streams = inputs.memory, run.observer, run.store, run.timeline.streams
    assert memory is not None and observer is not None and store.evidence is not None
    live, held, end = memory.live_rows, memory.held_rows, streams["keys"].shape[2]
    for rows in alike_rows(np.ones(len(live), dtype=bool), live, held):
        first = 0 if rows is None else int(rows[0])
        slots, begin = int(live[first]), end - int(held[first])
        at = slice(None) if rows is None else on_device(rows, readers.device)
        asked = Queries.of(inputs.policy, readers[at], inputs.parameters, inputs.rotation, None)
        keys, values = (streams[name][at, :, begin:] for name in ("keys", "values"))
        view = store.read(run.rules).first(slots) if slots else None
        _, told = softmax_evidence(*observer.met(asked, keys, values, view, at), missed=inputs.policy.missed)
        error = told[..., ERROR]
        for evidence, part in (
            (store.evidence[:, :, :slots], error[:, :, :slots]),
            (streams["evidence"][:, :, begin:], error[:, :, slots:]),
        ):
            of_rows = evidence[at]
            inputs.policy.observation.add_again_(of_rows, part)
            if rows is not None:  # a copy of them
                evidence[at] = of_rows
