"""Cases: a few small numbers that stand for the tensors of a call, so that a counter-example is one readable line.

A `Case` says how many rows, heads and tokens there are and what kind of data they hold; `Case.inputs(policy)` makes the
tensors, the same ones every time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

import memkit
from memkit.engine.inputs import Plan
from memkit.errors import InputError, shown
from memkit.memory import Memory
from memkit.parameters import PolicyParameters
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.policy import Policy

__all__ = ["DATA", "Case", "Inputs", "cases", "lengths", "part_of_plan", "plans", "splits"]

DATA = ("integers", "normal", "clusters", "duplicates", "zeros", "antipodal", "tiny", "huge", "spread")
"""Kinds of data, from harmless to hurtful: small whole numbers (many exact ties); normal; three clusters; a few vectors
repeated exactly; half of the vectors zero; antipodal pairs; magnitudes of 1e-12; of 1e12; from 1e-12 to 1e12 (1e-6 to
1e6 where a rule weighs keys by their own size)."""

Data = Literal["integers", "normal", "clusters", "duplicates", "zeros", "antipodal", "tiny", "huge", "spread"]


@dataclass(frozen=True)
class Case:
    """A call in small numbers.

    lengths: tokens of each row; kv_heads, group: key/value heads, and query heads of each; width, value_width: a
    head's; keys, values: kind of data (see `DATA`); seed: which such data; dtype: of the tensors;
    weights: merge weights, where the policy learns them: left out, positive, or zero for a third of the tokens;
    learned: whether LayerNorm and query scales are random, not 1, 0 and 1; positions: whether rotary positions are
    given (with gaps), or continue from the memory; pieces: how to split the tokens, repeated until they are used up
    (row r begins with the r-th, so that rows get out of step);
    ends: where the policy lets the caller say where chunks end, tokens of each chunk, repeated (row r begins with the
    r-th); left out: nobody says; gradients: whether gradients are compared, too; strided: whether the channels of
    queries, keys and values stand apart from each other, as those of a transposed tensor do.
    """

    lengths: tuple[int, ...] = (4,)
    kv_heads: int = 1
    group: int = 1
    width: int = 2
    value_width: int = 2
    keys: Data = "integers"
    values: Data = "integers"
    seed: int = 0
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    weights: Literal["none", "positive", "some-zero"] = "none"
    learned: bool = False
    positions: bool = False
    pieces: tuple[int, ...] = (1,)
    ends: tuple[int, ...] = ()
    gradients: bool = False
    strided: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0:
            raise InputError(f"a case's lengths must be at least 0, of one row at least, got {shown(self.lengths)}")
        if not self.pieces or min(*self.pieces, *self.ends, 1) < 1:
            raise InputError(
                "a case's pieces and ends must be of at least one token each, and there must be a piece, "
                f"got pieces {shown(self.pieces)} and ends {shown(self.ends)}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def cuts(self) -> Iterator[tuple[int, int]]:
        """The pieces as (start, stop)."""
        start, turn = 0, 0
        while start < self.tokens:
            stop = min(start + self.pieces[turn % len(self.pieces)], self.tokens)
            yield start, stop
            start, turn = stop, turn + 1

    def pieces_of_rows(self) -> Iterator[list[tuple[int, int]]]:
        """The pieces as (start, stop) of each row, one list per call; a row that is used up stands still."""
        at, turn = [0] * len(self.lengths), 0
        while any(start < length for start, length in zip(at, self.lengths, strict=True)):
            sizes = [self.pieces[(turn + row) % len(self.pieces)] for row in range(len(at))]
            ends = [min(start + size, length) for start, size, length in zip(at, sizes, self.lengths, strict=True)]
            yield list(zip(at, ends, strict=True))
            at, turn = ends, turn + 1

    def inputs(self, policy: Policy) -> Inputs:
        """The tensors of the call."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype, rows, heads = getattr(torch, self.dtype), len(self.lengths), self.kv_heads * self.group

        def data(kind: str, heads: int, width: int) -> Tensor:
            return make(kind, (rows, heads, self.tokens, width), generator, reach).to(dtype)

        # A rule that weighs keys by themselves sums squares: float32 holds no norm of those at 1e12.
        reach = 6 if policy.weighted and policy.merging.additive and not policy.merging.learned else 12

        queries = data("integers" if self.keys == "integers" else "normal", heads, self.width)
        keys = data(self.keys, self.kv_heads, self.width)
        values = data(self.values, self.kv_heads, self.value_width)
        weights = None
        if Need.MERGE_WEIGHTS in policy.needs and self.weights != "none":
            shape = (rows, self.kv_heads, self.tokens)
            weights = torch.randint(1, 9, shape, generator=generator).to(dtype) / 4
            if self.weights == "some-zero":
                weights = weights * (torch.randint(0, 3, shape, generator=generator) > 0)
        parameters = None
        if self.learned:
            parameters = PolicyParameters(policy, heads, self.width)
            for name, parameter in parameters.named_parameters():
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.data = ((noise - 0.5) if name.endswith("bias") else (noise + 0.5)).to(dtype)
        rotation = None
        if Need.ROTATION in policy.needs:
            turned = self.width // 2 * 2
            positions = None
            if self.positions:
                gaps = torch.randint(1, 4, (rows, self.tokens), generator=generator)
                positions = gaps.cumsum(1).double()
            frequencies = 0.7 ** torch.arange(1, turned // 2 + 1, dtype=torch.float64)
            rotation = Rotation(("adjacent", "half-split")[self.seed % 2], turned, frequencies, positions)
        lengths, boundaries = torch.tensor(self.lengths), self._boundaries() if policy.takes_boundaries else None
        return Inputs(queries, keys, values, weights, parameters, rotation, lengths, boundaries, self.strided)

    def _boundaries(self) -> Tensor | None:
        """Which tokens the case says are the last of their chunk, [b, t] bool."""
        if not self.ends:
            return None
        boundaries = torch.zeros(len(self.lengths), self.tokens, dtype=torch.bool)
        for row in range(len(self.lengths)):
            turns = (self.ends[(row + turn) % len(self.ends)] for turn in itertools.count())
            for end in itertools.takewhile(lambda end: end <= self.tokens, itertools.accumulate(turns)):
                boundaries[row, end - 1] = True
        return boundaries


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, as `memkit.attend` takes them; strided: channels are set apart before it is called."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None
    parameters: PolicyParameters | None
    rotation: Rotation | None
    lengths: Tensor
    boundaries: Tensor | None = None
    strided: bool = False

    def chunks(self, policy: Policy, row: int, tokens: int) -> list[tuple[int, int]]:
        """The chunks (begin, end) of a row's first tokens, from the definition; the last may not be complete."""
        found, begin = list[tuple[int, int]](), 0
        for end in range(1, tokens + 1):
            said = self.boundaries is not None and bool(self.boundaries[row, end - 1])
            if said or end - begin == policy.chunk or end == tokens:
                found.append((begin, end))
                begin = end
        return found

    @property
    def padded(self) -> bool:
        """Whether some row is shorter than others."""
        return bool((self.lengths < self.keys.shape[2]).any())

    @property
    def valid(self) -> Tensor:
        """Which tokens are no padding, [b, 1, t, 1] bool."""
        return (torch.arange(self.keys.shape[2]) < self.lengths[:, None])[:, None, :, None]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        tensors = {"queries": self.queries, "keys": self.keys, "values": self.values}
        if self.weights is not None:
            tensors["weights"] = self.weights
        if self.parameters is not None:
            tensors |= dict(self.parameters.named_parameters())
        return tensors

    def attend(
        self, policy: Policy, *, memory: Memory | None = None, plan: Plan | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Memory]:
        """`memkit.attend` on them."""
        return memkit.attend(
            policy,
            self._laid_out(self.queries),
            self._laid_out(self.keys),
            self._laid_out(self.values),
            weights=self.weights,
            parameters=self.parameters,
            rotation=self.rotation,
            memory=memory,
            lengths=self.lengths if self.padded else None,
            boundaries=self.boundaries,
            plan=plan,
            backend=backend,  # type: ignore[arg-type]
        )

    def plan_if_any(self, policy: Policy) -> Plan | None:
        """The plan to compare on; None where it waits for what has been read (`Policy.plans_ahead`)."""
        return self.plan(policy) if policy.plans_ahead else None

    def plan(self, policy: Policy, *, memory: Memory | None = None) -> Plan:
        """`memkit.plan` on them."""
        return memkit.plan(
            policy,
            self._laid_out(self.keys),
            weights=self.weights,
            parameters=self.parameters,
            rotation=self.rotation,
            memory=memory,
            lengths=self.lengths if self.padded else None,
            boundaries=self.boundaries,
        )

    def _laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers; with NaN between the channels, where these are set apart."""
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0] if self.strided else tensor

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        """The same call with every differentiable tensor changed."""
        parameters = self.parameters
        if parameters is not None:
            copy = PolicyParameters.__new__(PolicyParameters)
            torch.nn.Module.__init__(copy)
            for name in ("key_norm_weight", "key_norm_bias", "query_scale_window", "query_scale_memory"):
                tensor = getattr(parameters, name)
                copy.register_parameter(
                    name, None if tensor is None else torch.nn.Parameter(change(name, tensor.detach()))
                )
            parameters = copy
        return dataclasses.replace(
            self,
            queries=change("queries", self.queries),
            keys=change("keys", self.keys),
            values=change("values", self.values),
            weights=None if self.weights is None else change("weights", self.weights),
            parameters=parameters,
        )

    def differentiable(self) -> Inputs:
        """The same call, whose tensors ask for gradients."""
        return self.mapped(lambda _, tensor: tensor.detach().clone().requires_grad_())

    def part(self, start: int, stop: int) -> Inputs:
        """Columns start … stop − 1 of the call."""
        rotation = self.rotation
        if rotation is not None and rotation.positions is not None:
            rotation = dataclasses.replace(rotation, positions=rotation.positions[:, start:stop])
        return dataclasses.replace(
            self,
            queries=self.queries[:, :, start:stop],
            keys=self.keys[:, :, start:stop],
            values=self.values[:, :, start:stop],
            weights=None if self.weights is None else self.weights[:, :, start:stop],
            rotation=rotation,
            lengths=(self.lengths - start).clamp(0, stop - start),
            boundaries=None if self.boundaries is None else self.boundaries[:, start:stop],
        )

    def parts(self, spans: list[tuple[int, int]]) -> Inputs:
        """Tokens start … stop − 1 of each row, padded on the right to as many as the longest has."""
        lengths = torch.tensor([stop - start for start, stop in spans])
        longest = int(lengths.max())
        columns = torch.tensor([start for start, _ in spans])[:, None] + torch.arange(longest)
        columns = columns.clamp(max=self.keys.shape[2] - 1)

        def taken(tensor: Tensor) -> Tensor:
            index = columns[:, None].expand(-1, tensor.shape[1], -1)
            if tensor.ndim == 4:
                index = index.unsqueeze(-1).expand(*index.shape, tensor.shape[-1])
            return tensor.gather(2, index)

        rotation = self.rotation
        if rotation is not None and rotation.positions is not None:
            rotation = dataclasses.replace(rotation, positions=rotation.positions.gather(1, columns))
        return dataclasses.replace(
            self,
            queries=taken(self.queries),
            keys=taken(self.keys),
            values=taken(self.values),
            weights=None if self.weights is None else taken(self.weights),
            rotation=rotation,
            lengths=lengths,
            boundaries=None if self.boundaries is None else self.boundaries.gather(1, columns),
        )

    def row(self, row: int) -> Inputs:
        """One row alone, without its padding."""
        rotation = self.rotation
        if rotation is not None and rotation.positions is not None:
            rotation = dataclasses.replace(rotation, positions=rotation.positions[row : row + 1])
        alone = slice(row, row + 1)
        whole = dataclasses.replace(
            self,
            queries=self.queries[alone],
            keys=self.keys[alone],
            values=self.values[alone],
            weights=None if self.weights is None else self.weights[alone],
            rotation=rotation,
            lengths=self.lengths[alone],
            boundaries=None if self.boundaries is None else self.boundaries[alone],
        )
        return whole.part(0, int(self.lengths[row]))

    def head(self, head: int) -> Inputs:
        """One key/value head alone, with its query heads."""
        group = self.queries.shape[1] // self.keys.shape[1]
        mine, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
        cut = self.mapped(lambda name, tensor: tensor[mine] if name.startswith("query_scale") else tensor)
        return dataclasses.replace(
            cut,
            queries=self.queries[:, mine],
            keys=self.keys[:, own],
            values=self.values[:, own],
            weights=None if self.weights is None else self.weights[:, own],
        )


def part_of_plan(plan: Plan, *, rows: slice = slice(None), heads: slice = slice(None)) -> Plan:
    """The plan of some rows or heads."""
    return Plan(
        plan.slot[rows, heads], plan.founded[rows, heads], plan.begin[rows], plan.length[rows], plan.slots[rows]
    )


def make(kind: str, shape: tuple[int, int, int, int], generator: torch.Generator, reach: int = 12) -> Tensor:
    """Data of a kind, [b, h, t, d] float64; the hurtful magnitudes go from 10^−reach to 10^reach."""
    rows, heads, tokens, width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def pick(choices: int) -> Tensor:
        return torch.randint(0, choices, (rows, heads, tokens, 1), generator=generator).expand(shape)

    match kind:
        case "integers":
            return torch.randint(-2, 3, shape, generator=generator).double()
        case "normal":
            return normal(*shape)
        case "clusters":
            return normal(rows, heads, 3, width).gather(2, pick(3)) + 1e-3 * normal(*shape)
        case "duplicates":
            return normal(rows, heads, 3, width).gather(2, pick(3))
        case "zeros":
            return normal(*shape) * pick(2)
        case "antipodal":
            half = normal(rows, heads, (tokens + 1) // 2, width)
            return torch.stack((half, -half), dim=3).flatten(2, 3)[:, :, :tokens]
        case "tiny":
            return 10.0**-reach * normal(*shape)
        case "huge":
            return 10.0**reach * normal(*shape)
        case "spread":
            exponents = reach * (2 * torch.rand(rows, heads, tokens, 1, generator=generator, dtype=torch.float64) - 1)
            return 10**exponents * normal(*shape)
        case _:
            raise ValueError(f"kind of data must be one of {', '.join(DATA)}, got {kind!r}")


def lengths(policy: Policy, extra: int = 3) -> st.SearchStrategy[int]:
    """Numbers of tokens around every boundary of a policy: chunks filled, the first that leave, the sinks gone."""
    chunk, window = max(policy.chunk, 1), policy.window.capacity or 4
    edges = {1, chunk, window, window + chunk, window + extra * chunk, policy.sinks, policy.sinks + window}
    awkward = sorted({edge + step for edge in edges for step in (-1, 0, 1)} - {-1, 0})
    most = window + extra * chunk + 1
    return st.one_of(st.sampled_from([edge for edge in awkward if edge <= most]), st.integers(1, most))


def splits() -> st.SearchStrategy[tuple[int, ...]]:
    """How to split a sequence: piece sizes, repeated until its tokens are used up; (1,) is one token at a time."""
    return st.one_of(st.just((1,)), st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))


@st.composite
def cases(
    draw: st.DrawFn,
    policy: Policy,
    *,
    max_rows: int = 2,
    data: tuple[str, ...] = DATA,
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16"),
    min_width: int = 1,
) -> Case:
    """Cases for a policy: unequal rows, heads grouped or not, lengths around its boundaries, data that hurt.

    Where a policy decides by what was read, three in four are of normal float64 numbers.
    """
    if not policy.plans_ahead and draw(st.integers(0, 3)):  # decisions that no plan fixes then have a margin
        data, dtypes = ("normal",), ("float64",)
    rows = draw(st.integers(1, max_rows))
    # Keys of one channel all point one way or the other, as do those of two behind a LayerNorm: rounding would decide
    # between angles.
    narrow = 1 if policy.plans_ahead and Need.ROTATION not in policy.needs else 2
    narrow += not policy.plans_ahead and policy.readout.layer_norm
    least = max(min_width, narrow, getattr(policy.spec.rotary, "width", None) or 1)
    width = draw(st.integers(least, max(4, least)))
    return Case(
        lengths=tuple(draw(lengths(policy)) for _ in range(rows)),
        kv_heads=draw(st.integers(1, 2)) if policy.head_ratios is None else len(policy.head_ratios),
        group=draw(st.integers(1, 2)),
        width=width,
        value_width=draw(st.one_of(st.just(width), st.integers(1, 4))),
        keys=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        values=draw(st.sampled_from(data)),  # type: ignore[arg-type]
        seed=draw(st.integers(0, 999)),
        dtype=draw(st.sampled_from(dtypes)),  # type: ignore[arg-type]
        weights=draw(st.sampled_from(("none", "positive", "some-zero"))) if policy.merging.learned else "none",
        learned=draw(st.booleans()),
        positions=draw(st.booleans()) if Need.ROTATION in policy.needs else False,
        pieces=draw(splits()),
        ends=draw(st.one_of(st.just(()), splits())) if policy.takes_boundaries else (),
        gradients=draw(st.integers(0, 2)) == 2,
        strided=draw(st.integers(0, 3)) == 3,
    )


@st.composite
def plans(draw: st.DrawFn, policy: Policy, case: Case) -> Plan:
    """Any plan that a case's call may follow, not only the one memkit would make.

    As many tokens of every chunk found as growth grants, sinks first, each the next free slot; the others join any slot
    that is no sink, those founded in the same step included, or none where the policy drops them. Shrinks to the
    earliest founders and the lowest slots.
    """
    inputs = case.inputs(policy)
    made = inputs.plan(policy)
    if policy.sinks_only:
        return made
    slot, founded = torch.full_like(made.slot, -1), torch.zeros_like(made.founded)
    chunks = [inputs.chunks(policy, row, length) for row, length in enumerate(case.lengths)]
    for row, head, chunk in itertools.product(
        range(len(made.length)), range(case.kv_heads), range(made.slots.shape[1])
    ):
        if chunk >= len(chunks[row]) or chunks[row][chunk][1] > made.length[row]:
            continue
        begin, end = chunks[row][chunk]
        size = end - begin
        live, after = int(made.slots[row, chunk - 1]) if chunk else 0, int(made.slots[row, chunk])
        forced = min(max(policy.sinks - begin, 0), size)
        chosen = st.sets(st.integers(forced, size - 1), min_size=after - live - forced, max_size=after - live - forced)
        founders = [*range(forced), *sorted(draw(chosen) if after - live > forced else ())]
        targets = st.integers(policy.sinks, after - 1) if after > policy.sinks and policy.merging.joins else st.just(-1)
        numbers = [live + founders.index(token) if token in founders else draw(targets) for token in range(size)]
        here = slice(begin, end)
        slot[row, head, here] = torch.tensor(numbers)
        founded[row, head, here] = torch.tensor([token in founders for token in range(size)])
    return dataclasses.replace(made, slot=slot, founded=founded)
