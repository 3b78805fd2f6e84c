"""`attend` and `plan`: calls are checked and handed to a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine import forward
from memkit.engine.autocast import autocasts, without_autocast
from memkit.engine.checks import check
from memkit.engine.decode import decode_as_before
from memkit.engine.heads import attend_by_heads
from memkit.engine.heads_as_rows import attend_heads_as_rows
from memkit.engine.inputs import AttendInputs, Lengths, Plan
from memkit.errors import InputError, shown
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy, PolicySpec

__all__ = ["attend", "plan"]

Backend = Literal["auto", "torch", "reference"]
AnyPolicy = str | Path | PolicySpec | Policy


def attend(
    policy: AnyPolicy,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    weights: Tensor | None = None,
    parameters: PolicyParameters | None = None,
    rotation: Rotation | None = None,
    scale: float | None = None,
    memory: Memory | None = None,
    lengths: Lengths | None = None,
    boundaries: Tensor | None = None,
    plan: Plan | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Memory]:
    """Causal attention that remembers as the policy says: prefill, continuation by any number of tokens, and decoding.

    Under `torch.autocast` nothing is cast here; under `torch.compile` the call stands between two graphs. Several
    threads may call it at once, each with memories of its own. Where a call fails, the memory it was given is as it
    was, or says that it is lost. There is no second derivative: asking for one is an error.

    Args:
        policy: a shipped policy's name, the path of a YAML file, a PolicySpec or a Policy.
        queries: [b, h, t, d], h a multiple of g; float32, float64, bfloat16 or float16. They arrive rotated.
        keys: [b, g, t, d], of the queries' dtype. They arrive rotated.
        values: [b, g, t, v], of the queries' dtype.
        weights: merge weights ≥ 0, [b, g, t], only with `weight: learned`; None: 1.
        parameters: what the policy has learned; None: LayerNorm 1 and 0, query scales 1.
        rotation: how keys were rotated, needed by `unrotate`, `rerotate` and `admission: expected-attention`; refused
            elsewhere.
        scale: of the scores, above 0; None: 1/√d. A number that carries no gradient: what is learned, or may be
            negative, multiplies the queries.
        memory: what an earlier call returned. Without gradients this call takes it over, updating it in place: the old
            handle raises when used again, `memory.fork()` copies. With gradients it is left as it is, and they flow
            through.
        lengths: valid tokens of this call per row, [b], 0 … t; the rest is padding on the right, whose outputs are 0.
        boundaries: bool [b, t]: which of this call's tokens are the last of their chunk, only with `chunker:
            boundaries`; None: none. The host waits for them where they are on a GPU.
        plan: follow this plan instead of making one.
        backend: "torch", which "auto" is; "reference" is the oracle, token by token in float64.

    Returns:
        Outputs [b, h, t, v] in the inputs' dtype, and the memory to go on with.

    Raises:
        InputError: tensors that do not fit each other, the policy or the memory.
        MemoryStateError: a memory that was taken over, is lost, or belongs to another policy.
        PolicyError: a policy that is not there or not right.
    """
    asked: Any = policy  # becomes a Policy in `_attend`, outside of graphs
    given = AttendInputs(
        asked, queries, keys, values, weights, parameters, rotation, scale, memory, lengths, plan, boundaries
    )
    return (_attend_outside_graphs if torch.compiler.is_compiling() else _attend)(given, backend)


def _attend(given: AttendInputs, backend: Backend) -> tuple[Tensor, Memory]:
    if isinstance(given.keys, Tensor) and autocasts(given.keys.device):
        with without_autocast(given.keys.device):
            return _attend(given, backend)
    given.policy = as_policy(given.policy)
    if not isinstance(backend, str) or backend not in ("auto", "torch", "reference"):
        raise InputError(f"backend must be 'auto', 'torch' or 'reference', got {shown(backend)}")
    if given.policy.head_policies and isinstance(given.keys, Tensor):
        if backend != "reference" and (together := attend_heads_as_rows(given)) is not None:
            return together
        return attend_by_heads(given, lambda part: _attend(part, backend))
    if backend != "reference" and (again := decode_as_before(given)) is not None:
        return again
    for name, tensor in (("queries", given.queries), ("values", given.values)):
        if tensor is None:  # `check` takes them as left out, for a plan
            raise InputError(f"{name} must be a tensor [batch, heads, tokens, width], got None")
    inputs = check(given)  # raises, or adds row lengths, scale and whether gradients are wanted; moves no tensor
    if backend == "reference":
        from memkit import reference

        return reference.attend(inputs)
    return forward.attend(inputs)


# torch.compile leaves it alone, as one step between two graphs: how many chunks leave, and where their tokens go, is
# different at every call. `torch.compiler.disable` would do the same, but import the compiler along with memkit.
_attend_outside_graphs = torch._disable_dynamo(_attend)  # pyright: ignore[reportPrivateImportUsage]


def plan(
    policy: AnyPolicy,
    keys: Tensor,
    *,
    weights: Tensor | None = None,
    parameters: PolicyParameters | None = None,
    rotation: Rotation | None = None,
    memory: Memory | None = None,
    lengths: Lengths | None = None,
    boundaries: Tensor | None = None,
) -> Plan:
    """Where each token that leaves the window in such a call goes. Arguments as for `attend`; memory is only read."""
    given = (weights, parameters, rotation, None, memory, lengths, None, boundaries)
    return forward.plan(check(AttendInputs(as_policy(policy), None, keys, None, *given)))
