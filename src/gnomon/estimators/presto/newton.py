"""Proximal Newton for the penalised likelihood: a working set, an exact inner solve, steps that stay in the domain."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy.linalg import LinAlgError
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import logit

from gnomon.common.engine import ENGINES, Engine
from gnomon.errors import MethodError, nearest
from gnomon.estimators.presto.likelihood import (
    Curvature,
    class_probabilities,
    curvature,
    negative_log_likelihood,
    score,
)
from gnomon.estimators.presto.quadratic import minimise_lasso_quadratic

__all__ = ["Fit", "Problem", "SolverOptions", "minimise", "null_point", "violation"]

_TO_THE_WALL = 0.99  # share of the way to the end of the domain that a step may go
_LONGEST_MOVE = 10.0  # of a spacing in one step: beyond it the quadratic model says nothing
_PINNED = 1e-9  # a spacing this small, in a row of another class, keeps the steps from moving
_DAMPING = 1e-10  # proximal term relative to the mean curvature: collinear columns stay solvable, the optimum stays
_LARGE = 1500  # unknowns from which a problem without L1 is solved by conjugate gradients


@dataclass(frozen=True)
class SolverOptions:
    """How the optimum is found; none of it changes what the optimum is.

    Parameters
    ----------
    method : {"proxnewton", "fisher"}, default "proxnewton"
        Curvature of the steps: the exact Hessian, or the Fisher information as in the authors' code.
    tol : float, default 1e-9
        Largest violation of the optimality conditions, on standardised features and the mean log-likelihood.
    max_iter : int, default 200
        Newton steps a penalty at most.
    barrier : float, default 1e-8
        Final weight mu of the barrier ``-mu sum_k log P_k`` where the optimum lies on the boundary of the domain.
    engine : {"local", "ray"}, default "local"
        Where the folds of a cross-validation run.
    """

    method: Literal["proxnewton", "fisher"] = "proxnewton"
    tol: float = 1e-9
    max_iter: int = 200
    barrier: float = 1e-8
    engine: Engine = "local"

    def __post_init__(self) -> None:
        if self.method not in ("proxnewton", "fisher"):
            raise MethodError(f"solver = {self.method!r}. {nearest(str(self.method), ('proxnewton', 'fisher'))}")
        if self.engine not in ENGINES:
            raise MethodError(f"engine = {self.engine!r}. {nearest(str(self.engine), ENGINES, noun='engine')}")
        for name in ("tol", "barrier"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise MethodError(f"{name} = {value!r}; it must lie between 0 and 1. The default serves nearly always.")
        if int(self.max_iter) != self.max_iter or self.max_iter < 1:
            raise MethodError(f"max_iter = {self.max_iter!r}; it must be a whole number of at least 1.")


@dataclass(frozen=True)
class Problem:
    """Penalised likelihood on standardised features.

    Attributes
    ----------
    X : float64 array of shape (n, p + 1)
        A column of ones, then the standardised features; Fortran order.
    weights : float64 array of shape (n, K)
        Weight of each row in each class; they sum to 1 over everything.
    l1, l2 : float64 arrays of shape (p + 1, K - 1)
        Weights of ``|psi|`` and ``psi^2 / 2``; the first row (intercepts) is zero.
    held : bool array of shape (p + 1, K - 1)
        Entries that stay at zero.
    """

    X: Float[np.ndarray, "n q"]
    weights: Float[np.ndarray, "n K"]
    l1: Float[np.ndarray, "q b"]
    l2: Float[np.ndarray, "q b"]
    held: np.ndarray

    def penalty(self, theta: Float[np.ndarray, "q b"]) -> float:
        """Return the penalty at a point."""
        return float(np.sum(self.l1 * np.abs(theta)) + 0.5 * np.sum(self.l2 * theta**2))

    def objective(self, theta: Float[np.ndarray, "q b"]) -> float:
        """Return likelihood and penalty at a point."""
        return negative_log_likelihood(self.X @ theta, self.weights) + self.penalty(theta)

    def gradient(self, T: Float[np.ndarray, "n b"]) -> Float[np.ndarray, "q b"]:
        """Return the derivative of the likelihood by theta, given the spacings."""
        found: Float[np.ndarray, "q b"] = self.X.T @ score(T, self.weights)
        return found

    def with_barrier(self, mu: float) -> Problem:
        """Return the problem with ``-mu log P_k`` added for every class of every row."""
        rows = self.weights.sum(axis=1, keepdims=True)
        return replace(self, weights=self.weights + mu * rows)


@dataclass(frozen=True)
class Fit:
    """Where the search ended.

    Attributes
    ----------
    theta : float64 array of shape (p + 1, K - 1)
        First row: spacings of the intercepts; below: psi, all on standardised features.
    violation : float
        Of the optimality conditions.
    iterations : int
    converged : bool
        The violation is within the tolerance.
    pinned : bool
        Steps were stopped by the boundary of the domain.
    last_move : float
        Largest change of a spacing in the last step; not small at a "converged" point means an optimum at infinity.
    """

    theta: Float[np.ndarray, "q b"] = field(repr=False)
    violation: float
    iterations: int
    converged: bool
    pinned: bool
    last_move: float


def null_point(weights: Float[np.ndarray, "n K"], q: int) -> Float[np.ndarray, "q b"]:
    """Return the fit of the intercepts alone: the class frequencies."""
    shares = weights.sum(axis=0)
    theta = np.zeros((q, weights.shape[1] - 1))
    theta[0] = np.diff(logit(np.cumsum(shares / shares.sum())[:-1]), prepend=0.0)
    return theta


def violation(problem: Problem, theta: Float[np.ndarray, "q b"], gradient: Float[np.ndarray, "q b"]) -> np.ndarray:
    """Return by how much each entry misses its optimality condition.

    ``|g + l2 psi + l1 sign(psi)|`` where psi is not zero, what ``|g|`` exceeds l1 by where it is, 0 where it is held.
    """
    g = gradient + problem.l2 * theta
    miss = np.where(theta != 0, np.abs(g + problem.l1 * np.sign(theta)), np.maximum(np.abs(g) - problem.l1, 0.0))
    return np.where(problem.held, 0.0, miss)


def minimise(problem: Problem, start: Float[np.ndarray, "q b"], options: SolverOptions) -> Fit:
    """Minimise the penalised likelihood from a point inside the domain.

    Each step forms the curvature on a working set (free and non-zero entries and those whose derivative exceeds the
    penalty), minimises the quadratic model there exactly, and backtracks until the objective falls enough.

    Parameters
    ----------
    problem : Problem
    start : float64 array of shape (p + 1, K - 1)
    options : SolverOptions

    Returns
    -------
    Fit
    """
    theta = start.copy()
    T = problem.X @ theta
    value = negative_log_likelihood(T, problem.weights) + problem.penalty(theta)
    move, miss, stuck = 0.0, np.inf, 0
    barred = bool((problem.weights[:, 1:-1] > 0).all())  # with a barrier no wall is ever met
    for iteration in range(options.max_iter + 1):
        gradient = problem.gradient(T)
        missed = violation(problem, theta, gradient)
        miss = float(missed.max())
        if miss <= options.tol:
            return Fit(theta, miss, iteration, True, False, move)
        if iteration == options.max_iter:
            break
        if stuck >= 3 and not barred and T[:, 1:].min() < _PINNED:
            return Fit(theta, miss, iteration, False, True, move)
        direction = _direction(problem, theta, T, gradient, missed, options)
        share, T_new, new_value, limited = _line_search(problem, theta, T, value, gradient, direction)
        if share == 0.0:  # floating point cannot lower the objective any further
            close = not barred and bool(T[:, 1:].min() < 1e-6)
            return Fit(theta, miss, iteration, miss <= 100 * options.tol, close, move)
        stuck = stuck + 1 if limited else 0
        move = float(np.abs(T_new - T).max())
        theta, T, value = theta + share * direction, T_new, new_value
    return Fit(theta, miss, options.max_iter, False, stuck > 0, move)


def _direction(
    problem: Problem,
    theta: Float[np.ndarray, "q b"],
    T: Float[np.ndarray, "n b"],
    gradient: Float[np.ndarray, "q b"],
    missed: np.ndarray,
    options: SolverOptions,
) -> Float[np.ndarray, "q b"]:
    """Return the step to the minimum of the quadratic model on the working set."""
    weights = problem.weights
    if options.method == "fisher":
        weights = weights.sum(axis=1, keepdims=True) * class_probabilities(T)
    bend = curvature(T, weights)
    direction = np.zeros_like(theta)
    if not problem.l1.any() and int((~problem.held).sum()) > _LARGE:
        return _smooth_direction(problem, theta, gradient, bend, options)
    index = _working_set(problem, theta, missed)
    H = _hessian(problem.X, bend, index)
    at = tuple(index.T)
    H[np.diag_indices_from(H)] += problem.l2[at]
    damping, scale = _DAMPING, max(float(np.diag(H).mean()), 1e-300)
    while True:
        damped = H.copy()
        damped[np.diag_indices_from(H)] += damping * scale
        b = damped @ theta[at] - gradient[at] - problem.l2[at] * theta[at]
        try:
            direction[at] = minimise_lasso_quadratic(damped, b, problem.l1[at], theta[at]) - theta[at]
            return direction
        except LinAlgError:
            damping *= 100


def _working_set(problem: Problem, theta: Float[np.ndarray, "q b"], missed: np.ndarray) -> np.ndarray:
    """Return the (row, boundary) pairs to move: free, non-zero, and the worst violators (at most as many again)."""
    certain = ((problem.l1 == 0) | (theta != 0)) & ~problem.held
    room = max(200, int(certain.sum()))
    violators = (missed > 0) & ~certain
    if int(violators.sum()) > room:
        violators &= missed >= np.partition(missed[violators], -room)[-room]
    return np.argwhere((certain | violators).T)[:, ::-1]  # boundary by boundary


def _hessian(X: Float[np.ndarray, "n q"], bend: Curvature, index: np.ndarray) -> Float[np.ndarray, "d d"]:
    """Return the curvature in the chosen entries of theta.

    Entry (j, k) of theta moves eta_k, eta_{k+1}, ...: two entries share the sum of the slopes from the later of
    their boundaries on, and entries of the same boundary its spacing term besides. So the whole matrix takes one
    weighted product of feature columns a boundary and not one a pair of boundaries.
    """
    later = np.asfortranarray(np.cumsum(bend.slope[:, ::-1], axis=1)[:, ::-1])
    spacing = np.asfortranarray(bend.spacing)
    features, where = np.unique(index[:, 0], return_inverse=True)
    columns = X if len(features) == X.shape[1] else X[:, features]
    H = np.empty((len(index), len(index)))
    for k in np.unique(index[:, 1]):
        mine = np.flatnonzero(index[:, 1] == k)
        before = np.flatnonzero(index[:, 1] <= k)
        own = columns[:, where[mine]]
        block = (columns.T @ (later[:, k, None] * own))[where[before]]
        if spacing[:, k].any():
            block[-len(mine) :] += own.T @ (spacing[:, k, None] * own)
        H[np.ix_(before, mine)] = block
        H[np.ix_(mine, before)] = block.T
    return H


def _smooth_direction(
    problem: Problem,
    theta: Float[np.ndarray, "q b"],
    gradient: Float[np.ndarray, "q b"],
    bend: Curvature,
    options: SolverOptions,
) -> Float[np.ndarray, "q b"]:
    """Return the Newton step of a problem without L1 by conjugate gradients; nothing of size d x d is formed."""
    X, free = problem.X, ~problem.held
    size = int(free.sum())

    def unpack(v: Float[np.ndarray, " d"]) -> Float[np.ndarray, "q b"]:
        full = np.zeros_like(theta)
        full[free] = v
        return full

    def product(v: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
        V = unpack(np.ravel(v))
        T = X @ V
        slopes = bend.slope * np.cumsum(T, axis=1)
        back = np.cumsum(slopes[:, ::-1], axis=1)[:, ::-1] + bend.spacing * T
        out: Float[np.ndarray, " d"] = (X.T @ back + problem.l2 * V)[free]
        return out

    later = np.cumsum(bend.slope[:, ::-1], axis=1)[:, ::-1] + bend.spacing
    diagonal = ((X**2).T @ later + problem.l2)[free]
    diagonal += _DAMPING * max(float(diagonal.mean()), 1e-300)
    residual = (gradient + problem.l2 * theta)[free]
    found, _ = cg(
        LinearOperator((size, size), matvec=product, dtype=np.float64),
        -residual,
        rtol=min(0.1, float(np.sqrt(np.abs(residual).max()))),
        maxiter=500,
        M=LinearOperator((size, size), matvec=lambda v: np.ravel(v) / diagonal, dtype=np.float64),
    )
    return unpack(found)


def _line_search(
    problem: Problem,
    theta: Float[np.ndarray, "q b"],
    T: Float[np.ndarray, "n b"],
    value: float,
    gradient: Float[np.ndarray, "q b"],
    direction: Float[np.ndarray, "q b"],
) -> tuple[float, Float[np.ndarray, "n b"], float, bool]:
    """Return the share of the step taken, the spacings and the objective there, and whether the wall cut the step."""
    dT = problem.X @ direction
    share, limited = min(1.0, _LONGEST_MOVE / max(float(np.abs(dT).max()), 1e-300)), False
    inner, toward = T[:, 1:], dT[:, 1:]
    falling = toward < 0
    if falling.any():
        wall = _TO_THE_WALL * float((inner[falling] / -toward[falling]).min())
        share, limited = (wall, True) if wall < share else (share, False)
    old_penalty = problem.penalty(theta)
    slope = float(np.sum(gradient * direction)) + problem.penalty(theta + direction) - old_penalty
    noise = 4 * np.finfo(float).eps * abs(value)
    for _ in range(60):
        moved = T + share * dT
        new = negative_log_likelihood(moved, problem.weights) + problem.penalty(theta + share * direction)
        if new <= value + 1e-4 * share * slope + noise:
            return share, moved, new, limited
        share *= 0.5
    return 0.0, T, value, limited
