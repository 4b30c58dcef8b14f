"""Adapters in few bits: A and B rounded to a grid, with the rounding error of each input passed on to the next."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["check_bits", "quantise_adapter"]

_DAMPING = 0.01
_BLOCK = 128


def _grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (rows, 1) of an asymmetric grid that holds zero and the range of each row."""
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale)


def _round(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * (torch.clamp(torch.round(values / scale) + zero, 0, 2**bits - 1) - zero)


def _nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    parts = [_round(part, *_grid(part, bits), bits) for part in weight.split(group, dim=1)]
    return torch.cat(parts, dim=1)


def _with_feedback(weight: Tensor, hessian: Tensor, bits: int, group: int) -> Tensor:
    """GPTQ: round column by column; each column's error is made good by the columns still to come."""
    work = weight.double().clone()
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    diagonal.add_(_DAMPING * diagonal.mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    work[:, dead] = 0.0
    rounded = torch.zeros_like(work)
    scale = zero = work.new_zeros(work.shape[0], 1)
    for start in range(0, work.shape[1], _BLOCK):
        stop = min(start + _BLOCK, work.shape[1])
        errors = work.new_zeros(work.shape[0], stop - start)
        for column in range(start, stop):
            if column % group == 0:
                scale, zero = _grid(work[:, column : column + group], bits)
            value = work[:, column : column + 1]
            rounded[:, column : column + 1] = _round(value, scale, zero, bits)
            error = (value - rounded[:, column : column + 1]) / upper[column, column]
            work[:, column + 1 : stop] -= error * upper[column, column + 1 : stop]
            errors[:, column - start] = error[:, 0]
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded.to(weight.dtype)


def check_bits(bits: int, group_size: int) -> None:
    """Refuse a number of bits or a group size that adapters cannot be rounded with."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise MethodError(f"adapter_bits = {bits!r}: a whole number from 2 to 8 is allowed (the paper uses 4 and 3).")
    if group_size != -1 and group_size < 1:
        raise MethodError(f"adapter_group_size = {group_size}: at least 1, or -1 for the whole row, is allowed.")


def quantise_adapter(
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    gram: Float[Tensor, "in in"] | None,
    bits: int,
    *,
    group_size: int = 128,
    method: Literal["gptq", "rtn"] = "gptq",
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Round an adapter's matrices to `bits` bits; the values stay floating-point numbers that lie on the grid.

    A is rounded for its inputs' statistics C, then B for those of its own inputs, A C A^T. The grid is asymmetric
    and holds zero: one scale and zero point for each row and group of inputs.

    Parameters
    ----------
    A : Tensor of shape (r, in)
    B : Tensor of shape (out, r)
    gram : Tensor of shape (in, in) or None
        C = X^T X; not used by "rtn".
    bits : int
        From 2 to 8; the paper uses 4 and 3.
    group_size : int, default 128
        Inputs that share a scale; -1 is the whole row.
    method : {"gptq", "rtn"}, default "gptq"
        Rounding with error feedback, or to the nearest grid point.

    Returns
    -------
    A, B : Tensors of the same shapes and dtypes

    Raises
    ------
    MethodError
        When bits, group size or method are out of range, or "gptq" has no statistics.

    Examples
    --------
    >>> A, B = quantise_adapter(torch.randn(2, 8), torch.randn(4, 2), torch.eye(8), bits=4)
    >>> len(A[0].unique()) <= 16
    True
    """
    check_bits(bits, group_size)
    if method not in ("gptq", "rtn"):
        raise MethodError(f"adapter rounding = {method!r}: 'gptq' or 'rtn' is allowed.")
    if method == "gptq" and gram is None:
        raise MethodError("Rounding an adapter with 'gptq' needs gram = X^T X of the layer's inputs; 'rtn' does not.")
    group_a, group_b = (A.shape[1], B.shape[1]) if group_size == -1 else (group_size, group_size)
    if method == "rtn" or gram is None:
        return _nearest(A, bits, group_a), _nearest(B, bits, group_b)
    A = _with_feedback(A, gram, bits, group_a)
    wide = A.double()
    return A, _with_feedback(B, wide @ gram.double() @ wide.T, bits, group_b)
