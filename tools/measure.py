"""Two measurements that `memkit bench` does not make; docs/benchmarks.md has their results.

    python tools/measure.py stream [POLICY …] [--tokens 1000000] [--json FILE] [--figure FILE]
    python tools/measure.py batches [POLICY …] [--tokens 4096]

stream: one layer reads many tokens, a chunk per call, and carries its memory on. How long a chunk takes, what the
process holds, and what the memory holds, against what `memkit cost` says.
batches: unequal rows against equal ones of as many tokens in all, and grouped queries against ungrouped ones.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memkit

HEADS, HEAD_WIDTH = 6, 64


@dataclass
class Reading:
    """One stretch of a stream: tokens so far; median seconds of a chunk in it; bytes of the process and the memory."""

    tokens: int
    seconds_per_chunk: float
    resident_bytes: int
    memory_bytes: int
    cost_bytes: int
    slots: int


def resident_bytes() -> int:
    """Resident memory of this process (Linux), once the allocator has given back what it keeps for later."""
    with contextlib.suppress(OSError, AttributeError):  # the C library of GNU
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def stream(name: str, tokens: int, stretches: int) -> list[Reading]:
    """Read `tokens` tokens a chunk at a time."""
    torch.manual_seed(0)
    policy = memkit.load_policy(name).build()
    width, size = HEADS * HEAD_WIDTH, policy.chunk
    layer = memkit.MemoryAttention(policy, width=width, heads=HEADS)
    calls = tokens // size
    every, memory, spent = max(1, calls // stretches), None, []
    readings: list[Reading] = []
    with torch.no_grad():
        for call in range(1, calls + 1):
            x = torch.randn(1, size, width)
            begin = time.perf_counter()
            _, memory = layer(x, memory)
            spent.append(time.perf_counter() - begin)
            if call % every == 0 or call == calls:
                readings.append(
                    Reading(
                        tokens=call * size,
                        seconds_per_chunk=statistics.median(spent),
                        resident_bytes=resident_bytes(),
                        memory_bytes=memory.bytes,
                        cost_bytes=0,
                        slots=int(memory.slots[0]),
                    )
                )
                spent = []
    for reading in readings:  # afterwards, for what that takes is not the stream's
        reading.cost_bytes = memkit.cost(policy, reading.tokens, heads=HEADS, head_width=HEAD_WIDTH).bytes
    return readings


def draw(streams: dict[str, list[Reading]], path: Path) -> None:
    """Time per chunk and memory over the tokens read."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, readings in streams.items():
        tokens = [reading.tokens for reading in readings]
        (line,) = left.plot(tokens, [reading.seconds_per_chunk * 1e3 for reading in readings], label=name)
        colour = line.get_color()
        right.plot(tokens, [reading.memory_bytes / 1e6 for reading in readings], color=colour, label=name)
        right.plot(tokens, [reading.cost_bytes / 1e6 for reading in readings], color=colour, linestyle=":")
    left.set(xlabel="tokens read", ylabel="ms per chunk of 256", ylim=(0, None), title="Time")
    right.set(xlabel="tokens read", ylabel="MB", title="The layer's memory (dotted: memkit cost)", ylim=(0, None))
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


def run_stream(given: argparse.Namespace) -> None:
    """The `stream` command."""
    streams: dict[str, list[Reading]] = {}
    for name in given.policies or ["kvm-fixed-256", "kvm-log-256", "kvm-sqrt-16"]:
        readings = streams[name] = stream(name, given.tokens, given.stretches)
        tenth = readings[len(readings) // 10]
        last = readings[-1]
        settled = [reading.resident_bytes for reading in readings[len(readings) // 10 :]]
        print(
            f"{name}: {last.tokens:,} tokens, {last.slots:,} slots; a chunk takes {tenth.seconds_per_chunk * 1e3:.1f} "
            f"ms after a tenth, {last.seconds_per_chunk * 1e3:.1f} ms at the end; memory {last.memory_bytes / 1e6:.2f} "
            f"MB, by memkit cost {last.cost_bytes / 1e6:.2f} MB; process {min(settled) / 1e6:.0f} to "
            f"{max(settled) / 1e6:.0f} MB after the first tenth ({max(settled) / min(settled) - 1:.2%})",
            flush=True,
        )
    if given.json:
        rows = {name: [asdict(reading) for reading in readings] for name, readings in streams.items()}
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if given.figure:
        draw(streams, given.figure)


def ratio(one: Callable[[], None], other: Callable[[], None], repeats: int = 7) -> tuple[float, float, float]:
    """Median, least and most of seconds of `one` over seconds of `other`, measured in turn."""
    found: list[float] = []
    for number in range(repeats + 1):
        times: list[float] = []
        for task in (one, other):
            begin = time.perf_counter()
            task()
            times.append(time.perf_counter() - begin)
        if number:  # the first does not count
            found.append(times[0] / times[1])
    return statistics.median(found), min(found), max(found)


def task(policy: memkit.Policy, lengths: Tensor, tokens: int, heads: int, kv_heads: int, train: bool):
    """A call on rows of these lengths, forward or forward and backward."""
    rows = len(lengths)
    queries = torch.randn(rows, heads, tokens, HEAD_WIDTH, requires_grad=train)
    keys, values = (torch.randn(rows, kv_heads, tokens, HEAD_WIDTH, requires_grad=train) for _ in range(2))
    more: dict[str, Any] = {"lengths": lengths}
    if policy.learned:
        more["parameters"] = memkit.PolicyParameters(policy, heads, HEAD_WIDTH)
    cotangent = torch.randn_like(queries)

    def run() -> None:
        if not train:
            with torch.no_grad():
                memkit.attend(policy, queries, keys, values, **more)
            return
        memkit.attend(policy, queries, keys, values, **more)[0].backward(cotangent)
        for leaf in (queries, keys, values):
            leaf.grad = None

    return run


def run_batches(given: argparse.Namespace) -> None:
    """The `batches` command."""
    tokens = given.tokens
    unequal = torch.linspace(0.8 * tokens, tokens, 8).round().long()
    mean = int(unequal.double().mean())
    for name in given.policies or ["kvm-fixed-256", "kvm-sqrt-16"]:
        policy = memkit.load_policy(name).build()
        for train in (False, True):
            mode = "forward and backward" if train else "forward"
            torch.manual_seed(0)
            ragged = task(policy, unequal, tokens, HEADS, HEADS, train)
            equal = task(policy, torch.full((8,), mean), mean, HEADS, HEADS, train)
            median, low, high = ratio(ragged, equal)
            print(f"{name}, {mode}: rows of {unequal[0]} … {tokens} tokens take {median:.2f} ({low:.2f}–{high:.2f}) "
                  f"times as long as 8 rows of {mean}", flush=True)  # fmt: skip
            del ragged, equal
            row = torch.tensor([4 * tokens])
            grouped = task(policy, row, 4 * tokens, 8, 2, train)
            alone = task(policy, row, 4 * tokens, 8, 8, train)
            median, low, high = ratio(grouped, alone)
            print(f"{name}, {mode}: 8 query heads on 2 key/value heads take {median:.2f} ({low:.2f}–{high:.2f}) "
                  f"times as long as on 8, {4 * tokens} tokens", flush=True)  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    streaming = commands.add_parser("stream")
    streaming.add_argument("policies", nargs="*")
    streaming.add_argument("--tokens", type=int, default=1_000_000)
    streaming.add_argument("--stretches", type=int, default=100)
    streaming.add_argument("--json", type=Path)
    streaming.add_argument("--figure", type=Path)
    streaming.set_defaults(run=run_stream)
    batches = commands.add_parser("batches")
    batches.add_argument("policies", nargs="*")
    batches.add_argument("--tokens", type=int, default=4096)
    batches.set_defaults(run=run_batches)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
