"""Lets a LoRA layer compute with a moved base weight, without ever writing to that weight.

Three ways, all hung on the base layer inside PEFT's LoRA layer and taken off again:

- `swap_weight`: the base layer sees another tensor, W + eps, during its own forward pass.
- `add_low_rank`: a perturbation of low rank is added to the base layer's output through its two factors.
- `add_noise`: noise is drawn from a seed inside the forward pass, and once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from gnomon.common.lora import LoraPair

__all__ = ["Gate", "Noise", "Undo", "add_low_rank", "add_noise", "draw", "is_plain", "swap_weight"]

Undo = Callable[[], None]
Gate = Callable[[], bool]


def is_plain(base: nn.Module) -> bool:
    """Return whether a base layer is an ordinary linear layer on a floating-point weight (not quantised)."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(base, (nn.Linear, Conv1D)):
        return False
    ordinary = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, DTensor)
    return ordinary and weight.is_floating_point() and weight.dtype.itemsize > 1


def draw(seed: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "out in"]:
    """Return standard normal numbers that a seed gives; a private generator, the same numbers at every call."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(rows, columns, dtype=dtype, device=device).normal_(generator=generator)


@dataclass(frozen=True, eq=False)
class Noise:
    """The random perturbation of one layer at one step: a seed and the spread of every row.

    Parameters
    ----------
    seed : int
    deviations : Tensor (out,)
        Standard deviation of the entries of a row.
    in_features : int
    """

    seed: int
    deviations: Tensor
    in_features: int

    def matrix(self) -> Float[Tensor, "out in"]:
        """Return eps, in the dtype of the deviations (float32 or float64)."""
        spread = self.deviations
        return draw(self.seed, len(spread), self.in_features, spread.dtype, spread.device).mul_(spread[:, None])

    def added_to(self, weight: Float[Tensor, "out in"], dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return W + eps, added in the dtype of eps and then rounded to `dtype`."""
        return self.matrix().add_(weight).to(dtype)


class _LowRank(torch.autograd.Function):
    """y + x right^T left^T; the gradient goes to x and y, the factors are constants."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.of_x = (x.shape, x.dtype)
        with torch.autocast(device_type=y.device.type, enabled=False):
            inner = x.reshape(-1, x.shape[-1]).to(y.dtype) @ right.T
            return torch.addmm(y.reshape(-1, y.shape[-1]), inner, left.T).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        left, right = ctx.saved_tensors
        shape, dtype = ctx.of_x
        to_x = None
        if ctx.needs_input_grad[1]:
            to_x = (grad.reshape(-1, grad.shape[-1]) @ left @ right).view(shape).to(dtype)
        return grad, to_x, None, None


class _LowRankLinear(torch.autograd.Function):
    """x (W + left right)^T + bias without the sum; as `_LowRank`, but nothing is written twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        dtype = left.dtype
        ctx.save_for_backward(weight, left, right)
        ctx.of_x, ctx.bias = x.dtype, bias
        with torch.autocast(device_type=x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            y = linear(flat, weight.to(dtype), None if bias is None else bias.to(dtype))
            return y.addmm_(flat @ right.T, left.T).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        weight, left, right = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = (flat @ weight.to(flat.dtype)).addmm_(flat @ left, right)
            to_x = to_x.view(*grad.shape[:-1], right.shape[1]).to(ctx.of_x)
        if ctx.needs_input_grad[2]:
            to_bias = flat.sum(dim=0).to(ctx.bias.dtype)
        return to_x, None, to_bias, None, None


class _NoisyLinear(torch.autograd.Function):
    """x (W + eps)^T + bias with eps from a seed, forward and backward; W + eps is kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, noise: Noise, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.noise, ctx.of_x, ctx.dtype, ctx.bias = noise, x.dtype, dtype, bias
        with torch.autocast(device_type=x.device.type, enabled=False):
            moved = noise.added_to(weight, dtype)
            return linear(x.to(dtype), moved, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        to_x = (grad @ ctx.noise.added_to(weight, ctx.dtype)).to(ctx.of_x) if ctx.needs_input_grad[0] else None
        to_bias = None
        if ctx.needs_input_grad[2]:
            to_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias.dtype)
        return to_x, None, to_bias, None, None


class _AddedNoise(torch.autograd.Function):
    """y + x eps^T with eps from a seed, forward and backward; for base layers that compute in their own way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, noise: Noise) -> Tensor:
        ctx.noise, ctx.of_x = noise, (x.shape, x.dtype)
        with torch.autocast(device_type=y.device.type, enabled=False):
            eps = noise.matrix().to(y.dtype)
            flat = x.reshape(-1, x.shape[-1]).to(y.dtype)
            return torch.addmm(y.reshape(-1, y.shape[-1]), flat, eps.T).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        shape, dtype = ctx.of_x
        to_x = None
        if ctx.needs_input_grad[1]:
            eps = ctx.noise.matrix().to(grad.dtype)
            to_x = (grad.reshape(-1, grad.shape[-1]) @ eps).view(shape).to(dtype)
        return grad, to_x, None


def swap_weight(pair: LoraPair, moved: Float[Tensor, "out in"], gate: Gate) -> Undo:
    """Let the base layer compute with `moved` while the gate is open; its own weight is not touched."""
    base = pair.layer.get_base_layer()
    stored = moved.T.contiguous() if pair.layer.fan_in_fan_out else moved
    other = nn.Parameter(stored, requires_grad=False)
    own: list[Any] = []

    def before(module: nn.Module, args: Any) -> None:
        if gate():
            own.append(module._parameters["weight"])
            module._parameters["weight"] = other

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if own:
            module._parameters["weight"] = own.pop()

    handles = [base.register_forward_pre_hook(before), base.register_forward_hook(after, always_call=True)]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


def add_low_rank(pair: LoraPair, left: Float[Tensor, "out q"], right: Float[Tensor, "q in"], gate: Gate) -> Undo:
    """Let the base layer compute with ``W + left right`` while the gate is open, without a matrix of that size."""
    cast_to: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    base = pair.layer.get_base_layer()

    def factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in cast_to:
            cast_to[dtype] = (left.to(dtype), right.to(dtype))
        return cast_to[dtype]

    if not _is_replaceable(base):

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return cast(Tensor, _LowRank.apply(output, args[0], *factors(output.dtype))) if gate() else None

        return cast(Undo, base.register_forward_hook(after).remove)

    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return cast(Tensor, _LowRankLinear.apply(x, pair.weight, base.bias, *factors(dtype)))

    return _replace_forward(base, forward, gate)


def add_noise(pair: LoraPair, make: Callable[[], Noise], gate: Gate) -> Undo:
    """Let the base layer compute with noise on its weight while the gate is open.

    Parameters
    ----------
    pair : LoraPair
    make : callable
        Gives the layer's noise. It is called inside the forward pass, where FSDP has put the weight together.
    gate : callable

    Notes
    -----
    On an ordinary linear layer the noise is added to the weight, so there is one matrix product, as without noise.
    Where the base layer computes in another way (quantised, or wrapped by accelerate), the noise has a product of its
    own.
    """
    base = pair.layer.get_base_layer()
    if not _is_replaceable(base):

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            return cast(Tensor, _AddedNoise.apply(output, args[0], make())) if gate() else None

        return cast(Undo, base.register_forward_hook(after).remove)

    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return cast(Tensor, _NoisyLinear.apply(x, pair.weight, base.bias, make(), dtype))

    return _replace_forward(base, forward, gate)


def _is_replaceable(base: nn.Module) -> bool:
    """Whether the forward pass of a base layer is x W^T + bias and nothing else."""
    return is_plain(base) and type(base) in (nn.Linear, Conv1D) and "forward" not in base.__dict__


def _replace_forward(base: nn.Module, forward: Callable[[Tensor, torch.dtype], Tensor], gate: Gate) -> Undo:
    """Call `forward` in place of the base layer's own while the gate is open; hooks around it stay."""
    own = base.forward

    def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not gate():
            return own(x, *args, **kwargs)
        kind = x.device.type
        return forward(x, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)

    base.forward = chosen

    def undo() -> None:
        base.__dict__.pop("forward", None)

    return undo
