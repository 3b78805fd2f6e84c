"""A memory's file: safetensors, with the policy and a checksum beside the tensors.

What is read is checked as if anybody might have written it: nothing is run, and a file that is damaged, cut short or
put together by hand is refused before a call can stumble over it.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memkit.errors import MemoryStateError, PolicyError, short, shown
from memkit.memory.cuts import Cuts
from memkit.memory.window import Form, stream_forms
from memkit.pieces.needs import Need
from memkit.pieces.registry import SpecError
from memkit.pieces.window import BlockWindow
from memkit.policy import Policy, PolicySpec
from memkit.yaml12 import load

__all__ = ["FORMAT", "Contents", "read", "write"]

FORMAT = "memkit-memory-2"
MOST_CHUNKS = 2**24
"""Chunks that a memory in a file may have absorbed: the schedule of slots is counted chunk by chunk."""

KEYS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Contents:
    """What a file holds of heads that are alike: their policy, tensors by name, `seen` among them, the window's end."""

    policy: Policy
    tensors: dict[str, Tensor]
    end: int


def write(path: str | Path, policy: Policy, parts: Sequence[Contents]) -> None:
    """Write a memory's tensors: those of one part, or of each run of heads that are alike, with its number before them.

    Raises `MemoryStateError` where the file cannot be written.
    """
    said = _named(path)
    named = [
        (f"{index}.{name}" if len(parts) > 1 else name, tensor)
        for index, part in enumerate(parts)
        for name, tensor in part.tensors.items()
    ]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named}
    end: Any = [part.end for part in parts] if len(parts) > 1 else parts[0].end
    facts: dict[str, Any] = {"format": FORMAT, "policy": policy.spec.to_yaml(), "name": policy.name, "end": end}
    facts["checksum"] = _checksum(facts, tensors)
    try:
        save_file(tensors, str(path), metadata={"memkit": json.dumps(facts)})
    except (OSError, SafetensorError) as error:
        folder = Path(path).absolute().parent
        there = os.path.isdir(folder)
        missing = short(str(error)) if there else f"there is no folder {short(str(folder))}; make it first"
        raise MemoryStateError(f"{said}: cannot be written: {missing}") from None


def read(path: str | Path) -> tuple[PolicySpec, list[Contents]]:
    """Read a memory's file: its policy, and each part. Raises `MemoryStateError`: what is wrong with it."""
    said = _named(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("memkit", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise MemoryStateError(f"{said}: cannot be read as a memory: {short(' '.join(str(error).split()))}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise MemoryStateError(f"{said}: not a memory saved by memkit (no format {FORMAT}); write one with Memory.save")
    if unknown := sorted(facts.keys() - {"format", "policy", "name", "end", "checksum"}):
        raise MemoryStateError(f"{said}: damaged: it says {short(', '.join(unknown))}; save the memory again")
    checksum = facts.pop("checksum", None)  # files of before there was one have none
    if checksum is not None and checksum != _checksum(facts, tensors):
        raise MemoryStateError(f"{said}: damaged: its checksum is not that of what it holds; save the memory again")
    try:
        spec = _spec(facts)
        policy = spec.build()
        parts, wrong = _parts(policy, facts.get("end"), tensors)
        for number, part in enumerate(parts):
            wrong = wrong or _wrong_end(part.end, part.tensors) or _wrong_shapes(part.policy, part.tensors)
            wrong = wrong or _wrong_numbers(part.policy, part.tensors, part.end)
            if not wrong and policy.head_policies:
                wrong = _wrong_heads(part, parts[0], policy.head_policies[number][0])
    except PolicyError as error:
        raise MemoryStateError(f"{said}: its policy: {error}") from None
    if wrong:
        raise MemoryStateError(f"{said}: damaged: {wrong}; save the memory again")
    return spec, parts


def _parts(policy: Policy, end: Any, tensors: dict[str, Tensor]) -> tuple[list[Contents], str | None]:
    """The parts of a file, and what is wrong with their number or names."""
    if not policy.head_policies:
        return [Contents(policy, tensors, end)], None
    many = len(policy.head_policies)
    if not isinstance(end, list) or len(end) != many:
        return [], f"end must be {many} whole numbers, one for each run of equal heads, got {shown(end)}"
    parts = [Contents(one, {}, each) for (_, one), each in zip(policy.head_policies, end, strict=True)]
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        if not number.isdecimal() or int(number) >= many:
            return [], f"its tensors must be named 0. to {many - 1}. first, got {short(name)}"
        parts[int(number)].tensors[rest] = tensor
    return parts, None


def _wrong_heads(part: Contents, first: Contents, heads: int) -> str | None:
    """What of a part does not fit its policy's heads, or the first part."""
    if part.tensors["keys"].shape[1] != heads:
        return f"keys must be of {heads} heads, got {part.tensors['keys'].shape[1]}"
    if not torch.equal(part.tensors["seen"], first.tensors["seen"]):
        return "heads must have seen the same tokens"
    for name in ("chunk_begins", "chunk_ended"):
        if name in first.tensors and not torch.equal(part.tensors[name], first.tensors[name]):
            return f"{name} must be the same in all heads"
    if part.tensors["keys"].dtype != first.tensors["keys"].dtype:
        return "heads must be of one dtype"
    return None


def _named(path: Any) -> str:
    """A file's path as messages show it."""
    if not isinstance(path, (str, os.PathLike)):
        raise MemoryStateError(f"path must be a file's, got {shown(path)}")
    return short(str(path))


def _checksum(facts: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """CRC-32 over the facts, and every tensor's name, dtype, shape and bytes."""
    said = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        said = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), said)
        said = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, said)
    return said


def _spec(facts: dict[str, Any]) -> PolicySpec:
    name, text = facts.get("name"), facts.get("policy")
    if not isinstance(text, str) or not isinstance(name, str | None):
        raise PolicyError(f"must be YAML and its name text or null, got {shown(text)} and {shown(name)}")
    fields = load(text, "the file")
    if not isinstance(fields, dict):
        raise PolicyError(f"must be a mapping of families, got {shown(fields)}")
    try:
        return PolicySpec(**fields).named(name)
    except SpecError as error:
        raise PolicyError(str(error)) from None


def _wrong_end(end: Any, tensors: dict[str, Tensor]) -> str | None:
    wanted = {"keys": 4, "values": 4, "sums": 4, "numbers": 4, "seen": 1}
    for name, axes in wanted.items():
        if name not in tensors:
            return f"tensor {name} is missing"
        if tensors[name].ndim != axes:
            return f"{name} must have {axes} axes, got {tuple(tensors[name].shape)}"
    if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end <= tensors["keys"].shape[2]:
        return f"end must be a whole number up to the window's room, {tensors['keys'].shape[2]}, got {shown(end)}"
    return None


def _wrong_shapes(policy: Policy, tensors: dict[str, Tensor]) -> str | None:
    """What of names, dtypes and shapes is not as the policy and the keys say; None where all is."""
    keys = tensors["keys"]
    rows, heads, room, width = keys.shape
    if not keys.numel() and not (rows and heads and width):
        return f"keys must have a row, a head and a channel at least, got {tuple(keys.shape)}"
    if keys.dtype not in KEYS:
        return f"keys must be float32, float64, bfloat16 or float16, got {keys.dtype}"
    value_width, slots = tensors["values"].shape[-1], tensors["sums"].shape[2]
    wide = torch.promote_types(keys.dtype, torch.float32)
    wanted: dict[str, Form] = stream_forms(policy, rows, heads, room, (width, value_width), keys.dtype) | {
        "sums": ((rows, heads, slots, width + value_width), wide),
        "numbers": ((rows, heads, slots, len(policy.statistics)), torch.float64),
        "seen": ((rows,), torch.int64),
    }
    if policy.takes_boundaries and isinstance(policy.window, BlockWindow):
        chunks = policy.window.chunks
        wanted |= {"chunk_begins": ((rows, chunks), torch.int64), "chunk_slots": ((rows,), torch.int64)}
        wanted["chunk_ended"] = ((rows,), torch.bool)
    if Need.ROTATION in policy.needs:
        wanted["next_positions"] = ((rows,), torch.float64)
    if policy.observes:
        wanted["slot_evidence"] = ((rows, heads, slots, policy.observation.numbers), wide)
        observed = tensors.get("observed", keys)
        groups = observed.shape[1] // heads * heads if observed.ndim == 4 and observed.shape[1] >= heads else heads
        wanted["observed"] = ((rows, groups, len(policy.observation.waits), width), keys.dtype)
    if tensors.keys() != wanted.keys():
        return f"its tensors must be {', '.join(sorted(wanted))}, got {', '.join(sorted(tensors))}"
    for name, (shape, dtype) in wanted.items():
        tensor, any_floats = tensors[name], name == "weights"  # these keep the dtype that they were given in
        fits = tensor.is_floating_point() if any_floats else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not fits:
            return (
                f"{name} must be {'floats' if any_floats else dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    return f"values must have a channel at least, got {tuple(tensors['values'].shape)}" if not value_width else None


def _wrong_numbers(policy: Policy, tensors: dict[str, Tensor], end: int) -> str | None:
    """Whether tokens seen, window and slots fit each other as the policy says."""
    seen, slots = tensors["seen"].numpy(), tensors["sums"].shape[2]
    most = 2**53 if policy.sinks_only or policy.takes_boundaries else MOST_CHUNKS * policy.chunk
    if (seen < 0).any() or (seen > most).any():
        return f"seen must lie between 0 and {most}, got {shown(seen.tolist())}"
    if policy.takes_boundaries:
        if wrong := _wrong_cuts(policy, Cuts.of_tensors(tensors), seen, slots):
            return wrong
        window = seen - Cuts.of_tensors(tensors).left
    else:
        window = np.where(seen > 0, seen - policy.window.begin(np.maximum(seen - 1, 0)), 0)
    if window.max() > end:
        return f"a window of {window.max()} tokens must end at or after column {window.max()}, got end {end}"
    if policy.takes_boundaries:
        return None
    longest = int(seen.max())
    for tokens in (*(2**power for power in range(longest.bit_length())), longest):  # a wrong number is found out early
        if policy.slots_after(tokens) > slots:
            return f"after {longest} tokens there must be room for {policy.slots_after(tokens)} slots, got {slots}"
    return None


def _wrong_cuts(policy: Policy, cuts: Cuts, seen: np.ndarray, room: int) -> str | None:
    """Whether each row's chunks follow each other up to what it has seen, and its slots are not more than they may be.

    How many there are depends on boundaries that are long forgotten; the most is what each token alone would found.
    """
    window = policy.window
    assert isinstance(window, BlockWindow)
    for row, (begins, ended, slots) in enumerate(zip(cuts.begins, cuts.ended, cuts.slots, strict=True)):
        tokens = int(seen[row])
        lengths = [end - begin for begin, end in itertools.pairwise((*begins, tokens))]
        few = len(begins) < window.chunks and begins[:1] not in ((), (0,))
        missing = (tokens > 0) != bool(begins) or (ended and not begins) or few
        if missing or any(not 0 < length <= policy.chunk for length in lengths) or (begins and begins[0] < 0):
            return (
                f"chunk_begins must be chunks of 1 to {policy.chunk} tokens in order, up to the {tokens} seen, "
                f"got {list(begins)} in row {row}"
            )
        left = begins[0] if begins else 0
        if not min(left, policy.sinks) <= slots <= min(left, room):
            return (
                f"chunk_slots must lie between {min(left, policy.sinks)} and {min(left, room)} after {left} tokens "
                f"have left, got {slots} in row {row}"
            )
    return None
