"""Fira's arithmetic on one matrix: norm-based scaling and the norm-growth limiter, as functions of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.common.projection import LEFT, energy_resolution

__all__ = ["Scaled", "limit_growth", "norm_based_scaling", "scaling_factor"]

_TINY_NORM = 1e-6  # below it the remembered norm says nothing: the limiter starts anew


class Scaled(NamedTuple):
    """What one step adds to a weight, in two terms, and what the limiter remembers.

    The update is ``alpha * back(inner) + column * G``.
    """

    inner: Float[Tensor, "p q"]
    column: Float[Tensor, " ..."]
    norm: Float[Tensor, ""]
    phi: Float[Tensor, " ..."]
    limiter: Float[Tensor, ""]


def _squares(x: Tensor, axis: int) -> Tensor:
    """Sum of squares along an axis, in float32 at least."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if axis == 1:
        return torch.linalg.vector_norm(wide, dim=1).square_()
    # on the CPU a norm down the columns is some ten times slower than this sum
    return wide.square().sum(dim=0)


def scaling_factor(direction: Float[Tensor, "p q"], gradient: Float[Tensor, "p q"], axis: int) -> Float[Tensor, " ..."]:
    """Return phi = ||N|| / (||R|| + 1e-8) along an axis: how much Adam scales the gradient, per column or row.

    Parameters
    ----------
    direction : Tensor of shape (p, q)
        N, the normalised direction of the inner optimizer.
    gradient : Tensor of shape (p, q)
        R, the gradient in the same coordinates.
    axis : {0, 1}
        0 gives one factor per column, 1 one per row.

    Returns
    -------
    Tensor of shape (q,) or (p,)
        In float32, or float64 for float64 input.

    Examples
    --------
    >>> scaling_factor(torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [4.0]]), 1).tolist()
    [0.5, 0.25]
    """
    return _squares(direction, axis).sqrt_() / (_squares(gradient, axis).sqrt_() + 1e-8)


def limit_growth(
    norm: Float[Tensor, ""], previous: Float[Tensor, ""] | None, gamma: float = 1.01
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Norm-growth limiter: let the norm of the residual update grow by the factor gamma a step at most.

    Parameters
    ----------
    norm : scalar Tensor
        ||S|| of this step.
    previous : scalar Tensor or None
        What the last call returned; None on the first step.
    gamma : float, default 1.01
        The paper's threshold.

    Returns
    -------
    limiter : scalar Tensor
        L, by which S is divided: ``max(norm / (previous + 1e-8), gamma) / gamma``.
    remembered : scalar Tensor
        ``norm / L``, for the next call. A norm of exactly zero is not remembered and a previous one below 1e-6
        does not limit: otherwise a single zero gradient would switch the residual off for thousands of steps.

    Examples
    --------
    >>> limiter, norm = limit_growth(torch.tensor(3.0), torch.tensor(1.0))
    >>> round(float(norm), 4)
    1.01
    """
    if previous is None:
        return torch.ones_like(norm), norm
    limiter = (norm / (previous + 1e-8)).clamp(min=gamma) / gamma
    limiter = torch.where(previous < _TINY_NORM, torch.ones_like(norm), limiter)
    return limiter, torch.where(norm == 0, previous, norm / limiter)


def norm_based_scaling(
    G: Float[Tensor, "m n"],
    R: Float[Tensor, "p q"],
    N: Float[Tensor, "p q"],
    side: int,
    *,
    previous: Float[Tensor, ""] | None,
    alpha: float,
    orthogonal: bool = False,
    gamma: float = 1.01,
) -> Scaled:
    """Turn the low-rank direction N into Fira's full-rank update without forming the residual.

    With w = alpha (the authors' residual G - alpha * back(R)) or 1 (the orthogonal one), c = 1 / L and orthonormal
    projector columns, the update alpha * back(N) + c * phi * (G - w * back(R)) is

        alpha * back(N - c * (w / alpha) * phi * R) + c * phi * G,

    one product instead of two, and the residual's norm is known beforehand:
    ||S||^2 = sum_i phi_i^2 * (||G_i||^2 - (2 w - w^2) * ||R_i||^2), i over columns (left) or rows (right).

    Parameters
    ----------
    G : Tensor of shape (m, n)
        The gradient.
    R, N : Tensors of shape (r, n) on the left side, (m, r) on the right
        Its low-rank coordinates and the inner optimizer's direction. N is overwritten.
    side : {LEFT, RIGHT}
    previous : scalar Tensor or None
        The norm the limiter remembers; None on the first step.
    alpha : float
        Scale of the projected update.
    orthogonal : bool, default False
        Which residual.
    gamma : float, default 1.01
        Threshold of the limiter.

    Returns
    -------
    Scaled
        A residual below the resolution of the dtype (all of G in the subspace) counts as zero.
    """
    axis = 0 if side == LEFT else 1
    w = 1.0 if orthogonal else alpha
    gradient, low_rank = _squares(G, axis), _squares(R, axis)
    phi = _squares(N, axis).sqrt_() / (low_rank.sqrt() + 1e-8)
    whole = (phi.square() * gradient).sum()
    squared = whole - (2 * w - w * w) * (phi.square() * low_rank).sum()
    squared = torch.where(squared > energy_resolution(G.dtype) * whole, squared, torch.zeros_like(squared))
    norm = squared.sqrt()
    limiter, remembered = limit_growth(norm, previous, gamma)
    column = phi * torch.where(norm == 0, torch.zeros_like(norm), 1 / limiter)
    if axis == 1:
        column = column[:, None]
    inner = N.addcmul_(R, column.to(N.dtype), value=-w / alpha)
    return Scaled(inner, column.to(G.dtype), remembered, phi, limiter)
