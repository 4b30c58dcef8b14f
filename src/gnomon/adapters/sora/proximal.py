"""The mathematics of SoRA's gates: Adam's step, the two proximal maps, the gradient of the L1 term."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.errors import MethodError

__all__ = ["Prox", "adam_step", "l1_gradient", "prox_authors", "prox_soft"]

Prox = Literal["soft", "authors"]


def prox_soft(u: Float[Tensor, " *shape"], xi: float) -> Float[Tensor, " *shape"]:
    """Return sign(u) max(|u| - xi, 0), the minimiser of 1/2 (z - u)^2 + xi |z|: the paper's map.

    Parameters
    ----------
    u : Tensor (...)
    xi : float
        At least 0.

    Returns
    -------
    Tensor (...)

    Examples
    --------
    >>> prox_soft(torch.tensor([3.0, -0.5, -2.0]), 1.0)
    tensor([ 2.,  0., -1.])
    """
    return u - u.clamp(-xi, xi)


def prox_authors(u: Float[Tensor, " *shape"], xi: float) -> Float[Tensor, " *shape"]:
    """Return the map of the authors' code, which also sets to 0 what lies between xi and 2 xi.

    z = u - xi sign(u) where |u| > xi, else u; then 0 where |z| < xi, else z. So |u| = xi survives as it is, and
    |u| = 2 xi as xi.

    Parameters
    ----------
    u : Tensor (...)
    xi : float
        At least 0.

    Returns
    -------
    Tensor (...)

    Examples
    --------
    >>> prox_authors(torch.tensor([3.0, 1.5, -2.0, 1.0]), 1.0)
    tensor([ 2.,  0., -1.,  1.])
    """
    z = torch.where(u.abs() > xi, u - xi * u.sign(), u)
    return torch.where(z.abs() < xi, torch.zeros_like(z), z)


PROX = {"soft": prox_soft, "authors": prox_authors}


def adam_step(
    g: Float[Tensor, " p"],
    grad: Float[Tensor, " p"],
    m: Float[Tensor, " p"],
    v: Float[Tensor, " p"],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Return u, m and v after one step of Adam in the form of the authors, whose eps stands before bias correction.

    m = b1 m + (1 - b1) grad, v = b2 v + (1 - b2) grad^2, u = g - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps).

    Parameters
    ----------
    g, grad, m, v : Tensor (p,)
        Gates, their gradients and the two moments; not changed.
    step : int
        t, from 1.
    lr : float
    betas : pair of float, default (0.9, 0.999)
    eps : float, default 1e-6

    Returns
    -------
    tuple of Tensor (p,)
        u (before the proximal map), m, v.
    """
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad * grad
    rate = lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    return g - rate * (m / (v.sqrt() + eps)), m, v


def l1_gradient(g: Float[Tensor, " *shape"], lambda1: float, count: int) -> Float[Tensor, " *shape"]:
    """Return the gradient of lambda1 / count sum |g|: lambda1 / count sign(g), 0 at 0.

    Parameters
    ----------
    g : Tensor (...)
    lambda1 : float
    count : int
        p, the gates of the whole model.
    """
    return g.sign() * (lambda1 / count)


def check_options(
    xi: float, lambda1: float, prox: str, gate_lr: float | None, betas: tuple[float, float], eps: float
) -> None:
    """Refuse options that SoRA cannot train with.

    Raises
    ------
    MethodError
    """
    for name, value, sense in (("xi", xi, "the threshold"), ("lambda1", lambda1, "the weight of the L1 term")):
        if not 0 <= value < float("inf"):
            raise MethodError(f"{name} = {value!r}: {sense} is a number of at least 0, such as {_USUAL[name]}.")
    if prox not in PROX:
        raise MethodError(f"prox = {prox!r}. Allowed: 'soft' (the paper's map), 'authors' (that of their code).")
    if gate_lr is not None and not 0 < gate_lr < float("inf"):
        raise MethodError(f"gate_lr = {gate_lr!r}: a number above 0, or None for the rate of the other parameters.")
    if not all(0 <= beta < 1 for beta in betas) or not eps > 0:
        raise MethodError(f"betas = {betas!r}, eps = {eps!r}: betas lie from 0 to below 1, eps above 0.")


_USUAL = {"xi": "3e-4", "lambda1": "1e-3"}
