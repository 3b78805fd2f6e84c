"""A prompt kept: the cache of an attached model as a folder, a safetensors file per layer and a note of what they are.

No pickle. Each layer's file is `Memory.save`'s, with its policy and a checksum; `cache.json` says how many layers there
are, of which model and policies, and how many tokens each row has read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers.cache_utils import Cache

from memkit.errors import MemoryStateError, short, shown
from memkit.hf.cache import MemoryLayer, check_whole, mark_complete
from memkit.hf.names import CACHE
from memkit.memory import Memory

__all__ = ["FORMAT", "MemoryCache"]

FORMAT = "memkit-cache-1"
NOTE = "cache.json"
FIELDS = {"format", "policies", "model", "columns", "seen", "layers"}
WAITING = "waiting"
"""A field more, where texts are read again: the token ids of the portion that goes on, row by row."""


class MemoryCache(Cache):
    """The cache that an attached model returns: a `Memory` per attention layer."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers=list(layers))

    @classmethod
    def of(cls, cache: Cache) -> MemoryCache:
        """A cache that an attached model has filled, whoever made it, as `generate` does. The layers are shared."""
        return cls(cache.layers)

    def fork(self) -> Self:
        """A copy that shares nothing with this cache: each goes on by itself."""
        return copy.deepcopy(self)

    def activate_past_recording(self) -> None:
        """From now on the newest 64 tokens may be taken back, `crop(-n)`; as newer releases of transformers have it."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def save(self, path: str | Path) -> None:
        """Write the cache to a folder, which is made.

        Raises `MemoryStateError` where nothing was read yet, a call was interrupted, some layers are no attention, or
        the folder cannot be written.
        """
        layers = _ours(self.layers)
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, layer in enumerate(layers):
                layer.memories[0].save(_file(folder, number))
            note = {
                "format": FORMAT,
                "policies": _hash(layers),
                "model": layers[0].model,
                "columns": layers[0].columns,
                "seen": layers[0].memories[0].seen.tolist(),
                "layers": len(layers),
            }
            if layers[0].waiting is not None:
                note[WAITING] = layers[0].waiting.tolist()
            (folder / NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise MemoryStateError(f"{short(str(path))}: cannot be written ({error.strerror}); name a folder") from None

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> MemoryCache:
        """Read what `save` wrote, onto a device. An attached model refuses it where policies or model are others.

        Raises `MemoryStateError` for a folder that is none, is damaged or of which a part is missing.
        """
        note = _note(Path(path))
        layers: list[MemoryLayer] = []
        for number in range(note["layers"]):
            memory = Memory.load(_file(Path(path), number))
            if memory.seen.tolist() != note["seen"]:
                raise MemoryStateError(
                    f"{short(str(path))}: damaged: layer {number} has read {memory.seen.tolist()} tokens, not "
                    f"{note['seen']}; save the cache again"
                )
            layer = MemoryLayer(memory.policy, note["model"])
            layer.memory, layer.columns = memory.to(device), note["columns"]
            layers.append(layer)
        if _hash(layers) != note["policies"]:
            raise MemoryStateError(
                f"{short(str(path))}: damaged: its policies are not those it was saved with; save the cache again"
            )
        if WAITING in note:
            layers[0].waiting = torch.tensor(note[WAITING], dtype=torch.long, device=device)
        mark_complete(layers)
        return cls(layers)


def _ours(layers: Sequence[Any]) -> list[MemoryLayer]:
    """The layers of a cache that can be saved."""
    others = [type(layer).__name__ for layer in layers if not isinstance(layer, MemoryLayer)]
    if others:
        raise MemoryStateError(
            f"{CACHE} can be saved where all layers attend under a policy, got a {others[0]}; copy.deepcopy copies it"
        )
    if not layers or not layers[0].memories:
        raise MemoryStateError(f"{CACHE} must have read something to be saved; call the attached model with it first")
    check_whole(layers)
    return list(layers)


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03}.safetensors"


def _hash(layers: Sequence[MemoryLayer]) -> str:
    """SHA-256 of all layers' policies."""
    return hashlib.sha256("\n---\n".join(layer.policy.spec.to_yaml() for layer in layers).encode()).hexdigest()


def _note(folder: Path) -> dict[str, Any]:
    """What a folder's note says, checked."""
    said = short(str(folder))
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MemoryStateError(
            f"{said}: not a cache saved by memkit: {NOTE} cannot be read ({short(' '.join(str(error).split()))}); "
            "write one with cache.save"
        ) from None
    if not isinstance(note, dict) or note.get("format") != FORMAT or note.keys() - {WAITING} != FIELDS:
        raise MemoryStateError(f"{said}: not a cache saved by memkit (no format {FORMAT}); write one with cache.save")
    for field, least in (("layers", 1), ("columns", 0)):
        if type(note[field]) is not int or not least <= note[field] <= 2**53:
            raise MemoryStateError(
                f"{said}: damaged: {field} must be a whole number from {least} on, got {shown(note[field])}; "
                "save the cache again"
            )
    ids = note.get(WAITING, [])
    rows = ids if isinstance(ids, list) and all(isinstance(row, list) for row in ids) else [[None]]
    if len({len(row) for row in rows}) > 1 or any(type(each) is not int for row in rows for each in row):
        raise MemoryStateError(
            f"{said}: damaged: {WAITING} must be token ids of each row, as many in all, got {shown(ids)}; save "
            "the cache again"
        )
    return note
