"""What compares a policy with others: the share of the gap that it closes, and whether it is on the front."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from memkit.comparison.record import Measurement
from memkit.layers import LayerPoliciesSpec, as_layers

__all__ = ["BASELINE", "STREAMING", "Measured", "against_others"]

BASELINE, STREAMING = "full", "streaming-4-512"


@dataclass(frozen=True)
class Measured:
    """One policy's measurement, and its loss at each scored position of both texts, float64 [n − skip]."""

    layers: LayerPoliciesSpec
    entry: Measurement
    losses: Tensor
    second_losses: Tensor | None


def against_others(
    measured: list[Measured], streaming_spec: LayerPoliciesSpec | None = None
) -> tuple[Measurement, ...]:
    """Fill in what compares a policy with the others."""
    full = _find(measured, as_layers(BASELINE))
    streaming = _find(measured, streaming_spec or as_layers(STREAMING))
    entries = [each.entry for each in measured]
    done: list[Measurement] = []
    for each in measured:
        beaten = any(_dominates(other, each.entry) for other in entries)
        entry = replace(each.entry, front=math.isfinite(each.entry.loss) and not beaten)
        if full is not None:
            gap = each.losses - full.losses
            entry = replace(
                entry,
                difference=float(gap.mean()),
                difference_error=float(gap.std(correction=0) / len(gap) ** 0.5),
                held_share=(entry.slots + entry.window) / (full.entry.slots + full.entry.window),
                bytes_share=entry.bytes / full.entry.bytes,
            )
        if full is not None and streaming is not None:
            closed, error = _closed(each.losses, full.losses, streaming.losses)
            entry = replace(entry, gap_closed=closed, gap_error=error)
            if each.second_losses is not None and full.second_losses is not None:
                assert streaming.second_losses is not None
                closed, error = _closed(each.second_losses, full.second_losses, streaming.second_losses)
                entry = replace(entry, second_gap_closed=closed, second_gap_error=error)
        done.append(entry)
    return tuple(done)


def _closed(losses: Tensor, full: Tensor, streaming: Tensor) -> tuple[float | None, float | None]:
    """The share of the gap from streaming to full attention that is closed, and its standard error.

    Both None where there is no gap, or a loss is no finite number.
    """
    gap, saved = float((streaming - full).mean()), streaming - losses
    if not (gap > 0 and math.isfinite(gap) and bool(saved.isfinite().all())):
        return None, None
    return float(saved.mean()) / gap, float(saved.std(correction=0)) / len(saved) ** 0.5 / gap


def _find(measured: list[Measured], layers: LayerPoliciesSpec) -> Measured | None:
    """What was measured under these policies."""
    return next((each for each in measured if each.layers == layers), None)


def _dominates(one: Measurement, other: Measurement) -> bool:
    no_worse = one.bytes <= other.bytes and one.loss <= other.loss
    return no_worse and (one.bytes < other.bytes or one.loss < other.loss)
