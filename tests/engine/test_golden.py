"""The engine against the Key-Value Means authors' code: outputs, gradients and slots of one attention call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import memkit
from memkit.pieces.statistics import COUNT, RADIUS

FOLDER = Path(__file__).parents[1] / "golden" / "operator"
FILES = sorted(FOLDER.glob("*.safetensors"))

Tensors = dict[str, Tensor]

# The files' names of what we call otherwise.
PARAMETERS = {
    "key_norm_weight": "state_key_norm_weight",
    "key_norm_bias": "state_key_norm_bias",
    "query_scale_window": "temperature_window",
    "query_scale_memory": "temperature_memory",
}
GRADIENTS = {
    "grad_queries": "queries",
    "grad_keys": "keys",
    "grad_values": "values",
    "grad_merge_gate": "weights",
    "grad_ln_s_k_weight": "key_norm_weight",
    "grad_ln_s_k_bias": "key_norm_bias",
    "grad_front_head_temp": "query_scale_window",
    "grad_state_head_temp": "query_scale_memory",
}


def policy_of(config: dict[str, Any]) -> memkit.PolicySpec:
    """The authors' configuration as a policy; what a file leaves out has their default."""
    given = {
        "sink_len": 1,
        "n_max_d_chunks": 1,
        "kvm_use_vlens": 1,
        "kvm_use_head_temps": 1,
        "kvm_apply_merge_gate_to_initial_state": 0,
        "kvm_apply_merge_gate_to_appends": 0,
        **config,
    }
    match given["state_budget_mode"]:
        case "fixed":
            growth = {"kind": "fixed", "slots": given["state_min_len"]}
        case "power_law":
            growth = {
                "kind": "power",
                "factor": given["state_growth_factor"],
                "exponent": given["state_growth_exponent"],
                "floor": given["state_min_len"],
            }
        case mode:
            assert mode == "kvm_saturation"
            growth = {"kind": "saturating", "limit": given["state_saturation_n"], "floor": given["state_min_len"]}
    return memkit.PolicySpec(
        chunker={"kind": "fixed", "size": given["chunk_len"]},
        window={"kind": "block", "chunks": given["n_bswa_chunks"]},
        sinks=given["sink_len"],
        growth={**growth, "cap": given["chunk_len"] * given["n_max_d_chunks"], "first_chunk": "whole"},
        admission={"kind": "novelty"},
        routing={"kind": "nearest", "similarity": "dot"},
        merging={
            "kind": "weighted-mean",
            "weight": "learned",
            "weigh": {
                "founders": bool(given["kvm_apply_merge_gate_to_appends"]),
                "first_chunk": bool(given["kvm_apply_merge_gate_to_initial_state"]),
            },
        },
        readout={
            "key": "layer-norm",
            "value": "birth-radius" if given["kvm_use_vlens"] else "count-mean",
            "temperatures": bool(given["kvm_use_head_temps"]),
        },
        rotary={"kind": "zero", "width": given["rope_partial_dim"]},
    )


def opened(file: Path) -> tuple[memkit.PolicySpec, memkit.PolicyParameters, Tensors]:
    """A file's policy, what it has learned, and its tensors."""
    with safe_open(file, "pt") as stored:
        config = json.loads(stored.metadata()["info"])["config"]
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    spec = policy_of(config)
    _, heads, _, width = tensors["queries"].shape
    parameters = memkit.PolicyParameters(spec.build(), heads, width)
    parameters.load_state_dict({name: tensors[PARAMETERS[name]] for name in parameters.state_dict()})
    return spec, parameters, tensors


def inputs_of(tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name in ("queries", "keys", "values")} | {"weights": tensors["merge_gate"]}


def test_all_files_are_there():
    assert len(FILES) == 7


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_agrees_with_the_authors_code(file: Path, backend: str):
    spec, parameters, tensors = opened(file)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(tensors).items()}
    output, memory = memkit.attend(spec, **inputs, parameters=parameters, backend=backend)
    assert_near(output, tensors["output"], 2e-5, "output")

    live, width = int(memory.slots[0]), tensors["keys"].shape[3]
    assert memory.slots.tolist() == [live] * len(memory.slots)
    assert_near(memory.sums[:, :, :live, :width], tensors["memory_key_sum"], 1e-4, "key sums")
    assert_near(memory.sums[:, :, :live, width:], tensors["memory_value_sum"], 1e-4, "value sums")
    radius = RADIUS if spec.readout.value == "birth-radius" else COUNT
    assert_near(memory.number(radius)[:, :, :live], tensors["memory_radius"], 1e-4, radius.name)

    (output * tensors["output_cotangent"]).sum().backward()
    sources = inputs | dict(parameters.named_parameters())
    expected = {ours: tensors[theirs] for theirs, ours in GRADIENTS.items() if theirs in tensors}
    assert expected.keys() == sources.keys()
    for name, gradient in expected.items():
        assert_near(sources[name].grad, gradient, 1e-3 * gradient.abs().max().item(), f"gradient of {name}")


@torch.no_grad()
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_agrees_in_pieces_where_no_gradient_is_wanted(file: Path):
    spec, parameters, tensors = opened(file)
    memory, outputs = None, []
    for begin in range(0, tensors["queries"].shape[2], 33):
        part = {name: tensor[:, :, begin : begin + 33] for name, tensor in inputs_of(tensors).items()}
        output, memory = memkit.attend(spec, **part, parameters=parameters, memory=memory)
        outputs.append(output)
    assert_near(torch.cat(outputs, dim=2), tensors["output"], 2e-5, "output")


def assert_near(actual: Tensor, expected: Tensor, limit: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    off = (actual - expected).abs().max().item()
    assert off <= limit, f"{what}: off by {off:.3g}, allowed {limit:.3g}"
