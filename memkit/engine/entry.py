"""`attend` and `plan`: calls are checked and handed to a backend."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.engine import torch as fast
from memkit.engine.autocast import autocasts, without_autocast
from memkit.engine.decode import decode_again
from memkit.engine.validation import Lengths, check_call
from memkit.errors import InputError, shown
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.plan import Plan
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
    plan: Plan | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Memory]:
    """Causal attention that remembers as the policy says: prefill, continuation by any number of tokens, and decoding.

    queries [b, h, t, d], keys [b, g, t, d], values [b, g, t, v], h a multiple of g; float32, float64, bfloat16 or
    float16, all alike. Queries and keys arrive rotated.
    weights [b, g, t] ≥ 0: merge weights, only with `weight: learned`; None: 1.
    parameters: what the policy has learned; None: LayerNorm 1 and 0, temperatures 1.
    rotation: how keys were rotated, needed by `unrotate` and `rerotate`, refused elsewhere.
    scale: of the scores; None: 1/√d.
    memory: what an earlier call returned. Without gradients this call takes it over, updating it in place: the old
    handle raises when used again, `memory.fork()` copies. With gradients it is left as it is, and they flow through.
    lengths [b], a tensor or a list: valid tokens of this call per row, 0 … t, the rest padding on the right, whose
    outputs are 0.
    plan: follow this plan instead of making one. backend: "reference" is the oracle, token by token in float64.

    Under `torch.autocast` nothing is cast here; under `torch.compile` the call stands between two graphs. Several
    threads may call it at once, each with memories of its own. Where a call fails, the memory it was given is as it
    was, or says that it is lost. There is no second derivative: asking for one is an error.

    Returns outputs [b, h, t, v] in the inputs' dtype, and the memory. Raises `InputError`, `MemoryStateError`,
    `PolicyError`: rule, value, remedy.
    """
    arguments = (policy, queries, keys, values, weights, parameters, rotation, scale, memory, lengths, plan, backend)
    if torch.compiler.is_compiling():
        return _attend_outside_graphs(*arguments)
    return _attend(*arguments)


def _attend(
    policy: AnyPolicy,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None,
    parameters: PolicyParameters | None,
    rotation: Rotation | None,
    scale: float | None,
    memory: Memory | None,
    lengths: Lengths | None,
    plan: Plan | None,
    backend: Backend,
) -> tuple[Tensor, Memory]:
    if isinstance(keys, Tensor) and autocasts(keys.device):
        with without_autocast(keys.device):
            return _attend(
                policy, queries, keys, values, weights, parameters, rotation, scale, memory, lengths, plan, backend
            )
    built = as_policy(policy)
    if not isinstance(backend, str) or backend not in ("auto", "torch", "reference"):
        raise InputError(f"backend must be 'auto', 'torch' or 'reference', got {shown(backend)}")
    tensors = isinstance(queries, Tensor) and isinstance(keys, Tensor) and isinstance(values, Tensor)
    tensors = tensors and (weights is None or isinstance(weights, Tensor))
    if tensors and isinstance(memory, Memory) and lengths is None and plan is None and backend != "reference":
        again = decode_again(built, queries, keys, values, weights, parameters, rotation, scale, memory)
        if again is not None:
            return again
    for name, tensor in (("queries", queries), ("values", values)):
        if tensor is None:  # `check_call` takes them as left out, for a plan
            raise InputError(f"{name} must be a tensor [batch, heads, tokens, width], got None")
    call = check_call(
        built,
        queries,
        keys,
        values,
        weights=weights,
        parameters=parameters,
        rotation=rotation,
        scale=scale,
        memory=memory,
        lengths=lengths,
        plan=plan,
    )
    if backend == "reference":
        from memkit import reference

        return reference.attend(call)
    return fast.attend(call)


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
) -> Plan:
    """Where each token that leaves the window in such a call goes. Arguments as for `attend`; memory is only read."""
    call = check_call(
        as_policy(policy),
        None,
        keys,
        None,
        weights=weights,
        parameters=parameters,
        rotation=rotation,
        scale=None,
        memory=memory,
        lengths=lengths,
        plan=None,
    )
    return fast.plan(call)
