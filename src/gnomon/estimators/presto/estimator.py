"""`PRESTO`: the estimator for one penalty."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gnomon.errors import MethodError
from gnomon.estimators.presto.base import OrderedClassifier
from gnomon.estimators.presto.newton import SolverOptions
from gnomon.estimators.presto.path import Boundary, PrestoPath, fit_path

__all__ = ["PRESTO"]


class PRESTO(OrderedClassifier):
    """Ordered regression whose boundaries have slopes of their own, shrunk towards proportional odds.

    Parameters
    ----------
    lam : float, default 0.01
        Penalty on the standardised features and the mean log-likelihood. 0 is the unpenalised fit. `PRESTOCV`
        chooses it; `lambda_max_` is the value from which on nothing is left.
    alpha : float, default 1.0
        Share of the L1 norm: 1 is PRESTO, 0 the ridge variant.
    penalize_first : bool, default True
        Penalise the slopes of the first boundary like the differences (the final paper and the authors' code). False
        leaves them free (its first version): a large penalty then gives proportional odds instead of no slopes.
    penalty_weights : array of shape (p,) or (p, K - 1), optional
        Factors of the penalty by feature, or by feature and boundary; infinity holds a coefficient at 0.
    classes_order : list or "sorted", optional
        All labels, from the common to the rare end. Numbers and ordered pandas categoricals need none; strings do.
    reverse : bool, default False
        Turn the order round, for labels whose rare class comes first.
    boundary : {"barrier", "stop"}, default "barrier"
        Where the optimum lies on the boundary of the domain: find it there with a barrier, or keep the fit of the
        last of ten penalties from lambda_max_ down to `lam` whose optimum is inside.
    solver : {"proxnewton", "fisher"} or SolverOptions, default "proxnewton"
        Curvature of the steps, or all options of the search.

    Attributes
    ----------
    intercept_ : float64 array of shape (K - 1,)
        The thresholds alpha_k: ``P(y <= k) = sigma(alpha_k + x.beta_k)``.
    coef_ : float64 array of shape (p, K - 1)
        beta_k as columns. Software that writes ``theta_k - x.beta`` has the opposite sign.
    psi_ : float64 array of shape (p, K - 1)
        beta_1, then beta_k - beta_{k-1}: zero columns are boundaries with proportional odds.
    classes_ : array of shape (K,)
        Sorted: the columns of `predict_proba`, as scikit-learn's scorers expect them.
    classes_order_ : array of shape (K,)
        In the order of the model; the last is the rare class.
    lam_, lambda_max_, objective_, log_likelihood_, violation_, n_iter_ : float
        Penalty of the fit kept, smallest penalty that leaves nothing, mean penalised loss, sum of the log-likelihood,
        violation of the optimality conditions, steps.
    converged_, boundary_reached_, separated_ : bool
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Raises
    ------
    MethodError
        In `fit`: an option out of range, labels without an order, one class only.

    Examples
    --------
    >>> import numpy as np
    >>> from gnomon.estimators import PRESTO
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(-1, 1, (400, 3))
    >>> y = np.digitize(2 * X[:, 0] + rng.logistic(size=400), [0.0, 2.0])
    >>> model = PRESTO(lam=0.02).fit(X, y)
    >>> model.coef_.shape, bool(model.coef_[0, 0] < 0), int(np.count_nonzero(model.psi_[:, 1]))
    ((3, 2), True, 0)
    """

    def __init__(
        self,
        lam: float = 0.01,
        *,
        alpha: float = 1.0,
        penalize_first: bool = True,
        penalty_weights: ArrayLike | None = None,
        classes_order: Sequence[Any] | str | None = None,
        reverse: bool = False,
        boundary: Boundary = "barrier",
        solver: str | SolverOptions = "proxnewton",
    ) -> None:
        self.lam = lam
        self.alpha = alpha
        self.penalize_first = penalize_first
        self.penalty_weights = penalty_weights
        self.classes_order = classes_order
        self.reverse = reverse
        self.boundary = boundary
        self.solver = solver

    def fit(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> PRESTO:
        """Fit the model.

        Parameters
        ----------
        X : array-like of shape (n, p)
            Finite numbers; standardised inside, no column of ones.
        y : array-like of shape (n,)
            Ordered labels.
        sample_weight : array-like of shape (n,), optional
            A weight of 2 is a row given twice, 0 a row left out.

        Returns
        -------
        PRESTO
        """
        if isinstance(self.lam, bool) or not isinstance(self.lam, (int, float, np.number)):
            raise MethodError(
                f"lam = {self.lam!r}; a penalty must be a finite number, 0 or above. PRESTOCV chooses it."
            )
        rows = self._read(X, y, sample_weight)
        fit = functools.partial(
            fit_path, rows.X, rows.codes, rows.weights, self._penalty(), boundary=self.boundary, options=self._options()
        )
        path = fit([float(self.lam)])
        if not len(path.lambdas) or not path.converged[-1]:  # what a cold start cannot reach, a path may
            smallest = max(float(self.lam), 1e-6 * path.lambda_max)
            path = fit([*np.geomspace(max(path.lambda_max, smallest), smallest, 10), float(self.lam)])
        if not len(path.lambdas):
            path = fit([path.lambda_max])
        self._keep(path, len(path.lambdas) - 1, rows.ordered)
        return self

    def path(
        self,
        X: Any,
        y: Any,
        lambdas: ArrayLike | None = None,
        *,
        n_lambda: int = 20,
        lambda_min_ratio: float = 0.01,
        sample_weight: ArrayLike | None = None,
    ) -> PrestoPath:
        """Fit a falling sequence of penalties, each from the one before; `lam` does not matter.

        Parameters
        ----------
        X, y, sample_weight
            As in `fit`.
        lambdas : array-like, optional
            Penalties in any order; the path runs from the largest down.
        n_lambda : int, default 20
            Without `lambdas`: so many, evenly spaced in the logarithm from lambda_max down. The paper's simulations
            take 20 down to 0.01 lambda_max, its real data 100 down to 1e-4.
        lambda_min_ratio : float, default 0.01

        Returns
        -------
        PrestoPath
        """
        rows = self._read(X, y, sample_weight)
        wanted: Any = "grid" if lambdas is None else np.asarray(lambdas, dtype=np.float64)
        return fit_path(
            rows.X, rows.codes, rows.weights, self._penalty(), wanted,
            n_lambda=n_lambda, ratio=lambda_min_ratio, boundary=self.boundary, options=self._options(),
        )  # fmt: skip
