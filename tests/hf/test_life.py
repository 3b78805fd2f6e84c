"""Attached and detached: handles, blocks, copies, errors, saving, wrappers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import LlamaForCausalLM

import memkit
from memkit import hf
from memkit.hf.names import CACHE, returned_cache
from tests.hf.test_attachment import state

WINDOW = memkit.load_policy("window-512", {"window.size": 20})


@torch.no_grad()
def test_a_handle_lasts_until_it_is_detached(tiny: Any, ids: torch.Tensor):
    before, stock = state(tiny), tiny(ids).logits
    with hf.attach(tiny, WINDOW) as model:
        assert model is tiny
        expected = tiny(ids).logits
    handle = hf.attach(tiny, WINDOW)
    assert torch.equal(tiny(ids).logits, expected)
    assert handle.attached
    assert [policy.name for policy in handle.policies.values()] == ["window-512"] * 2
    assert repr(handle) == "Attached(LlamaForCausalLM, window-512)"
    with pytest.raises(memkit.ModelError, match=r"one policy at a time.*detach its handle"):
        hf.attach(tiny, "full")
    handle.detach()
    handle.detach()
    assert (state(tiny), handle.attached, repr(handle)[-10:]) == (before, False, " detached)")
    assert torch.equal(tiny(ids).logits, stock)
    with pytest.raises(memkit.ModelError, match="this handle was detached; attach the model anew"), handle:
        pass


@torch.no_grad()
def test_a_copy_is_under_the_policy_as_long_as_the_model_is(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    stock = tiny(ids).logits
    before = state(tiny)
    with hf.attach(tiny, WINDOW):
        expected = tiny(ids).logits
        copies = [copy.deepcopy(tiny) for _ in range(3)]
        assert torch.equal(copies[0](ids).logits, expected)
        with pytest.raises(memkit.ModelError, match="one policy at a time"):
            hf.attach(copies[0], "full")
    assert torch.equal(copies[0](ids).logits, stock)
    assert torch.equal(copies[1].generate(ids, max_new_tokens=3)[:, :90], ids)
    with hf.attach(copies[2], WINDOW):  # which no call has put right before
        assert torch.equal(copies[2](ids).logits, expected)
    assert [state(each) for each in copies] == [before] * 3


@torch.no_grad()
def test_saving_meanwhile_saves_the_stock_model(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    expected = tiny(ids).logits
    with hf.attach(tiny, WINDOW):
        tiny.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert "memkit" not in (tmp_path / "config.json").read_text()
    assert torch.equal(again(ids).logits, expected)


@torch.no_grad()
def test_layers_that_have_read_unequally_are_an_error(tiny: Any, ids: torch.Tensor):
    with hf.attach(tiny, WINDOW):
        cache = returned_cache(tiny(ids[:, :50], use_cache=True))
        cache.layers[1].reset()
        with pytest.raises(memkit.MemoryStateError, match="whose layers have read 0 to 50 tokens"):
            tiny(ids[:, 50:], **{CACHE: cache})


class Wrapper(torch.nn.Module):
    """As peft's: the model inside is changed in place, and called past its hooks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> Any:
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


@torch.no_grad()
def test_a_wrapped_model(tiny: Any, ids: torch.Tensor):
    with hf.attach(tiny, WINDOW):
        expected = tiny(ids).logits
    wrapped = Wrapper(tiny)
    with hf.attach(wrapped, WINDOW) as model:
        assert model is wrapped
        first = wrapped(ids[:, :50], use_cache=True)
        rest = wrapped(ids[:, 50:], **{CACHE: returned_cache(first)}).logits
        torch.testing.assert_close(torch.cat((first.logits, rest), 1), expected, atol=1e-4, rtol=0)
        assert torch.equal(tiny(ids).logits, expected)
        with pytest.raises(memkit.InputError, match=r"padding in row 0; pad on the left"):
            wrapped(ids, attention_mask=torch.tensor([[1] * 89 + [0], [1] * 90]), logits_to_keep=1)
    assert not wrapped._forward_pre_hooks
    with pytest.raises(memkit.ModelError, match="must be a Hugging Face model, got Linear"):
        hf.attach(torch.nn.Linear(2, 2), WINDOW)


def test_lora_of_peft_trains_and_reads_as_the_merged_model(tiny: Any, ids: torch.Tensor):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(
        tiny, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.eval()
    expected = adapted(ids, labels=ids)
    expected.loss.backward()
    gradients = {name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None}
    generated = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    adapted.zero_grad()
    with hf.attach(adapted, "full"):
        output = adapted(ids, labels=ids)
        output.loss.backward()
        assert torch.equal(adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False), generated)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=0)
    for name, each in adapted.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(each.grad, gradients[name], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_is_refused_while_it_lasts(tiny: Any, ids: torch.Tensor):
    before = state(tiny)
    handle = hf.attach(tiny, WINDOW)
    twin = copy.deepcopy(tiny)
    for model in (tiny, twin):
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            with pytest.raises(memkit.ModelError, match=r"no policy sees; use model\.generate with rows padded on the"):
                getattr(model, name)([[5, 6, 7]], max_new_tokens=2)
    handle.detach()
    assert state(tiny) == before
    assert "generate_batch" not in vars(tiny)
    with pytest.raises(memkit.ModelError, match="a copy of a model that was attached; let it read anything once"):
        twin.generate_batch([[5, 6, 7]])
    twin(ids)
    assert "generate_batch" not in vars(twin)
    assert tiny.generate_batch.__func__ is twin.generate_batch.__func__


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_model_that_accelerate_spreads_over_devices(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    expected = tiny(ids).logits
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = accelerate.dispatch_model(tiny, places, main_device="cpu", offload_dir=tmp_path)
    with hf.attach(spread, "full"):
        torch.testing.assert_close(spread(ids).logits, expected, atol=1e-4, rtol=0)
