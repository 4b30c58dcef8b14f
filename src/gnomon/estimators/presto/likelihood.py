"""The cumulative-logit likelihood with free slopes: value, gradient and curvature, all in the spacing coordinates.

A row is described by its spacings T_1 = eta_1 and T_k = eta_k - eta_{k-1}, so that eta is the running sum of T. Since
sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)), the log of a class probability splits into

    log P_k = log sigma(eta_k) [k < K] + log sigma(-eta_{k-1}) [k > 1] + log(1 - exp(-T_k)) [1 < k < K],

that is K - 1 weighted logistic losses plus a term that keeps each inner spacing positive. Nothing is ever computed
as a difference of two nearly equal probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import expit

__all__ = [
    "Curvature",
    "class_probabilities",
    "crossed_rows",
    "curvature",
    "fisher_information",
    "negative_log_likelihood",
    "score",
]


class Curvature(NamedTuple):
    """The tridiagonal second derivative in eta, as the sum it is.

    Attributes
    ----------
    slope : float64 array of shape (n, K - 1)
        What stands on the diagonal of each eta_k.
    spacing : float64 array of shape (n, K - 1)
        What multiplies ``(e_k - e_{k-1})(e_k - e_{k-1})^T``; the first column is zero.
    """

    slope: Float[np.ndarray, "n b"]
    spacing: Float[np.ndarray, "n b"]

    def tridiagonal(self) -> Float[np.ndarray, "n b b"]:
        """Return the matrices themselves, one (K - 1) x (K - 1) matrix a row."""
        n, b = self.slope.shape
        W = np.zeros((n, b, b))
        k = np.arange(b)
        W[:, k, k] = self.slope + self.spacing
        W[:, k[:-1], k[:-1]] += self.spacing[:, 1:]
        W[:, k[1:], k[:-1]] = W[:, k[:-1], k[1:]] = -self.spacing[:, 1:]
        return W


def negative_log_likelihood(T: Float[np.ndarray, "n b"], weights: Float[np.ndarray, "n K"]) -> float:
    """Return ``-sum_ik weights_ik log P_ik``, or infinity where a class of a row has no probability left.

    Parameters
    ----------
    T : float64 array of shape (n, K - 1)
        Spacings.
    weights : float64 array of shape (n, K)
        Weight of each row in each class: one-hot rows for plain data; any non-negative numbers otherwise.

    Returns
    -------
    float

    Examples
    --------
    >>> import numpy as np
    >>> T = np.array([[-1.0, 2.0]])  # eta = (-1, 1)
    >>> bool(np.isclose(negative_log_likelihood(T, np.array([[1.0, 0.0, 0.0]])), np.log(1 + np.e)))
    True
    """
    inner = T[:, 1:]
    if inner.size and not inner.min() > 0:
        return np.inf
    eta = np.cumsum(T, axis=1)
    lower, upper = weights[:, :-1], weights[:, 1:]
    value = np.sum((lower + upper) * np.logaddexp(0.0, eta)) - np.sum(lower * eta)
    return float(value - np.sum(weights[:, 1:-1] * np.log(-np.expm1(-inner))))


def score(T: Float[np.ndarray, "n b"], weights: Float[np.ndarray, "n K"]) -> Float[np.ndarray, "n b"]:
    """Return the derivative of `negative_log_likelihood` by T.

    Parameters
    ----------
    T : float64 array of shape (n, K - 1)
        Spacings, the inner ones positive.
    weights : float64 array of shape (n, K)

    Returns
    -------
    float64 array of shape (n, K - 1)
    """
    lower, upper = weights[:, :-1], weights[:, 1:]
    by_eta = (lower + upper) * expit(np.cumsum(T, axis=1)) - lower
    by_T = _suffix_sum(by_eta)
    with np.errstate(over="ignore"):  # a spacing beyond 700 weighs nothing
        by_T[:, 1:] -= weights[:, 1:-1] / np.expm1(T[:, 1:])
    return by_T


def curvature(T: Float[np.ndarray, "n b"], weights: Float[np.ndarray, "n K"]) -> Curvature:
    """Return the second derivative of `negative_log_likelihood` by eta.

    With the observed weights it is the exact Hessian; with the class probabilities in their place it is the Fisher
    information (the tridiagonal matrix of the paper).

    Parameters
    ----------
    T : float64 array of shape (n, K - 1)
        Spacings, the inner ones positive.
    weights : float64 array of shape (n, K)

    Returns
    -------
    Curvature
    """
    eta = np.cumsum(T, axis=1)
    slope = (weights[:, :-1] + weights[:, 1:]) * expit(eta) * expit(-eta)
    spacing = np.zeros_like(T)
    inner = T[:, 1:]
    spacing[:, 1:] = weights[:, 1:-1] * np.exp(-inner) / np.expm1(-inner) ** 2
    return Curvature(slope, spacing)


def fisher_information(eta: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "n b b"]:
    """Return the expected second derivative by eta of each row.

    ``W_kk = q_k^2 (1/P_k + 1/P_{k+1})`` and ``W_{k,k+1} = -q_k q_{k+1} / P_{k+1}`` with ``q = sigma (1 - sigma)``.

    Parameters
    ----------
    eta : float64 array of shape (n, K - 1)
        Cumulative logits, increasing along a row.

    Returns
    -------
    float64 array of shape (n, K - 1, K - 1)
    """
    T = np.diff(eta, axis=1, prepend=0.0)
    return curvature(T, class_probabilities(T)).tridiagonal()


def class_probabilities(T: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "n K"]:
    """Return the class probabilities, clipped at 0 and renormalised where boundaries cross.

    Parameters
    ----------
    T : float64 array of shape (n, K - 1)
        Spacings of any sign.

    Returns
    -------
    float64 array of shape (n, K)
        Rows sum to 1. The last class is ``sigma(-eta_{K-1})`` before renormalising, which is a probability always.
    """
    eta = np.cumsum(T, axis=1)
    below, above = expit(eta), expit(-eta)
    P = np.empty((len(T), T.shape[1] + 1))
    P[:, 0] = below[:, 0]
    P[:, -1] = above[:, -1]
    P[:, 1:-1] = below[:, 1:] * above[:, :-1] * -np.expm1(-np.maximum(T[:, 1:], 0.0))
    crossed = crossed_rows(T)
    if crossed.any():
        P[crossed] /= P[crossed].sum(axis=1, keepdims=True)
    return P


def crossed_rows(T: Float[np.ndarray, "n b"]) -> np.ndarray:
    """Return which rows have two boundaries in the wrong order, so that a middle class would be negative."""
    return np.asarray((T[:, 1:] < 0).any(axis=1))


def _suffix_sum(a: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "n b"]:
    return np.cumsum(a[:, ::-1], axis=1)[:, ::-1].copy()
