"""A text read in full and compressed at once: published rows, and the memory goes on as any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memkit
from memkit.memory.slots import SlotRules, read_slots
from memkit.pieces.statistics import POSITION
from tests.engine.cases import assert_close, tolerance
from tests.engine.test_observing import golden, golden_rotation

LIMIT = tolerance(torch.float64, 2048)


def policy_of(info: dict[str, Any]) -> memkit.PolicySpec:
    merging = {"kind": "weighted-mean", "weight": "share", "of": "values"} if info["merging"] else {"kind": "drop"}
    return memkit.PolicySpec(
        chunker={"kind": "fixed", "size": info["window"]},
        window={"kind": "block", "chunks": 1},
        sinks=info["sinks"],
        growth={"kind": "fixed", "slots": info["rows"] - info["window"]},
        observe={"queries": info["window"]},
        admission={"kind": "output-error"},
        eviction="weakest",
        routing={"kind": "nearest", "similarity": "cosine"},
        merging=merging,
        readout={"bias": "mass" if info["merging"] else "none"},
        rotary={"kind": "rerotate"},
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["full-dropping", "full-merging"])
def test_rows_values_and_biases_are_as_published(name: str):
    tensors, info = golden(name)
    spec, rotation = policy_of(info), golden_rotation(info)
    asked = tensors["queries"][:, :, tensors["reference_index"]]
    readers = rotation.apply(asked, tensors["reference_position"] - tensors["reference_index"])
    given = [tensors[each] for each in ("queries", "keys", "values")]
    memory = memkit.compress(spec, *given, rotation=rotation, scale=info["scale"], readers=readers)
    slots, window, sinks = info["rows"] - info["window"], info["window"], info["sinks"]
    assert int(memory.slots[0]) == slots
    order = tensors["slot_position"].sort(-1)
    position = memory.number(POSITION)[:, :, sinks:slots]
    assert torch.equal(position.round().long(), order.values)
    wanted = {each: tensors[f"row_{each}"].clone() for each in ("keys", "values", "bias")}
    for tensor in wanted.values():
        rest = tensor[:, :, sinks:slots]
        index = order.indices if rest.ndim == 3 else order.indices[..., None].expand_as(rest)
        tensor[:, :, sinks:slots] = rest.gather(2, index)
    rules = SlotRules(spec.build(), tensors["keys"].shape[-1], tensors["keys"].dtype, None, rotation, valued=True)
    view = read_slots(rules, memory.sums, memory.store.numbers)
    keys = torch.cat((view.keys[:, :, :slots], memory.window.last(window)["keys"]), dim=2)
    values = torch.cat((view.values[:, :, :slots], memory.window.last(window)["values"]), dim=2)
    assert_close(keys, wanted["keys"], 2e-5, "keys")
    assert_close(values, wanted["values"], 2e-5, "values")
    if view.bias is not None:
        assert_close(view.bias[:, :, :slots], wanted["bias"][:, :, :slots], 2e-5, "bias")
        assert not wanted["bias"][:, :, slots:].any()
