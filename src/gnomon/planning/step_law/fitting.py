"""Refitting the law on your own table of runs: least squares in logs, and its bootstrap in one batched solve."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from gnomon.errors import DataError, GnomonWarning, MethodError
from gnomon.planning.step_law.law import Coefficients, positive
from gnomon.planning.step_law.runs import near_optimal, read_runs

__all__ = ["StepLawFit", "bootstrap_least_squares", "fit_step_law", "least_squares", "resample_counts"]

Array = NDArray[np.float64]


def least_squares(X: Array, y: Array, weights: Array | None = None) -> Array:
    """Return the coefficients of ordinary (or weighted) least squares.

    Parameters
    ----------
    X : float64 array, (n, p)
    y : float64 array, (n,)
    weights : float64 array, (n,), optional
        How much each row counts.

    Returns
    -------
    float64 array, (p,)
    """
    if weights is not None:
        root = np.sqrt(weights)
        X, y = X * root[:, None], y * root
    return np.linalg.lstsq(X, y, rcond=None)[0].astype(np.float64, copy=False)


def resample_counts(rows: int, resamples: int, generator: np.random.Generator) -> Array:
    """Return how often each row was drawn in each resample with replacement, (resamples, rows)."""
    drawn = generator.integers(0, rows, size=(resamples, rows))
    drawn += np.arange(resamples)[:, None] * rows
    return np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


def bootstrap_least_squares(X: Array, y: Array, counts: Array) -> Array:
    """Refit on every resample at once: the normal equations of all of them are one product, solved in one batch.

    The columns are centred and scaled first, which keeps the squared condition number small.

    Parameters
    ----------
    X : float64 array, (n, p)
        First column ones.
    y : float64 array, (n,)
    counts : float64 array, (resamples, n)
        How often each row counts.

    Returns
    -------
    float64 array, (resamples, p)
        NaN for a resample that does not determine the coefficients (too few distinct rows were drawn).
    """
    n, p = X.shape
    centre = np.r_[0.0, X[:, 1:].mean(axis=0)]
    scale = np.r_[1.0, X[:, 1:].std(axis=0)]
    scale[scale == 0] = 1.0
    Z, middle = (X - centre) / scale, y.mean()
    upper = np.triu_indices(p)
    products = np.concatenate([Z[:, upper[0]] * Z[:, upper[1]], Z * (y - middle)[:, None]], axis=1)
    sums = counts @ products / n
    gram = np.empty((len(counts), p, p))
    gram[:, upper[0], upper[1]] = gram[:, upper[1], upper[0]] = sums[:, : len(upper[0])]
    lost = ~(np.linalg.det(gram) > 1e-10)
    gram[lost] = np.eye(p)
    beta = np.linalg.solve(gram, sums[:, len(upper[0]) :, None])[..., 0] / scale
    beta[:, 0] += middle - beta[:, 1:] @ centre[1:]
    beta[lost] = np.nan
    return beta


@dataclass(frozen=True)
class StepLawFit:
    """A refit of the law.

    Attributes
    ----------
    coefficients : Coefficients
        Least squares on the kept rows; callable: ``fit.coefficients(N, D) -> (lr, batch in tokens)``.
    lr_rows, batch_rows : float64 arrays, (resamples, 3) and (resamples, 2 or 3)
        Coefficients of the bootstrap; one row holds the two fits on one resample.
    kept, rows, groups : int
        Near-optimal rows that entered, all rows, (N, D) groups.
    threshold : float
        Largest relative excess loss of a kept row.
    lost : int
        Resamples that did not determine the coefficients and were left out.
    """

    coefficients: Coefficients
    lr_rows: Array
    batch_rows: Array
    kept: int
    rows: int
    groups: int
    threshold: float
    lost: int = 0

    def predict(self, n_params: ArrayLike, n_tokens: ArrayLike) -> tuple[Array, Array]:
        """Return peak learning rate and batch in tokens, elementwise."""
        return self.coefficients(n_params, n_tokens)

    def interval(self, n_params: float, n_tokens: float, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
        """Return percentiles, over the bootstrap rows, of the predicted learning rate and batch.

        Raises
        ------
        MethodError
            When the fit was made without a bootstrap.
        """
        if not len(self.lr_rows):
            raise MethodError("this fit has no bootstrap rows. Fit with bootstrap=1000 for intervals.")
        if not 0 < confidence < 1:
            raise MethodError(f"confidence = {confidence!r}: a level lies between 0 and 1, such as 0.95.")
        n, d = float(positive("n_params", n_params)), float(positive("n_tokens", n_tokens))
        x = np.array([1.0, np.log(n), np.log(d)])
        ends = [50 * (1 - confidence), 50 * (1 + confidence)]
        lr = np.exp(np.percentile(self.lr_rows @ x, ends))
        batch = np.exp(np.percentile(self.batch_rows @ (x if self.batch_rows.shape[1] == 3 else x[[0, 2]]), ends))
        return {"lr": (float(lr[0]), float(lr[1])), "batch_tokens": (float(batch[0]), float(batch[1]))}

    def summary(self) -> pd.DataFrame:
        """Return a row per coefficient: the fit, and mean, std and percentiles over the bootstrap (all in logs)."""
        names = ["lr_intercept", "lr_coefN", "lr_coefD"]
        names += ["bs_intercept", *(["bs_coefN"] if len(self.coefficients.batch) == 3 else []), "bs_coefD"]
        table = pd.DataFrame({"fit": [*self.coefficients.lr, *self.coefficients.batch]}, index=names)
        if len(self.lr_rows):
            rows = np.concatenate([self.lr_rows, self.batch_rows], axis=1)
            table["mean"], table["std"] = rows.mean(axis=0), rows.std(axis=0, ddof=1)
            for percent in (2.5, 50, 97.5):
                table[f"{percent:g}%"] = np.percentile(rows, percent, axis=0)
        return table


def fit_step_law(
    runs: str | Path | pd.DataFrame,
    *,
    seq_len: int = 2048,
    threshold: float = 0.0025,
    batch_on_n: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> StepLawFit:
    """Fit the law's coefficients to a table of runs.

    Rows whose loss is within `threshold` of the smallest of their (N, D) group are kept; ln lr is regressed on
    [1, ln N, ln D] and ln batch on [1, ln D], unweighted.

    Parameters
    ----------
    runs : str, Path or DataFrame
        Columns N, D (tokens), lr, bs (sequences), smooth loss or loss: see `read_runs`.
    seq_len : int, default 2048
        Tokens in one sequence.
    threshold : float, default 0.0025
        The paper's.
    batch_on_n : bool, default False
        Regress the batch on ln N too.
    bootstrap : int, default 1000
        Resamples of the kept rows; 0 makes none.
    seed : int, default 0
        Of the resampling.

    Returns
    -------
    StepLawFit

    Raises
    ------
    DataError
        When the table cannot be used, or N or D do not vary enough to tell their exponents; names the column.

    Examples
    --------
    >>> grid = [(n, d, lr, b, 3 + 99 * abs(lr - 1e-3) + abs(b - 64)) for n in (1e8, 3e8, 1e9) for d in (1e9, 4e9, 9e9)
    ...         for lr in (5e-4, 1e-3) for b in (32, 64)]
    >>> fit = fit_step_law(pd.DataFrame(grid, columns=["N", "D", "lr", "bs", "loss"]), bootstrap=0)
    >>> fit.kept, [round(abs(c), 6) for c in fit.coefficients.lr[1:]]
    (9, [0.0, 0.0])
    """
    if bootstrap < 0:
        raise MethodError(f"bootstrap = {bootstrap}: a number of resamples, 0 for none.")
    file = None if isinstance(runs, pd.DataFrame) else str(runs)
    table = read_runs(runs, seq_len)
    kept = near_optimal(table, threshold)
    X = np.stack([np.ones(len(kept)), np.log(kept["N"]), np.log(kept["D"])], axis=1)
    _check_rank(kept, X, file)
    lr, batch = np.log(kept["lr"].to_numpy()), np.log(kept["batch"].to_numpy())
    X_batch = X if batch_on_n else X[:, [0, 2]]
    lr_fit, batch_fit = least_squares(X, lr), least_squares(X_batch, batch)
    counts = resample_counts(len(kept), bootstrap, np.random.default_rng(seed))
    rows = np.concatenate(
        [bootstrap_least_squares(X, lr, counts), bootstrap_least_squares(X_batch, batch, counts)], axis=1
    )
    good = np.isfinite(rows).all(axis=1)
    if bootstrap and not good.all():
        warnings.warn(
            f"{int((~good).sum())} of {bootstrap} resamples had too few distinct N or D and are left out; the "
            "intervals are rough. More runs near the optimum would steady them.",
            GnomonWarning,
            stacklevel=2,
        )
    return StepLawFit(
        coefficients=Coefficients((float(lr_fit[0]), float(lr_fit[1]), float(lr_fit[2])), tuple(batch_fit.tolist())),
        lr_rows=rows[good, :3],
        batch_rows=rows[good, 3:],
        kept=len(kept),
        rows=len(table),
        groups=int(kept["group"].nunique()),
        threshold=threshold,
        lost=int((~good).sum()),
    )


def _check_rank(kept: pd.DataFrame, X: Array, file: str | None) -> None:
    for name in ("N", "D"):
        values = sorted(set(kept[name]))
        if len(values) < 3:
            raise DataError(
                f"column {name} has {len(values)} distinct values ({', '.join(f'{v:g}' for v in values)}) among the "
                "near-optimal runs; the fit needs at least 3. Add groups of runs.",
                file=file,
            )
    centred = X[:, 1:] - X[:, 1:].mean(axis=0)
    if abs(np.corrcoef(centred.T)[0, 1]) > 1 - 1e-9:
        raise DataError(
            "columns N and D rise together (ln D is a linear function of ln N), so their exponents cannot be told "
            "apart. Add runs with other ratios of D to N.",
            file=file,
        )
