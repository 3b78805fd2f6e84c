"""What figures were measured on: the machine, and the versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from memkit.version import __version__

__all__ = ["machine_facts", "now"]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Device, machine, cores, threads and versions, as records have them among their settings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": f"{_processor()}, {platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **_installed("torch", "transformers", "numba"),
            "memkit": __version__,
        },
    }


def _processor() -> str:
    """The processor's name, and which instructions PyTorch's kernels use of it: figures differ by them."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _installed(*packages: str) -> dict[str, str]:
    """The versions of those that are there."""
    found: dict[str, str] = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
