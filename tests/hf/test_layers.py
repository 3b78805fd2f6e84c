"""Layers under policies of their own, compared with the layers' parts one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import memkit
from memkit import hf
from memkit.errors import PolicyError
from memkit.hf.loading import LoadedModel
from memkit.hf.names import CACHE, returned_cache
from memkit.layers import LayerPoliciesSpec, as_layers
from tests.hf.tiny import randomised, tiny_config

SMALL = memkit.load_policy("untrained-kvm-sqrt", {"chunker.size": 8})
WINDOW = memkit.load_policy("window-512", {"window.size": 20})


@torch.no_grad()
def test_each_layer_reads_by_its_own_policy(tiny: Any, ids: torch.Tensor):
    """The first layer's output under its policy is that of a model all under it; the second's depends on both."""
    seen: dict[str, torch.Tensor] = {}
    with hf.attach(tiny, SMALL):
        seen["all"] = tiny(ids, output_hidden_states=True).hidden_states[1]
    with hf.attach(tiny, {"default": WINDOW, "at": {0: SMALL}}):
        output = tiny(ids, output_hidden_states=True)
        assert [memory.policy.name for memory in hf.memories(returned_cache(output))] == [SMALL.name, WINDOW.name]
        torch.testing.assert_close(output.hidden_states[1], seen["all"], atol=1e-6, rtol=0)
        first = tiny(ids[:, :50])
        rest = tiny(ids[:, 50:], **{CACHE: returned_cache(first)}).logits
        torch.testing.assert_close(torch.cat((first.logits, rest), 1), output.logits, atol=1e-4, rtol=0)
    with hf.attach(tiny, {"default": "keep"}) as model:
        full = model(ids).logits
    torch.testing.assert_close(full, tiny(ids).logits, atol=1e-4, rtol=0)
    assert not torch.allclose(output.logits, full, atol=1e-2)


@torch.no_grad()
def test_a_file_a_mapping_and_a_function_say_the_same(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    path = tmp_path / "mixed.yaml"
    path.write_text("default: full\nat: {-1: {from: window-512, window.size: 20}}\n", encoding="utf-8")
    found: list[torch.Tensor] = []
    for given in (str(path), {"default": "full", "at": {1: WINDOW}}, lambda layer: WINDOW if layer else "full"):
        with hf.attach(tiny, given):
            found.append(tiny(ids).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(memkit.PolicyError, match="must name layers from 0 to 1"):
        hf.attach(tiny, {"default": "full", "at": {2: WINDOW}}).__enter__()
    with pytest.raises(memkit.ModelError, match=r"got kvm-sqrt-16, which needs merge weights"):
        hf.attach(tiny, {"default": "full", "at": {1: "kvm-sqrt-16"}}).__enter__()


@pytest.mark.parametrize(
    ("model", "config", "changes"),
    [
        (MistralForCausalLM, MistralConfig, {"sliding_window": 16}),
        (Qwen2ForCausalLM, Qwen2Config, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
    ids=["mistral", "qwen2"],
)
@torch.no_grad()
def test_layers_that_slide_stay_as_they_are(model: Any, config: Any, changes: dict[str, Any], ids: torch.Tensor):
    stock = randomised(model(tiny_config(config, **changes)))
    expected = stock(ids).logits
    generated = stock.generate(ids, max_new_tokens=8, do_sample=False)
    with hf.attach(stock, {"default": "full", "sliding": "keep"}):
        first = stock(ids[:, :50])
        rest = [stock(ids[:, at : at + 1], **{CACHE: returned_cache(first)}).logits for at in range(50, 90)]
        torch.testing.assert_close(torch.cat((first.logits, *rest), 1), expected, atol=1e-4, rtol=0)
        assert torch.equal(stock.generate(ids, max_new_tokens=8, do_sample=False), generated)
        assert hf.memories(returned_cache(first))[-1].held_rows.tolist() == [16, 16]


class Letters:
    """A tokenizer: one token per character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 208 for letter in text]}


def test_compare_takes_a_mapping(tiny: Any, tmp_path: Path):
    path = tmp_path / "mixed.yaml"
    path.write_text("default: full\nat: {0: {from: window-512, window.size: 20}}\n", encoding="utf-8")
    loaded = LoadedModel(tiny, Letters(), "tiny", 0.5)
    options: dict[str, Any] = {"model": loaded, "tokens": 100, "skip": 50, "decoded": 2}
    full, mixed, window = memkit.compare(["full", path, WINDOW], **options).policies
    assert (mixed.policy, mixed.window, full.window, window.window) == ("mixed", 60, 100, 20)
    assert window.bytes < mixed.bytes < full.bytes
    assert len({full.loss, mixed.loss, window.loss}) == 3
    assert memkit.compare({"default": "full", "at": {0: WINDOW}}, **options).policies[0].loss == mixed.loss


@pytest.mark.parametrize("budget", [{"rows": 20}, {"bytes": 200_000}])
def test_a_budget_does_not_hide_that_no_layer_would_have_the_policy(budget):
    model = randomised(MistralForCausalLM(tiny_config(MistralConfig, sliding_window=100)))
    for asked in (budget, {}):
        with pytest.raises(PolicyError, match="none would have policy"):
            hf.attach(model, "streaming-4-512", **asked)
    with pytest.raises(PolicyError, match="none would have policy"):
        hf.attach(model, as_layers(as_layers("streaming-4-512"), {"default.window.size": 20}))
    with hf.attach(model, {"default": "full", "sliding": "streaming-4-512"}, **budget) as attached:
        assert attached is model


def test_a_layer_named_by_number_and_by_text_is_named_twice():
    with pytest.raises(PolicyError, match="layer 1 is named twice"):
        LayerPoliciesSpec(default="full", at={1: "streaming-4-512", "1": "full"})
