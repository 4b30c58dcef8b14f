"""`PRESTOCV`: the penalty is the one that predicts held-out rows best."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import BaseCrossValidator, check_cv

from gnomon.common.engine import run_all
from gnomon.errors import MethodError, nearest
from gnomon.estimators.presto.base import OrderedClassifier, Rows
from gnomon.estimators.presto.likelihood import class_probabilities
from gnomon.estimators.presto.newton import SolverOptions
from gnomon.estimators.presto.path import Boundary, Penalty, fit_path

__all__ = ["PRESTOCV"]

_SCORES = ("brier", "log_loss", "rare_brier")


class PRESTOCV(OrderedClassifier):
    """`PRESTO` with the penalty chosen by cross-validation, refitted on all rows.

    Parameters
    ----------
    lambdas : array-like, optional
        Penalties to choose from, in any order; by default a grid from lambda_max of all rows down.
    n_lambda : int, default 20
        Length of that grid (the paper's simulations).
    lambda_min_ratio : float, default 0.01
        Its smallest value over its largest.
    cv : int, splitter or list of (train, test), default 5
        A number means stratified folds in the order of the rows: a fold without the rare class would score nothing.
    scoring : {"brier", "log_loss", "rare_brier"}, default "brier"
        Mean over the held-out rows of ``sum_k (1[y=k] - P_k)^2``, of ``-log P_y``, or of the last class's square
        alone. The largest penalty that attains the minimum is taken.
    alpha, penalize_first, penalty_weights, classes_order, reverse, boundary, solver
        As in `PRESTO`. ``solver=SolverOptions(engine="ray")`` fits the folds on a Ray cluster.

    Attributes
    ----------
    lam_ : float
        The penalty chosen.
    path_ : PrestoPath
        Fits of all penalties on all rows.
    cv_scores_ : float64 array of shape (L, folds)
        Score by penalty and fold; NaN where a path was stopped at the boundary.
    best_index_ : int
        Position of `lam_` in the path.
    intercept_, coef_, psi_, classes_, classes_order_, ...
        As in `PRESTO`.

    Raises
    ------
    MethodError
        In `fit`: an option out of range, or a class with fewer rows than there are folds.

    Examples
    --------
    >>> import numpy as np
    >>> from gnomon.estimators import PRESTOCV
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(-1, 1, (400, 3))
    >>> y = np.digitize(2 * X[:, 0] + rng.logistic(size=400), [0.0, 3.0])
    >>> model = PRESTOCV(cv=3).fit(X, y)
    >>> model.cv_scores_.shape, model.rare_proba(X).shape
    ((20, 3), (400,))
    """

    def __init__(
        self,
        lambdas: ArrayLike | None = None,
        *,
        n_lambda: int = 20,
        lambda_min_ratio: float = 0.01,
        cv: int | BaseCrossValidator | Iterable[Any] | None = 5,
        scoring: Literal["brier", "log_loss", "rare_brier"] = "brier",
        alpha: float = 1.0,
        penalize_first: bool = True,
        penalty_weights: ArrayLike | None = None,
        classes_order: Sequence[Any] | str | None = None,
        reverse: bool = False,
        boundary: Boundary = "barrier",
        solver: str | SolverOptions = "proxnewton",
    ) -> None:
        self.lambdas = lambdas
        self.n_lambda = n_lambda
        self.lambda_min_ratio = lambda_min_ratio
        self.cv = cv
        self.scoring = scoring
        self.alpha = alpha
        self.penalize_first = penalize_first
        self.penalty_weights = penalty_weights
        self.classes_order = classes_order
        self.reverse = reverse
        self.boundary = boundary
        self.solver = solver

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> PRESTOCV:
        """Choose the penalty and fit the model.

        Parameters
        ----------
        X, y, sample_weight
            As in `PRESTO.fit`; weights count in the scores too.

        Returns
        -------
        PRESTOCV
        """
        if self.scoring not in _SCORES:
            raise MethodError(f"scoring = {self.scoring!r}. {nearest(str(self.scoring), _SCORES, noun='score')}")
        rows = self._read(X, y, sample_weight)
        options = self._options()
        wanted: Any = "grid" if self.lambdas is None else np.asarray(self.lambdas, dtype=np.float64)
        self.path_ = fit_path(
            rows.X, rows.codes, rows.weights, self._penalty(), wanted,
            n_lambda=self.n_lambda, ratio=self.lambda_min_ratio, boundary=self.boundary, options=options,
        )  # fmt: skip
        if not len(self.path_.lambdas):
            raise MethodError("every penalty has its optimum on the boundary of the domain. Add larger penalties, or "
                              "take boundary='barrier'.")  # fmt: skip
        work = functools.partial(
            _fold_scores,
            rows,
            self._penalty(),
            self.path_.lambdas,
            self.boundary,
            replace(options, engine="local"),
            self.scoring,
        )
        scores = run_all(work, self._splits(rows), engine=options.engine)
        self.cv_scores_ = np.column_stack(scores)
        means = self.cv_scores_.mean(axis=1)
        if np.isnan(means).all():
            raise MethodError("no penalty has its optimum inside the domain in every fold. Add larger penalties, or "
                              "take boundary='barrier'.")  # fmt: skip
        self.best_index_ = int(np.nanargmin(means))  # the first minimum: the largest penalty
        self._keep(self.path_, self.best_index_, rows.ordered)
        return self

    def _splits(self, rows: Rows) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Return the folds as positions among the rows that have weight."""
        cv = self.cv
        if isinstance(cv, (int, np.integer)):
            counts = np.bincount(rows.codes)
            if cv < 2:
                raise MethodError(f"cv = {cv}; at least 2 folds are needed. The default is 5.")
            if counts.min() < cv:
                raise MethodError(
                    f"cv = {cv}, but the class {_plain(rows.ordered[counts.argmin()])!r} has {counts.min()} rows only: "
                    "some fold would lack it. Take fewer folds, or merge the class with its neighbour."
                )
        if isinstance(cv, str) or not (
            cv is None or isinstance(cv, (int, np.integer, Iterable)) or hasattr(cv, "split")
        ):
            raise MethodError(f"cv = {cv!r}; allowed are a number of folds, a splitter and a list of (train, test).")
        if cv is None or isinstance(cv, (int, np.integer)) or hasattr(cv, "split"):
            splits = list(check_cv(cv, rows.codes, classifier=True).split(rows.X, rows.codes))
        else:  # positions among all rows as they were given
            place = np.cumsum(rows.kept) - 1
            pairs = [(np.asarray(train), np.asarray(test)) for train, test in cv]
            splits = [(place[a[rows.kept[a]]], place[b[rows.kept[b]]]) for a, b in pairs]
        for number, (train, test) in enumerate(splits):
            lost = set(range(len(rows.ordered))) - set(rows.codes[train].tolist())
            if lost or not len(test):
                what = f"lack the class {_plain(rows.ordered[min(lost)])!r}" if lost else "leave nothing to score"
                raise MethodError(
                    f"the training rows of fold {number} {what}. Stratify the folds: cv=5, or a StratifiedKFold."
                )
        return splits


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label


def _fold_scores(
    rows: Rows,
    penalty: Penalty,
    lambdas: NDArray[np.float64],
    boundary: Boundary,
    options: SolverOptions,
    scoring: str,
    split: tuple[NDArray[np.intp], NDArray[np.intp]],
) -> NDArray[np.float64]:
    """Return the held-out score of every penalty in one fold; NaN behind the end of a path that was stopped."""
    train, test = split
    path = fit_path(
        rows.X[train], rows.codes[train], rows.weights[train], penalty, lambdas, boundary=boundary, options=options
    )
    scores = np.full(len(lambdas), np.nan)
    truth = np.eye(len(rows.ordered))[rows.codes[test]]
    shares = rows.weights[test] / rows.weights[test].sum()
    for index, T in enumerate(path.spacings(rows.X[test])):
        P = class_probabilities(T)
        if scoring == "brier":
            loss = ((truth - P) ** 2).sum(axis=1)
        elif scoring == "rare_brier":
            loss = (truth[:, -1] - P[:, -1]) ** 2
        else:
            loss = -np.log(np.maximum((truth * P).sum(axis=1), np.finfo(float).tiny))
        scores[index] = shares @ loss
    return scores
