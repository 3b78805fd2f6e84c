"""Checks a call before any work is done: shapes, dtypes, devices, lengths, and what the policy wants or cannot use."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memkit.engine.course import course_of
from memkit.engine.inputs import AttendInputs, Lengths, Plan
from memkit.engine.read import default_scale
from memkit.errors import InputError, shown
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.heads import AUTO
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy
from memkit.whole import is_finite, whole_numbers

__all__ = ["check", "check_signs"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check(given: AttendInputs) -> AttendInputs:
    """The call, checked, or an error that says rule, value and remedy."""
    policy, queries, keys, values, weights = given.policy, given.queries, given.keys, given.values, given.weights
    _check_tensors(queries, keys, values)
    lengths = _check_lengths(keys, given.lengths)
    boundaries = _check_boundaries(policy, keys, given.boundaries)
    _check_weights(policy, keys, weights, lengths)
    _check_rotation(policy, keys, given.rotation)
    _check_parameters(policy, queries, keys, given.parameters)
    if given.memory is not None:
        _check_memory(policy, keys, values, given.memory)
        observed = given.memory.observed_heads
        if observed is not None and queries is not None and observed != queries.shape[1]:
            raise InputError(f"memory observes {observed} query heads, got {queries.shape[1]}")
    if policy.spec.heads.profile not in (None, AUTO):
        raise InputError(
            "heads.profile says how the heads of every layer share, and a call is about one; "
            "give it a layer's own policy: memkit.profiles.per_layer(policy, layers, kv_heads)[layer]"
        )
    if policy.head_ratios is not None:
        _check_heads(policy, keys, queries, given.plan)
    if not policy.plans_ahead and (queries is None or given.plan is not None):
        raise InputError(
            "a plan is made from keys alone, and this policy's rows are judged by queries or compete for their slots; "
            "leave plan out, and read memory.counts to see what became of the slots"
        )
    if given.plan is not None:
        _check_plan(policy, keys, given.plan, given.memory, lengths, boundaries)
    _check_scale(given.scale)
    scale = default_scale(keys.shape[-1]) if given.scale is None else given.scale
    sources = [queries, keys, values, weights, *([] if given.parameters is None else given.parameters.tensors())]
    wanted = any(tensor is not None and tensor.requires_grad for tensor in sources)
    wanted = wanted or (given.memory is not None and given.memory.requires_grad)
    differentiable = queries is not None and torch.is_grad_enabled() and wanted
    return dataclasses.replace(
        given, scale=float(scale), row_lengths=lengths, row_boundaries=boundaries, differentiable=differentiable
    )


def _check_tensors(queries: Tensor | None, keys: Tensor, values: Tensor | None) -> None:
    for name, tensor in (("keys", keys), ("queries", queries), ("values", values)):
        if tensor is None and name != "keys":
            continue
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name} must be a tensor [batch, heads, tokens, width], got {shape}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} must be floating point (float32, float64, bfloat16, float16), got {tensor.dtype}")
        if tensor.dtype != keys.dtype:
            raise InputError(f"{name} must have the keys' dtype {keys.dtype}, got {tensor.dtype}; convert one of them")
        if tensor.device != keys.device:
            raise InputError(f"{name} must be on the keys' device {keys.device}, got {tensor.device}; move one of them")
        if tensor.shape[0] != keys.shape[0] or tensor.shape[2] != keys.shape[2]:
            raise InputError(
                f"{name} must have the keys' {keys.shape[0]} rows and {keys.shape[2]} tokens, "
                f"got {tensor.shape[0]} and {tensor.shape[2]}"
            )
    if keys.shape[0] < 1 or keys.shape[1] < 1 or keys.shape[3] < 1:
        raise InputError(f"keys need at least one row, one head and one channel, got {tuple(keys.shape)}")
    if values is not None and (values.shape[1] != keys.shape[1] or values.shape[3] < 1):
        raise InputError(
            f"values must have the keys' {keys.shape[1]} heads and at least one channel, got {tuple(values.shape)}"
        )
    if queries is not None and queries.shape[3] != keys.shape[3]:
        raise InputError(f"queries must be as wide as keys, {keys.shape[3]} channels, got {queries.shape[3]}")
    if queries is not None and (queries.shape[1] < 1 or queries.shape[1] % keys.shape[1]):
        raise InputError(
            f"query heads must be a multiple of the {keys.shape[1]} key/value heads, got {queries.shape[1]}"
        )


def _check_weights(policy: Policy, keys: Tensor, weights: Tensor | None, lengths: np.ndarray) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise InputError(f"weights must be a tensor [batch, key/value heads, tokens], got {shown(weights)}")
    if Need.MERGE_WEIGHTS not in policy.needs:
        raise InputError(
            "weights are given, but this policy weighs nothing with them; "
            "leave them out, or use merging: {kind: weighted-mean, weight: learned} in a memory that grows"
        )
    if weights.shape != keys.shape[:3]:
        raise InputError(f"weights must be [b, g, t] = {tuple(keys.shape[:3])}, got {tuple(weights.shape)}")
    if weights.device != keys.device or not weights.is_floating_point():
        raise InputError(f"weights must be floating point on {keys.device}, got {weights.dtype} on {weights.device}")
    if weights.device.type == "cpu" and (lengths < keys.shape[2]).any():  # what padding weighs is nobody's business
        own = torch.arange(keys.shape[2]) < torch.from_numpy(lengths)[:, None]
        weights = weights.detach().masked_fill(~own[:, None], 0)
    check_signs(weights)


def check_signs(weights: Tensor) -> None:
    """Weights are at least 0; looked at on the CPU alone, for elsewhere the host would wait for the device."""
    if weights.device.type == "cpu" and weights.numel() and (least := weights.amin().item()) < 0:
        raise InputError(f"weights must be at least 0, got {least}; KVM takes 1 + ELU of its gate")


def _check_scale(scale: Any) -> None:
    """That a scale is above 0, for the kernels' causal masks take it for granted, and one that nobody learns."""
    if scale is None:
        return
    if not is_finite(scale):
        raise InputError(f"scale must be a finite number, got {shown(scale)}")
    if scale <= 0:
        raise InputError(f"scale must be above 0, got {shown(scale)}; multiply the queries by it instead")
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise InputError("scale has no gradient, got a tensor that asks for one; multiply the queries by it instead")


def _check_rotation(policy: Policy, keys: Tensor, rotation: Rotation | None) -> None:
    if Need.ROTATION not in policy.needs:
        if rotation is not None:
            raise InputError(
                f"rotation is given, but rotary {policy.spec.rotary.kind} does not use it; leave it out"
                if not policy.sinks_only
                else "rotation is given, but with growth none sinks stay at their own positions; leave it out"
            )
        return
    if rotation is None:
        if policy.expects is not None:
            raise InputError(
                f"admission {policy.spec.admission.kind} turns queries to places to come and needs to know how they "
                "were rotated; give rotation=memkit.Rotation(pairing, width, frequencies)"
            )
        raise InputError(
            f"rotary {policy.spec.rotary.kind} must un-rotate keys and needs to know how they were rotated; "
            "give rotation=memkit.Rotation(pairing, width, frequencies)"
        )
    if not isinstance(rotation, Rotation):
        raise InputError(f"rotation must be a memkit.Rotation, got {shown(rotation)}")
    if torch.is_grad_enabled():
        for name, tensor in (("frequencies", rotation.frequencies), ("positions", rotation.positions)):
            if tensor is not None and tensor.requires_grad:
                raise InputError(f"rotation.{name} have no gradient, got a tensor that asks for one; detach() it")
    if rotation.width > keys.shape[-1]:
        raise InputError(f"rotation.width must be at most the head width {keys.shape[-1]}, got {rotation.width}")
    expected = (keys.shape[0], keys.shape[2])
    if rotation.positions is not None and tuple(rotation.positions.shape) != expected:
        raise InputError(f"rotation.positions must be [b, t] = {expected}, got {tuple(rotation.positions.shape)}")


def _check_parameters(
    policy: Policy, queries: Tensor | None, keys: Tensor, parameters: PolicyParameters | None
) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, PolicyParameters):
        raise InputError(f"parameters must be memkit.PolicyParameters, got {type(parameters).__name__}")
    norm, scales = Need.KEY_NORM in policy.needs, Need.QUERY_SCALES in policy.needs
    width, heads = keys.shape[-1], None if queries is None else queries.shape[1]
    for name, needed, size in (
        ("key_norm_weight", norm, width),
        ("key_norm_bias", norm, width),
        ("query_scale_window", scales, heads),
        ("query_scale_memory", scales and not policy.sinks_only, heads),
    ):
        tensor: Tensor | None = getattr(parameters, name)
        if (tensor is not None) != needed:
            need = "needs" if needed else "has no use for"
            raise InputError(
                f"the policy {need} parameters.{name}; make them with PolicyParameters(policy, heads, head_width)"
            )
        if tensor is not None and size is not None and tuple(tensor.shape) != (size,):
            raise InputError(f"parameters.{name} must have shape ({size},), got {tuple(tensor.shape)}")


def _check_lengths(keys: Tensor, lengths: Lengths | None) -> np.ndarray:
    rows, tokens = keys.shape[0], keys.shape[2]
    if lengths is None:
        return np.full(rows, tokens, dtype=np.int64)
    limits = f"lie between 0 and the call's {tokens} tokens"
    return whole_numbers("lengths", lengths, 0, tokens, count=rows, limits=limits).numpy()


def _check_boundaries(policy: Policy, keys: Tensor, boundaries: Tensor | None) -> np.ndarray | None:
    """Boundaries [b, t] on the host; None where no token is said to be one."""
    if boundaries is None:
        return None
    if not policy.takes_boundaries:
        raise InputError(
            f"boundaries are given, but chunker {policy.spec.chunker.kind} cuts by itself; "
            "leave them out, or use chunker: {kind: boundaries, most: 256}"
        )
    expected = (keys.shape[0], keys.shape[2])
    if not isinstance(boundaries, Tensor) or boundaries.dtype != torch.bool or tuple(boundaries.shape) != expected:
        got = f"{boundaries.dtype} {tuple(boundaries.shape)}" if isinstance(boundaries, Tensor) else shown(boundaries)
        raise InputError(f"boundaries must be a tensor of bool [b, t] = {expected}, got {got}")
    if boundaries.is_meta:
        raise InputError(
            "boundaries must be numbers that the host can look at, got a tensor on meta; give a CPU tensor"
        )
    ends = boundaries.cpu().numpy()
    return ends if ends.any() else None


def _check_memory(policy: Policy, keys: Tensor, values: Tensor | None, memory: Memory) -> None:
    if not isinstance(memory, Memory):
        raise InputError(f"memory must be a memkit.Memory or None, got {type(memory).__name__}")
    memory.check_usable()
    memory.check_policy(policy)
    rows, heads, width = keys.shape[0], keys.shape[1], keys.shape[3]
    if (len(memory.seen_rows), memory.heads) != (rows, heads):
        raise InputError(
            f"memory is for {len(memory.seen_rows)} rows × {memory.heads} heads, got keys of {rows} × {heads}; "
            "reorder() changes rows"
        )
    widths = (width, width if values is None else values.shape[3])
    if memory.head_widths[0] != widths[0] or (values is not None and memory.head_widths[1] != widths[1]):
        raise InputError(f"memory holds keys and values of widths {memory.head_widths}, got {widths}")
    if memory.dtype != keys.dtype:
        raise InputError(f"memory holds {memory.dtype}, got keys of {keys.dtype}; go on with the same dtype")
    if memory.device != keys.device:
        raise InputError(f"memory is on {memory.device}, got keys on {keys.device}; move it with memory.to()")


def _check_heads(policy: Policy, keys: Tensor, queries: Tensor | None, plan: Plan | None) -> None:
    """That there are as many heads as ratios, and no plan, which has one number of slots for all heads."""
    ratios = policy.head_ratios or ()
    if keys.shape[1] != len(ratios):
        raise InputError(
            f"heads.ratios has {len(ratios)} numbers, one per key/value head, got keys of {keys.shape[1]} heads"
        )
    if queries is None or plan is not None:
        raise InputError(
            "a plan has the same number of slots in all heads, and under this policy's heads.ratios they differ; "
            "leave plan out, or ask each of Policy.head_policies for its own"
        )


def _check_plan(
    policy: Policy,
    keys: Tensor,
    plan: Plan,
    memory: Memory | None,
    lengths: np.ndarray,
    boundaries: np.ndarray | None,
) -> None:
    rows, heads = keys.shape[:2]
    if not isinstance(plan, Plan):
        raise InputError(f"plan must be what memkit.plan returned, got {shown(plan)}")
    if plan.slot.shape[:2] != (rows, heads):
        raise InputError(
            f"plan must be made for the same rows and heads, got {tuple(plan.slot.shape[:2])} for keys of "
            f"{(rows, heads)}; make it with memkit.plan on these keys"
        )
    before = np.zeros(rows, dtype=np.int64) if memory is None else memory.seen_rows
    course = course_of(policy, before, lengths, None if memory is None else memory.cuts, boundaries)
    begin, end = course.left_before, course.left_after
    missing = (begin < end) & ((plan.begin > begin) | (plan.begin + plan.length < end))
    if missing.any():
        row = int(missing.argmax())
        first, last = int(plan.begin[row]), int(plan.begin[row] + plan.length[row])
        raise InputError(
            f"plan must cover the tokens that leave during the call, {begin[row]} … {end[row] - 1} in row {row}, "
            f"got {f'{first} … {last - 1}' if first < last else 'none'}; "
            "make it with memkit.plan on these keys and this memory"
        )
    if plan.slot.device.type != "cpu":  # looking at it would make the host wait for the device
        return
    position = plan.begin[:, None] + np.arange(plan.slot.shape[2])
    leaves = (position >= begin[:, None]) & (position < end[:, None])
    slots = course.slots(end)
    placed = plan.slot.numpy()
    if (leaves[:, None] & ((placed < -1) | (placed >= slots[:, None, None]))).any():
        raise InputError(
            f"plan.slot must name one of the slots there are after the call, {slots.tolist()} in each row, or be −1; "
            "make it with memkit.plan on these keys and this memory"
        )


def check_readers(readers: Any, rows: int, heads: int, width: int, dtype: torch.dtype | None = None) -> None:
    """Readers must be queries [rows, heads, n, width], one at least, of this dtype; None: of any floating one."""
    shape = tuple(readers.shape) if isinstance(readers, Tensor) else type(readers).__name__
    if not isinstance(readers, Tensor) or readers.ndim != 4 or not readers.shape[2]:
        raise InputError(f"readers must be a tensor [b, h, n, d] of one query at least, got {shape}")
    fits = readers.is_floating_point() if dtype is None else readers.dtype == dtype
    if (*readers.shape[:2], readers.shape[3]) != (rows, heads, width) or not fits:
        raise InputError(
            f"readers must be {dtype or 'floats'} ({rows}, {heads}, n, {width}) as queries, got {readers.dtype} {shape}"
        )
