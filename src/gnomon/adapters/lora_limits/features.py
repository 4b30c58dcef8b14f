"""Polynomials of a dot product as dot products of features: all monomials up to a degree.

For a polynomial p(z) = sum_j c_j z^j of degree g, p(q . k) = sum_a w_a q^a k^a over all exponents a with |a| <= g and
w_a = c_|a| |a|! / a!. With the Taylor coefficients c_j = 1 / j! of exp the weights are w_a = 1 / a!. There are
C(d + g, g) monomials in d variables.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gnomon.errors import MethodError

__all__ = [
    "error_bound",
    "exp_coefficients",
    "feature_count",
    "monomial_weights",
    "monomials",
    "needed_degree",
    "poly_features",
]


def feature_count(dim: int, degree: int) -> int:
    """Return k1 = C(dim + degree, degree), the number of monomials of `dim` variables up to a degree.

    Examples
    --------
    >>> feature_count(4, 4), feature_count(64, 2)
    (70, 2145)
    """
    return math.comb(dim + degree, degree)


def exp_coefficients(degree: int, span: float | None = None) -> tuple[float, ...]:
    """Return the coefficients c_0 .. c_degree of a polynomial near exp.

    Parameters
    ----------
    degree : int
        0 or more.
    span : float, optional
        Without it the Taylor polynomial at 0, which is positive everywhere when the degree is even. With it the
        interpolation of exp at the Chebyshev points of [-span, span]: a smaller largest error there, but it may be
        negative, most of all outside.

    Returns
    -------
    tuple of float

    Raises
    ------
    MethodError
        When the degree is negative or the span is no positive number.

    Examples
    --------
    >>> exp_coefficients(2)
    (1.0, 1.0, 0.5)
    """
    if degree < 0:
        raise MethodError(f"degree = {degree}: the degree of a polynomial is 0 or more.")
    if span is None:
        return tuple(1.0 / math.factorial(j) for j in range(degree + 1))
    if not (math.isfinite(span) and span > 0):
        raise MethodError(
            f"span = {span}: it is the largest |q . k| to be met, a positive number. Leave it out for the Taylor "
            "polynomial."
        )
    fitted = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp, degree, domain=[-span, span])
    plain: Any = fitted.convert(kind=np.polynomial.Polynomial, domain=[-1.0, 1.0], window=[-1.0, 1.0])
    found = np.zeros(degree + 1)
    found[: len(plain.coef)] = plain.coef
    return tuple(float(c) for c in found)


def monomials(x: Float[Tensor, "*n d c"], degree: int) -> Float[Tensor, "*n k c"]:
    """Return all monomials of the d rows of `x` up to a degree, one per row: degree by degree, without weights.

    Inside a degree they are ordered by their last variable, so that those whose last variable is at most i stand
    together and the next degree is d products of slices.

    Parameters
    ----------
    x : Tensor (..., d, c)
        c vectors as columns.
    degree : int

    Returns
    -------
    Tensor (..., C(d + degree, degree), c)

    Examples
    --------
    >>> monomials(torch.tensor([[2.0], [3.0]]), 2).squeeze(-1)
    tensor([1., 2., 3., 4., 6., 9.])
    """
    dim = x.shape[-2]
    out = x.new_empty((*x.shape[:-2], feature_count(dim, degree), x.shape[-1]))
    out[..., 0, :] = 1.0
    start, position = 0, 1  # of the previous degree, of the next row to write
    for power in range(1, degree + 1):
        first = position
        for i in range(dim):
            taken = math.comb(i + power - 1, power - 1)  # of the previous degree, with last variable at most i
            block = out[..., position : position + taken, :]
            torch.mul(out[..., start : start + taken, :], x[..., i : i + 1, :], out=block)
            position += taken
        start = first
    return out


@lru_cache(maxsize=64)
def _exponent_weights(dim: int, degree: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return |a| and |a|! / a! of all monomials, in the order of `monomials`."""
    powers, counts = [np.zeros((1, dim), dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
    for power in range(1, degree + 1):
        parts = []
        for i in range(dim):
            raised = powers[-1][: math.comb(i + power - 1, power - 1)].copy()
            raised[:, i] += 1
            parts.append(raised)
        powers.append(np.concatenate(parts))
        counts.append(np.full(len(powers[-1]), power))
    factorials = np.array([math.factorial(j) for j in range(degree + 1)], dtype=np.float64)
    total = np.concatenate(counts)
    return total, factorials[total] / factorials[np.concatenate(powers)].prod(axis=1)


def monomial_weights(dim: int, coefficients: tuple[float, ...]) -> Float[np.ndarray[Any, Any], " k"]:
    """Return w_a = c_|a| |a|! / a! of all monomials of `dim` variables, float64, in the order of `monomials`.

    Examples
    --------
    >>> monomial_weights(2, exp_coefficients(2)).tolist()
    [1.0, 1.0, 1.0, 0.5, 1.0, 0.5]
    """
    total, multinomial = _exponent_weights(dim, len(coefficients) - 1)
    weights: np.ndarray[Any, Any] = np.asarray(coefficients)[total] * multinomial
    return weights


def poly_features(x: Float[Tensor, "*n d"], degree: int) -> Float[Tensor, "*n k"]:
    """Return Phi(x), all monomials x^a / sqrt(a!) up to a degree: <Phi(q), Phi(k)> = sum_{j <= degree} (q . k)^j / j!.

    Parameters
    ----------
    x : Tensor (..., d)
        Half precision is brought to float32: x^8 does not fit float16.
    degree : int
        Odd degrees are allowed here; the polynomial can then be negative (degree 1 below -1, degree 3 below -1.6).

    Returns
    -------
    Tensor (..., C(d + degree, degree))

    Raises
    ------
    MethodError
        When the degree is negative.

    Examples
    --------
    >>> q, k = torch.tensor([0.5, 1.0]), torch.tensor([1.0, -0.5])
    >>> round(float(poly_features(q, 4) @ poly_features(k, 4)), 6)  # q . k = 0
    1.0
    """
    weights = monomial_weights(x.shape[-1], exp_coefficients(degree))
    wide = x if x.dtype == torch.float64 else x.float()
    found = monomials(wide[..., None], degree).squeeze(-1)
    return found * torch.as_tensor(np.sqrt(weights), dtype=wide.dtype, device=wide.device)


def error_bound(z: float, degree: int) -> float:
    """Return 2 z^(g+1) / (g+1)! e^z, above the relative error of a softmax weight by the Taylor polynomial.

    Parameters
    ----------
    z : float
        The largest |q . k|, centred.
    degree : int
        g.

    Returns
    -------
    float
        Infinity where it does not fit a float.

    Examples
    --------
    >>> round(error_bound(1.0, 4), 4)
    0.0453
    """
    if z <= 0:
        return 0.0
    logarithm = math.log(2) + (degree + 1) * math.log(z) - math.lgamma(degree + 2) + z
    return math.exp(logarithm) if logarithm < 700 else math.inf


def needed_degree(z: float, eps: float) -> int:
    """Return the smallest even degree whose `error_bound` is at most `eps`, 2 at least.

    Parameters
    ----------
    z : float
        The largest |q . k|, centred.
    eps : float

    Raises
    ------
    MethodError
        When `z` is negative or not finite, or `eps` is not positive.

    Examples
    --------
    >>> needed_degree(1.0, 1e-2), needed_degree(16.0, 1e-2)
    (6, 60)
    """
    if not (math.isfinite(z) and z >= 0):
        raise MethodError(f"z = {z}: the largest |q . k| is a finite number of at least 0.")
    if not eps > 0:
        raise MethodError(f"eps = {eps}: the error allowed is a positive number, such as 0.01.")
    degree = 2
    while error_bound(z, degree) > eps:
        degree += 2
    return degree
