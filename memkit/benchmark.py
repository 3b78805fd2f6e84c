"""How fast a policy is here, as factors against PyTorch's own fused causal attention on the same tensors.

Seconds on a shared machine say little; ratios of medians within one run say more. Besides full attention, every row
is held against its *limit*: the time that its attention and routing arithmetic alone would take at the rates that one
fused call and one matrix product reach on these shapes in this run.
"""

from __future__ import annotations

import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memkit.catalog import as_policy
from memkit.costing import cost
from memkit.engine import attend
from memkit.errors import InputError
from memkit.machine import machine_facts
from memkit.parameters import PolicyParameters
from memkit.pieces.needs import Need
from memkit.pieces.rotary import Rotation
from memkit.plain_json import as_json
from memkit.policy import Policy, PolicySpec
from memkit.rendering import render
from memkit.whole import MOST, SEEDS, whole_number

__all__ = ["MODES", "Bench", "Timing", "bench"]

Mode = Literal["forward", "train", "decode"]
MOST_NUMBERS = 2**34
"""Of queries, keys, values and outputs together: 64 GiB in float32."""

MODES: tuple[Mode, ...] = ("forward", "train", "decode")
AnyPolicy = str | Path | PolicySpec | Policy
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """One policy in one mode at one length.

    mode: forward (prefill), train (forward and backward), decode (one token after `tokens`, the mean over two chunks,
    absorption included). seconds: median of the repeats; low, high: their range; full_seconds: full attention's median
    in the same run; limit_seconds: see the module. peak_bytes: most resident memory of a fresh process that does this
    once, PyTorch and the inputs included; None where not asked for.
    """

    policy: str
    mode: Mode
    tokens: int
    seconds: float
    low: float
    high: float
    full_seconds: float
    limit_seconds: float
    peak_bytes: int | None = None

    @property
    def factor(self) -> float:
        """How many times as fast as full attention."""
        return self.full_seconds / self.seconds

    @property
    def limit_share(self) -> float:
        """The share of the time that is the limit's; 1 is as fast as the arithmetic allows."""
        return self.limit_seconds / self.seconds


@dataclass(frozen=True)
class Bench:
    """What `bench` measured, and on what."""

    settings: dict[str, Any]
    timings: list[Timing]

    def to_json(self) -> str:
        """`{"settings": {…}, "timings": [{"policy", "mode", "tokens", "seconds", …, "factor", "limit_share"}]}`."""
        rows = [{**asdict(row), "factor": row.factor, "limit_share": row.limit_share} for row in self.timings]
        return as_json({"settings": self.settings, "timings": rows})

    def table(self) -> Any:
        """The timings as a rich table: `rich.print(bench.table())`."""
        return render(self, "table")

    def plot(self) -> Any:
        """Factor against tokens: a panel per mode, a line per policy; the first panel's matplotlib axes.

        Raises `ModelError` where matplotlib is not installed.
        """
        return render(self, "plot")

    def _repr_html_(self) -> str:
        return render(self, "html")


@dataclass(frozen=True)
class _Shape:
    rows: int
    heads: int
    kv_heads: int
    width: int
    dtype: torch.dtype


def bench(
    policies: Iterable[AnyPolicy],
    tokens: int | Sequence[int] = 4096,
    *,
    heads: int = 6,
    kv_heads: int | None = None,
    head_width: int = 64,
    rows: int = 1,
    modes: Sequence[Mode] = MODES,
    repeats: int = 5,
    dtype: torch.dtype = torch.float32,
    peak: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bench:
    """Time policies on random tensors [rows, heads, tokens, head_width], normally distributed.

    peak: also measure the most memory a training step takes, each in a fresh process.
    Raises `InputError` where an argument is out of range.
    """
    lengths = [
        whole_number("tokens", length, 2, MOST) for length in (tokens if isinstance(tokens, Sequence) else [tokens])
    ]
    repeats, seed = whole_number("repeats", repeats, 1, MOST), whole_number("seed", seed, *SEEDS)
    if not lengths:
        raise InputError("tokens must be one length or several, got none")
    if unknown := set(modes) - set(MODES):
        raise InputError(f"modes must be among {', '.join(MODES)}, got {', '.join(sorted(unknown))}")
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = {"rows": rows, "heads": heads, "kv_heads": kv_heads, "width": head_width}
    shape = _Shape(**{name: whole_number(name, size, 1, MOST) for name, size in sizes.items()}, dtype=dtype)
    if shape.heads % shape.kv_heads:
        raise InputError(f"heads must be a multiple of the {shape.kv_heads} kv_heads, got {shape.heads}")
    numbers = 4 * shape.rows * shape.heads * max(lengths) * shape.width
    if numbers > MOST_NUMBERS:
        raise InputError(
            f"rows × heads × tokens × head_width must give at most {MOST_NUMBERS // 4:,} numbers a tensor, "
            f"got {numbers // 4:,}; lower one of them"
        )
    built = [as_policy(policy) for policy in policies]
    timings: list[Timing] = []
    for length in lengths:
        for mode in modes:
            torch.manual_seed(seed)
            full, rate = _full_attention(shape, length, mode, repeats)
            for policy in built:
                if progress is not None:
                    progress(f"{policy.name} {mode} {length:,}")
                measured = _repeat(_task(policy, shape, length, mode), repeats)
                most = _peak_bytes(policy, shape, length) if peak and mode == "train" else None
                timings.append(
                    Timing(
                        policy=policy.name or "unnamed",
                        mode=mode,
                        tokens=length,
                        seconds=statistics.median(measured),
                        low=min(measured),
                        high=max(measured),
                        full_seconds=full,
                        limit_seconds=_limit(policy, shape, length, mode, rate),
                        peak_bytes=most,
                    )
                )
    settings = {
        "heads": heads,
        "kv_heads": shape.kv_heads,
        "head_width": head_width,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "seed": seed,
        **machine_facts(torch.device("cpu")),
    }
    return Bench(settings, timings)


@dataclass(frozen=True)
class _Rates:
    """Operations per second of one fused attention call, and of one matrix product as routing takes it."""

    attention: float
    product: float


def _inputs(shape: _Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    queries = torch.randn(shape.rows, shape.heads, tokens, shape.width, dtype=shape.dtype)
    keys, values = (torch.randn(shape.rows, shape.kv_heads, tokens, shape.width, dtype=shape.dtype) for _ in range(2))
    return queries, keys, values


def _full_attention(shape: _Shape, tokens: int, mode: Mode, repeats: int) -> tuple[float, _Rates]:
    """Median seconds of PyTorch's fused causal attention, and the rates of this machine on these shapes."""
    queries, keys, values = _inputs(shape, tokens)
    options: dict[str, Any] = {"enable_gqa": shape.heads != shape.kv_heads}
    operations = 4.0 * shape.rows * shape.heads * shape.width * tokens
    if mode == "decode":
        last = queries[:, :, -1:]
        with torch.no_grad():
            seconds = _repeat(lambda: scaled_dot_product_attention(last, keys, values, **options), 8 * repeats)
    elif mode == "forward":
        operations *= (tokens + 1) / 2
        with torch.no_grad():
            seconds = _repeat(
                lambda: scaled_dot_product_attention(queries, keys, values, is_causal=True, **options), repeats
            )
    else:
        operations *= (tokens + 1) / 2 * 3.5  # backward takes five products where forward takes two
        leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
        cotangent = torch.randn(queries.shape, dtype=shape.dtype)

        def step() -> None:
            scaled_dot_product_attention(queries, keys, values, is_causal=True, **options).backward(cotangent)
            for leaf in leaves:
                leaf.grad = None

        seconds = _repeat(step, repeats)
    median = statistics.median(seconds)
    chunk = torch.randn(shape.rows, shape.kv_heads, 256, shape.width)
    slots = torch.randn(shape.rows, shape.kv_heads, shape.width, 1024)
    product = statistics.median(_repeat(lambda: chunk @ slots, 5 * repeats))
    return median, _Rates(operations / median, 2.0 * chunk.numel() * 1024 / product)


def _limit(policy: Policy, shape: _Shape, tokens: int, mode: Mode, rates: _Rates) -> float:
    """Seconds of the attention and routing arithmetic alone."""
    spent = cost(policy, tokens, heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.width, rows=shape.rows)
    flops = spent.decode if mode == "decode" else spent.prefill
    return flops.attention * (3.5 if mode == "train" else 1) / rates.attention + flops.routing / rates.product


def _task(policy: Policy, shape: _Shape, tokens: int, mode: Mode) -> Callable[[], float | None]:
    """What is timed; a task that returns a number says itself how many seconds count."""
    queries, keys, values = _inputs(shape, tokens)
    given = _extras(policy, shape, tokens)
    if mode == "forward":

        def forward() -> None:
            with torch.no_grad():
                attend(policy, queries, keys, values, **given)

        return forward
    if mode == "train":
        leaves = [tensor.requires_grad_() for tensor in (queries, keys, values)]
        cotangent = torch.randn_like(queries)
        learned: list[Tensor] = [] if given["parameters"] is None else list(given["parameters"].parameters())
        if given["weights"] is not None:
            learned.append(given["weights"].requires_grad_())

        def step() -> None:
            attend(policy, *leaves, **given)[0].backward(cotangent)
            for leaf in [*leaves, *learned]:
                leaf.grad = None

        return step
    steps = 2 * max(policy.chunk, 32)
    weights = given.pop("weights")
    with torch.no_grad():
        _, memory = attend(policy, queries, keys, values, weights=weights, **given)
    streams = [[None] * tokens if each is None else each.split(1, 2) for each in (queries, keys, values, weights)]
    ones = list(zip(*streams, strict=True))

    def decode() -> float:
        mine = memory.fork()
        with torch.no_grad():
            begin = time.perf_counter()
            for index in range(steps):
                query, key, value, weight = ones[index % tokens]
                _, mine = attend(policy, query, key, value, weights=weight, memory=mine, **given)
            return (time.perf_counter() - begin) / steps

    return decode


def _extras(policy: Policy, shape: _Shape, tokens: int) -> dict[str, Any]:
    """What the policy needs besides queries, keys and values."""
    learned = Need.MERGE_WEIGHTS in policy.needs
    rotation = None
    if Need.ROTATION in policy.needs:
        rotation = Rotation("half-split", shape.width, 1 / torch.logspace(0, 4, shape.width // 2, dtype=torch.float64))
    return {
        "weights": torch.rand(shape.rows, shape.kv_heads, tokens) + 0.5 if learned else None,
        "parameters": PolicyParameters(policy, shape.heads, shape.width).to(shape.dtype) if policy.learned else None,
        "rotation": rotation,
    }


def _repeat(task: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that does not count."""
    task()
    seconds: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        told = task()
        seconds.append(told if isinstance(told, float) else time.perf_counter() - begin)
    return seconds


def _peak_bytes(policy: Policy, shape: _Shape, tokens: int) -> int:
    """Most resident memory of a fresh process that trains once, the process itself (PyTorch loaded) included."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, policy.spec, shape, tokens, torch.get_num_threads()))
    process.start()
    peak = receiver.recv()
    process.join()
    return int(peak)


def _report_peak(sender: Any, spec: PolicySpec, shape: _Shape, tokens: int, threads: int) -> None:
    torch.set_num_threads(threads)
    _task(spec.build(), shape, tokens, "train")()
    scale = 1 if platform.system() == "Darwin" else 1024
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)
