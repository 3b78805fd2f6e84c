"""Training under a policy: autocast, Trainer in bfloat16, gradient checkpointing of both kinds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import memkit
from memkit import hf

MERGING = memkit.load_policy("untrained-block-mean", {"chunker.size": 8})


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", ["full", MERGING], ids=["full", "merging"])
def test_checkpoints_of_either_kind_change_no_gradient(tiny: Any, ids: torch.Tensor, policy: Any, reentrant: bool):
    tiny.train()
    with hf.attach(tiny, policy):
        expected = gradients(tiny, ids)
        tiny.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        tiny.enable_input_require_grads()
        found = gradients(tiny, ids)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], atol=1e-5, rtol=1e-4)
    if policy == "full":
        tiny.gradient_checkpointing_disable()
        for name, each in gradients(tiny, ids).items():
            torch.testing.assert_close(each, found[name], atol=1e-4, rtol=1e-3)


class Texts(torch.utils.data.Dataset):
    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


@pytest.mark.slow
def test_trainer_in_bfloat16_learns_as_the_stock_model(tiny: Any, ids: torch.Tensor, tmp_path: Path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), bf16=True, use_cpu=True, max_steps=3, per_device_train_batch_size=2,
        save_strategy="no", report_to=[], logging_steps=1, learning_rate=1e-2, disable_tqdm=True, seed=0,
    )  # fmt: skip
    losses: list[list[float]] = []
    for policy in (None, "full", MERGING):
        model = copy.deepcopy(tiny)
        trainer = Trainer(model=model, args=arguments, train_dataset=Texts(ids))
        if policy is None:
            trainer.train()
        else:
            with hf.attach(model, policy):
                trainer.train()
        losses.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
    stock, full, merging = losses
    # bfloat16 has 8 bits: the losses of either agree to a few of its steps.
    assert full == pytest.approx(stock, rel=4 * torch.finfo(torch.bfloat16).eps)
    assert stock[-1] < stock[0]
    assert merging[-1] < merging[0]
