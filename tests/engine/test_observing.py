"""Memory that sees its readers: published numbers, the oracle, every split, ragged rows, gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import memkit
from tests.engine.cases import CHUNK, assert_close, cotangent, make_case, tolerance

GOLDEN = Path(__file__).parent.parent / "golden" / "observing"
NAMES = ["bounded-dropping", "bounded-merging", "bounded-one-window-chunk-more"]


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(GOLDEN / f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["info"])  # noqa: SIM118


def golden_policy(info: dict[str, Any]) -> memkit.PolicySpec:
    merging = {"kind": "weighted-mean", "weight": "share", "of": "values"} if info["merging"] else {"kind": "drop"}
    return memkit.PolicySpec(
        chunker={"kind": "fixed", "size": info["chunk"]},
        window={"kind": "block", "chunks": info["window_chunks"]},
        sinks=info["sinks"],
        growth={"kind": "fixed", "slots": info["slots_without_sinks"] + info["sinks"]},
        observe={"queries": info["chunk"], "decay": info["decay"]},
        admission={"kind": "output-error"},
        eviction="weakest",
        routing={"kind": "nearest", "similarity": "cosine"},
        merging=merging,
        readout={"bias": "mass" if info["merging"] else "none"},
        rotary={"kind": "rerotate"},
    )


def golden_rotation(info: dict[str, Any]) -> memkit.Rotation:
    rotary = info["rotary"]
    pairs = torch.arange(rotary["width"] // 2, dtype=torch.float64) / (rotary["width"] // 2)
    return memkit.Rotation(rotary["pairing"], rotary["width"], rotary["theta"] ** -pairs)


@torch.no_grad()
@pytest.mark.parametrize("split", [10_000, 37, 1], ids=["whole", "pieces", "one-by-one"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_rows_biases_and_evidence_are_as_published(name: str, split: int):
    tensors, info = golden(name)
    spec, rotation = golden_policy(info), golden_rotation(info)
    outputs, memory = [], None
    for begin in range(0, info["tokens"], split):
        part = [tensors[each][:, :, begin : begin + split] for each in ("queries", "keys", "values")]
        output, memory = memkit.attend(spec, *part, rotation=rotation, scale=info["scale"], memory=memory)
        outputs.append(output)
    assert memory is not None
    slots, held = int(memory.slots[0]), int(memory.held_rows[0])
    window = memory.window.last(held)
    assert memory.store.evidence is not None
    evidence = torch.cat((memory.store.evidence[:, :, :slots], window["evidence"]), dim=2)
    # Slots as queries meet them, and as none was changed since: through a call without tokens' consequences.
    view = _view(spec, memory, rotation)
    bias = torch.zeros_like(tensors["row_bias"])
    if view.bias is not None:
        bias[:, :, :slots] = view.bias[:, :, :slots]
    found = {
        "output": torch.cat(outputs, dim=2),
        "row_keys": torch.cat((view.keys[:, :, :slots], window["keys"]), dim=2),
        "row_values": torch.cat((view.values[:, :, :slots], window["values"]), dim=2),
        "row_bias": bias,
        "row_error": evidence[..., 0],
        "row_share": evidence[..., 1],
        "row_chunks": evidence[..., 2],
    }
    for each, tensor in found.items():
        assert (tensor - tensors[each]).abs().max() <= 2e-5, each


def _view(spec: memkit.PolicySpec, memory: memkit.Memory, rotation: memkit.Rotation) -> Any:
    from memkit.memory.rows import SlotRules, read_slots

    rules = SlotRules(spec.build(), memory.keys.shape[-1], memory.keys.dtype, None, rotation, valued=True)
    return read_slots(rules, memory.store.sums, memory.store.numbers)


def policy(**changes: Any) -> memkit.PolicySpec:
    """A small observing policy."""
    fields: dict[str, Any] = {
        "chunker": {"kind": "fixed", "size": CHUNK},
        "window": {"kind": "block", "chunks": 2},
        "sinks": 2,
        "growth": {"kind": "fixed", "slots": 12},
        "observe": {"queries": 3, "decay": 0.9},
        "admission": {"kind": "output-error"},
        "eviction": "weakest",
        "routing": {"kind": "nearest", "similarity": "cosine"},
        "merging": {"kind": "weighted-mean", "weight": "share", "of": "values"},
        "readout": {"bias": "mass"},
        "rotary": {"kind": "rerotate"},
    }
    return memkit.PolicySpec(**fields | changes)


SPECS = {
    "as-published": policy(),
    "all-queries": policy(observe={"queries": CHUNK}),
    "most": policy(observe={"queries": 3, "decay": 0.9, "aggregate": "max"}),
    "most-of-all": policy(
        observe={"queries": CHUNK, "aggregate": "max"}, admission={"kind": "output-error", "pool": 3}
    ),
    "differing": policy(
        observe={"queries": CHUNK, "aggregate": "max"}, admission={"kind": "output-error", "pool": 3, "difference": 2}
    ),
    "differing-alone": policy(admission={"kind": "output-error", "difference": 0.5}),
    "apart": policy(observe={"queries": 3, "decay": 0.9, "apart": 2}),
    "all-apart": policy(observe={"queries": CHUNK, "aggregate": "max", "apart": CHUNK + 1}),
    "capped": policy(merging={"kind": "weighted-mean", "weight": "share", "of": "values", "cap": 0.5}),
    "capped-both": policy(merging={"kind": "weighted-mean", "weight": "share", "cap": 1.0}),
    "dropping": policy(merging={"kind": "drop"}, readout={}),
    "attention": policy(admission={"kind": "attention"}),
    "attention-pooled": policy(admission={"kind": "attention", "value_norm": True, "pool": 3}),
    "expected": policy(
        admission={"kind": "expected-attention", "future": 5},
        merging={"kind": "drop"},
        readout={},
        rotary={"kind": "keep"},
    ),
    "expected-merging": policy(
        admission={"kind": "expected-attention", "future": 3, "value_norm": False},
        readout={"bias": "mass", "temperatures": True},
    ),
    "expected-mean-query": policy(
        admission={"kind": "expected-attention", "future": 2, "covariance": False},
        observe={"queries": CHUNK},
        sinks=CHUNK + 3,
        growth={"kind": "sqrt", "factor": 2.0, "floor": 16},
    ),
    "both": policy(merging={"kind": "weighted-mean", "weight": "share"}),
    "plain-mean": policy(merging={"kind": "mean"}, readout={"bias": "count"}),
    "mean-of-values": policy(merging={"kind": "mean", "of": "values"}),
    "learned": policy(
        merging={"kind": "weighted-mean", "weight": "learned"},
        readout={"key": "layer-norm", "value": "birth-radius", "temperatures": True},
        rotary={"kind": "keep"},
    ),
    "norms": policy(readout={"key": "mean-norm", "value": "mean-norm", "bias": "mass"}),
    "unrotated": policy(rotary={"kind": "unrotate"}),
    "growing": policy(growth={"kind": "sqrt", "factor": 2.0, "floor": 6}),
    "first-chunk-whole": policy(growth={"kind": "fixed", "slots": 6, "first_chunk": "whole"}),
    "least": policy(routing={"kind": "nearest", "similarity": "cosine", "least": 0.3}),
    "never-evicting": policy(eviction="never", growth={"kind": "sqrt", "factor": 2.0, "floor": 6}),
    "never-evicting-novel": policy(
        eviction="never", admission={"kind": "novelty"}, growth={"kind": "sqrt", "factor": 2.0, "floor": 6}
    ),
    "segments": policy(
        eviction="never",
        routing={"kind": "segment"},
        growth={"kind": "sqrt", "factor": 2.0, "floor": 6},
    ),
    "no-sinks": policy(sinks=0),
    "many-sinks": policy(sinks=CHUNK + 3, growth={"kind": "fixed", "slots": 2 * CHUNK}),
    "unobserved-key-norm": policy(
        observe={}, admission={"kind": "key-norm"}, merging={"kind": "mean"}, readout={"bias": "count"}
    ),
    "unobserved-key-difference": policy(
        observe={}, admission={"kind": "key-difference"}, merging={"kind": "drop"}, readout={}
    ),
    "unobserved-recency": policy(
        observe={}, admission={"kind": "recency"}, merging={"kind": "mean"}, readout={"bias": "count"}
    ),
}
everywhere = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@everywhere
def test_engine_and_oracle_agree(spec: memkit.PolicySpec):
    case = make_case(spec, 6 * CHUNK + 3)
    direction = cotangent(case)
    expected, remembered, gradients = case.gradients(direction, backend="reference")
    output, memory, found = case.gradients(direction)
    limit = tolerance(torch.float64)
    assert_close(output, expected, limit, "output")
    for name, gradient in gradients.items():
        assert_close(found[name], gradient, limit, f"gradient of {name}")
    assert memory.counts.tolist() == remembered.counts.tolist()
    most = int(memory.slots.max())
    if spec.observe.queries:
        own, expected = memory.store.evidence, remembered.store.evidence
        assert own is not None
        assert expected is not None
        assert_close(own[:, :, :most], expected[:, :, :most], limit, "evidence")


@torch.no_grad()
@everywhere
def test_any_split_gives_the_same_one_token_at_a_time_included(spec: memkit.PolicySpec):
    case = make_case(spec, 6 * CHUNK + 3)
    expected, whole = case.attend()
    for pieces in ([1], [5, 1, 11], [CHUNK]):
        outputs, memory, begin = [], None, 0
        while begin < case.tokens:
            size = pieces[len(outputs) % len(pieces)]
            output, memory = case.part(begin, begin + size).attend(memory=memory)
            outputs.append(output)
            begin += size
        assert_close(torch.cat(outputs, dim=2), expected, tolerance(torch.float64), f"pieces of {pieces}")
        assert memory is not None
        assert memory.counts.tolist() == whole.counts.tolist()


@torch.no_grad()
@everywhere
def test_a_rows_result_does_not_depend_on_the_others(spec: memkit.PolicySpec):
    case = make_case(spec, 7 * CHUNK, rows=3)
    lengths = [[5 * CHUNK + 3, 2 * CHUNK, 0], [CHUNK, 3 * CHUNK - 2, 4 * CHUNK + 1], [1, 1, 1]]
    memory, seen = None, [0, 0, 0]
    alone: list[Any] = [None, None, None]
    for now in lengths:
        width = max(now)
        index = torch.stack([torch.arange(width) + begin for begin in seen]).clamp(max=case.tokens - 1)
        tensors = {
            name: tensor.gather(
                2,
                index.view(3, 1, width, *[1] * (tensor.ndim - 3)).expand(-1, *tensor.shape[1:2], -1, *tensor.shape[3:]),
            )
            for name, tensor in case.tensors.items()
        }
        given = {"parameters": case.parameters(), "rotation": case.rotation}
        output, memory = memkit.attend(spec, **tensors, **given, memory=memory, lengths=now)
        for row in range(3):
            part = {
                name: tensor[row : row + 1, :, seen[row] : seen[row] + now[row]]
                for name, tensor in case.tensors.items()
            }
            own, alone[row] = memkit.attend(spec, **part, **given, memory=alone[row])
            assert_close(output[row : row + 1, :, : now[row]], own, tolerance(torch.float64), f"row {row}")
            seen[row] += now[row]


@torch.no_grad()
@everywhere
def test_a_memory_survives_a_file(spec: memkit.PolicySpec, tmp_path: Path):
    case = make_case(spec, 5 * CHUNK + 4)
    memory = case.part(0, 4 * CHUNK + 3).attend()[1]
    memory.save(tmp_path / "memory.safetensors")
    loaded = memkit.Memory.load(tmp_path / "memory.safetensors")
    rest = case.part(4 * CHUNK + 3, case.tokens)
    # Products round by how tensors lie in memory, and what was loaded lies more densely.
    found, expected = rest.attend(memory=loaded)[0], rest.attend(memory=memory)[0]
    assert_close(found, expected, tolerance(torch.float64, 16), "output")


@torch.no_grad()
@pytest.mark.parametrize("name", ["as-published", "dropping", "growing", "never-evicting"])
def test_bytes_are_as_cost_says(name: str):
    spec = SPECS[name]
    case = make_case(spec, 9 * CHUNK, rows=2).to(torch.float32)
    memory = case.attend()[1]
    cost = memkit.cost(spec, 9 * CHUNK, heads=4, kv_heads=2, head_width=8, value_width=6, rows=2)
    assert memory.bytes == cost.bytes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observe": {}}, "observe.queries is 0"),
        ({"admission": {"kind": "expected-attention"}, "observe": {}}, "observe.queries is 0"),
        (
            {"admission": {"kind": "expected-attention"}, "observe": {"queries": 3, "readers": "window"}},
            "expects readers who go on with the text, got observe.readers window; leave readers out",
        ),
        (
            {"admission": {"kind": "expected-attention"}, "rotary": {"kind": "unrotate"}},
            "rotary unrotate turns them back before they meet slots; use rotary: {kind: rerotate}",
        ),
        ({"growth": {"kind": "none"}}, "with growth none there is nothing to judge"),
        ({"admission": {"kind": "novelty"}}, "rates slots"),
        (
            {
                "routing": {"kind": "nearest", "new_slots": False},
                "growth": {"kind": "fixed", "slots": 12, "first_chunk": "whole"},
            },
            "needs routing.new_slots: true",
        ),
        ({"admission": {"kind": "attention", "pool": 2}}, "pool must be odd"),
        (
            {"merging": {"kind": "weighted-mean", "weight": "learned"}, "readout": {"bias": "mass"}},
            "weights that no gradient flows through",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_a_remedy(changes: dict[str, Any], message: str):
    with pytest.raises(memkit.PolicyError, match=message):
        policy(**changes)


def test_a_plan_of_keys_alone_is_refused():
    case = make_case(policy(), 20)
    with pytest.raises(memkit.InputError, match="a plan is made from keys alone"):
        case.plan()


def test_expecting_readers_needs_the_rotation():
    spec = SPECS["expected"]
    case = make_case(spec, 20)
    with pytest.raises(memkit.InputError, match="admission expected-attention turns queries to places to come"):
        memkit.attend(spec, **case.tensors)
    with pytest.raises(memkit.InputError, match="admission expected-attention un-rotates queries, but this layer"):
        memkit.MemoryAttention(spec, width=16, heads=2, rotary={"width": 0})
    with pytest.raises(memkit.InputError, match="expects them to be as the text's own queries; leave them out"):
        memkit.compress(spec, **case.tensors, rotation=case.rotation, readers=case.tensors["queries"])


def test_what_expecting_readers_costs_is_counted():
    shape = {"heads": 4, "kv_heads": 2, "head_width": 8, "value_width": 6}
    spec = memkit.load_policy(SPECS["expected"], {"rotary": {"kind": "rerotate"}})
    mean = memkit.load_policy(spec, {"admission.covariance": False})
    plain = memkit.load_policy(spec, {"admission": {"kind": "attention"}})
    chunks = 9
    every, of_mean, asked = (memkit.cost(each, chunks * CHUNK, **shape).prefill.routing for each in (spec, mean, plain))
    rows = (of_mean - asked) // (2 * 4 * 8)
    assert rows > chunks * CHUNK
    assert every - asked == 2 * 4 * (2 * 8 + 8**2) * rows + 4 * 4 * 3 * 8**2 * chunks


def test_count_bias_as_it_was_written_before():
    old = memkit.PolicySpec(readout={"count_bias": True})
    assert old == memkit.PolicySpec(readout={"bias": "count"})
    assert memkit.PolicySpec(readout={"count_bias": False}).readout.bias == "none"
    with pytest.raises(memkit.PolicyError):
        memkit.PolicySpec(readout={"count_bias": "yes"})
