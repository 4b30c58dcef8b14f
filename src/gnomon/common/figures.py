"""Figures with intervals: means and any other statistic, over units that may come in clusters.

Units of one cluster (prompts about one record, notes about one patient) are not independent. Standard errors here sum
the deviations within a cluster before squaring, with the factor C / (C - 1) for C clusters (Miller 2024,
arXiv 2411.00640, appendix A, plus that correction); bootstraps draw whole clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from gnomon.errors import MethodError

__all__ = ["Figure", "bootstrap_figures", "mean_figure"]


@dataclass(frozen=True)
class Figure:
    """One number with what is known of its spread.

    Attributes
    ----------
    value : float
        NaN when there was nothing to measure.
    stderr, low, high : float
        Standard error and interval; NaN with fewer than two clusters.
    n : int
        Units that entered.
    """

    value: float
    stderr: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def plain(self) -> dict[str, float | int | None]:
        """Return a JSON-plain dict in which NaN is None."""

        def finite(x: float) -> float | None:
            return float(x) if math.isfinite(x) else None

        return {
            "value": finite(self.value),
            "stderr": finite(self.stderr),
            "low": finite(self.low),
            "high": finite(self.high),
            "n": self.n,
        }


def _codes(clusters: Sequence[Hashable] | None, n: int) -> tuple[np.ndarray[Any, np.dtype[np.intp]], int]:
    if clusters is None:
        return np.arange(n), n
    if len(clusters) != n:
        raise MethodError(f"{len(clusters)} cluster names for {n} values. Give one for each value.")
    known: dict[Hashable, int] = {}
    codes = np.fromiter((known.setdefault(name, len(known)) for name in clusters), dtype=np.intp, count=n)
    return codes, len(known)


def mean_figure(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Figure:
    """Return the mean with its clustered standard error and t interval; NaN values do not count.

    The same numbers as Inspect's `mean`, `stderr(cluster=...)` and `ci(cluster=...)`.

    Parameters
    ----------
    values : sequence of float, shape (n,)
    clusters : sequence, optional
        The cluster of each value; default every value its own.
    confidence : float, default 0.95
    bounds : pair of float, default none
        The interval is cut to the range that the mean can have, such as (0, 1).

    Returns
    -------
    Figure

    Raises
    ------
    MethodError
        When lengths differ or `confidence` is not in (0, 1).

    Examples
    --------
    >>> round(mean_figure([1.0, 0.0, 1.0, 1.0]).stderr, 4)
    0.25
    """
    if not 0 < confidence < 1:
        raise MethodError(f"confidence = {confidence}: allowed is a share above 0 and below 1, such as 0.95.")
    x = np.asarray(values, dtype=np.float64)
    codes, _ = _codes(clusters, len(x))
    kept = ~np.isnan(x)
    x, codes = x[kept], codes[kept]
    if not len(x):
        return Figure(math.nan)
    mean = float(x.mean())
    sums = np.bincount(np.unique(codes, return_inverse=True)[1], weights=x - mean)
    count = len(sums)
    if count < 2:
        return Figure(mean, n=len(x))
    error = math.sqrt(float((sums**2).sum()) * count / (count - 1)) / len(x)
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    return Figure(mean, error, max(bounds[0], mean - reach), min(bounds[1], mean + reach), len(x))


def bootstrap_figures(
    statistic: Callable[[np.ndarray[Any, np.dtype[np.intp]]], Mapping[str, float]],
    n: int,
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Figure]:
    """Return statistics that are no means (F1, a kappa, a correlation) with percentile bootstrap intervals.

    Parameters
    ----------
    statistic : callable
        Takes positions (int array, with repeats) into the n units and returns named numbers; NaN where undefined.
    n : int
        Number of units.
    clusters : sequence, optional
        The cluster of each unit; whole clusters are drawn. Default every unit its own.
    resamples : int, default 1000
    confidence : float, default 0.95
    seed : int, default 0
        Of a private generator.

    Returns
    -------
    dict of str to Figure
        Empty when n is 0.

    Raises
    ------
    MethodError
        When an argument is out of range.

    Examples
    --------
    >>> x = np.array([1.0, 2.0, 3.0, 4.0])
    >>> bootstrap_figures(lambda i: {"median": float(np.median(x[i]))}, 4)["median"].value
    2.5
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise MethodError(f"resamples = {resamples}, confidence = {confidence}: allowed are >= 1 and (0, 1).")
    codes, count = _codes(clusters, n)
    if n == 0:
        return {}
    point = dict(statistic(np.arange(n)))
    if count < 2:
        return {name: Figure(float(value), n=n) for name, value in point.items()}
    members = [np.flatnonzero(codes == c) for c in range(count)]
    if clusters is not None:  # the same draws whatever the order of the rows is
        members.sort(key=lambda m: repr(clusters[int(m[0])]))
    generator = np.random.default_rng(seed)
    draws = [
        dict(statistic(np.concatenate([members[c] for c in generator.integers(0, count, size=count)])))
        for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2
    figures = {}
    for name, value in point.items():
        column = np.asarray([draw.get(name, math.nan) for draw in draws], dtype=np.float64)
        column = column[~np.isnan(column)]
        if len(column) < 2:
            figures[name] = Figure(float(value), n=n)
            continue
        low, high = np.quantile(column, [tail, 1 - tail])
        figures[name] = Figure(float(value), float(column.std(ddof=1)), float(low), float(high), n)
    return figures
