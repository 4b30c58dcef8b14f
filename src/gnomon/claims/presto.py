"""PRESTO's claims re-measured on the paper's synthetic data, where the true probabilities are known.

2,500 rows of 10 features, uniform on (-1, 1), and four ordered classes of which the last is rare. The slopes of the
first boundary are 0.5 with probability q = 1/3 and else 0, each difference between boundaries is 0.5 or -0.5 with
probability q and else 0. What is measured is the mean squared error of the rare class's probability over the rows of
the training. This is the paper's size; it repeats 700 times what is done here once a seed.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from gnomon.claims.experiment import experiment
from gnomon.errors import GnomonWarning
from gnomon.estimators.presto import PRESTO, PRESTOCV

__all__ = ["Sample", "draw", "errors", "rare_probability", "rarity"]

_ROWS, _FEATURES, _DENSITY, _FEWEST = 2500, 10, 1 / 3, 5
_THRESHOLDS = {"common": (0.0, 3.0, 5.0), "rare": (0.0, 3.5, 5.5), "rarest": (0.0, 4.0, 6.0)}
_SEEDS = tuple(range(12))


class Sample(NamedTuple):
    """Features, classes 0 to 3, and the true probability of class 3."""

    X: NDArray[np.float64]
    y: NDArray[np.int64]
    rare: NDArray[np.float64]


def draw(seed: int, thresholds: tuple[float, ...], rows: int = _ROWS) -> Sample:
    """Draw one data set of the paper's design.

    Slopes are drawn again until every class is possible in every row, and classes until each has five rows, without
    which five folds cannot be made.

    Parameters
    ----------
    seed : int
    thresholds : tuple of float
    rows : int, default 2500

    Returns
    -------
    Sample
    """
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (rows, _FEATURES))
    boundaries = len(thresholds)
    while True:
        kept = rng.random((_FEATURES, boundaries)) < _DENSITY
        signs = rng.choice([-1.0, 1.0], size=kept.shape)
        signs[:, 0] = 1.0
        eta = np.asarray(thresholds) + X @ np.cumsum(0.5 * kept * signs, axis=1)
        if (np.diff(eta, axis=1) > 0).all():
            break
    below = 1 / (1 + np.exp(-eta))
    while True:
        y = (rng.random((rows, 1)) > below).sum(axis=1)
        if np.bincount(y, minlength=boundaries + 1).min() >= _FEWEST:
            return Sample(X, y, 1 - below[:, -1])


@lru_cache(maxsize=128)
def errors(seed: int, setting: str) -> dict[str, float]:
    """Return the mean squared error of the rare probability by method.

    Parameters
    ----------
    seed : int
    setting : {"common", "rare", "rarest"}
        Thresholds: about 1 %, 0.6 % and 0.4 % of the rows in the last class.

    Returns
    -------
    dict of str to float
        presto, logistic, proportional-odds, and best-on-path: the penalty that nobody knows without the truth.
    """
    X, y, truth = draw(seed, _THRESHOLDS[setting])
    boundaries = int(y.max())
    parallel = np.full((_FEATURES, boundaries), np.inf)
    parallel[:, 0] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnomonWarning)  # a baseline may separate; its error is what is measured
        chosen = PRESTOCV().fit(X, y)
        common = PRESTO(lam=0.0, penalty_weights=parallel).fit(X, y)
    logistic = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(X, y == boundaries)
    path = chosen.path_.probabilities(X)[:, :, -1]
    found = {
        "presto": chosen.rare_proba(X),
        "logistic": logistic.predict_proba(X)[:, 1],
        "proportional-odds": common.rare_proba(X),
    }
    measured = {name: float(np.mean((p - truth) ** 2)) for name, p in found.items()}
    return {**measured, "best-on-path": float(((path - truth) ** 2).mean(axis=1).min())}


@experiment(
    arms=("presto", "logistic", "proportional-odds", "best-on-path"),
    relation=("presto < 0.75 * logistic", "presto < 0.75 * proportional-odds"),
    unit="mean squared error of the rare class's probability",
    seeds=_SEEDS,
    scales=("small",),
)
def rare_probability(arm: str, seed: int, scale: str) -> float:
    """PRESTO with a cross-validated penalty estimates the rare probability better than both baselines."""
    return errors(seed, "common")[arm]


@experiment(
    arms=tuple(_THRESHOLDS),
    relation="rarest < common",
    unit="PRESTO's mean squared error over that of logistic regression",
    seeds=tuple(range(24)),
    scales=("small",),
)
def rarity(arm: str, seed: int, scale: str) -> float:
    """The rarer the class, the smaller PRESTO's error is against that of logistic regression."""
    found = errors(seed, arm)
    return found["presto"] / found["logistic"]
