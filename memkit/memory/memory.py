"""Memory: the tensors that a policy carries from one call to the next, window included."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from memkit.catalog import as_policy
from memkit.errors import MemoryStateError, shown
from memkit.memory import file
from memkit.memory.cuts import Cuts
from memkit.memory.held import HeldSlots
from memkit.memory.slots import SlotStore
from memkit.memory.window import Window
from memkit.parameters import PolicyParameters
from memkit.pieces.rotary import Rotation
from memkit.pieces.statistics import COUNT, MASS, Statistic
from memkit.pieces.window import BlockWindow
from memkit.policy import Policy, PolicySpec
from memkit.whole import whole_numbers

__all__ = ["DecodeBuffer", "Memory", "row_numbers", "tokens_in_window"]


@dataclass
class DecodeBuffer:
    """Slots as they are read, and the window behind them, in one buffer: what decoding reads with one fused call.

    keys [b, g, slots + room, d], values [b, g, slots + room, v]: the window's streams are the end of them;
    bias [b, g, 1, slots + room], or None;
    query_scale [h, 1, 1], key_scale [g, 1, 1]: what queries, and slots' keys, are multiplied by, None for 1;
    begin: the first column to read;
    band: tokens of a sliding window that is full and moves on at each step, else 0;
    sinks: keys and values of the slots that move with it;
    until: the window's `end` at which this is over, because a chunk leaves or the buffer is full;
    made_with: the parameters' versions;
    policy, parameters, rotation, signature: of the calls that this serves.
    """

    slots: int
    begin: int
    band: int
    sinks: tuple[Tensor, Tensor] | None
    until: int
    keys: Tensor
    values: Tensor
    bias: Tensor | None
    query_scale: Tensor | None
    key_scale: Tensor | None
    made_with: tuple[int, ...]
    policy: Policy
    parameters: PolicyParameters | None
    rotation: Rotation | None
    signature: tuple[Any, ...]

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        always = [self.keys, self.values, *(self.sinks or ())]
        return always + [each for each in (self.bias, self.query_scale, self.key_scale) if each is not None]


@dataclass(eq=False)
class Memory:
    """What a policy carries from one call to the next.

    window: the tokens seen exactly; store: the slots (`HeldSlots` where how they are read says all), of which
    `live_rows` are live, the sinks first; seen_rows [b]: tokens of each row so far; next_positions [b]: where positions
    continue, None where the policy rotates nothing; observed [b, h, n, d]: the observed queries of each row's
    incomplete chunk, None where none are observed; buffer: slots and window side by side, while decoding; cuts: where
    each row's chunks begin, None where positions tell.

    taken: a later call has taken this memory over; written: the call that is about to has begun to change it; lost: the
    error with which such a call failed.

    A memory belongs to one thread at a time; memories never share anything, so that threads may each use their own.
    `pickle`, `copy`, `torch.save` and processes get a copy, as of `fork()` (without history where it is written out).
    """

    policy: Policy
    seen_rows: np.ndarray
    window: Window
    store: SlotStore | HeldSlots
    next_positions: Tensor | None = None
    observed: Tensor | None = None
    buffer: DecodeBuffer | None = None
    taken: bool = False
    written: bool = False
    lost: str | None = None
    cuts: Cuts | None = None

    of_parts: ClassVar[Callable[[Policy, Sequence[Memory]], Memory]]
    """Memories of heads that differ, as one: `memory.heads` sets it."""

    # What a caller asks

    @property
    def seen(self) -> Tensor:
        """Tokens of each row so far, [b] int64."""
        return torch.from_numpy(self.seen_rows.copy())

    @property
    def slots(self) -> Tensor:
        """Slots of each row, sinks included, [b] int64."""
        return torch.from_numpy(self.live_rows)

    @property
    def counts(self) -> Tensor:
        """Tokens in each slot, [b, g, m] int64; 0 past a row's slots."""
        return self.number(COUNT)[:, :, : int(self.live_rows.max(initial=0))].round().long()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors held, room kept for growth and decoding's working copy included."""
        storages = [tensor.untyped_storage() for tensor in self.tensors()]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    @property
    def live_rows(self) -> np.ndarray:
        """Slots of each row, on the host, [b] int64."""
        if self.cuts is not None:
            return np.array(self.cuts.slots, dtype=np.int64)
        return np.array([self.policy.slots_after(int(seen)) for seen in self.seen_rows], dtype=np.int64)

    @property
    def held_rows(self) -> np.ndarray:
        """Tokens in each row's window, [b] int64."""
        return tokens_in_window(self.policy, self.seen_rows) if self.cuts is None else self.seen_rows - self.cuts.left

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return self.keys.shape[1]

    @property
    def observed_heads(self) -> int | None:
        """Query heads that are observed; None where none are."""
        return None if self.observed is None else self.observed.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The keys' and values' dtype."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.keys.device

    @property
    def head_widths(self) -> tuple[int, int]:
        """Width of keys and of values."""
        return self.keys.shape[-1], self.values.shape[-1]

    @property
    def keys(self) -> Tensor:
        """The window's keys, [b, g, room, d]."""
        return self.window.streams["keys"]

    @property
    def values(self) -> Tensor:
        """The window's values, [b, g, room, v]."""
        return self.window.streams["values"]

    @property
    def sums(self) -> Tensor:
        """What slots sum of keys and values, [b, g, M, d + v]."""
        return self.store.sums

    def number(self, statistic: Statistic) -> Tensor:
        """One of the numbers that slots keep, [b, g, M]; the mass is the count where every token weighs 1."""
        if statistic is MASS and MASS not in self.policy.statistics:
            if self.policy.weighted:
                raise MemoryStateError("this policy's readout needs no mass, so its slots do not store it")
            statistic = COUNT
        return self.store.numbers[..., self.policy.statistics.index(statistic)]

    # What a caller does

    def fork(self) -> Memory:
        """A copy that shares nothing with this memory."""
        self.check_usable()
        return self._mapped(torch.Tensor.clone)

    def detach(self) -> Memory:
        """A copy without its history: gradients stop here. Shares nothing with this memory, as a fork does."""
        self.check_usable()
        return self._mapped(lambda tensor: tensor.detach().clone())

    def to(self, device: torch.device | str) -> Memory:
        """A copy on a device, be it the same one. Shares nothing with this memory, as a fork does.

        Raises `MemoryStateError` for what is no device: a memory keeps its dtype, for its counts and sums are wider
        than its keys, and would not be what they are in another.
        """
        self.check_usable()
        there = _device(device)
        return self._mapped(lambda tensor: tensor.to(there, copy=True))

    def reorder(self, rows: Tensor | list[int]) -> Memory:
        """A memory whose row i is this one's row rows[i]; rows may repeat (beam search) or be left out."""
        self.check_usable()
        index = row_numbers(rows, len(self.seen_rows))
        here = index.to(self.device)
        copy = self._mapped(lambda tensor: tensor.index_select(0, here))
        cuts = None if self.cuts is None else self.cuts.of_rows(index.tolist())
        return dataclasses.replace(copy, seen_rows=self.seen_rows[index.numpy()], cuts=cuts)

    def save(self, path: str | Path) -> None:
        """Write the memory to a safetensors file; its policy travels along."""
        self.check_usable()
        file.write(path, self.policy, [self.contents()])

    @classmethod
    def load(cls, path: str | Path, policy: str | Path | PolicySpec | Policy | None = None) -> Memory:
        """Read a memory. With `policy`, refuse a file that another policy wrote; a damaged file is refused anyway."""
        spec, parts = file.read(path)
        wanted = None if policy is None else as_policy(policy).spec
        if wanted is not None and wanted != spec:
            raise MemoryStateError(
                f"{path}: belongs to {_named(spec)}, not to {_named(wanted)}; load it with its own policy"
            )
        each = [Memory._of(part) for part in parts]
        return Memory.of_parts(spec.build(), each) if parts[0].policy.spec != spec else each[0]

    @staticmethod
    def _of(part: file.Contents) -> Memory:
        tensors, policy = part.tensors, part.policy
        numbers = tensors["numbers"].to(tensors["sums"].dtype) if policy.replaces else tensors["numbers"]
        return Memory(
            policy=policy,
            seen_rows=tensors["seen"].numpy(),
            window=Window({name: tensors[name] for name in policy.streams}, part.end),
            store=SlotStore(tensors["sums"], numbers, evidence=tensors.get("slot_evidence")),
            next_positions=tensors.get("next_positions"),
            observed=tensors.get("observed"),
            cuts=Cuts.of_tensors(tensors) if policy.takes_boundaries else None,
        )

    def __copy__(self) -> Memory:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return self.fork()

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without history, and without working copies, whose views of one storage pickle would part."""
        return dict(vars(self.detach()))

    # What the engine asks

    @contextmanager
    def taken_over(self) -> Generator[None]:
        """In the `with` block a call updates this memory in place, and afterwards the memory it returns goes on.

        Where the call fails, this memory is as it was if nothing was written yet, and lost otherwise.
        """
        self.taken = True
        try:
            yield
        except BaseException as error:
            self.call_failed(error)
            raise

    def about_to_write(self) -> None:
        """The call that is about to take this memory over begins to change it."""
        self.written = True

    def call_failed(self, error: BaseException) -> None:
        """A call that was to take this memory over has failed."""
        self.taken = False
        if self.written:
            self.lost = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__

    @property
    def frozen(self) -> bool:
        """Whether it was made in inference mode, and this is outside: then nothing may be written into it."""
        return not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in self.tensors())

    def one_token_later(self, next_positions: Tensor | None, ending: np.ndarray | None = None) -> Memory:
        """The memory after one more token in every row, once that stands behind the window. This one is taken over.

        ending [b] bool: rows in which a boundary makes it the last of its chunk.
        """
        self.taken, self.written = True, False
        after = object.__new__(Memory)  # a third of what dataclasses.replace takes
        after.__dict__.update(self.__dict__)
        after.seen_rows, after.next_positions, after.taken = self.seen_rows + 1, next_positions, False
        after.window = Window(self.window.streams, self.window.end + 1)
        if ending is not None and self.cuts is not None:
            after.cuts = self.cuts.ending(ending)
        return after

    def skip(self, tokens: int) -> None:
        """Go on as if so many tokens had been decoded; what stands behind the window is theirs then."""
        self.seen_rows, self.window = self.seen_rows + tokens, Window(self.window.streams, self.window.end + tokens)

    def check_usable(self) -> None:
        """Raise where a later call has taken this memory over."""
        if self.lost is not None:
            raise MemoryStateError(
                f"this memory is lost: a call failed while it was changing it ({self.lost}); "
                "start again with memory=None, or fork() before a call that may fail"
            )
        if self.taken:
            raise MemoryStateError(
                "this memory was taken over by a later call, which updated it in place; "
                "go on with the memory that call returned, or fork() before it"
            )

    def check_policy(self, policy: Policy) -> None:
        """Raise where the memory is another policy's."""
        if self.policy is not policy and self.policy.spec != policy.spec:
            raise MemoryStateError(
                f"memory belongs to {_named(self.policy.spec)}, not to {_named(policy.spec)}; start with memory=None"
            )

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow into this memory."""
        return any(tensor.requires_grad for tensor in self.tensors())

    def contents(self) -> file.Contents:
        """What a file holds."""
        saved = self._saved()  # numbers are float64 in every file, whatever they are here
        return file.Contents(
            self.policy, {**saved, "numbers": saved["numbers"].double(), "seen": self.seen}, self.window.end
        )

    def _saved(self) -> dict[str, Tensor]:
        """The tensors of a file, by name."""
        rest = {
            "sums": self.store.sums,
            "numbers": self.store.numbers,
            "slot_evidence": self.store.evidence,
            "next_positions": self.next_positions,
            "observed": self.observed,
        }
        cuts: dict[str, Tensor] = {}
        if self.cuts is not None and isinstance(self.policy.window, BlockWindow):
            cuts = self.cuts.tensors(self.policy.window.chunks)
        return self.window.streams | cuts | {name: tensor for name, tensor in rest.items() if tensor is not None}

    def tensors(self) -> list[Tensor]:
        """All tensors held, working copies included."""
        rest = [tensor for tensor in (self.next_positions, self.observed) if tensor is not None]
        copies = [] if self.buffer is None else self.buffer.tensors()
        return [*self.window.streams.values(), *self.store.tensors(), *rest, *copies]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Memory:
        following = None if self.next_positions is None else change(self.next_positions)
        observed = None if self.observed is None else change(self.observed)
        window, store = self.window.mapped(change), self.store.mapped(change)
        return Memory(self.policy, self.seen_rows.copy(), window, store, following, observed, cuts=self.cuts)

    def __repr__(self) -> str:
        rows, heads = self.keys.shape[:2]
        return (
            f"Memory({_named(self.policy.spec)}, {rows} rows × {heads} heads, seen {self.seen_rows.tolist()}, "
            f"window {self.held_rows.tolist()}, slots {self.live_rows.tolist()}, {self.bytes:,} bytes"
            f"{', lost' if self.lost else ', taken over' if self.taken else ''})"
        )


def _device(given: Any) -> torch.device:
    """A device by its name or number."""
    try:
        return torch.device(given)
    except (TypeError, RuntimeError):
        raise MemoryStateError(
            f"device must be one of this machine's, such as 'cpu' or 'cuda:0', got {shown(given)}; "
            "a memory keeps its dtype"
        ) from None


def row_numbers(rows: Any, batch: int) -> Tensor:
    """Rows of a batch as numbers, [n] int64 on the CPU; a mask, no row at all, or rows that are not there, raise."""
    masked = isinstance(rows, Tensor) and rows.dtype == torch.bool
    index = whole_numbers(
        "rows",
        rows,
        0,
        batch - 1,
        limits=f"be a list of numbers from 0 to {batch - 1}",
        kind=MemoryStateError,
        remedy="; a mask's rows are mask.nonzero().flatten()" if masked else "",
    )
    if not len(index):
        raise MemoryStateError("rows must name one row at least, got none; a memory of no rows cannot go on")
    return index


def tokens_in_window(policy: Policy, seen: np.ndarray) -> np.ndarray:
    """Tokens in the window of rows that have seen so many."""
    return np.where(seen > 0, seen - policy.window.begin(np.maximum(seen - 1, 0)), 0)


def _named(spec: PolicySpec) -> str:
    return f"policy '{spec.name}'" if spec.name else "a policy without a name"
