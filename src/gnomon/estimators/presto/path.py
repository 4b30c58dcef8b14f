"""Fits for a falling sequence of penalties: standardisation, the boundary of the domain, the way back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from gnomon.errors import MethodError
from gnomon.estimators.presto.likelihood import class_probabilities, negative_log_likelihood
from gnomon.estimators.presto.newton import Fit, Problem, SolverOptions, minimise, null_point

__all__ = ["Boundary", "Penalty", "PrestoPath", "fit_path", "lambda_grid", "standardise"]

Boundary = Literal["barrier", "stop"]

_SMALLEST_ALPHA = 1e-3  # what lambda_max is divided by at least: the ridge alone has no penalty that zeroes anything
_NEAR_THE_WALL = 1e-6  # what rounding of tiny spacings lets the conditions be met to; 1e-12 or so of the objective
_FIRST_BARRIER, _BARRIER_FACTOR = 1e-3, 30.0
_SMALL = 2_000_000  # numbers in all slopes' columns up to which threads of the BLAS cost more than they bring
_PERFECT = 0.999  # probability of every row's own class from which the classes count as separated


class Penalty(NamedTuple):
    """What is penalised and how, apart from lambda.

    Attributes
    ----------
    alpha : float
        Share of the L1 norm.
    first : bool
        Whether the slopes of the first boundary are penalised.
    weights : float array, optional
        Of shape (p,) or (p, K - 1); infinity holds an entry at zero.
    """

    alpha: float = 1.0
    first: bool = True
    weights: NDArray[np.float64] | None = None

    def matrix(self, p: int, boundaries: int) -> Float[np.ndarray, "p b"]:
        """Return the weight of every entry of psi.

        Raises
        ------
        MethodError
            When the share or the weights are not allowed, or do not fit the data.
        """
        if not 0 <= self.alpha <= 1:
            raise MethodError(f"alpha = {self.alpha!r}; it must lie in [0, 1]: 1 is L1, 0 is ridge.")
        c = np.ones((p, boundaries))
        if self.weights is not None:
            given = np.asarray(self.weights, dtype=np.float64)
            if given.shape not in ((p,), (p, boundaries)):
                raise MethodError(
                    f"penalty_weights has the shape {given.shape}; allowed are ({p},), one weight a feature, and "
                    f"({p}, {boundaries}), one for each feature and boundary."
                )
            if np.isnan(given).any() or (given < 0).any():
                raise MethodError(
                    "penalty_weights holds a negative number or NaN; allowed are 0 (not penalised) and above, "
                    "infinity holds the coefficient at 0."
                )
            c = given[:, None] * c if given.ndim == 1 else given.copy()
        if not self.first:
            c[:, 0] = 0.0
        return c


@dataclass(frozen=True)
class PrestoPath:
    """Fits along a falling sequence of penalties, on the original scale of the features.

    Attributes
    ----------
    lambdas : float64 array of shape (L,)
        Penalties, falling. With ``boundary="stop"`` the sequence ends before the first fit on the boundary.
    intercepts : float64 array of shape (L, K - 1)
    psi : float64 array of shape (L, p, K - 1)
        Slopes of the first boundary, then the differences from boundary to boundary.
    objective : float64 array of shape (L,)
        Mean negative log-likelihood and penalty.
    log_likelihood : float64 array of shape (L,)
        Sum over the rows (times their weights).
    violation : float64 array of shape (L,)
        Of the optimality conditions (on the boundary: of those with the barrier).
    n_iter : int array of shape (L,)
    converged, boundary, separated : bool arrays of shape (L,)
        Within the tolerance; optimum on the boundary of the domain; classes separated, so that the optimum lies at
        infinity or nearly so.
    lambda_max : float
        Smallest penalty at which nothing penalised is left.
    boundary_reached : bool
        Some penalty asked for has its optimum on the boundary.
    """

    lambdas: Float[np.ndarray, " L"]
    intercepts: Float[np.ndarray, "L b"]
    psi: Float[np.ndarray, "L p b"]
    objective: Float[np.ndarray, " L"]
    log_likelihood: Float[np.ndarray, " L"]
    violation: Float[np.ndarray, " L"]
    n_iter: NDArray[np.int64]
    converged: NDArray[np.bool_]
    boundary: NDArray[np.bool_]
    separated: NDArray[np.bool_]
    lambda_max: float
    boundary_reached: bool

    @property
    def coefs(self) -> Float[np.ndarray, "L p b"]:
        """Slopes of every boundary: the running sums of `psi`."""
        return np.cumsum(self.psi, axis=2)

    @property
    def nonzero(self) -> NDArray[np.int64]:
        """Number of non-zero entries of `psi`, by penalty."""
        return np.count_nonzero(self.psi, axis=(1, 2))

    def spacings(self, X: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "L n b"]:
        """Return the spacings T of rows under every fit."""
        delta = np.diff(self.intercepts, axis=1, prepend=0.0)
        return np.matmul(X[None], self.psi) + delta[:, None, :]

    def probabilities(self, X: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "L n K"]:
        """Return the class probabilities of rows under every fit, classes in their order."""
        return np.stack([class_probabilities(T) for T in self.spacings(X)])


def standardise(
    X: Float[np.ndarray, "n p"], shares: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "n q"], Float[np.ndarray, " p"], Float[np.ndarray, " p"], NDArray[np.bool_]]:
    """Return a column of ones and the standardised features, the means, the deviations, and which are constant."""
    mean = shares @ X
    centred = X - mean
    sd = np.sqrt(shares @ centred**2)
    rounding = 10 * np.finfo(np.float64).eps * np.abs(X).max(axis=0, initial=0.0)
    constant = (np.ptp(X, axis=0) == 0) | (sd <= rounding)
    sd = np.where(constant, 1.0, sd)
    out = np.ones((len(X), X.shape[1] + 1), order="F")
    out[:, 1:] = np.where(constant, 0.0, centred / sd)
    return out, mean, sd, constant


def lambda_grid(largest: float, n_lambda: int, ratio: float) -> Float[np.ndarray, " L"]:
    """Return `n_lambda` penalties, evenly spaced in the logarithm, from `largest` down to `ratio` times it.

    Raises
    ------
    MethodError
        When the number or the ratio is not allowed.
    """
    if int(n_lambda) != n_lambda or n_lambda < 1:
        raise MethodError(f"n_lambda = {n_lambda!r}; it must be a whole number of at least 1.")
    if not 0 < ratio < 1:
        raise MethodError(f"lambda_min_ratio = {ratio!r}; it must lie between 0 and 1, such as 0.01.")
    grid: Float[np.ndarray, " L"] = max(largest, 1e-12) * np.geomspace(1.0, ratio, int(n_lambda))
    return grid


def fit_path(
    X: Float[np.ndarray, "n p"],
    codes: NDArray[np.intp],
    row_weights: Float[np.ndarray, " n"],
    penalty: Penalty,
    lambdas: Sequence[float] | NDArray[np.float64] | Literal["grid"],
    *,
    n_lambda: int = 20,
    ratio: float = 0.01,
    boundary: Boundary = "barrier",
    options: SolverOptions | None = None,
) -> PrestoPath:
    """Fit every penalty, each from the fit before.

    Parameters
    ----------
    X : float64 array of shape (n, p)
    codes : integer array of shape (n,)
        Classes 0 .. K - 1, all of them present.
    row_weights : float64 array of shape (n,)
        Positive.
    penalty : Penalty
    lambdas : sequence of float or "grid"
        Sorted here into falling order. ``"grid"``: `n_lambda` values from lambda_max down to `ratio` times it.
    n_lambda, ratio : int, float
        Of the grid.
    boundary : {"barrier", "stop"}
    options : SolverOptions, optional

    Returns
    -------
    PrestoPath

    Raises
    ------
    MethodError
        When a penalty is negative or not finite, or an option is not allowed.
    """
    if boundary not in ("barrier", "stop"):
        raise MethodError(f"boundary = {boundary!r}; allowed are 'barrier' and 'stop'.")
    options = options or SolverOptions()
    K = int(codes.max()) + 1
    shares = row_weights / row_weights.sum()
    columns, mean, sd, constant = standardise(X, shares)
    c = penalty.matrix(X.shape[1], K - 1)
    held = np.vstack([np.zeros((1, K - 1), dtype=bool), np.isinf(c) | constant[:, None]])
    c = np.vstack([np.zeros((1, K - 1)), np.where(np.isinf(c), 0.0, c)])
    blank = np.zeros_like(c)
    base = Problem(columns, np.eye(K)[codes] * shares[:, None], blank, blank, held)
    with _threads(X.size * (K - 1)):
        start, largest = _null_fit(base, c, penalty.alpha, options)
        wanted = lambda_grid(largest, n_lambda, ratio) if isinstance(lambdas, str) else _checked(lambdas)
        rows, walled = _walk(base, c, penalty.alpha, wanted, start, boundary, options)
    kept = [_on_original_scale(*row, mean, sd, float(row_weights.sum())) for row in rows]
    shape = (0, X.shape[1], K - 1)
    fields = {key: np.asarray([row[key] for row in kept]) for key in kept[0]} if kept else _empty(shape)
    return PrestoPath(**fields, lambda_max=largest, boundary_reached=walled)


def _walk(
    base: Problem,
    c: Float[np.ndarray, "q b"],
    alpha: float,
    lambdas: NDArray[np.float64],
    start: Float[np.ndarray, "q b"],
    boundary: Boundary,
    options: SolverOptions,
) -> tuple[list[tuple[float, Problem, Fit, bool]], bool]:
    """Return the fits down the path, and whether any optimum lies on the boundary of the domain."""
    rows: list[tuple[float, Problem, Fit, bool]] = []
    walled = False
    for lam in lambdas:
        problem = replace(base, l1=lam * alpha * c, l2=lam * (1 - alpha) * c)
        fit, start, at_wall = _fit_one(problem, start, options)
        walled = walled or at_wall
        if at_wall and boundary == "stop":
            break
        rows.append((float(lam), problem, fit, at_wall))
    return rows, walled


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # looking for the libraries takes milliseconds


def _threads(size: int) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the BLAS works on a small problem with one thread."""
    return _controller().limit(limits=1, user_api="blas") if size <= _SMALL else contextlib.nullcontext()


def _checked(lambdas: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    wanted = np.asarray(lambdas, dtype=np.float64)
    if wanted.ndim != 1 or not len(wanted):
        raise MethodError(f"the penalties have the shape {wanted.shape}; a list of at least one number is needed.")
    if not np.isfinite(wanted).all() or (wanted < 0).any():
        raise MethodError(
            f"lam = {wanted.min() if np.isfinite(wanted).all() else wanted[~np.isfinite(wanted)][0]}; "
            "a penalty must be a finite number, 0 or above."
        )
    return np.sort(wanted)[::-1]


def _null_fit(
    base: Problem, c: Float[np.ndarray, "q b"], alpha: float, options: SolverOptions
) -> tuple[Float[np.ndarray, "q b"], float]:
    """Return the fit without anything penalised and the smallest penalty that leaves it so."""
    start = null_point(base.weights, base.X.shape[1])
    penalised = (c > 0) & ~base.held
    if ((c[1:] == 0) & ~base.held[1:]).any():
        start = _fit_one(replace(base, held=base.held | (c > 0)), start, options)[1]
    if not penalised.any():
        return start, 0.0
    slopes = np.abs(base.gradient(base.X @ start))[penalised] / c[penalised]
    return start, float(slopes.max()) / max(alpha, _SMALLEST_ALPHA)


def _fit_one(
    problem: Problem, start: Float[np.ndarray, "q b"], options: SolverOptions
) -> tuple[Fit, Float[np.ndarray, "q b"], bool]:
    """Return the fit, where to start the next one, and whether the optimum lies on the boundary of the domain.

    Newton's method alone first. If the boundary stops it, a falling barrier leads to the optimum, wherever it is;
    unless that is at the wall, Newton's method can finish from there without the barrier.
    """
    exact = replace(options, method="proxnewton")
    fit = minimise(problem, start, options)
    if not fit.converged and not fit.pinned and options.method == "fisher":
        # steps that ignore which classes were observed may crawl
        rest = minimise(problem, fit.theta, exact)
        fit = replace(rest, iterations=fit.iterations + rest.iterations)
    if fit.converged or not fit.pinned:
        return fit, fit.theta, False
    # the barrier is followed by the exact Hessian alone: the Fisher information knows nothing of it
    theta, inside, iterations = start, start, fit.iterations
    stages = max(1, math.ceil(math.log(_FIRST_BARRIER / options.barrier, _BARRIER_FACTOR)))
    for stage, mu in enumerate(np.geomspace(_FIRST_BARRIER, options.barrier, stages + 1)):
        tol = max(options.tol, _NEAR_THE_WALL) if stage == stages else 1e-3
        fit = minimise(problem.with_barrier(mu), theta, replace(exact, tol=tol))
        theta, iterations = fit.theta, iterations + fit.iterations
        if stage == 1:
            inside = theta
    if (problem.X @ theta)[:, 1:].min() > 10 * options.barrier:
        polished = minimise(problem, theta, options)
        if polished.converged:
            return replace(polished, iterations=iterations + polished.iterations), polished.theta, False
    return replace(fit, iterations=iterations), inside, True


def _on_original_scale(
    lam: float,
    problem: Problem,
    fit: Fit,
    at_wall: bool,
    mean: Float[np.ndarray, " p"],
    sd: Float[np.ndarray, " p"],
    total: float,
) -> dict[str, Any]:
    T = problem.X @ fit.theta
    loss = negative_log_likelihood(T, problem.weights)
    psi = fit.theta[1:] / sd[:, None]
    # the shift of alpha_k takes all blocks up to k: its slopes are their sum
    alpha = np.cumsum(fit.theta[0] - mean @ psi)
    own = class_probabilities(T)[problem.weights > 0]
    return {
        "lambdas": lam,
        "intercepts": alpha,
        "psi": psi,
        "objective": loss + problem.penalty(fit.theta),
        "log_likelihood": -total * loss,
        "violation": fit.violation,
        "n_iter": fit.iterations,
        "converged": fit.converged,
        "boundary": at_wall,
        "separated": bool(own.min() > _PERFECT)
        or (fit.converged and not at_wall and fit.last_move > 0.1 and fit.iterations > 5),
    }


def _empty(shape: tuple[int, int, int]) -> dict[str, Any]:
    none, flags = np.zeros(0), np.zeros(0, dtype=bool)
    return {
        "lambdas": none,
        "intercepts": np.zeros((0, shape[2])),
        "psi": np.zeros(shape),
        "objective": none,
        "log_likelihood": none,
        "violation": none,
        "n_iter": np.zeros(0, dtype=np.int64),
        "converged": flags,
        "boundary": flags,
        "separated": flags,
    }
