"""Law 7, limits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memkit.catalog import as_policy
from memkit.pieces.admission import NoveltySpec
from memkit.pieces.growth import LinearGrowthSpec, NoGrowthSpec
from memkit.pieces.heads import HeadsSpec
from memkit.pieces.merging import MeanSpec
from memkit.pieces.observation import ObservationSpec
from memkit.pieces.readout import ReadoutSpec
from memkit.pieces.rotary import KeepSpec
from memkit.pieces.routing import NearestSpec
from memkit.pieces.window import BlockWindowSpec
from memkit.policy import Policy, PolicySpec
from memkit.testing.agreement import Results
from memkit.testing.cases import Case, Inputs
from memkit.testing.law import law
from memkit.testing.laws.policy.comparing import compare, in_pieces
from memkit.testing.laws.policy.definitions import tokens_left

__all__ = ["limits"]


ALONE = {"observe": ObservationSpec(), "eviction": "never", "heads": HeadsSpec()}
"""Of those that have no slots to judge or to share."""


@law("limits", "policy")
def limits(policy: Policy, case: Case) -> None:
    """One slot per token is full attention; no slots is the window and the sinks.

    With growth `linear` 1.0, novelty, readout `mean`/`mean`, unweighted, rotary `keep` or `rerotate`, output = softmax
    over all tokens ≤ t. With growth `none`, over the first S and those that the window shows. These are the two ends
    of the space that every policy lies in, and the only ones with a closed form.
    """
    spec = as_policy(policy).spec
    if isinstance(spec.growth, NoGrowthSpec):
        full, window = spec.model_copy(update={"window": BlockWindowSpec(chunks=2)}), spec
    else:
        full, window = spec, spec.model_copy(update={"growth": NoGrowthSpec(), **ALONE})
    founds, admission = full.routing.build().founds, full.admission.build()
    judges = admission is not None and admission.needs_evidence
    full = PolicySpec(
        chunker=full.chunker,
        window=full.window,
        sinks=full.sinks,
        growth=LinearGrowthSpec(fraction=1.0, counts=getattr(full.growth, "counts", "seen")),
        admission=full.admission if founds and not judges else NoveltySpec(),
        routing=full.routing if founds else NearestSpec(similarity=getattr(full.routing, "similarity", "dot")),
        merging=MeanSpec(),
        readout=ReadoutSpec(bias="none" if full.readout.bias == "none" else "count"),
        rotary=full.rotary if full.rotary.kind == "rerotate" else KeepSpec(),
    )
    plain = dataclasses.replace(case, weights="none", learned=False, width=max(case.width, 2))
    for limit in (full.build(), window.build()):
        inputs = plain.inputs(limit)
        for rerun in (True, False):  # in one call, then in pieces
            cuts = [(0, plain.tokens)] if rerun else plain.cuts()
            outputs = [output for _, output, _ in in_pieces(limit, inputs, cuts)]

            def expected(inputs: Inputs, limit: Policy = limit) -> Results:
                return {"output": _masked_attention(limit, inputs)}

            what = f"{'full attention' if limit.growth is not None else 'window and sinks'}, "
            what += "one call: " if rerun else f"pieces of {plain.pieces}: "
            compare(limit, plain, inputs, {"output": torch.cat(outputs, dim=2)}, expected(inputs), expected, what)


def _masked_attention(policy: Policy, inputs: Inputs) -> Tensor:
    """Softmax over what a policy without slots (or with one per token) shows, in float64."""
    tokens = inputs.keys.shape[2]
    position = torch.arange(tokens)
    seen = position[None, :] <= position[:, None]
    if policy.growth is None:
        rows = range(len(inputs.lengths))
        begin = torch.tensor([[tokens_left(policy, inputs, row, p + 1) for p in range(tokens)] for row in rows])
        seen = seen & ((position[None, :] >= begin[..., None]) | (position < policy.sinks)[None, :])
        seen = seen[:, None]
    group = inputs.queries.shape[1] // inputs.keys.shape[1]
    keys, values = (tensor.double().repeat_interleave(group, 1) for tensor in (inputs.keys, inputs.values))
    output = scaled_dot_product_attention(inputs.queries.double(), keys, values, attn_mask=seen)
    return output.masked_fill(~inputs.valid, 0)
