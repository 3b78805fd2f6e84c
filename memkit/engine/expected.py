"""Expected attention (arXiv 2510.00636): what share of their attention readers who are still to come will pay a row.

They are normally distributed, with mean μ and covariance Σ of queries of the text, all turned to the first place behind
it, and then by the mean of the rotations over the next F places, R: μ → Rμ, Σ → RΣRᵀ. With k_j the key of row j as
queries meet it, b_j its bias and s the scale of the scores,

    log E exp(s·q·k_j) = s·k_j·μ + s²·k_jᵀΣk_j / 2      share = softmax over j of this + b_j, a mean over query heads
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from memkit.pieces.admission import Expectation
from memkit.pieces.rotary import Rotation

__all__ = ["expected_shares", "mean_rotation"]


def expected_shares(
    expects: Expectation,
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    rotation: Rotation,
    *,
    bias: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Each row's share, [b, g, m], float32 or float64; 0 for the first `sinks` rows, which are no part of the softmax.

    Args:
        expects: over how many places readers are spread, and whether they differ from their mean.
        queries: [b, h, n, d], float32 or float64, turned to the first place behind the text.
        keys: [b, g, m, d], as queries meet them, of the same dtype.
        scale: of the scores; where heads have learned theirs, one for each of them and each row, [h, m].
        rotation: how queries and keys were rotated.
        bias: [b, g, m], added to the scores; None: 0.
        sinks: of the rows, how many in front are sinks.
    """
    sinks = min(sinks, keys.shape[2])
    keys, bias = keys[:, :, sinks:], None if bias is None else bias[:, :, sinks:]
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # [b, g, r, n, d]
    if isinstance(scale, Tensor):
        scale = scale[:, sinks:].unflatten(0, grouped.shape[1:3])
    smear, mean = mean_rotation(rotation, expects.future, queries), grouped.mean(3)
    scores = scale * ((mean @ smear) @ keys.mT)  # [b, g, r, m]
    if expects.covariance:
        centred = (grouped - mean.unsqueeze(3)) @ smear
        covariance = centred.mT @ centred / grouped.shape[3]
        met = keys.unsqueeze(2)
        scores = scores + scale**2 / 2 * ((met @ covariance) * met).sum(-1)
    if bias is not None:
        scores = scores + bias.unsqueeze(2)
    return pad(scores.softmax(-1).mean(2), (sinks, 0))


def mean_rotation(rotation: Rotation, places: int, like: Tensor) -> Tensor:
    """The mean of the rotations by 0 … places − 1 positions, for vectors as rows: [d, d]."""
    cos, sin = rotation.angles(torch.arange(places, device=like.device))
    unit = torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)
    return rotation.turn(unit, cos.mean(0), sin.mean(0))
