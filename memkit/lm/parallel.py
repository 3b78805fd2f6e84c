"""A model whose heads, or whose texts, are split over processes.

Attention's heads never see each other, so both are exact: split heads are tensor parallel (PyTorch's DTensor), in which
every process has all tokens and some heads of every layer; a split text is exchanged around attention, heads for tokens
(all-to-all), so that every process has its stretch of the text everywhere else. PyTorch's own context parallel hands
keys around instead, which is wrong for a memory: it must read a text from its beginning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from memkit.attention import MemoryAttention
from memkit.errors import InputError
from memkit.lm.mixers import AttentionMixer
from memkit.lm.model import Block, MemoryLM
from memkit.lm.parts import LowRank, TokenShift, ValueResidual
from memkit.parameters import PolicyParameters
from memkit.processes import HeadExchange

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["split_heads", "split_text"]


def split_heads(model: MemoryLM, mesh: DeviceMesh) -> MemoryLM:
    """Split every layer's heads and its MLP over the processes of a mesh of one dimension (tensor parallel), in place.

    Parameters of layers become DTensors: projections split by heads, the MLP by hidden channels, what belongs to a head
    with it, what all heads share copied. Embeddings, the norms around layers and the head stay whole on each process.
    Each process gives the model the same ids and gets the same logits, and a memory of its own heads.

    Raises `InputError` for heads that the processes do not divide, and for what is not attention with equal heads.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    if mesh.ndim != 1:
        raise InputError(f"heads are split over one dimension of a mesh, got {mesh.ndim}; give mesh['name']")
    blocks, processes = _blocks(model), mesh.size()
    for block in blocks:
        hidden = block.mlp.up.out_features
        if hidden % processes:
            raise InputError(f"the MLP's {hidden} channels must be a multiple of the {processes} processes")
        _attention(block, processes)
    for block in blocks:
        parallelize_module(block, mesh, _plan(block))
        for module in block.mixer.modules():
            for name, along in _of_heads(module).items():
                _distribute(module, name, mesh, along)
    return model


def split_text(model: MemoryLM, group: distributed.ProcessGroup | None = None) -> MemoryLM:
    """From now on each process gives the model its stretch of each text, in the order of ranks, all equally long.

    Logits are those of the stretch; the mean of `loss` over processes is the loss of the whole text, and the mean of
    gradients (as DDP takes it) its gradient. Every process has all parameters. Each layer exchanges heads for tokens
    before attention, and back after it. Texts have no padding and are not packed.

    group: of `torch.distributed`; left out, all processes. Raises `InputError` for heads that the processes do not
    divide, and for what is not attention with equal heads.
    """
    exchange = HeadExchange(group)
    for attention in [_attention(block, exchange.size) for block in _blocks(model)]:
        attention.exchange = exchange
    model.exchange = exchange
    return model


def _blocks(model: MemoryLM) -> list[Block]:
    if not isinstance(model, MemoryLM):
        raise InputError(f"model must be a MemoryLM, got {type(model).__name__}")
    return [block for block in model.blocks if isinstance(block, Block)]


def _attention(block: Block, processes: int) -> MemoryAttention:
    """A block's attention, whose heads so many processes can share."""
    mixer = block.mixer
    if not isinstance(mixer, AttentionMixer):
        raise InputError(f"heads are split in attention alone, got a layer of {type(mixer).__name__}")
    attention = mixer.attention
    if attention.heads % processes or attention.kv_heads % processes:
        raise InputError(
            f"heads must be a multiple of the {processes} processes, got {attention.heads} of queries and "
            f"{attention.kv_heads} of keys and values"
        )
    if attention.policy.head_ratios is not None:
        raise InputError("heads must have as many rows as each other where they are split, got a head profile")
    return attention


def _plan(block: Block) -> dict[str, ParallelStyle]:
    """What is done to which projection of a block."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    projections = {f"mixer.attention.{name}" for name in ("query", "key", "value", "gate")}
    split = {*projections, "mixer.residual.gate.up", "mlp.up"}
    joined = {"mixer.attention.output", "mlp.down"}
    return {
        name: ColwiseParallel() if name in split else RowwiseParallel()
        for name, module in block.named_modules()
        if name in split | joined and isinstance(module, nn.Linear)
    }


def _of_heads(module: nn.Module) -> dict[str, bool]:
    """A module's own parameters that act on some heads: whether each is split along them, or the same for all."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    match module:
        case PolicyParameters():
            return {name: name.startswith("query_scale") for name in own}
        case MemoryAttention() | TokenShift() | LowRank():
            return dict.fromkeys(own, True)
        case ValueResidual() | nn.LayerNorm():
            return dict.fromkeys(own, False)
        case _:
            return {}


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, along: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    parameter = getattr(module, name)
    with torch.no_grad():
        split = distribute_tensor(parameter, mesh, [Shard(0) if along else Replicate()])
    module.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))
