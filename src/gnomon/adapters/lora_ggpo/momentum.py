"""Finds the first moment that an optimizer keeps for a LoRA factor, and refuses optimizers that keep none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gnomon.common.quantized_state import dequantize
from gnomon.common.tensors import full_tensor
from gnomon.errors import MethodError

__all__ = ["check_optimizer", "full", "momentum", "set_momentum", "unwrapped"]

_NAMES = ("exp_avg", "momentum_buffer")
_USABLE = (
    "MGPO moves along the optimizer's momentum: take AdamW, Adam, SGD(momentum=0.9) or bitsandbytes' AdamW, or use "
    "GGPO, which needs none."
)


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside accelerate's wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise MethodError(
            f"the optimizer is a {type(optimizer).__name__}. Give the torch.optim.Optimizer that trains the adapter."
        )
    return optimizer


def full(x: Tensor) -> Tensor:
    """Return a tensor without its graph, put together where it is sharded (a collective call)."""
    return full_tensor(x.detach())


def _group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any] | None:
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


def check_optimizer(optimizer: Optimizer, parameters: dict[str, Tensor], need_momentum: bool) -> None:
    """Refuse what can be seen to be wrong before the first step.

    Parameters
    ----------
    optimizer : Optimizer
    parameters : dict of str to Tensor
        The trained factors.
    need_momentum : bool

    Raises
    ------
    MethodError
        When a factor is in none of the groups, or its group keeps no momentum or a projected one.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        group = groups.get(id(parameter))
        if group is None:
            raise MethodError(
                f"{name} is not among the optimizer's parameters. Build the optimizer from this model after the "
                "adapter was attached (and after FSDP sharded it)."
            )
        if not need_momentum:
            continue
        kind = type(optimizer).__name__
        if group.get("rank") is not None or "proj_type" in group or "projector" in group:
            raise MethodError(f"{kind} keeps the momentum of {name} projected to a lower rank. {_USABLE}")
        plain_sgd = "momentum" in group and "betas" not in group and not group["momentum"]
        plain_adafactor = "beta2_decay" in group or ("decay_rate" in group and group.get("beta1") is None)
        if plain_sgd or plain_adafactor:
            raise MethodError(f"{kind} with these options keeps no momentum. {_USABLE}")


def set_momentum(optimizer: Optimizer, mu: float) -> None:
    """Set the decay of the first moment (beta1 of Adam, momentum of SGD) in every group.

    Raises
    ------
    MethodError
        When mu is outside [0, 1) or the groups have no such option.
    """
    if not 0 <= mu < 1:
        raise MethodError(f"mu = {mu}; it must be in [0, 1): beta1 of AdamW (the authors use 0.9 and 0.8).")
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (mu, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = mu
        else:
            raise MethodError(
                f"{type(optimizer).__name__} has neither betas nor momentum, so mu = {mu} has no place. Leave mu out."
            )


def momentum(optimizer: Optimizer, parameter: Tensor, name: str, stepped: bool) -> Tensor | None:
    """Return the first moment of a parameter in its own shape, in full precision; None before its first step.

    Parameters
    ----------
    optimizer : Optimizer
    parameter : Tensor
    name : str
        For messages.
    stepped : bool
        Whether the optimizer has made a step, after which a moment must exist.

    Raises
    ------
    MethodError
        When the optimizer keeps no momentum, or one in another shape or an unknown format.
    """
    state = optimizer.state.get(parameter, {})
    kind = type(optimizer).__name__
    found: Any = None
    if "exp_avg_codes" in state:
        found = dequantize(state["exp_avg_codes"], state["exp_avg_absmax"], parameter.shape)
    elif "state1" in state:
        found = _of_bitsandbytes(state)
    else:
        found = next((state[key] for key in _NAMES if state.get(key) is not None), None)
    if found is None:
        if state and stepped:
            raise MethodError(
                f"{kind} keeps no momentum of {name} (its state: {', '.join(map(str, state))}). {_USABLE}"
            )
        return None
    if not (type(found) in (Tensor, torch.nn.Parameter) or isinstance(found, DTensor)) or not found.is_floating_point():
        raise MethodError(
            f"{kind} keeps the momentum of {name} as {type(found).__name__} of {found.dtype}, which is not understood. "
            f"{_USABLE}"
        )
    if found.shape != parameter.shape:
        raise MethodError(
            f"{kind} keeps the momentum of {name} in the shape {tuple(found.shape)}, not {tuple(parameter.shape)}: "
            f"projected or flattened. {_USABLE} Under FSDP use version 2 (fully_shard)."
        )
    return full(found)


def _of_bitsandbytes(state: dict[str, Any]) -> Any:
    moment: Tensor = state["state1"]
    if moment.dtype != torch.uint8:
        return moment
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(moment, absmax=state["absmax1"], code=state["qmap1"], blocksize=256)
