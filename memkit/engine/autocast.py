"""Autocast is for projections: routing and sums take at least float32, and attention its inputs' own dtype."""

from __future__ import annotations

import torch

__all__ = ["autocasts", "without_autocast"]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device's operations."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which it is off. Only for devices where `autocasts` says that it is on."""
    return torch.autocast(device.type, enabled=False)
