"""What a policy costs, from its spec alone: slots, bytes and floating-point operations. Nothing is computed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch

from memkit.engine.checks import DTYPES
from memkit.errors import InputError, shown
from memkit.holding import Shape, held_bytes
from memkit.layers import AnyLayers, as_layers, layer_policies
from memkit.policy import Policy
from memkit.whole import MOST, whole_number

__all__ = ["FITTED_LENGTHS", "Cost", "Flops", "Shape", "alike_parts", "cost"]

FITTED_LENGTHS = tuple(4096 << i for i in range(9))
"""Tokens at which the exponent is fitted: 4k, 8k … 1M."""

MOST_TOKENS, MOST_CHUNKS = 2**28, 2**22
"""Tokens, and chunks that leave, up to which a cost is counted: some seconds, for every one of them is looked at."""

# Positions looked at in one go: a few arrays of 8 MB, however long the text.
BLOCK = 1 << 20


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, 2 per multiply-add.

    attention: queries meet keys and values; routing: tokens that leave the window find their slots.
    """

    attention: int
    routing: int

    @property
    def total(self) -> int:
        """Attention and routing."""
        return self.attention + self.routing


@dataclass(frozen=True)
class Cost:
    """What `policy` costs at `tokens` tokens; see `cost` for what is counted.

    slots, window: slots, and tokens kept exactly, of each row, layer and key/value head after a prefill (where layers
    or heads differ, the mean, rounded);
    shape: the layers, rows, heads, widths and dtype that it was counted for;
    slot_bytes, window_bytes: what the memories of all layers and rows hold then, room to decode included;
    decoding_bytes: the most that they hold while tokens are decoded after it, until a chunk more has left;
    prefill: operations for all tokens; decode: for one more; exponent: prefill grows as tokens^exponent from 4k to 1M.
    """

    policy: str
    tokens: int
    shape: Shape
    slots: int
    window: int
    slot_bytes: int
    window_bytes: int
    decoding_bytes: int
    prefill: Flops
    decode: Flops
    exponent: float

    @property
    def bytes(self) -> int:
        """Slots and window."""
        return self.slot_bytes + self.window_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is held at any time: after reading, or while decoding."""
        return max(self.bytes, self.decoding_bytes)

    def to_dict(self) -> dict[str, object]:
        """All fields as plain numbers and text, for JSON."""
        return {**dataclasses.asdict(self), "bytes": self.bytes, "peak_bytes": self.peak_bytes}


@overload
def cost(
    policy: AnyLayers,
    tokens: int,
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_width: int = 64,
    value_width: int | None = None,
    dtype: str | torch.dtype = "float32",
    layers: int = 1,
    rows: int = 1,
) -> Cost: ...


@overload
def cost(
    policy: AnyLayers,
    tokens: Iterable[int],
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_width: int = 64,
    value_width: int | None = None,
    dtype: str | torch.dtype = "float32",
    layers: int = 1,
    rows: int = 1,
) -> list[Cost]: ...


def cost(
    policy: AnyLayers,
    tokens: int | Iterable[int],
    *,
    heads: int = 8,
    kv_heads: int | None = None,
    head_width: int = 64,
    value_width: int | None = None,
    dtype: str | torch.dtype = "float32",
    layers: int = 1,
    rows: int = 1,
) -> Cost | list[Cost]:
    """What a policy costs after reading `tokens` tokens; a list of costs for several lengths.

    policy: one for all layers, or a mapping `{"default": …, "at": {…}}` or its YAML file for layers that differ; as no
    model is known here, no layer slides by itself.

    heads h, kv_heads g (left out: h), head_width d, value_width v (left out: d), dtype, layers and rows say for what.

    Bytes are those of `Memory.bytes`: after one prefill in `dtype` without gradients, room to decode included, and at
    most while tokens are decoded after it, one at a time, until a chunk has left and one more token has come. They are
    counted on tensors without numbers, by the engine itself.

    With w(p) tokens of the window and m(p) slots visible to the query at position p, its own token included,

        attention = 2·h·(d + v) · Σ_p (w(p) + m(p))              scores and weighted values
        routing   = 2·g·d · Σ_chunks (pairs compared)            who founds nothing against every slot

    for each layer and row. An admission that compares looks at all tokens of a chunk and the slots before it; their
    routing then adds the new slots alone. Where slots compete, those that lose are compared with all that stay. What
    n observed queries of a chunk cost counts as routing: 2·h·n·(d + 2v) for each row that its last token sees; under
    `admission: expected-attention` 2·h·(2d + d²) more for each such row, and 4·h·n·d² for each chunk (without
    `covariance` 2·h·d for each row). Routing costs nothing where no slot is compared (`segment`, growth `none`) and
    where the whole chunk founds. `full` thus costs the causal half of the square. One decoded token stands at p =
    `tokens` and pays its share, 1/C, of routing the next chunk that leaves. Left out, all linear in the tokens:
    projections, softmax, norms, rotary, the sums themselves, and what a kernel computes only to mask it.

    Where the caller says where chunks end (`chunker: boundaries`), all this is of chunks of `most` tokens, as if nobody
    had said so: no window is longer.

    The exponent is the slope, by least squares in log–log, of attention + routing over a prefill at 4k, 8k … 1M tokens.

    Raises `InputError` for numbers that do not fit, `PolicyError` as `load_policy` does.
    """
    shape = _shape(heads, kv_heads, head_width, value_width, dtype, layers, rows)
    several = isinstance(tokens, Iterable) and not isinstance(tokens, (str, bytes, Mapping))
    several = several and getattr(tokens, "ndim", 1) > 0  # one number may be an array without axes
    each = list(tokens) if isinstance(tokens, Iterable) and several else [tokens]
    spec = as_layers(policy)
    parts = alike_parts(layer_policies(spec, shape.layers, shape.kv_heads), shape)
    chunks = [part.chunk for part, _ in parts if not part.sinks_only]
    most = min(MOST_TOKENS, *(MOST_CHUNKS * chunk for chunk in chunks)) if chunks else MOST_TOKENS
    lengths = [whole_number("tokens", length, 1, most) for length in each]
    courses = {part: _Course(part, {*lengths, *FITTED_LENGTHS}) for part, _ in parts}
    whole = [(courses[part], of_part) for part, of_part in parts]
    exponent = _slope({n: _total(_prefill(*each, n) for each in whole).total for n in FITTED_LENGTHS})
    costs = [_cost_at(spec.label, whole, shape, length, exponent) for length in lengths]
    return costs if several else costs[0]


def alike_parts(policies: list[Policy], shape: Shape) -> list[tuple[Policy, Shape]]:
    """The layers and heads that are alike: their policy, and what is multiplied for it.

    A head profile says what each layer's heads get; `auto` finds none, for no model is known here.
    """
    group = shape.heads // shape.kv_heads
    parts: list[tuple[Policy, Shape]] = []
    for one, layers in Counter(policies).items():
        if one.head_ratios is not None and len(one.head_ratios) != shape.kv_heads:
            raise InputError(
                f"heads.ratios has {len(one.head_ratios)} numbers, one per key/value head, got kv_heads "
                f"{shape.kv_heads}"
            )
        for heads, part in one.head_policies or ((shape.kv_heads, one),):
            parts.append((part, dataclasses.replace(shape, layers=layers, heads=heads * group, kv_heads=heads)))
    return parts


class _Course:
    """How windows and slots go along for texts of so many tokens and one more: whole numbers, all exact.

    visible: Σ over all queries of what each sees, slots and window, for each of the lengths.
    """

    def __init__(self, policy: Policy, lengths: set[int]) -> None:
        self.policy, tokens = policy, max(lengths)
        self.admission_compares = policy.admission is not None and policy.admission.compares
        self.compares = not policy.sinks_only and (policy.routing.compares or self.admission_compares)
        chunks = 0 if policy.sinks_only else int(policy.window.begin(tokens)) // policy.chunk + 1
        # Slots once so many chunks have left; without growth there may be a chunk per token, and none is needed.
        self.table = np.array([policy.slots_after_chunk(index - 1) for index in range(chunks + 1)], dtype=np.int64)
        self.visible = self._visible(lengths)

    def slots(self, left: np.ndarray) -> np.ndarray:
        """Slots there are once `left` tokens have left the window."""
        return np.minimum(self.policy.sinks, left) if self.policy.sinks_only else self.table[left // self.policy.chunk]

    def _visible(self, lengths: set[int]) -> dict[int, int]:
        totals: dict[int, int] = {}
        total = begin = 0
        for length in sorted(lengths):
            while begin < length:
                end = min(length, begin + BLOCK)
                positions = np.arange(begin, end, dtype=np.int64)
                left = self.policy.window.begin(positions)
                total += int((positions - left + 1 + self.slots(left)).sum())
                begin = end
            totals[length] = total
        return totals

    def compared(self, first: int, stop: int) -> int:
        """Pairs of a token and a slot that are compared as chunks `first` … `stop` − 1 leave."""
        if not self.compares:
            return 0
        policy, live, after = self.policy, self.table[first:stop], self.table[first + 1 : stop + 1]
        if policy.competes:  # what loses with all that stays
            losing = live + policy.chunk - after
            return int((losing * after).sum()) if policy.merging.joins else 0
        chunk, new = policy.chunk, after - live
        others = chunk - new
        scores = chunk * live * ((new > 0) & (others > 0)) if self.admission_compares else np.zeros_like(live)
        if not (policy.routing.compares and policy.merging.joins):
            return int(scores.sum())
        # Who founds nothing meets all slots; where the admission has compared it with those there were, the new ones.
        return int((scores + others * np.where(scores > 0, new, after)).sum())


def _cost_at(policy: str, parts: list[tuple[_Course, Shape]], shape: Shape, tokens: int, exponent: float) -> Cost:
    held = held_bytes([(course.policy, of_part) for course, of_part in parts], tokens)
    slots = sum(course.policy.slots_after(tokens) * part.layers * part.kv_heads for course, part in parts)
    window = sum(
        (tokens - int(course.policy.window.begin(tokens - 1))) * part.layers * part.kv_heads for course, part in parts
    )
    return Cost(
        policy=policy,
        tokens=tokens,
        shape=shape,
        slots=round(slots / (shape.layers * shape.kv_heads)),
        window=round(window / (shape.layers * shape.kv_heads)),
        slot_bytes=held.slots,
        window_bytes=held.window,
        decoding_bytes=held.decoding,
        prefill=_total(_prefill(course, of_part, tokens) for course, of_part in parts),
        decode=_total(_decode(course, of_part, tokens) for course, of_part in parts),
        exponent=exponent,
    )


def _total(parts: Iterable[Flops]) -> Flops:
    each = list(parts)
    return Flops(sum(part.attention for part in each), sum(part.routing for part in each))


def _prefill(course: _Course, shape: Shape, tokens: int) -> Flops:
    chunks = int(course.policy.window.begin(tokens - 1)) // (course.policy.chunk or 1)
    routing = _routing(shape, course.compared(0, chunks)) + _observing(course, shape, 0, tokens)
    return Flops(attention=_attention(shape, course.visible[tokens]), routing=routing)


def _decode(course: _Course, shape: Shape, tokens: int) -> Flops:
    left, chunk = int(course.policy.window.begin(tokens)), course.policy.chunk or 1
    visible = tokens - left + 1 + int(course.slots(np.array(left)))
    compared = course.compared(left // chunk, left // chunk + 1)
    first = tokens // chunk * chunk
    routing = _routing(shape, compared) + _observing(course, shape, first, first + chunk)
    return Flops(attention=_attention(shape, visible), routing=routing // chunk)


def _attention(shape: Shape, visible: int) -> int:
    """For so many pairs of a query and what it sees."""
    return 2 * shape.layers * shape.rows * shape.heads * (shape.head_width + shape.value_width) * visible


def _observing(course: _Course, shape: Shape, first: int, stop: int) -> int:
    """What the observed queries of the chunks that are complete among tokens `first` … `stop` − 1 cost."""
    policy = course.policy
    if not policy.observes:
        return 0
    last = np.arange(first + policy.chunk - 1, stop, policy.chunk, dtype=np.int64)
    left = policy.window.begin(last)
    rows = int((last - left + 1 + course.slots(left)).sum())
    per_row = 2 * policy.observation.queries * (shape.head_width + 2 * shape.value_width)
    per_chunk = 0
    if policy.expects is not None:
        width = shape.head_width
        per_row += 2 * (2 * width + width**2 if policy.expects.covariance else width)
        per_chunk = 4 * policy.observation.queries * width**2 if policy.expects.covariance else 0
    return shape.layers * shape.rows * shape.heads * (per_row * rows + per_chunk * len(last))


def _routing(shape: Shape, compared: int) -> int:
    """For so many pairs of a token that leaves and a slot."""
    return 2 * shape.layers * shape.rows * shape.kv_heads * shape.head_width * compared


def _slope(operations: dict[int, int]) -> float:
    """Of log operations over log tokens, by least squares."""
    x, y = np.log(list(operations)), np.log([float(number) for number in operations.values()])
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def _shape(
    heads: int,
    kv_heads: int | None,
    head_width: int,
    value_width: int | None,
    dtype: str | torch.dtype,
    layers: int,
    rows: int,
) -> Shape:
    if not isinstance(dtype, (str, torch.dtype)):
        raise InputError(f"dtype must be a name or a torch.dtype, got {shown(dtype)}")
    shape = Shape(
        heads=whole_number("heads", heads, 1, MOST),
        kv_heads=whole_number("kv_heads", heads if kv_heads is None else kv_heads, 1, MOST),
        head_width=whole_number("head_width", head_width, 1, MOST),
        value_width=whole_number("value_width", head_width if value_width is None else value_width, 1, MOST),
        dtype=str(dtype).removeprefix("torch."),
        layers=whole_number("layers", layers, 1, MOST),
        rows=whole_number("rows", rows, 1, MOST),
    )
    if shape.heads % shape.kv_heads:
        raise InputError(f"heads must be a multiple of the {shape.kv_heads} kv_heads, got {shape.heads}")
    known = [str(known).removeprefix("torch.") for known in DTYPES]
    if shape.dtype not in known:
        raise InputError(f"dtype must be one of {', '.join(known)}, got {shown(shape.dtype)[1:-1]}")
    return shape
