"""Evidence: what observed queries have told of rows.

When a chunk has been read, some of its queries, with what each saw then, tell what every row (sink, slot or window
token) was worth to them. With p_rj the softmax of query r over all rows that it sees, o_r its output, r over the
observed queries of all heads of a group:

    share_j = mean_r p_rj                       what the row receives
    error_j = mean_r p_rj² · ‖v_j − o_r‖²       the squared change of the output without it, to first order
                                                (exactly it is p/(1 − p)·(o − v): arXiv 2504.14051); queries that
                                                stand too near count 0 (`observe.apart`); an admission may say
                                                otherwise what was missed (`Admission.missed`)

A row's evidence is a decaying sum over the chunks that judged it: a ← γ·a + error, m ← γ·m + share, n ← γ·n + 1. It is
read as the means a/n and m/n, and stays with a token that becomes a slot. Where the most that a chunk said counts
(`observe.aggregate: max`), a is n times that: a ← n · max(γ·a/n before, error). Nothing comes from the future, and no
gradient flows through it.

Where the text is read again (`observe.again`), a fourth number of a row is the most that any second reading's queries
would have missed without it: error = a/n + the most. So what nobody goes on to ask for stays, if it could be asked for.
Shares and n stay those of the first reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memkit import loops

__all__ = ["AGAIN", "ERROR", "JUDGED", "SHARE", "Evidence", "Missed", "output_errors", "softmax_evidence"]

ERROR, SHARE, JUDGED, AGAIN = 0, 1, 2, 3
"""Where a row's evidence [..., e] holds a, m and n; and, of texts that are read again, the most that was told then."""

Missed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What readers would miss without each row, [b, g, n], from their shares, values and outputs: as `output_errors`."""


@dataclass(frozen=True)
class Evidence:
    """What readers have told of rows: error, share, each the mean over a row's life, [b, g, c]; 0 where nobody did. The
    error is that and the most that second readings told."""

    error: Tensor
    share: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> Evidence:
        """From sums a, m and n, [b, g, c, e]."""
        judged = sums[..., JUDGED].clamp(min=1)  # 0 where nobody has, at least 1 afterwards
        error = sums[..., ERROR] / judged
        return cls(error + sums[..., AGAIN] if sums.shape[-1] > AGAIN else error, sums[..., SHARE] / judged)


def output_errors(shares: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """error_j = mean_q p_qj² · ‖v_j − o_q‖², [b, g, n], of shares [b, g, q, n], values [b, g, n, v], outputs
    [b, g, q, v].

    As [⟨v_j, (Σ_q p²)·v_j − 2·Σ_q p²·o_q⟩ + Σ_q p²·‖o_q‖²] / Q: products, no [q, n, v] tensor.
    """
    return _errors(shares.square(), values, outputs)


def _errors(squares: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """`output_errors` from p²."""
    of_outputs = squares.mT @ outputs.mul(-2)
    of_sizes = outputs.square().sum(-1, keepdim=True).mT @ squares
    error = torch.addcmul(of_outputs, values, squares.sum(-2).unsqueeze(-1)).mul_(values).sum(-1) + of_sizes.squeeze(-2)
    return error.clamp_(min=0).div_(outputs.shape[-2])


def softmax_evidence(
    scores: Tensor,
    values: Tensor,
    observed: slice | Tensor = slice(None),
    near: Tensor | None = None,
    missed: Missed = output_errors,
) -> tuple[Tensor, Tensor]:
    """From scores [b, g, r, n] and values [b, g, n, v]: outputs o [b, g, r, v] of all queries; what the observed ones
    among them tell of each row, [b, g, n, 3]: its error, its share, and that somebody has judged it (1). The scores'
    memory is used.

    near [observed, w]: of whose errors among the last w rows an observed query tells nothing; None: it tells of all.
    missed: what an error is.
    """
    # Into memory that is warm, unless autograd is to follow it.
    warm = None if torch.is_grad_enabled() and scores.requires_grad else scores
    shares = torch.softmax(scores, -1, out=warm)
    outputs = shares @ values
    if missed is output_errors and loops.usable(shares, values):
        return outputs, _by_loops(shares, outputs, values, observed, near)
    shares, read = shares[..., observed, :], outputs[..., observed, :]
    share = shares.mean(-2)
    usual = missed is output_errors
    if usual:  # in the same memory, unless a graph needs it
        shares = torch.mul(shares, shares, out=None if warm is None else shares)
    elif near is not None and warm is None:
        shares = shares.clone()
    if near is not None:
        shares[..., -near.shape[1] :].masked_fill_(near, 0)
    error = _errors(shares, values, read) if usual else missed(shares, values, read)
    return outputs, torch.stack((error, share, torch.ones_like(share)), dim=-1)


def _by_loops(shares: Tensor, outputs: Tensor, values: Tensor, observed: slice | Tensor, near: Tensor | None) -> Tensor:
    """What the observed queries tell, [b, g, n, 3], from shares [b, g, r, n] and outputs [b, g, r, v] of all. The
    shares' memory is used."""
    told = shares.new_empty(*shares.shape[:-2], shares.shape[-1], 3)
    shares, outputs, values = (loops.flat(each) for each in (shares, outputs, values))
    if isinstance(observed, Tensor):
        shares, outputs, observed = shares.index_select(1, observed), outputs.index_select(1, observed), slice(None)
    first, stop, step = observed.indices(shares.shape[1])
    asked = len(range(first, stop, step))
    twice, sums = shares.new_empty(len(shares), asked, values.shape[-1]), loops.rows(told)
    close = np.zeros((asked, 0), dtype=bool) if near is None else near.numpy()
    run = loops.compiled()
    run.told_by(shares.numpy(), outputs.numpy(), first, step, close, twice.numpy(), sums)
    products = torch.bmm(shares[:, observed].mT, twice)
    run.told_of(values.numpy(), products.numpy(), asked, sums)
    return told
