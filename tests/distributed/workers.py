"""What each of two processes does; every process starts a function of this module by its name."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import memkit
from memkit import hf
from memkit.lm import MemoryLM, load_model_spec, split_heads, split_text
from tests.hf.tiny import randomised, tiny_config

SIZES = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8}
POLICY = {"from": "kvm-sqrt-16", "chunker.size": 8, "growth.factor": 1.0, "growth.floor": 8}
TEXT = {"steps": 4, "length": 48, "warmup": 0, "log_every": 1, "save_every": 2}


SMALL = {"chunker.size": 8, "growth.factor": 1.0, "growth.floor": 8, "window.chunks": 2, "heads": {}}
KINDS: dict[str, dict[str, Any]] = {
    "layer-norm": {},
    "unit": {"qk_norm": "unit", "value_residual": "linear", "policy": {**POLICY, "merging.of": "values"}},
    "grouped": {"kv_heads": 2, "policy": {"from": "untrained-observed-sqrt", **SMALL}},
}
"""Of mixers: what they change."""


def made(changes: dict[str, Any] | None = None) -> MemoryLM:
    """The model, the same in every process, and away from its start, at which most gradients are 0."""
    torch.manual_seed(0)
    fields = {"policy": POLICY, **(changes or {})}
    fields = {f"layers.default.{name}": each for name, each in fields.items()}
    heads = 4 if changes is not None else SIZES["heads"]
    model = MemoryLM(load_model_spec("tiny-kvm-sqrt", {**SIZES, "heads": heads, **fields}))
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


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, of parameters that may be split."""
    each: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in each.items()}


def heads_split(kind: str) -> dict[str, Any]:
    """Tensor parallel: each process has half of the heads. Then a text goes on where it stopped."""
    model = split_heads(made(KINDS[kind]), init_device_mesh("cpu", (2,)))
    loss = model.loss(batch())
    loss.backward()
    with torch.no_grad():
        first, memory = model(batch()[:, :37])
        second, _ = model(batch()[:, 37:], memory)
    return {"loss": loss.detach(), "gradients": gradients(model), "logits": torch.cat((first, second), 1)}


def saved(folder: str) -> dict[str, Any]:
    """Models whose heads, or parameters, are split are written whole, and there for every process once it goes on."""
    mesh = init_device_mesh("cpu", (2,))
    sharded = made()
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    result: dict[str, Any] = {}
    for name, model in {"heads": split_heads(made(KINDS["unit"]), mesh), "sharded": sharded}.items():
        path = Path(folder) / f"saved {name}"
        model.save_pretrained(path)
        there = [None, None]
        distributed.all_gather_object(there, memkit.load_model(path).state_dict())
        result[name] = there
    return result


def text_split(kind: str) -> dict[str, Any]:
    """Each process has its stretch of the text, and heads are exchanged; then a text goes on where it stopped."""
    model = split_text(made(KINDS[kind]))
    rank = distributed.get_rank()
    loss = model.loss(batch().chunk(2, 1)[rank])
    loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    with torch.no_grad():
        found, memory = [], None
        for stretch in (batch()[:, :38], batch()[:, 38:]):
            logits, memory = model(stretch.chunk(2, 1)[rank], memory)
            every = [torch.empty_like(logits) for _ in range(2)]
            distributed.all_gather(every, logits.contiguous())
            found += every
    return {"loss": averaged(loss), "gradients": gradients(model), "logits": torch.cat(found, 1)}


def refused() -> dict[str, Any]:
    """What is said of what cannot be split."""
    mesh = init_device_mesh("cpu", (2,))
    three = {**SIZES, "width": 48, "heads": 3}
    uneven = {"layers.default.policy": {**POLICY, "heads": {"ratios": (1.5, 0.5)}}}
    specs = {"rwkv": ("tiny-rwkv7", SIZES), "three": ("tiny-kvm-sqrt", three), "uneven": ("tiny-kvm-sqrt", uneven)}
    said: dict[str, Any] = {}
    for name, (model, changes) in specs.items():
        for split in (split_text, lambda model: split_heads(model, mesh)):
            try:
                split(MemoryLM(load_model_spec(model, changes)))
            except memkit.InputError as error:
                said.setdefault(name, []).append(str(error))
    model = split_text(made())
    calls = {"unequal": lambda: model(batch()[:, : 20 + distributed.get_rank()])}
    calls["padded"] = lambda: model(batch(), lengths=[3, 3, 3, 3])
    calls["packed"] = lambda: model.loss(batch(), documents=batch())
    for name, call in calls.items():
        try:
            call()
        except memkit.InputError as error:
            said[name] = str(error)
    return said


ALONE = (data_parallel, fully_sharded, attached_data_parallel, attached_fully_sharded, refused)


def everything(folder: str) -> dict[str, Any]:
    """All of the above."""
    kinds = {f"{each.__name__} {kind}": each(kind) for each in (heads_split, text_split) for kind in KINDS}
    return kinds | {each.__name__: each() for each in ALONE} | {"saved": saved(folder)}


if __name__ == "__main__":
    folder = sys.argv[1]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    result = everything(folder)
    if os.environ["RANK"] == "0":
        torch.save(result, Path(folder) / "found.pt")
    distributed.destroy_process_group()
