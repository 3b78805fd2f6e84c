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
from memkit import hf, loops
from memkit.hf.names import CACHE, returned_cache
from memkit.pieces.admission import KeyNorm
from memkit.pieces.evidence import SHARE

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


def at_once(info: dict[str, Any], admission: dict[str, Any], **changes: Any) -> memkit.PolicySpec:
    """A policy that drops as these methods do: all of the prompt, one chunk, competes when the next token arrives, and
    nothing leaves after that."""
    fields: dict[str, Any] = {
        "chunker": {"kind": "fixed", "size": info["prefill"]},
        "window": {"kind": "block", "chunks": 1},
        "growth": {"kind": "fixed", "slots": info["kept"]},
        "admission": admission,
        **DROPPING,
    }
    return memkit.PolicySpec(**fields | changes)


def snapkv(info: dict[str, Any]) -> memkit.PolicySpec:
    """The window's queries judge what is older. When the window itself leaves, growth has room for all of it."""
    window, kept = info["window"], info["kept"]
    return memkit.PolicySpec(
        chunker={"kind": "fixed", "size": window},
        window={"kind": "block", "chunks": 1},
        growth={"kind": "linear", "fraction": 1 - info["ratio"], "round_down": kept, "floor": kept - window},
        observe={"queries": window, "readers": "window"},
        admission={"kind": "attention", "pool": info["kernel"]},
        **DROPPING,
    )


def expected(info: dict[str, Any]) -> memkit.PolicySpec:
    admission = {"kind": "expected-attention"} | {name: info[name] for name in ("future", "covariance", "value_norm")}
    return at_once(info, admission, sinks=info["sinks"], observe={"queries": info["prefill"]})


METHODS = {
    "snapkv-window16-half": snapkv,
    "snapkv-window16-quarter": snapkv,
    "expected-attention-half": expected,
    "key-norm-half": lambda info: at_once(info, {"kind": "key-norm"}),
    "keydiff-half": lambda info: at_once(info, {"kind": "key-difference"}),
    "streaming-half": lambda info: at_once(info, {"kind": "recency"}, sinks=info["sinks"]),
}


def same_rows(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two sets of keys [1, g, n, d] are the same, in whatever order."""
    off = (ours[..., :, None, :] - theirs[..., None, :, :]).abs().amax(-1)
    one_each = torch.equal(off.argmin(-1).sort(-1).values, torch.arange(theirs.shape[2]).expand(off.shape[:3]))
    return ours.shape == theirs.shape and one_each and float(off.amin(-1).max()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("pieces", [12, 1], ids=["at-once", "one-by-one"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_rows_are_kept_and_the_model_goes_on_alike(name: str, pieces: int, monkeypatch: pytest.MonkeyPatch):
    if name == "key-norm-half":  # see the next test; loops do not ask `score`
        monkeypatch.setattr(loops, "ENABLED", False)
        monkeypatch.setattr(KeyNorm, "score", lambda _, chunk: -chunk.keys.norm(dim=-1) - 1e-6 * (chunk.offsets == 99))
    tensors, info = golden(name)
    model, spec = model_of(tensors, info), METHODS[name](info)
    prompt, rest = tensors["input_ids"].split((info["prefill"], 12), dim=1)
    with hf.attach(model, spec, prefill="full"):
        output = model(prompt)
        torch.testing.assert_close(output.logits, tensors["prefill_logits"], atol=1e-4, rtol=1e-4)
        cache, logits = returned_cache(output), list[Tensor]()
        for part in rest.split(pieces, dim=1):
            output = model(part, **{CACHE: cache})
            cache = returned_cache(output)
            logits.append(output.logits)
    assert (torch.cat(logits, 1) - tensors["logits"]).abs().max() < 1e-4
    assert (tensors["logits_uncompressed"] - tensors["logits"]).abs().max() > 0.1  # what was evicted is missed
    for layer, memory in enumerate(hf.memories(cache)):
        assert memory.slots.tolist() == [info["kept"]]
        theirs = tensors[f"cache_keys.{layer}"]
        kept, newest = theirs[:, :, : info["kept"]], theirs[:, :, info["kept"] :]
        assert same_rows(memory.sums[:, :, : info["kept"], : theirs.shape[-1]], kept)
        assert (memory.window.last(12)["keys"] - newest).abs().max() < 1e-4


@torch.no_grad()
def test_of_equal_keys_the_earliest_is_kept():
    # One token comes three times, its keys are equally long, and there is room for two of them: nobody's choice. Of the
    # later two kvpress happens to keep the last; everything else is the same.
    tensors, info = golden("key-norm-half")
    scores, kept = tensors["scores.0"][0, 1], tensors["kept.0"][0, 1].long()
    earlier, later = 99, 135
    assert scores[earlier] == scores[later] == scores[kept].min()
    with hf.attach(model_of(tensors, info), METHODS["key-norm-half"](info), prefill="full") as model:
        cache = returned_cache(model(tensors["input_ids"][:, : info["prefill"]]))
        token = tensors["input_ids"][:, info["prefill"] :][:, :1]
        before = hf.memories(cache)[0].window.last(info["prefill"])["keys"][0, 1].clone()
        memory = hf.memories(returned_cache(model(token, **{CACHE: cache})))[0]
    wanted = sorted({*kept.tolist(), earlier} - {later})
    assert torch.equal(memory.sums[0, 1, : info["kept"], : before.shape[-1]], before[wanted])


@torch.no_grad()
@pytest.mark.parametrize("name", ["snapkv-window16-half", "snapkv-window16-quarter", "streaming-half"])
def test_with_a_window_rows_are_there_once_the_prompt_is_read(name: str):
    tensors, info = golden(name)
    streaming = memkit.PolicySpec(
        window={"kind": "sliding", "size": info["kept"] - info.get("sinks", 0)}, sinks=info.get("sinks", 0)
    )
    with hf.attach(
        model_of(tensors, info), streaming if "streaming" in name else snapkv(info), prefill="full"
    ) as model:
        cache = returned_cache(model(tensors["input_ids"][:, : info["prefill"]]))
    for layer, memory in enumerate(hf.memories(cache)):
        slots, held = int(memory.slots[0]), int(memory.held_rows[0])
        assert slots + held == info["kept"]
        kept = tensors[f"cache_keys.{layer}"][:, :, : info["kept"]]
        ours = (memory.sums[:, :, :slots, : kept.shape[-1]], memory.window.last(held)["keys"])
        assert same_rows(torch.cat(ours, dim=2), kept)


@torch.no_grad()
def test_expected_shares_are_as_published():
    tensors, info = golden("expected-attention-half")
    with hf.attach(model_of(tensors, info), expected(info), prefill="full") as model:
        cache = returned_cache(model(tensors["input_ids"][:, : info["prefill"]]))
    for layer, memory in enumerate(hf.memories(cache)):
        held = memory.window.last(info["prefill"])
        scores = held["evidence"][..., SHARE] * held["values"].norm(dim=-1)
        theirs = tensors[f"scores.{layer}"]
        assert (scores - theirs)[..., info["sinks"] :].abs().max() < 1e-6
        assert not scores[..., : info["sinks"]].any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["caote-512", "untrained-observed", "streaming-4-512", "untrained-kvm-fixed"])
def test_after_a_prompt_read_in_full_the_policy_goes_on(name: str, tiny: torch.nn.Module, ids: Tensor):
    spec = memkit.load_policy(name, {} if "streaming" in name else {"chunker.size": 8, "growth.slots": 24})
    if name == "caote-512":  # so that slots compete as soon as the prompt is compressed
        spec = memkit.load_policy(spec, {"window.chunks": 3})
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
