"""One layer whose heads have unequal numbers of slots, read in one pass or run by run, over full attention's time.

    python tools/uneven_heads.py 0.8 1.2 1.0 --threads 1

Turns are taken in one process: full attention, one pass, a pass for each run of alike heads; medians of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ratios", type=float, nargs="+", help="of each key/value head's slots, over the even share")
    parser.add_argument("--policy", default="untrained-observed")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--group", type=int, default=3, help="query heads of a key/value head")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    import torch

    import memkit
    from memkit.engine import heads_as_rows

    torch.set_num_threads(given.threads)
    policy = memkit.load_policy(given.policy, {"heads": {"ratios": tuple(given.ratios)}}).build()
    heads, width = len(given.ratios), given.width
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(1, count, given.tokens, width, generator=generator) for count in (heads * given.group, heads, heads)
    )
    frequencies = 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    rotation = memkit.Rotation("half-split", width, frequencies) if policy.needs_rotation else None

    def full() -> None:
        torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)

    def read(as_rows: bool) -> Callable[[], None]:
        def call() -> None:
            heads_as_rows.ENABLED = as_rows
            memkit.attend(policy, queries, keys, values, rotation=rotation)

        return call

    ways = {"full attention": full, "one pass": read(True), "run by run": read(False)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for turn in range(given.turns + 1):
            for name, call in ways.items():
                start = time.perf_counter()
                call()
                if turn:  # the first allocates
                    times[name].append(time.perf_counter() - start)
    base = statistics.median(times["full attention"])
    for name, each in times.items():
        low, middle, high = min(each) / base, statistics.median(each) / base, max(each) / base
        print(f"{name:15} {middle:5.2f} × full attention ({low:.2f} to {high:.2f}), {statistics.median(each):.3f} s")


if __name__ == "__main__":
    main()
