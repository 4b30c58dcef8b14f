"""The tensors of a model in training: what a snapshot holds, in whole or as this rank's shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gnomon.errors import ModelError

__all__ = [
    "assign",
    "bare",
    "broadcast",
    "is_sharded",
    "local",
    "refuse_split",
    "settle",
    "shard",
    "snapshot_tensors",
    "whole",
    "world",
]


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def bare(model: nn.Module) -> nn.Module:
    """Take DDP and `torch.compile` wrappers off; a PEFT model stays one."""
    inner: Any = model
    while hasattr(inner, "_orig_mod") or isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    found: nn.Module = inner
    return found


def refuse_split(model: nn.Module) -> None:
    """Refuse models whose parameters are flattened (FSDP version 1) or empty between uses (DeepSpeed ZeRO-3)."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "FSDP version 1 flattens the weights, so they cannot be averaged in place. Use fsdp_version: 2, or save "
            "consolidated checkpoints and call average_checkpoints."
        )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ModelError(
            "DeepSpeed ZeRO-3 takes the weights apart, so they cannot be averaged in place. Save consolidated "
            "checkpoints (stage3_gather_16bit_weights_on_model_save, zero_to_fp32.py) and call average_checkpoints."
        )


def settle(model: nn.Module) -> None:
    """Bring FSDP2 modules back to their shards: a forward pass without a backward one leaves some gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def snapshot_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters in training and the buffers that are saved, by name; tied ones once.

    A parameter that is frozen stays what it is, so its average need not be kept.
    """
    settle(model)
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return dict(found)


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether any is divided among ranks."""
    return any(isinstance(t, DTensor) for t in tensors.values())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(like: Tensor, part: Tensor) -> Tensor:
    """Return the whole tensor of which `part` is this rank's shard as `like` is divided, on the CPU; all ranks call."""
    if not isinstance(like, DTensor):
        return part
    device = like.to_local().device
    made = DTensor.from_local(
        part.to(device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made.full_tensor().cpu()


def shard(like: Tensor, full: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor that every rank holds."""
    if not isinstance(like, DTensor):
        return full
    device = like.to_local().device
    divided = distribute_tensor(full.to(device), like.device_mesh, like.placements, src_data_rank=None)
    return divided.to_local().cpu()


@torch.no_grad()
def assign(tensor: Tensor, part: Tensor) -> None:
    """Write this rank's part into a tensor of the model, in its own dtype."""
    local(tensor).copy_(part)


@torch.no_grad()
def broadcast(tensors: Mapping[str, Tensor]) -> None:
    """Give every rank the first one's values of tensors that are not divided."""
    for tensor in tensors.values():
        if not isinstance(tensor, DTensor):
            dist.broadcast(tensor.data, src=0)
