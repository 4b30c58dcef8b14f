"""Writes a factor into the weights of a norm or a linear layer, exactly: in float32 at least, rounded once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import set_weight, weight_of
from gnomon.errors import ModelError

__all__ = ["check_multipliable", "gain_offset", "multiply_output", "untouched_gain"]

Factor = float | Tensor


def gain_offset(norm: nn.Module, name: str) -> float:
    """Return c such that the norm multiplies by ``c + weight``: 0 for Llama and LayerNorm, 1 for Gemma.

    Found by running a copy of the norm with weight 0 and 1 on four numbers a feature.

    Parameters
    ----------
    norm : nn.Module
    name : str
        Its name, for messages.

    Raises
    ------
    ModelError
        When the norm has no gain, other parameters than ``weight`` and ``bias``, or uses them in another way.
    """
    parameters = dict(norm.named_parameters(recurse=False))
    if "weight" not in parameters or set(parameters) - {"weight", "bias"}:
        has = ", ".join(parameters) or "no parameters"
        raise ModelError(
            f"The norm {name!r} ({type(norm).__name__}) has {has}, so a scale cannot be written into its gain. "
            "Allowed: norms with a weight and perhaps a bias. Keep the model as it is and save it with "
            "gnomon.save_model."
        )
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.zeros(p.shape, dtype=torch.float32), requires_grad=False) for p in parameters.values()
    }
    probe = copy.deepcopy(norm, memo)
    width = parameters["weight"].shape[-1]
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        zero = probe.forward(x)
        probe.get_parameter("weight").fill_(1.0)
        one = probe.forward(x)
    for offset in (0.0, 1.0):
        unit = one / (1.0 + offset)
        if torch.allclose(zero, offset * unit, atol=1e-5) and not torch.allclose(unit, torch.zeros(())):
            return offset
    raise ModelError(
        f"The norm {name!r} ({type(norm).__name__}) does not multiply by its weight, nor by 1 + weight, so a scale "
        "cannot be written into it. Allowed: RMSNorm and LayerNorm of the Llama, GPT-2 or Gemma kind."
    )


def untouched_gain(norm: nn.Module) -> bool:
    """Return whether a norm's weight is still as it was initialised: all ones, or all zeros (Gemma's 1 + w)."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.is_meta:
        return True
    first = float(weight.detach().flatten()[0])
    return first in (0.0, 1.0) and bool((weight == first).all())


def check_multipliable(module: nn.Module, name: str) -> None:
    """Refuse a module whose output no factor can be written into; see `multiply_output`."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        gain_offset(module, name)


@torch.no_grad()
def multiply_output(module: nn.Module, factor: Factor, name: str) -> None:
    """Change the weights of `module` in place so that its output is `factor` times what it was.

    Parameters
    ----------
    module : nn.Module
        A norm with a gain, an ``nn.Linear`` or a ``Conv1D``.
    factor : float or Tensor of shape (features,) or (1,)
    name : str
        Its name, for messages.

    Raises
    ------
    ModelError
        When the module is none of these.
    """
    bias: Tensor | None = getattr(module, "bias", None)
    if isinstance(module, (nn.Linear, Conv1D)):
        column = factor.reshape(-1, 1) if isinstance(factor, Tensor) else factor
        set_weight(module, _times(weight_of(module), column))
    else:
        offset = gain_offset(module, name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        weight.copy_(_times(_wide(weight) + offset, factor) - offset)
    if bias is not None:
        bias.copy_(_times(bias, factor))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _times(tensor: Tensor, factor: Factor) -> Tensor:
    wide = _wide(tensor)
    return wide * (factor.to(wide.device, wide.dtype) if isinstance(factor, Tensor) else factor)
