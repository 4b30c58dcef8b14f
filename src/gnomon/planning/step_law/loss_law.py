"""The loss as a function of parameters and tokens: L(N, D) = exp(E) + exp(A) / N^alpha + exp(B) / D^beta."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from gnomon.errors import DataError, MethodError
from gnomon.planning.step_law.fitting import resample_counts
from gnomon.planning.step_law.law import positive
from gnomon.planning.step_law.runs import near_optimal, read_runs

__all__ = ["LossLaw", "fit_loss_law", "huber_objective", "minimise_all"]

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Objective = Callable[[Array, Indices], tuple[Array, Array]]

_NAMES = ("E", "A", "B", "alpha", "beta")
# starts: E, then the logs of the two other terms at the middle of the data, then the exponents
_STARTS = ((-1.0, 0.0, 0.5), (-4.0, -2.0, -0.5), (-4.0, -2.0, -0.5), (0.1, 0.3, 0.8), (0.1, 0.3, 0.8))


def _predict(theta: Array, log_n: Array, log_d: Array) -> tuple[Array, Array]:
    """Return ln L, (..., n), and the share of each of the three terms, (..., 3, n)."""
    E, A, B, alpha, beta = (theta[..., i, None] for i in range(5))
    terms = np.stack(np.broadcast_arrays(E + 0 * log_n, A - alpha * log_n, B - beta * log_d), axis=-2)
    top = terms.max(axis=-2, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=-2, keepdims=True)
    return (top + np.log(total))[..., 0, :], shares / total


def huber_objective(
    theta: Array, log_n: Array, log_d: Array, log_loss: Array, counts: Array, delta: float = 1e-3
) -> tuple[Array, Array]:
    """Return the Huber loss of log-loss residuals over delta^2, and its gradient, for many parameter vectors at once.

    Parameters
    ----------
    theta : float64 array, (s, 5)
        E, A, B, alpha, beta.
    log_n, log_d, log_loss : float64 arrays, (n,)
        Natural logs of parameters, tokens, losses.
    counts : float64 array, (s, n) or (n,)
        How much each row counts.
    delta : float, default 1e-3
        Where the square turns into a line.

    Returns
    -------
    value : float64 array, (s,)
    gradient : float64 array, (s, 5)
    """
    predicted, shares = _predict(theta, log_n, log_d)
    r = (predicted - log_loss) / delta
    size = np.abs(r)
    value = (counts * np.where(size <= 1, 0.5 * r * r, size - 0.5)).sum(axis=-1)
    pull = counts * np.clip(r, -1, 1) / delta
    e, a, b = shares[..., 0, :], shares[..., 1, :], shares[..., 2, :]
    parts = (e * pull, a * pull, b * pull, -a * pull * log_n, -b * pull * log_d)
    return value, np.stack([part.sum(axis=-1) for part in parts], axis=-1)


def minimise_all(
    objective: Objective, starts: Array, *, max_steps: int = 500, tolerance: float = 1e-6
) -> tuple[Array, Array]:
    """Run BFGS from many starts at once, each with its own inverse Hessian and backtracking line search.

    Parameters
    ----------
    objective : callable
        Takes points (m, p) and their indices among the starts (m,); returns values (m,) and gradients (m, p).
    starts : float64 array, (s, p)
    max_steps : int, default 500
    tolerance : float, default 1e-6
        A start is done when its largest gradient entry is below this times (1 + value), when no step improves it, or
        when four in a row improve it by less than 1e-7 (at a kink of the objective).

    Returns
    -------
    points : float64 array, (s, p)
    values : float64 array, (s,)
    """
    x = starts.copy()
    count, p = x.shape
    value, gradient = objective(x, np.arange(count))
    inverse = np.tile(np.eye(p), (count, 1, 1)) / np.maximum(1.0, np.abs(gradient).max(axis=1))[:, None, None]
    active, idle = np.arange(count), np.zeros(count, dtype=np.intp)
    for _ in range(max_steps):
        small = np.abs(gradient[active]).max(axis=1) <= tolerance * (1 + value[active])
        active = active[~small & np.isfinite(value[active])]
        if not len(active):
            break
        g, H = gradient[active], inverse[active]
        direction = -np.einsum("spq,sq->sp", H, g)
        slope = (direction * g).sum(axis=1)
        step, new, new_value, new_gradient = _search(objective, x, value, active, direction, slope)
        moved = step > 0
        s, y = new - x[active], new_gradient - g
        idle[active] = np.where(value[active] - new_value > 1e-7 * (1 + value[active]), 0, idle[active] + 1)
        x[active], value[active], gradient[active] = new, new_value, new_gradient
        inverse[active] = _updated(H, s, y, moved)
        active = active[moved & (idle[active] < 4)]
    return x, value


def _search(
    objective: Objective, x: Array, value: Array, active: Indices, direction: Array, slope: Array
) -> tuple[Array, Array, Array, Array]:
    """Halve the step until the objective falls enough; a step of 0 where it never does."""
    step = np.ones(len(active))
    new, new_value = x[active].copy(), value[active].copy()
    new_gradient = np.zeros_like(new)
    todo = np.arange(len(active))
    for _ in range(40):
        rows = active[todo]
        tried = x[rows] + step[todo, None] * direction[todo]
        tried_value, tried_gradient = objective(tried, rows)
        good = tried_value <= value[rows] + 1e-4 * step[todo] * slope[todo]
        hit = todo[good]
        new[hit], new_value[hit], new_gradient[hit] = tried[good], tried_value[good], tried_gradient[good]
        todo = todo[~good]
        if not len(todo):
            break
        step[todo] *= 0.5
    step[todo] = 0.0
    return step, new, new_value, new_gradient


def _updated(H: Array, s: Array, y: Array, moved: NDArray[np.bool_]) -> Array:
    """The BFGS update of the inverse Hessians, where the curvature along the step is positive."""
    curvature = (s * y).sum(axis=1)
    good = moved & (curvature > 1e-12 * np.linalg.norm(s, axis=1) * np.linalg.norm(y, axis=1))
    rho = np.where(good, 1.0 / np.where(good, curvature, 1.0), 0.0)
    Hy = np.einsum("spq,sq->sp", H, y)
    outer = np.einsum("sp,sq->spq", s, Hy)
    grow = rho * (1 + rho * (y * Hy).sum(axis=1))
    change = grow[:, None, None] * np.einsum("sp,sq->spq", s, s) - rho[:, None, None] * (
        outer + outer.transpose(0, 2, 1)
    )
    return H + np.where(good[:, None, None], change, 0.0)


@dataclass(frozen=True)
class LossLaw:
    """A fitted loss law.

    Attributes
    ----------
    coefficients : float64 array, (5,)
        E, A, B, alpha, beta of the best fit to all rows but the held-out one.
    mode : float64 array, (5,)
        The peak of each coefficient's density over the bootstrap. They are strongly correlated, so the five modes
        together need not be a good fit: `predict` uses `coefficients`.
    rows : float64 array, (resamples, 5)
    fit_error : float
        Root mean square of the log-loss residuals of the rows that were fitted.
    held_out : dict or None
        ``N``, ``D``, ``loss`` of the row with the smallest loss, kept apart, ``predicted``, and ``error``, the
        relative difference.
    """

    coefficients: Array
    mode: Array
    rows: Array
    fit_error: float
    held_out: dict[str, float] | None = None

    def predict(self, n_params: ArrayLike, n_tokens: ArrayLike) -> Array:
        """Return the loss expected at the best learning rate and batch, elementwise."""
        log_n, log_d = np.log(positive("n_params", n_params)), np.log(positive("n_tokens", n_tokens))
        log_n, log_d = np.broadcast_arrays(log_n, log_d)
        return np.exp(_predict(self.coefficients, log_n.ravel(), log_d.ravel())[0]).reshape(log_n.shape)

    def interval(self, n_params: float, n_tokens: float, confidence: float = 0.95) -> tuple[float, float]:
        """Return percentiles of the predicted loss over the bootstrap.

        Raises
        ------
        MethodError
            When the law was fitted without a bootstrap, or the level is not between 0 and 1.
        """
        if not len(self.rows):
            raise MethodError("this loss law has no bootstrap rows. Fit with bootstrap=2000 for intervals.")
        if not 0 < confidence < 1:
            raise MethodError(f"confidence = {confidence!r}: a level lies between 0 and 1, such as 0.95.")
        n, d = np.log(positive("n_params", [n_params])), np.log(positive("n_tokens", [n_tokens]))
        losses = np.exp(_predict(self.rows, n, d)[0][:, 0])
        low, high = np.percentile(losses, [50 * (1 - confidence), 50 * (1 + confidence)])
        return float(low), float(high)

    def summary(self) -> pd.DataFrame:
        """Return a row per coefficient: fit, mode, and percentiles over the bootstrap."""
        table = pd.DataFrame({"fit": self.coefficients, "mode": self.mode}, index=list(_NAMES))
        if len(self.rows):
            for percent in (2.5, 50, 97.5):
                table[f"{percent:g}%"] = np.percentile(self.rows, percent, axis=0)
        return table


def fit_loss_law(
    runs: str | Path | pd.DataFrame,
    *,
    seq_len: int = 2048,
    delta: float = 1e-3,
    bootstrap: int = 2000,
    hold_out: bool = True,
    seed: int = 0,
) -> LossLaw:
    """Fit the loss law to the best run of every (N, D) group.

    A Huber loss on the residuals of ln L is minimised by BFGS from every point of a grid of 243 starts; each resample
    of the bootstrap starts at the best of these. Only the best run of a group enters, so diverged ones do not.

    Parameters
    ----------
    runs : str, Path or DataFrame
        A table of runs for `read_runs`, or what it returned.
    seq_len : int, default 2048
        Tokens in one sequence of a table that was not read yet.
    delta : float, default 1e-3
        The Huber loss is a square below this residual and a line above.
    bootstrap : int, default 2000
        Resamples of the groups; 0 makes none.
    hold_out : bool, default True
        Keep the group with the smallest loss apart and predict it.
    seed : int, default 0
        Of the resampling.

    Returns
    -------
    LossLaw

    Raises
    ------
    DataError
        With fewer than 6 groups to fit, or fewer than 3 distinct N or D.
    MethodError
        When an option is not positive.

    Examples
    --------
    >>> grid = [(n, d, lr, 64, 1.7 + 60 * n**-0.25 + 400 * d**-0.28 + abs(lr - 1e-3)) for n in (1e8, 4e8, 1e9)
    ...         for d in (2e9, 1e10, 5e10) for lr in (5e-4, 1e-3)]
    >>> law = fit_loss_law(pd.DataFrame(grid, columns=["N", "D", "lr", "bs", "loss"]), bootstrap=0)
    >>> law.coefficients[3:].round(3).tolist()
    [0.25, 0.28]
    """
    if not delta > 0 or bootstrap < 0:
        raise MethodError(f"delta = {delta}, bootstrap = {bootstrap}: delta is above 0, bootstrap 0 or more.")
    table = runs if isinstance(runs, pd.DataFrame) and "excess" in runs else read_runs(runs, seq_len)
    best = near_optimal(table, np.inf).sort_values("loss").drop_duplicates("group")
    kept = best.iloc[1:] if hold_out else best
    for name in ("N", "D"):
        if kept[name].nunique() < 3:
            raise DataError(f"column {name} has {kept[name].nunique()} distinct values among the groups; 3 are needed.")
    if len(kept) < 6:
        raise DataError(
            f"{len(kept)} groups to fit five coefficients to; at least 6 are needed"
            + (" besides the one held out." if hold_out else ".")
        )
    log_n, log_d, log_loss = (np.log(kept[name].to_numpy(np.float64)) for name in ("N", "D", "loss"))
    fitter = _Fitter(log_n, log_d, log_loss, delta)
    best_theta = fitter.from_grid()
    counts = resample_counts(len(kept), bootstrap, np.random.default_rng(seed))
    rows = fitter.resampled(best_theta, counts)
    residuals = _predict(best_theta, log_n, log_d)[0] - log_loss
    law = LossLaw(best_theta, _modes(rows) if bootstrap else best_theta, rows, float(np.sqrt((residuals**2).mean())))
    if not hold_out:
        return law
    out = {name: float(best[name].iloc[0]) for name in ("N", "D", "loss")}
    predicted = float(law.predict(out["N"], out["D"]))
    held = {**out, "predicted": predicted, "error": predicted / out["loss"] - 1}
    return LossLaw(law.coefficients, law.mode, rows, law.fit_error, held)


class _Fitter:
    """The objective around the middle of the data, where terms and exponents are nearly uncorrelated."""

    def __init__(self, log_n: Array, log_d: Array, log_loss: Array, delta: float) -> None:
        self.centre_n, self.centre_d = float(log_n.mean()), float(log_d.mean())
        self.data = (log_n - self.centre_n, log_d - self.centre_d, log_loss)
        self.delta = delta

    def _moved(self, theta: Array, sign: int) -> Array:
        """Move A and B between the centre of the data (sign -1) and N = D = 1 (sign 1)."""
        out = theta.copy()
        out[..., 1] += sign * theta[..., 3] * self.centre_n
        out[..., 2] += sign * theta[..., 4] * self.centre_d
        return out

    def from_grid(self) -> Array:
        starts = np.array(list(itertools.product(*_STARTS)))
        ones = np.ones(len(self.data[0]))
        points, values = minimise_all(lambda t, _: huber_objective(t, *self.data, ones, self.delta), starts)
        return self._moved(points[int(np.nanargmin(values))], 1)

    def resampled(self, theta: Array, counts: Array) -> Array:
        starts = np.tile(self._moved(theta, -1), (len(counts), 1))
        if not len(counts):
            return starts
        points, _ = minimise_all(lambda t, i: huber_objective(t, *self.data, counts[i], self.delta), starts)
        return self._moved(points, 1)


def _modes(rows: Array) -> Array:
    """The peak of a kernel density of each column on 1000 points, over its central 98 % (resamples that hardly
    determine a coefficient put it anywhere)."""
    from scipy.stats import gaussian_kde

    found = []
    for column in rows.T:
        low, high = np.percentile(column, [1, 99])
        if not high > low:
            found.append(float(np.median(column)))
            continue
        grid = np.linspace(low, high, 1000)
        found.append(float(grid[np.argmax(gaussian_kde(column[(column >= low) & (column <= high)])(grid))]))
    return np.array(found)
