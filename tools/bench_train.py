"""Training steps of one small model under several policies, as factors of a plain PyTorch transformer's, in one run.

    python tools/bench_train.py --tokens 256 --batch 32 --chunk 16 32 --threads 1

Every model has two layers of width 64 over the same random tokens. Steps of all models take turns, so that what else
the machine does meets all alike; the median counts. The plain transformer is an embedding, two
nn.TransformerEncoderLayers (pre-norm, causal fused attention, an MLP of four widths) and a head. Freed memory is kept,
and the optimiser is fused, as under `memkit train`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memkit.catalog import load_policy
from memkit.lm import MemoryLM, ModelSpec, load_model_spec, with_policy
from memkit.training.settings import TrainingSpec
from memkit_command import keep_freed_memory

WIDTH, DEPTH, HEADS, VOCABULARY = 64, 2, 2, 256


class Plain(nn.Module):
    """What PyTorch has for this."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of every next token."""
        x = self.embedding(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def models(chunk: int) -> dict[str, nn.Module]:
    """A model per policy."""
    sizes = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "rotary.width": 16}
    base: ModelSpec = load_model_spec("tiny-full", sizes)
    changed = {"chunker.size": chunk}
    policies = {
        "full": load_policy("full"),
        "block window": load_policy("block-window-3x256", {**changed, "window.chunks": 2}),
        "kvm-fixed, 32 slots": load_policy("kvm-fixed-256", {**changed, "growth.slots": 32}),
        "kvm-sqrt, 2·√t": load_policy("kvm-sqrt-16", {**changed, "growth.factor": 2.0, "growth.floor": 16}),
    }
    return {"plain PyTorch": Plain(), **{name: MemoryLM(with_policy(base, each)) for name, each in policies.items()}}


def measure(tokens: int, batch: int, chunk: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of each model's steps, by turns."""
    settings = TrainingSpec()
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (batch, tokens))
    step_of: dict[str, Callable[[], None]] = {}
    for name, model in models(chunk).items():
        optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=settings.betas, fused=True)

        def step(model: nn.Module = model, optimiser: torch.optim.Optimizer = optimiser) -> None:
            model.loss(ids).backward()  # type: ignore[operator]
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
            optimiser.zero_grad()

        step_of[name] = step
    times: dict[str, list[float]] = {name: [] for name in step_of}
    for turn in range(steps + 2):
        for name, step in step_of.items():
            begun = time.process_time()
            step()
            if turn >= 2:  # the first ones allocate
                times[name].append(time.process_time() - begun)
    return times


def main() -> None:
    """Print a line per model and length of a chunk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="such small operations gain little from a second one")
    given = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    for chunk in given.chunk:
        times = measure(given.tokens, given.batch, chunk, given.steps)
        plain = statistics.median(times["plain PyTorch"])
        print(
            f"{given.batch} × {given.tokens} tokens, chunks of {chunk}, {torch.get_num_threads()} thread(s), CPU time"
        )
        for name, each in times.items():
            low, middle, high = (quartile / plain for quartile in statistics.quantiles(each, n=4))
            print(f"{name:20} {1000 * statistics.median(each):7.1f} ms  ×{middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
