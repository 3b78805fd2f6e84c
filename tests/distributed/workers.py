"""What each of two processes does; every process starts a function of this module by its name."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import memkit
from memkit import hf
from memkit.lm import MemoryLM, load_model_spec
from tests.hf.tiny import randomised, tiny_config

SIZES = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8}
POLICY = {"from": "kvm-sqrt-16", "chunker.size": 8, "growth.factor": 1.0, "growth.floor": 8}
TEXT = {"steps": 4, "length": 48, "warmup": 0, "log_every": 1, "save_every": 2}


def made() -> MemoryLM:
    """The model, the same in every process, and away from its start, at which most gradients are 0."""
    torch.manual_seed(0)
    model = MemoryLM(load_model_spec("tiny-kvm-sqrt", {**SIZES, "layers.default.policy": POLICY}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch() -> Tensor:
    """Four rows of 60 tokens."""
    return torch.randint(256, (4, 60), generator=torch.Generator().manual_seed(1))


class Loss(nn.Module):
    """The loss as a module's call, which is what DDP sees."""

    def __init__(self, model: MemoryLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids)


def rows() -> Tensor:
    """This process's half of the batch."""
    return batch().chunk(2)[distributed.get_rank()]


def averaged(loss: Tensor) -> Tensor:
    """The mean over processes."""
    total = loss.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def data_parallel() -> dict[str, Any]:
    """DDP: gradients are averaged."""
    model = made()
    parallel = DistributedDataParallel(Loss(model))
    loss = parallel(rows())
    loss.backward()
    return {"loss": averaged(loss), "gradients": {name: each.grad for name, each in model.named_parameters()}}


def fully_sharded() -> dict[str, Any]:
    """FSDP2: every block's parameters are split over processes, and gathered for its call."""
    model = made()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    loss = model.loss(rows())
    loss.backward()
    split: dict[str, Any] = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": averaged(loss), "gradients": {name: each.full_tensor() for name, each in split.items()}}


STOCK_POLICY = memkit.load_policy("untrained-observed", {"chunker.size": 8, "window.chunks": 2, "growth.slots": 8})


def stock() -> LlamaForCausalLM:
    """A stock model, the same in every process."""
    return randomised(LlamaForCausalLM(tiny_config(vocab_size=256)))


class StockLoss(nn.Module):
    """The same for a stock model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, labels=ids).loss


def attached_data_parallel() -> dict[str, Any]:
    """A stock model under a policy, with DDP around it."""
    model = stock()
    parallel = DistributedDataParallel(StockLoss(model))
    with hf.attach(model, STOCK_POLICY):
        loss = parallel(rows())
        loss.backward()
    return {"loss": averaged(loss), "gradients": {name: each.grad for name, each in model.named_parameters()}}


def attached_fully_sharded() -> dict[str, Any]:
    """A stock model under a policy, its layers' parameters split over processes before it is attached and after."""
    model = stock()
    with hf.attach(model, STOCK_POLICY):
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        attached_before = StockLoss(model)(rows()).detach()
    with hf.attach(model, STOCK_POLICY):
        loss = StockLoss(model)(rows())
        loss.backward()
    torch.testing.assert_close(attached_before, loss.detach())
    split: dict[str, Any] = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": averaged(loss), "gradients": {name: each.full_tensor() for name, each in split.items()}}


FOUND_BY = {
    each.__name__: each for each in (data_parallel, fully_sharded, attached_data_parallel, attached_fully_sharded)
}
"""What there is to find, by name."""


def trainer(folder: str) -> dict[str, Any]:
    """`train` as accelerate launches it: two rows for each process."""
    from memkit.training import TrainingSpec, train

    found = train(
        "tiny-kvm-sqrt",
        Path(folder) / "two",
        text=[Path(folder) / "text.txt"],
        settings=TrainingSpec(**TEXT, batch=2),
        overrides=SIZES,
    )
    return {"losses": found.losses}


if __name__ == "__main__":
    name, folder = sys.argv[1:3]
    torch.set_num_threads(1)
    if name == "trainer":
        result = trainer(folder)
    else:
        distributed.init_process_group("gloo")
        result = FOUND_BY[name]()
    if os.environ["RANK"] == "0":
        torch.save(result, Path(folder) / f"{name}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()
