"""Public eviction methods: what kvpress 0.5.5 keeps of a prompt read in full, our policies keep too."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import memkit
from memkit import hf
from memkit.engine.plan import assign
from memkit.hf.names import CACHE, returned_cache
from memkit.pieces.chunk import ChunkContext

GOLDEN = Path(__file__).parents[1] / "golden" / "press"
DROPPING = {"eviction": "weakest", "merging": {"kind": "drop"}}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(str(GOLDEN / f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["info"])  # noqa: SIM118


def model_of(tensors: dict[str, Tensor], info: dict[str, Any]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**info["config"])).eval()
    weights = {name.removeprefix("weights."): each for name, each in tensors.items() if name.startswith("weights.")}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all("lm_head" in name or "rotary" in name for name in missing.missing_keys), missing
    return model


def snapkv(info: dict[str, Any]) -> memkit.PolicySpec:
    window = info["window"]
    return memkit.PolicySpec(
        chunker={"kind": "fixed", "size": window},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "fixed", "slots": info["kept"] - window},
        observe={"queries": window, "readers": "window"},
        admission={"kind": "attention", "pool": info["kernel"]},
        **DROPPING,
    )


def streaming(info: dict[str, Any]) -> memkit.PolicySpec:
    return memkit.PolicySpec(window={"kind": "sliding", "size": info["kept"] - info["sinks"]}, sinks=info["sinks"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "policy"),
    [("snapkv-window16-half", snapkv), ("snapkv-window16-quarter", snapkv), ("streaming-half", streaming)],
)
def test_the_same_rows_are_kept(name: str, policy: Any):
    tensors, info = golden(name)
    model, spec = model_of(tensors, info), policy(info)
    prompt = tensors["input_ids"][:, : info["prefill"]]
    with hf.attach(model, spec, prefill="full"):
        output = model(prompt)
    torch.testing.assert_close(output.logits, tensors["prefill_logits"], atol=1e-4, rtol=1e-4)
    for layer, memory in enumerate(hf.memories(returned_cache(output))):
        slots, held = int(memory.slots[0]), int(memory.held_rows[0])
        assert slots + held == info["kept"]
        kept = tensors[f"cache_keys.{layer}"][:, :, : info["kept"]]
        ours = torch.cat((memory.sums[:, :, :slots, : kept.shape[-1]], memory.window.last(held)["keys"]), dim=2)
        same = (ours[..., :, None, :] - kept[..., None, :, :]).abs().amax(-1)  # theirs are in another order
        assert same.amin(-1).max() < 1e-4
        assert torch.equal(same.argmin(-1).sort(-1).values, torch.arange(info["kept"]).expand(1, 2, -1))


@torch.no_grad()
@pytest.mark.parametrize(("name", "admission"), [("key-norm-half", "key-norm"), ("keydiff-half", "key-difference")])
def test_the_same_rows_are_chosen_by_keys_alone(name: str, admission: str):
    # These methods have no window: all tokens are candidates, and so they are given to the plan as one chunk.
    tensors, info = golden(name)
    model = model_of(tensors, info)
    with hf.attach(model, "full"):
        cache = returned_cache(model(tensors["input_ids"][:, : info["prefill"]]))
    policy = memkit.load_policy("caote-512", {"admission": {"kind": admission}, "observe": {"queries": 0}}).build()
    for layer, memory in enumerate(hf.memories(cache)):
        keys = memory.window.last(info["prefill"])["keys"]
        context = ChunkContext(
            keys=keys,
            slots=keys[:, :, :0],
            slots_before=0,
            sinks=0,
            sink_tokens=0,
            new_slots=info["kept"],
            joins=False,
            alone=lambda keys=keys: keys,
        )
        founded = assign(policy, context).founded
        kept = torch.zeros_like(founded).scatter_(2, tensors[f"kept.{layer}"].long(), value=True)
        scores = tensors[f"scores.{layer}"]
        least = scores.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        tied = scores == least  # equal tokens have equal keys: which of them stays is nobody's choice
        assert torch.equal(founded | tied, kept | tied)
        assert (founded.sum(-1) == info["kept"]).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["caote-512", "untrained-observed", "streaming-4-512", "untrained-kvm-fixed"])
def test_after_a_prompt_read_in_full_the_policy_goes_on(name: str, tiny: torch.nn.Module, ids: Tensor):
    spec = memkit.load_policy(name, {} if "streaming" in name else {"chunker.size": 8, "growth.slots": 24})
    if spec.observe.queries:
        spec = memkit.load_policy(spec, {"observe.queries": 8})
    if "streaming" in name:
        spec = memkit.load_policy(spec, {"window.size": 20})
    with hf.attach(tiny, "full"):
        exact = tiny(ids[:, :60]).logits
    with hf.attach(tiny, spec, prefill="full"):
        first = tiny(ids[:, :60])
        cache = returned_cache(first)
        copies = [copy.deepcopy(cache) for _ in range(2)]
        whole = tiny(ids[:, 60:], **{CACHE: copies[0]}).logits
        parts = [tiny(ids[:, at : at + 1], **{CACHE: copies[1]}).logits for at in range(60, 90)]
        alone = tiny(ids[:, :60], use_cache=False).logits
        generated = tiny.generate(ids[:, :60], max_new_tokens=12, do_sample=False)
    torch.testing.assert_close(first.logits, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone, exact, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=2e-4)
    assert generated.shape == (2, 72)
    policy = spec.build()
    for memory in hf.memories(copies[0]):
        assert memory.slots.tolist() == [policy.slots_after(90)] * 2
        assert memory.seen.tolist() == [90, 90]


def test_what_cannot_be_read_in_full_is_refused(tiny: torch.nn.Module, ids: Tensor):
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    with hf.attach(tiny, "caote-512", prefill="full"), pytest.raises(memkit.InputError, match="rows of equal length"):
        tiny(ids, attention_mask=mask)
    with pytest.raises(memkit.InputError, match="prefill must be"), hf.attach(tiny, "full", prefill="exact"):
        pass
