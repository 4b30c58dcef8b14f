"""How far the merged weight is moved: the equations of GGPO, Flat-LoRA and MGPO as functions of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gnomon.common.lora import product_inner, product_row_norms
from gnomon.common.tensors import wide
from gnomon.errors import MethodError

__all__ = [
    "GGPO",
    "MGPO",
    "ggpo_deviations",
    "gradient_norm",
    "gradient_row_norms",
    "merged_row_norms",
    "mgpo_factors",
    "next_average",
]

TINY = 1e-12
LARGEST_SCALE = 10.0


@dataclass(frozen=True)
class GGPO:
    """Random perturbations whose spread follows the rows of the merged weight and of its gradient.

    With ``beta=0`` and ``ramp="cosine"`` this is Flat-LoRA.

    Parameters
    ----------
    sigma : float, default 0.03
        Size against the norm of a row of the merged weight; 0 perturbs nothing. Flat-LoRA's value is 0.05.
    beta : float, default 0.01
        Weight of the squared gradient norm of a row beside the squared norm of the row, in [0, 1).
    ramp : {"none", "cosine"}, default "none"
        With "cosine" sigma rises from 0 at the first step as (1 - cos(pi t / T)) / 2.
    total_steps : int, optional
        T of the ramp, in optimizer steps. The callback takes it from the Trainer.

    Raises
    ------
    MethodError
        When a value is outside its range.

    Examples
    --------
    >>> GGPO(sigma=0.05, beta=0.0, ramp="cosine", total_steps=100).sigma_at(100)
    0.05
    """

    sigma: float = 0.03
    beta: float = 0.01
    ramp: Literal["none", "cosine"] = "none"
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise MethodError(f"sigma = {self.sigma}; it must be a number of 0 or more (the papers use 0.03 and 0.05).")
        _check_beta(self.beta)
        if self.ramp not in ("none", "cosine"):
            raise MethodError(f"ramp = {self.ramp!r}. Allowed: 'none', 'cosine'.")
        if self.total_steps is not None and self.total_steps < 1:
            raise MethodError(f"total_steps = {self.total_steps}; it must be at least 1.")

    def sigma_at(self, step: int) -> float:
        """Return sigma at an optimizer step, counted from 0."""
        if self.ramp == "none":
            return self.sigma
        if self.total_steps is None:
            raise MethodError("ramp = 'cosine' needs the length of training. Give total_steps.")
        return self.sigma * (1 - math.cos(math.pi * min(step, self.total_steps) / self.total_steps)) / 2


@dataclass(frozen=True)
class MGPO:
    """A perturbation along the optimizer's momentum, of a length that follows the gradient norm.

    Parameters
    ----------
    rho : float, default 0.05
        Length of the perturbation of a layer, before it is divided by the averaged gradient norm. The authors took
        0.05 for T5-base on GLUE and 0.01 for LLaMA-2-7B.
    beta : float, default 0.9
        Of the moving average of a layer's gradient norm, in [0, 1). The authors took 0.9 and 0.8.
    sign : {-1, 1}, default -1
        -1, the authors', looks ahead along the descent direction. +1 ascends, as SAM does.

    Raises
    ------
    MethodError
        When a value is outside its range.

    Examples
    --------
    >>> MGPO(rho=0.01, beta=0.8).sign
    -1
    """

    rho: float = 0.05
    beta: float = 0.9
    sign: Literal[-1, 1] = -1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise MethodError(
                f"rho = {self.rho}; it must be above 0 (the authors use 0.01 to 0.05). For plain LoRA leave the "
                "method out."
            )
        _check_beta(self.beta)
        if self.sign not in (-1, 1):
            raise MethodError(f"sign = {self.sign!r}. Allowed: -1 (look ahead, the authors'), 1 (ascend).")


def _check_beta(beta: float) -> None:
    if not 0 <= beta < 1:
        raise MethodError(f"beta = {beta}; it must be in [0, 1), 1 itself excluded.")


def merged_row_norms(
    weight: Float[Tensor, "out in"], b: Float[Tensor, "out r"], a: Float[Tensor, "r in"], scaling: float
) -> Float[Tensor, " out"]:
    """Return the norm of every row of W + s B A without forming the sum.

    Parameters
    ----------
    weight : Tensor (out, in)
    b, a : Tensor (out, r), (r, in)
    scaling : float
        s.

    Returns
    -------
    Tensor (out,)
        float32, or float64 where the weight is.

    Examples
    --------
    >>> merged_row_norms(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0]]), torch.tensor([[0.0, 1.0]]), 2.0)
    tensor([5.])
    """
    weight, b, a = wide(weight), wide(b), wide(a)
    b, a = b.to(weight.dtype), a.to(weight.dtype)
    cross = ((weight @ a.T) * b).sum(dim=1)
    square = torch.linalg.vector_norm(weight, dim=1).square() + 2 * scaling * cross
    return (square + (scaling * product_row_norms(b, a)).square()).clamp(min=0.0).sqrt()


def _stacked(
    b: Float[Tensor, "out r"], a: Float[Tensor, "r in"], b_part: Float[Tensor, "out r"], a_part: Float[Tensor, "r in"]
) -> tuple[Float[Tensor, "out r2"], Float[Tensor, "r2 in"]]:
    """Factors of ``B a_part + b_part A``: what moving B and A by the parts does to their product."""
    wide = torch.promote_types(torch.promote_types(b.dtype, b_part.dtype), torch.float32)
    left = torch.cat([b_part.to(wide), b.to(wide)], dim=1)
    return left, torch.cat([a.to(wide), a_part.to(wide)], dim=0)


def gradient_row_norms(
    b: Float[Tensor, "out r"],
    a: Float[Tensor, "r in"],
    b_grad: Float[Tensor, "out r"],
    a_grad: Float[Tensor, "r in"],
    scaling: float,
) -> Float[Tensor, " out"]:
    """Return the norm of every row of s (B g_A + g_B A), GGPO's stand-in for the gradient of the merged weight."""
    return abs(scaling) * product_row_norms(*_stacked(b, a, b_grad, a_grad))


def gradient_norm(
    b: Float[Tensor, "out r"],
    a: Float[Tensor, "r in"],
    b_grad: Float[Tensor, "out r"],
    a_grad: Float[Tensor, "r in"],
    scaling: float,
) -> Float[Tensor, ""]:
    """Return the Frobenius norm of s (B g_A + g_B A) without forming it.

    Examples
    --------
    >>> one = torch.ones(1, 1)
    >>> gradient_norm(one, one, 2 * one, 3 * one, 2.0)
    tensor(10.)
    """
    left, right = _stacked(b, a, b_grad, a_grad)
    return abs(scaling) * product_inner(left, right, left, right).clamp(min=0.0).sqrt()


def ggpo_deviations(
    weight_norms: Float[Tensor, " out"],
    gradient_norms: Float[Tensor, " out"] | None,
    sigma: float,
    beta: float,
    in_features: int,
) -> Float[Tensor, " out"]:
    """Return the standard deviation of the entries of every row of GGPO's perturbation.

    ``sigma / sqrt(n) * sqrt(||W'_i||^2 + beta ||grad W'_i||^2)``.

    Parameters
    ----------
    weight_norms : Tensor (out,)
        Norms of the rows of the merged weight.
    gradient_norms : Tensor (out,), optional
        Norms of the rows of its gradient at the previous step; None at the first.
    sigma, beta : float
    in_features : int
        n.

    Examples
    --------
    >>> ggpo_deviations(torch.tensor([3.0]), torch.tensor([4.0]), 0.2, 1.0, 4)
    tensor([0.5000])
    """
    square = weight_norms.square()
    if gradient_norms is not None and beta:
        square = square + beta * gradient_norms.to(square).square()
    return sigma / math.sqrt(in_features) * square.sqrt()


def mgpo_factors(
    b: Float[Tensor, "out r"],
    a: Float[Tensor, "r in"],
    b_momentum: Float[Tensor, "out r"],
    a_momentum: Float[Tensor, "r in"],
    scaling: float,
    rule: MGPO,
    average: Float[Tensor, ""] | None,
) -> tuple[Float[Tensor, "out r2"], Float[Tensor, "r2 in"], Bool[Tensor, ""]]:
    """Return MGPO's perturbation of one layer as two thin factors.

    The direction is v = s (m_B A + B m_A); the perturbation ``sign * rho * c * v / (||v|| + 1e-12)`` with c = 1 before
    there is an average gradient norm, else min(1 / (average + 1e-12), 10).

    Parameters
    ----------
    b, a : Tensor (out, r), (r, in)
    b_momentum, a_momentum : Tensor, as b and a
        First moments of an optimizer.
    scaling : float
        s.
    rule : MGPO
    average : Tensor (), optional
        Moving average of the layer's gradient norm.

    Returns
    -------
    left, right : Tensor (out, 2 r), (2 r, in)
        Their product is the perturbation; both are 0 where v is 0 or not finite.
    finite : Tensor () of bool
        Whether v is finite.
    """
    left, right = _stacked(b, a, b_momentum, a_momentum)
    norm = abs(scaling) * product_inner(left, right, left, right).clamp(min=0.0).sqrt()
    length: Tensor | float = rule.rho
    if average is not None:
        scale = (1 / (average.to(norm) + TINY)).clamp(max=LARGEST_SCALE)
        length = rule.rho * torch.where(torch.isfinite(average.to(norm)), scale, 1.0)
    finite = torch.isfinite(norm)
    moved = finite & (norm > TINY)
    factor = rule.sign * scaling * length / (norm + TINY)
    return torch.where(moved, left * factor, 0.0), torch.where(moved, right, 0.0), finite


def next_average(average: Float[Tensor, ""] | None, norm: Float[Tensor, ""], beta: float) -> Float[Tensor, ""]:
    """Return the moving average after one more gradient norm.

    The first finite norm is the average; a norm that is not finite changes nothing.

    Examples
    --------
    >>> next_average(torch.tensor(1.0), torch.tensor(2.0), 0.75)
    tensor(1.2500)
    """
    if average is None:
        return norm
    mixed = torch.where(torch.isfinite(average), beta * average + (1 - beta) * norm, norm)
    return torch.where(torch.isfinite(norm), mixed, average)
