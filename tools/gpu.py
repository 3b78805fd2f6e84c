"""All that a GPU is needed for, in one command; it runs to its end on a CPU too, with small sizes.

    python tools/gpu.py [--device cuda|cpu] [--out build/gpu] [--policies …] [--tokens …] [--rows …] [--seconds 420]

Writes OUT/gpu.json and OUT/gpu.md, after every part anew, so that a run cut short leaves what it had:

- tests: `tests/engine/test_devices.py`.
- agreement: every shipped policy's outputs and gradients against the CPU's, in float32 and bfloat16; with the CPU's
  plan where a policy's plan can be given, else in float64, in which no two scores lie within rounding.
- waiting: whether the host waits for the device anywhere in a prefill or a training step.
- determinism: outputs of two runs, bit for bit; and gradients, under `torch.use_deterministic_algorithms(True)`.
- ceilings: device memory's bandwidth, a large matrix product, each of PyTorch's attention kernels.
- kernels: memkit's own (`memkit/engine/kernels.py`) against PyTorch on the same device; interpreted on a CPU.
- table: prefill, forward and backward, and decoding, against the fastest of these kernels; serial time per chunk; where
  memkit has kernels of its own for a policy, with them and without.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS is not deterministic
if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton asks when it is imported

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import memkit
from memkit.engine import fused, together
from memkit.memory.rows import SlotRules
from memkit.pieces import Need

DEVICE_TESTS = Path(__file__).parents[1] / "tests" / "engine" / "test_devices.py"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TIMED = ("full", "block-window-3x256", "kvm-fixed-256", "kvm-sqrt-16", "block-mean-8", "untrained-observed")
SIZES = {  # of the table: tokens, rows, heads, width of a head
    "cuda": ((4096, 16384, 65536, 131072), (1, 8), 32, 128),
    "cpu": ((512, 1024), (1,), 4, 32),
}
MOST_NUMBERS = 2**32
"""Of queries, keys, values and outputs together, with gradients twice that: 16 GiB in bfloat16."""


@dataclass
class Report:
    """What was found. Every entry of a list is a dictionary of plain numbers and words."""

    settings: dict[str, Any]
    tests: str = "not run"
    agreement: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    table: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """OUT/gpu.json and OUT/gpu.md."""
        (folder / "gpu.json").write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        (folder / "gpu.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """The report as tables."""
        lines = [", ".join(f"{name} {value}" for name, value in self.settings.items()), "", f"Tests: {self.tests}", ""]
        for rows in (self.agreement, self.kernels, [self.ceilings] if self.ceilings else [], self.table):
            if rows:
                names = list(dict.fromkeys(name for row in rows for name in row))
                lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
                lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
                lines.append("")
        lines += [f"Left out: {each}" for each in self.left_out]
        return "\n".join([*lines, *(f"FAILED: {failure}" for failure in self.failures), ""])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


class Clock:
    """Times work on a device: what is queued there is finished before either hand is read."""

    def __init__(self, device: str) -> None:
        self.device = device

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, task: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """The median of some repeats, after some that do not count; of one where it takes more than two seconds."""
        spent: list[float] = []
        while len(spent) < warm + repeats:
            self.wait()
            begin = time.perf_counter()
            task()
            self.wait()
            spent.append(1000 * (time.perf_counter() - begin))
            if spent[-1] > 2000 and len(spent) > warm:
                break
        return statistics.median(spent[warm:])


def given(policy: memkit.Policy, heads: int, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What the policy needs besides queries, keys and values [b, g, t, d] = shape."""
    width = shape[-1]
    learned = Need.MERGE_WEIGHTS in policy.needs
    rotation = None
    if Need.ROTATION in policy.needs:
        rotation = memkit.Rotation("half-split", width, 1 / torch.logspace(0, 4, width // 2, device=device))
    parameters = memkit.PolicyParameters(policy, heads, width).to(device, dtype) if policy.learned else None
    return {
        "weights": torch.rand(shape[:3], device=device) + 0.5 if learned else None,
        "parameters": parameters,
        "rotation": rotation,
    }


def moved(each: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A copy of a tensor, a module or a rotation on a device; anything else as it is."""
    if isinstance(each, Tensor):
        return each.detach().to(device, dtype if each.is_floating_point() else None)
    if isinstance(each, memkit.PolicyParameters):
        return copy.deepcopy(each).to(device, dtype)
    if isinstance(each, memkit.Rotation):
        return dataclasses.replace(each, frequencies=each.frequencies.to(device))
    return each


def step(
    policy: memkit.Policy, tensors: list[Tensor], more: dict[str, Any], cotangent: Tensor, plan: Any = None
) -> list[Tensor]:
    """Outputs and gradients of a training step."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output, _ = memkit.attend(policy, *leaves, plan=plan, **more)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def small(name: str) -> memkit.Policy:
    """A shipped policy with chunks short enough that a short text has several."""
    sliding = memkit.load_policy(name).window.kind == "sliding"
    changes = {"window.size": 40} if sliding else {"chunker.size": 16}
    return memkit.load_policy(name, changes).build()


def agreement(name: str, device: str, report: Report) -> None:
    """One shipped policy: does the device say what the CPU says, twice the same, and is it never waited for?"""
    policy = small(name)
    heads, shape = 4, (2, 2, 150, 16)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        exact = torch.float64 if dtype == torch.float32 and not policy.plans_ahead else dtype
        if dtype != torch.float32 and not policy.plans_ahead:
            continue  # rounding decides between rows there, and a plan cannot be given
        tensors = [torch.randn(2, heads, *shape[2:]).to(exact), *(torch.randn(shape).to(exact) for _ in range(2))]
        cotangent = torch.randn(2, heads, *shape[2:]).to(exact)
        more = given(policy, heads, shape, "cpu", exact)
        plan = memkit.plan(policy, tensors[1], **more) if policy.plans_ahead and policy.chunk else None
        wanted = step(policy, tensors, more, cotangent, plan)
        there = [moved(tensor, device) for tensor in (*tensors, cotangent)]
        extras = {key: moved(each, device, exact if key == "parameters" else None) for key, each in more.items()}
        once = step(policy, there[:3], extras, there[3], plan)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                again = step(policy, there[:3], extras, there[3], plan)
                with torch.no_grad():
                    memkit.attend(policy, *there[:3], plan=plan, **extras)
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        waits = sorted(
            {f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)}
        )
        # PyTorch's own kernels take a gradient's parts as they come, unless told otherwise.
        torch.use_deterministic_algorithms(True)
        try:
            runs = [step(policy, there[:3], extras, there[3], plan) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        errors = [
            float((mine.cpu().double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1))
            for mine, other in zip(once, wanted, strict=True)
        ]
        same = torch.equal(once[0], again[0]) and all(map(torch.equal, *runs))
        allowed = {torch.float64: 2**-36, torch.float32: 2**-13, torch.bfloat16: 2**-4}[exact]
        report.agreement.append(
            {
                "policy": name,
                "dtype": str(exact).removeprefix("torch."),
                "outputs": errors[0],
                "gradients": max(errors[1:]),
                "two runs": "same" if same else "differ",
                "gradients unasked": "same" if all(map(torch.equal, once, again)) else "differ",
                "waits": " ".join(waits) or "no",
            }
        )
        if max(errors) > allowed or not max(errors) >= 0:
            report.failures.append(f"{name} in {exact}: off by {max(errors):.2g}, {allowed:.2g} allowed")
        if not same:
            report.failures.append(f"{name} in {exact}: two runs differ")
        if waits:
            report.failures.append(f"{name} in {exact}: the host waits at {', '.join(waits)}")


@contextmanager
def own_kernels(device: str, used: bool) -> Generator[None]:
    """Chunks are folded together on the device, by memkit's own kernels or without."""
    before = fused.FUSED_ON, together.FOLDED_TOGETHER
    fused.FUSED_ON = {device} if used else set()
    together.FOLDED_TOGETHER = together.FOLDED_TOGETHER | {device}
    try:
        yield
    finally:
        fused.FUSED_ON, together.FOLDED_TOGETHER = before


def has_kernels(policy: memkit.Policy, device: str) -> bool:
    """Whether memkit has kernels of its own for a policy."""
    with own_kernels(device, True):
        rules = SlotRules(policy, 16, torch.float32, None, None, True)
        return fused.fuses(rules, torch.zeros(1, 1, 1, 32, device=device))


def kernels_agree(name: str, device: str, report: Report) -> None:
    """One shipped policy: do memkit's kernels say what PyTorch says on the same device, and twice the same?"""
    policy = small(name)
    if not has_kernels(policy, device):
        return
    shapes = ((1, 2, 1, 80, 16),) if device == "cpu" else ((2, 4, 2, 150, 16), (2, 8, 4, 3000, 128))
    for rows, heads, kv_heads, tokens, width in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            shape = (rows, kv_heads, tokens, width)
            tensors = [torch.randn(rows, heads, tokens, width), *(torch.randn(shape) for _ in range(2))]
            tensors, more = [moved(each, device, dtype) for each in tensors], given(policy, heads, shape, device, dtype)
            cotangent = torch.randn(rows, heads, tokens, width).to(device, dtype)
            runs: list[list[Tensor]] = []
            for used in (False, True, True):
                with own_kernels(device, used):
                    runs.append(step(policy, tensors, more, cotangent))
            errors = [
                float((mine.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1))
                for mine, other in zip(runs[1], runs[0], strict=True)
            ]
            same = all(map(torch.equal, runs[1], runs[2]))
            allowed = {torch.float32: 2**-13, torch.bfloat16: 2**-4}[dtype]
            report.kernels.append(
                {
                    "policy": name,
                    "tokens": tokens,
                    "width": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "outputs": errors[0],
                    "gradients": max(errors[1:]),
                    "two runs": "same" if same else "differ",
                }
            )
            if max(errors) > allowed or not max(errors) >= 0:
                report.failures.append(
                    f"{name}, own kernels in {dtype}: off by {max(errors):.2g}, {allowed:.2g} allowed"
                )
            if not same:
                report.failures.append(f"{name}, own kernels in {dtype}: two runs differ")


def ceilings(device: str, clock: Clock) -> dict[str, float]:
    """GB/s of a copy (bytes read and written), TFLOP/s of a matrix product in bfloat16."""
    numbers, size = (2**30, 8192) if device == "cuda" else (2**22, 512)
    source = torch.randn(numbers, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = clock.milliseconds(lambda: target.copy_(source), repeats=10)
    one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = clock.milliseconds(lambda: one @ other, repeats=10)
    return {"copy GB/s": 4 * numbers / copied / 1e6, "product TFLOP/s": 2 * size**3 / product / 1e9}


def fastest(device: str, mode: str, clock: Clock, tensors: list[Tensor]) -> tuple[str, float]:
    """PyTorch's fastest attention kernel for these tensors, and its milliseconds."""
    queries, keys, values = tensors
    cotangent = torch.randn_like(queries)

    def run() -> None:
        if mode == "decode":
            with torch.no_grad():
                scaled_dot_product_attention(queries[:, :, -1:], keys, values)
        elif mode == "prefill":
            with torch.no_grad():
                scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            scaled_dot_product_attention(*leaves, is_causal=True).backward(cotangent)

    if device == "cpu":
        return "cpu", clock.milliseconds(run)
    found: dict[str, float] = {}
    for name, kernel in KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                found[name] = clock.milliseconds(run, repeats=20 if mode == "decode" else 3)
        except RuntimeError:  # a kernel that does not take these shapes, or not enough memory for it
            torch.cuda.empty_cache()
    best = min(found, key=lambda name: found[name])
    return best, found[best]


def timed(policy: memkit.Policy, mode: str, clock: Clock, tensors: list[Tensor]) -> tuple[float, float | None]:
    """Milliseconds of the policy; of one decoded token; and the most bytes that were allocated, where this is known."""
    queries, keys, values = tensors
    device = queries.device.type
    more = given(policy, queries.shape[1], tuple(keys.shape), device, queries.dtype)
    repeats = 3
    if mode == "prefill":

        def task() -> None:
            with torch.no_grad():
                memkit.attend(policy, queries, keys, values, **more)
    elif mode == "train":
        cotangent = torch.randn_like(queries)

        def task() -> None:
            step(policy, tensors, more, cotangent)
    else:
        weights = more.pop("weights")
        with torch.no_grad():
            _, memory = memkit.attend(policy, queries, keys, values, weights=weights, **more)
        count = 2 * max(policy.chunk, 16)

        def task() -> None:
            mine = memory.fork()
            with torch.no_grad():
                for index in range(count):
                    one = [tensor[:, :, index : index + 1] for tensor in tensors]
                    weight = None if weights is None else weights[:, :, index : index + 1]
                    _, mine = memkit.attend(policy, *one, weights=weight, memory=mine, **more)

        return clock.milliseconds(task, repeats=1) / count, None
    if device != "cuda":
        return clock.milliseconds(task, repeats), None
    task()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spent = clock.milliseconds(task, repeats, warm=0)
    return spent, float(torch.cuda.max_memory_allocated() - before)


def table(arguments: argparse.Namespace, clock: Clock, report: Report, until: float) -> None:
    """Fills `report.table`, shorter texts first, until time is up; `report.left_out` says what is not in it."""
    sizes = SIZES[arguments.device]
    for tokens in arguments.tokens or sizes[0]:
        for rows in arguments.rows or sizes[1]:
            heads, width = sizes[2], sizes[3]
            for mode in ("prefill", "train", "decode"):
                if 4 * rows * heads * tokens * width > MOST_NUMBERS // (2 if mode == "train" else 1):
                    report.left_out.append(f"{mode} of {rows} × {tokens:,} tokens: more than {MOST_NUMBERS:,} numbers")
                    continue
                if time.monotonic() > until:
                    report.failures.append(f"time is up before {mode} of {rows} × {tokens:,} tokens")
                    return
                torch.manual_seed(0)
                tensors = [
                    torch.randn(rows, heads, tokens, width, device=arguments.device, dtype=torch.bfloat16)
                    for _ in range(3)
                ]
                kernel, best = fastest(arguments.device, mode, clock, tensors)
                for name in arguments.policies:
                    policy = memkit.load_policy(name).build()
                    if mode == "train" and not policy.plans_ahead:
                        report.left_out.append(
                            f"{mode} of {rows} × {tokens:,} tokens under {name}: for models as they are"
                        )
                        continue
                    chunks = tokens // policy.chunk if policy.chunk else 0
                    both = mode != "decode" and arguments.device == "cuda" and has_kernels(policy, "cuda")
                    for used in (False, True) if both else (None,):
                        with nullcontext() if used is None else own_kernels(arguments.device, used):
                            spent, peak = timed(policy, mode, clock, tensors)
                        report.table.append(
                            {
                                "mode": mode,
                                "tokens": tokens,
                                "rows": rows,
                                "policy": name,
                                "own kernels": None if used is None else str(used).lower(),
                                "ms": spent,
                                "full, ms": best,
                                "kernel": kernel,
                                "× full": best / spent,
                                "µs a chunk": 1000 * spent / chunks if chunks and mode != "decode" else None,
                                "peak MB": None if peak is None else peak / 1e6,
                            }
                        )
                        print({key: _cell(each) for key, each in report.table[-1].items()}, flush=True)
                del tensors
                report.write(arguments.out)


def main() -> int:
    """Run everything; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--policies", nargs="+", default=list(TIMED))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, default=420, help="no new row of the table is begun after as many")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; try it out with --device cpu")
    until = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    clock = Clock(arguments.device)
    report = Report(
        {
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "memkit": memkit.__version__,
        }
    )
    for name in memkit.policy_names():
        agreement(name, arguments.device, report)
        kernels_agree(name, arguments.device, report)
    report.write(arguments.out)
    print(report.markdown(), flush=True)
    report.ceilings = ceilings(arguments.device, clock)
    table(arguments, clock, report, until)
    if not arguments.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(DEVICE_TESTS)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        report.tests = found.stdout.strip().splitlines()[-1] if found.stdout.strip() else found.stderr[-500:]
        if found.returncode:
            report.failures.append("tests/engine/test_devices.py")
            (arguments.out / "tests.log").write_text(found.stdout + found.stderr, encoding="utf-8")
    report.write(arguments.out)
    print(report.markdown())
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
