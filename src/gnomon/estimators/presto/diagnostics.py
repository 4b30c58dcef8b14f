"""What to look at beside a fit: a test of parallel lines, and the calibration of the rare class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chi2
from sklearn.utils.validation import check_array, column_or_1d

from gnomon.errors import MethodError
from gnomon.estimators.presto.estimator import PRESTO
from gnomon.estimators.presto.likelihood import class_probabilities, curvature, score

__all__ = ["ChiSquare", "ParallelLinesTest", "parallel_lines_test", "rare_calibration_error"]


class ChiSquare(NamedTuple):
    """One test: the statistic, its degrees of freedom, the probability of so large a value by chance."""

    statistic: float
    df: int
    p_value: float


@dataclass(frozen=True)
class ParallelLinesTest:
    """Whether proportional odds can be kept.

    Attributes
    ----------
    overall : ChiSquare
        All features together.
    by_feature : dict of str to ChiSquare
        Slopes of one feature free to differ between boundaries, the others common.
    log_likelihood : float
        Of the proportional odds model.
    trustworthy : bool
        False where a fit lies on the boundary of the domain or the classes are separated: no chi-squared law there.
    """

    overall: ChiSquare
    by_feature: dict[str, ChiSquare]
    log_likelihood: float
    trustworthy: bool


def parallel_lines_test(
    X: Any,
    y: Any,
    *,
    method: Literal["score", "likelihood-ratio"] = "score",
    classes_order: Sequence[Any] | str | None = None,
    reverse: bool = False,
    sample_weight: ArrayLike | None = None,
) -> ParallelLinesTest:
    """Test proportional odds against free slopes, without penalties.

    The score test needs the proportional odds fit alone, so it works where the free model has no interior optimum.

    Parameters
    ----------
    X, y, classes_order, reverse, sample_weight
        As in `PRESTO`. Weights count as numbers of rows.
    method : {"score", "likelihood-ratio"}, default "score"

    Returns
    -------
    ParallelLinesTest

    Raises
    ------
    MethodError
        With fewer than three classes, or an unknown method.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(500, 2))
    >>> y = np.digitize(X[:, 0] + rng.logistic(size=500), [0.0, 2.0])
    >>> test = parallel_lines_test(X, y)
    >>> test.overall.df, test.overall.p_value > 0.01, sorted(test.by_feature)
    (2, True, ['x0', 'x1'])
    """
    if method not in ("score", "likelihood-ratio"):
        raise MethodError(f"method = {method!r}; allowed are 'score' and 'likelihood-ratio'.")
    names = [str(name) for name in getattr(X, "columns", ())]
    X = check_array(X, dtype=np.float64)
    names = names or [f"x{j}" for j in range(X.shape[1])]
    rows = PRESTO(classes_order=classes_order, reverse=reverse)._read(X, y, sample_weight)
    K = len(rows.ordered)
    if K < 3:
        raise MethodError(f"y holds {K} classes; with one boundary there are no lines to be parallel. Give 3 or more.")

    def fit(free: NDArray[np.bool_]) -> Any:
        held = np.zeros((X.shape[1], K - 1))
        held[:, 1:] = np.where(free, 0.0, np.inf)[:, None]
        model = PRESTO(penalty_weights=held)
        return model.path(rows.X, rows.codes, [0.0], sample_weight=rows.weights)

    null = fit(np.zeros(X.shape[1], dtype=bool))
    fine = not bool(null.separated[0])
    sets = [np.ones(X.shape[1], dtype=bool), *np.eye(X.shape[1], dtype=bool)]
    tests = []
    if method == "score":
        T = null.spacings(rows.X)[0]
        tests = _score_tests(rows.X, T, np.eye(K)[rows.codes] * rows.weights[:, None], sets)
    else:
        varying = np.ptp(rows.X, axis=0) > 0
        for free in sets:
            full = fit(free)
            fine = fine and not bool(full.boundary[0] or full.separated[0])
            gain = 2 * float(full.log_likelihood[0] - null.log_likelihood[0])
            tests.append(_chi_square(max(gain, 0.0), (K - 2) * int((free & varying).sum())))
    return ParallelLinesTest(tests[0], dict(zip(names, tests[1:], strict=True)), float(null.log_likelihood[0]), fine)


def _score_tests(
    X: Float[np.ndarray, "n p"],
    T: Float[np.ndarray, "n b"],
    weights: Float[np.ndarray, "n K"],
    sets: list[NDArray[np.bool_]],
) -> list[ChiSquare]:
    """Return the score tests that free the differences of the given sets of features."""
    b, sd = T.shape[1], X.std(axis=0)
    columns = np.column_stack([np.ones(len(X)), (X - X.mean(axis=0)) / np.where(sd > 0, sd, 1.0)])
    q = columns.shape[1]
    gradient = (columns.T @ score(T, weights)).T.ravel()  # boundary by boundary
    bend = curvature(T, weights.sum(axis=1, keepdims=True) * class_probabilities(T))
    later = np.cumsum(bend.slope[:, ::-1], axis=1)[:, ::-1]
    information = np.empty((b, q, b, q))
    for k in range(b):
        for m in range(k + 1):
            block = columns.T @ ((later[:, k] + (bend.spacing[:, k] if m == k else 0.0))[:, None] * columns)
            information[k, :, m], information[m, :, k] = block, block
    flat = information.reshape(b * q, b * q)
    common = np.zeros((b, q), dtype=bool)
    common[:, 0] = common[0] = True
    null_rank = int(np.linalg.matrix_rank(flat[np.ix_(*[common.ravel()] * 2)], hermitian=True))
    tests = []
    for free in sets:
        moved = common.copy()
        moved[1:, 1:] |= free
        at = moved.ravel()
        part = flat[np.ix_(at, at)]
        statistic = float(gradient[at] @ np.linalg.pinv(part, hermitian=True) @ gradient[at])
        tests.append(_chi_square(statistic, int(np.linalg.matrix_rank(part, hermitian=True)) - null_rank))
    return tests


def _chi_square(statistic: float, df: int) -> ChiSquare:
    return ChiSquare(statistic, df, float(chi2.sf(statistic, df)) if df else 1.0)


def rare_calibration_error(is_rare: ArrayLike, probability: ArrayLike, bins: int = 10) -> float:
    """Return how far predicted and observed frequencies of the rare class lie apart.

    The rows are sorted by their prediction and cut into bins of equal size; the mean over the rows of
    ``|mean prediction - share of rare rows|`` of their bin.

    Parameters
    ----------
    is_rare : array-like of shape (n,)
        1 or True for rows of the rare class.
    probability : array-like of shape (n,)
        Their predicted probabilities, such as ``model.rare_proba(X)``.
    bins : int, default 10

    Returns
    -------
    float

    Raises
    ------
    MethodError
        When the lengths differ, a probability lies outside [0, 1], or there are more bins than rows.

    Examples
    --------
    >>> rare_calibration_error([0, 0, 0, 1], [0.0, 0.0, 0.5, 0.5], bins=2)
    0.0
    """
    truth = column_or_1d(is_rare).astype(np.float64)
    p = column_or_1d(probability).astype(np.float64)
    if len(truth) != len(p):
        raise MethodError(f"is_rare has {len(truth)} rows and probability {len(p)}; one of each a row is needed.")
    if not (np.isin(truth, (0, 1)).all() and ((p >= 0) & (p <= 1)).all()):
        raise MethodError("is_rare must hold 0 and 1 only, and probability numbers in [0, 1].")
    if not 1 <= bins <= len(p):
        raise MethodError(f"bins = {bins!r}; it must lie between 1 and the number of rows, {len(p)}.")
    order = np.argsort(p, kind="stable")
    gaps = [len(part) * abs(p[part].mean() - truth[part].mean()) for part in np.array_split(order, bins)]
    return float(sum(gaps) / len(p))
