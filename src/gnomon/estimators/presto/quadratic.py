"""The inner problem of proximal Newton, solved exactly: a convex quadratic plus a weighted L1 norm."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.linalg import LinAlgError, cho_factor, cho_solve

__all__ = ["minimise_lasso_quadratic"]


def minimise_lasso_quadratic(
    H: Float[np.ndarray, "d d"],
    b: Float[np.ndarray, " d"],
    l1: Float[np.ndarray, " d"],
    start: Float[np.ndarray, " d"],
    *,
    tol: float = 1e-12,
    max_solves: int = 1000,
) -> Float[np.ndarray, " d"]:
    """Minimise ``z.H z / 2 - b.z + sum_j l1_j |z_j|`` by an active set with signs.

    With the signs of the non-zero entries fixed the minimum is one linear system. Entries that would change sign are
    set to zero and leave; zero entries whose derivative exceeds their weight enter, all together as long as that
    makes progress and one at a time otherwise. The objective falls with every change of the set, so the search ends.

    Parameters
    ----------
    H : float64 array of shape (d, d)
        Symmetric positive definite.
    b, l1, start : float64 arrays of shape (d,)
        Linear term, weights (0: not penalised) and the point whose signs are tried first.
    tol : float, default 1e-12
        By how much, relative to the largest ``|b|``, a derivative may exceed its weight.
    max_solves : int, default 1000
        Linear systems at most; the best point found is returned.

    Returns
    -------
    float64 array of shape (d,)

    Raises
    ------
    numpy.linalg.LinAlgError
        When H is not positive definite on a set it is solved on.

    Examples
    --------
    >>> import numpy as np
    >>> minimise_lasso_quadratic(np.eye(2), np.array([3.0, 0.5]), np.ones(2), np.zeros(2))
    array([2., 0.])
    """
    free = l1 == 0
    z, sign = start.copy(), np.sign(start)
    active = free | (z != 0)
    slack = tol * max(float(np.abs(b).max(initial=0.0)), 1e-300)
    all_at_once, solves = True, 0
    before = _value(H, b, l1, z)
    while True:
        z, used = _settle(H, b, l1, z, sign, active, max_solves - solves)
        solves += used
        now = _value(H, b, l1, z)
        derivative = b - H @ z
        excess = np.where(active, -np.inf, np.abs(derivative) - l1)
        if solves >= max_solves or not (excess > slack).any():
            return z
        if solves > used and not now < before:
            if not all_at_once:
                return z  # the largest violator alone brought nothing: this is as exact as floating point gets
            all_at_once = False
        else:
            all_at_once = True
        before = now
        entering = excess > slack if all_at_once else np.arange(len(z)) == np.argmax(excess)
        active |= entering
        sign[entering] = np.sign(derivative[entering])


def _settle(
    H: Float[np.ndarray, "d d"],
    b: Float[np.ndarray, " d"],
    l1: Float[np.ndarray, " d"],
    z: Float[np.ndarray, " d"],
    sign: Float[np.ndarray, " d"],
    active: np.ndarray,
    allowed: int,
) -> tuple[Float[np.ndarray, " d"], int]:
    """Minimise over the active set; entries that cross zero leave it (`active` and `sign` change in place)."""
    solves = 0
    while True:
        at = np.flatnonzero(active)
        target = np.zeros_like(z)
        if len(at):
            target[at] = _solve(H[np.ix_(at, at)], (b - l1 * sign)[at])
        solves += 1
        crossing = active & (l1 > 0) & (target * sign <= 0)
        if not crossing.any() or solves >= max(allowed, 1):
            return (target, solves) if not crossing.any() else (z, solves)
        tried = np.where(crossing, 0.0, target)
        if _value(H, b, l1, tried) < _value(H, b, l1, z):
            z = tried
        else:  # only as far as the first entry that reaches zero
            at = np.flatnonzero(crossing)
            share = np.where(z[at] == 0, 0.0, z[at] / np.where(z[at] == 0, 1.0, z[at] - target[at]))
            z = z + share.min() * (target - z)
            crossing = np.zeros_like(active)
            crossing[at[share <= share.min()]] = True
            z[crossing] = 0.0
        active[crossing] = False
        sign[crossing] = 0.0


def _solve(H: Float[np.ndarray, "d d"], b: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
    factor = cho_factor(H, lower=True, check_finite=False)
    found: Float[np.ndarray, " d"] = cho_solve(factor, b, check_finite=False)
    if not np.isfinite(found).all():
        raise LinAlgError("the quadratic is not positive definite")
    return found


def _value(
    H: Float[np.ndarray, "d d"], b: Float[np.ndarray, " d"], l1: Float[np.ndarray, " d"], z: Float[np.ndarray, " d"]
) -> float:
    return float(z @ (0.5 * (H @ z) - b) + l1 @ np.abs(z))
