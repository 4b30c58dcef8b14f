"""The weight-norm parametrisation of one matrix as functions of tensors: W = g * v / ||v||, row by row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.common.tensors import wide

__all__ = ["SMALLEST_MAGNITUDE", "ZERO_ROW", "WeightNormGradients", "new_magnitudes", "weight_norm_gradients"]

ZERO_ROW = 1e-12
"""Rows of this norm or less have no direction and are stepped without normalisation."""

SMALLEST_MAGNITUDE = 1e-6
"""What a magnitude that would reach zero or turn negative is set to."""


class WeightNormGradients(NamedTuple):
    """Gradients in the coordinates g (one magnitude a row) and v (the direction), taken at ||v|| = 1.

    Attributes
    ----------
    norms : Tensor of shape (m,)
        g = ||W|| by row.
    magnitude : Tensor of shape (m,)
        dL/dg = sum over the row of G * W / g; 0 where the row is zero.
    direction : Tensor of shape (m, n)
        dL/dv = g * G - dL/dg * W, orthogonal to W row by row; G itself where the row is zero.
    """

    norms: Float[Tensor, " m"]
    magnitude: Float[Tensor, " m"]
    direction: Float[Tensor, "m n"]


def squares(x: Float[Tensor, "... n"]) -> Float[Tensor, " ..."]:
    """Return the sum of squares along the last axis, in float32 at least."""
    return torch.linalg.vector_norm(wide(x), dim=-1).square_()


def inner(x: Float[Tensor, "... n"], y: Float[Tensor, "... n"]) -> Float[Tensor, " ..."]:
    """Return the inner products along the last axis, in float32 at least."""
    return (wide(x) * wide(y)).sum(dim=-1)


def tangent(
    W: Float[Tensor, "m n"], G: Float[Tensor, "m n"], scale: Float[Tensor, "m 1"], magnitude: Float[Tensor, "m 1"]
) -> Float[Tensor, "m n"]:
    """Return scale * G - magnitude * W in the gradient's dtype: the gradient of the direction."""
    return (wide(G) * scale).addcmul_(wide(W), magnitude, value=-1).to(G.dtype)


def magnitude_gradient(
    product: Float[Tensor, " m"], norms: Float[Tensor, " m"]
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return dL/dg from the inner products of gradient and weight, and the scale of G in dL/dv: (0, 1) on zero rows."""
    alive = norms > ZERO_ROW
    scale = torch.where(alive, norms, torch.ones_like(norms))
    return torch.where(alive, product / scale, torch.zeros_like(norms)), scale


def weight_norm_gradients(W: Float[Tensor, "m n"], G: Float[Tensor, "m n"]) -> WeightNormGradients:
    """Turn the gradient of a weight into those of its row magnitudes and row directions.

    Parameters
    ----------
    W : Tensor of shape (m, n)
        The weight, one unit a row (torch's layout of a linear layer).
    G : Tensor of shape (m, n)
        dL/dW.

    Returns
    -------
    WeightNormGradients
        Norms and magnitudes in float32 (float64 for float64 input), the direction's in the dtype of G.

    Examples
    --------
    >>> found = weight_norm_gradients(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    >>> found.magnitude.tolist(), [round(x, 4) for x in found.direction[0].tolist()]
    ([0.6000000238418579], [3.2, -2.4])
    """
    norms = squares(W).sqrt_()
    magnitude, scale = magnitude_gradient(inner(G, W), norms)
    return WeightNormGradients(norms, magnitude, tangent(W, G, scale[:, None], magnitude[:, None]))


def new_magnitudes(
    norms: Float[Tensor, " m"], direction: Float[Tensor, " m"], step_size: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Step the magnitudes, g - step_size * direction, and keep them above zero.

    Parameters
    ----------
    norms, direction : Tensor of shape (m,)
    step_size : float

    Returns
    -------
    magnitudes : Tensor of shape (m,)
        At least `SMALLEST_MAGNITUDE`, or g itself where that is smaller.
    crossed : bool Tensor of shape (m,)
        Where the step would have flipped the sign of the row; zero rows do not count.

    Examples
    --------
    >>> magnitudes, crossed = new_magnitudes(torch.tensor([1.0, 0.1]), torch.tensor([1.0, 1.0]), 0.5)
    >>> crossed.tolist()
    [False, True]
    """
    stepped = torch.add(norms, direction, alpha=-step_size)
    crossed = (stepped <= 0) & (norms > ZERO_ROW)
    return torch.maximum(stepped, norms.clamp(max=SMALLEST_MAGNITUDE)), crossed
