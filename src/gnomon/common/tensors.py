"""Tensors as arithmetic needs them: put together where they are sharded, and in enough bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["full_tensor", "wide"]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor (a collective on every rank), or the tensor itself.

    Parameters
    ----------
    tensor : Tensor or DTensor (...)

    Returns
    -------
    Tensor (...)
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64.

    Parameters
    ----------
    tensor : Tensor (...)

    Returns
    -------
    Tensor (...)

    Examples
    --------
    >>> wide(torch.ones(2, dtype=torch.bfloat16)).dtype, wide(torch.ones(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return tensor if tensor.dtype == torch.float64 else tensor.float()
