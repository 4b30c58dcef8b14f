"""What both estimators share: reading rows, keeping a fit and warning of it, predicting."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from gnomon.errors import GnomonWarning, MethodError, NoEffectWarning
from gnomon.estimators.presto.labels import encode, natural_order
from gnomon.estimators.presto.likelihood import class_probabilities, crossed_rows
from gnomon.estimators.presto.newton import SolverOptions
from gnomon.estimators.presto.path import Boundary, Penalty, PrestoPath

__all__ = ["OrderedClassifier", "PrestoConvergenceWarning", "Rows"]


class PrestoConvergenceWarning(GnomonWarning, ConvergenceWarning):
    """A fit that is not the optimum, or an optimum that no finite coefficients attain."""


class Rows(NamedTuple):
    """Rows with a positive weight, ready to fit; `kept` tells where they stood."""

    X: Float[np.ndarray, "n p"]
    codes: NDArray[np.intp]
    weights: Float[np.ndarray, " n"]
    ordered: NDArray[Any]
    kept: NDArray[np.bool_]


class OrderedClassifier(ClassifierMixin, BaseEstimator):
    """An ordered regression that is fitted by a penalised path."""

    alpha: float
    penalize_first: bool
    penalty_weights: ArrayLike | None
    classes_order: Sequence[Any] | str | None
    reverse: bool
    boundary: Boundary
    solver: str | SolverOptions

    def _read(self, X: Any, y: Any, sample_weight: Any) -> Rows:
        natural = natural_order(y)
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        kept = weights > 0
        codes, ordered = encode(y[kept], self.classes_order, self.reverse, natural)
        if len(ordered) == 2:
            warnings.warn(
                "there are two classes only: with one boundary nothing can be shrunk towards proportional odds, and "
                "this is logistic regression with an L1 penalty. sklearn's LogisticRegression does the same.",
                NoEffectWarning,
                stacklevel=3,
            )
        return Rows(X[kept], codes, weights[kept], ordered, kept)

    def _penalty(self) -> Penalty:
        if not isinstance(self.alpha, (int, float, np.number)):
            raise MethodError(f"alpha = {self.alpha!r}; it must be a number in [0, 1]: 1 is L1, 0 is ridge.")
        weights = None if self.penalty_weights is None else np.asarray(self.penalty_weights, dtype=np.float64)
        return Penalty(float(self.alpha), bool(self.penalize_first), weights)

    def _options(self) -> SolverOptions:
        return self.solver if isinstance(self.solver, SolverOptions) else SolverOptions(method=self.solver)  # type: ignore[arg-type]

    def _keep(self, path: PrestoPath, index: int, ordered: NDArray[Any]) -> None:
        self.classes_order_ = ordered
        self.classes_ = np.sort(ordered)
        self.lam_ = float(path.lambdas[index])
        self.lambda_max_ = path.lambda_max
        self.intercept_ = path.intercepts[index]
        self.psi_ = path.psi[index]
        self.coef_ = np.cumsum(self.psi_, axis=1)
        self.objective_ = float(path.objective[index])
        self.log_likelihood_ = float(path.log_likelihood[index])
        self.violation_ = float(path.violation[index])
        self.n_iter_ = int(path.n_iter[index])
        self.converged_ = bool(path.converged[index])
        self.separated_ = bool(path.separated[index])
        self.boundary_reached_ = bool(path.boundary[index]) or (self.boundary == "stop" and path.boundary_reached)
        self._warn_of_the_fit()

    def _warn_of_the_fit(self) -> None:
        if self.boundary_reached_:
            done = (
                f"the fit of the last penalty with an optimum inside, {self.lam_:.6g}, is kept"
                if self.boundary == "stop"
                else f"the optimum there was found with a barrier of {self._options().barrier:g}"
            )
            warnings.warn(
                "the boundary of the domain was reached: at this penalty some class that a row does not belong to has "
                f"no probability left; {done}. A larger penalty keeps the optimum inside.",
                PrestoConvergenceWarning,
                stacklevel=4,
            )
        if self.separated_:
            warnings.warn(
                f"the classes are separated at lam = {self.lam_:.6g}: the likelihood has no finite optimum or nearly "
                "none, and coefficients stop where the tolerance is met. Take a larger penalty.",
                PrestoConvergenceWarning,
                stacklevel=4,
            )
        if not self.converged_:
            warnings.warn(
                f"not converged at lam = {self.lam_:.6g}: after {self.n_iter_} steps the optimality conditions are "
                f"missed by {self.violation_:.2g}. Raise max_iter or the penalty, or look for collinear features.",
                PrestoConvergenceWarning,
                stacklevel=4,
            )

    def _spacings(self, X: Any) -> Float[np.ndarray, "n b"]:
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        spacings: Float[np.ndarray, "n b"] = X @ self.psi_ + np.diff(self.intercept_, prepend=0.0)
        return spacings

    def cumulative_proba(self, X: Any) -> Float[np.ndarray, "n b"]:
        """Return ``P(y <= k)`` for each boundary, in the order of the classes.

        Parameters
        ----------
        X : array-like of shape (n, p)

        Returns
        -------
        float64 array of shape (n, K - 1)
            As the model gives it; where boundaries cross, a row falls.
        """
        found: Float[np.ndarray, "n b"] = expit(np.cumsum(self._spacings(X), axis=1))
        return found

    def rare_proba(self, X: Any) -> Float[np.ndarray, " n"]:
        """Return the probability of the last class, ``1 - sigma(eta_{K-1})``, valid for every row.

        Parameters
        ----------
        X : array-like of shape (n, p)

        Returns
        -------
        float64 array of shape (n,)
        """
        found: Float[np.ndarray, " n"] = expit(-self._spacings(X).sum(axis=1))
        return found

    def crossed_rows(self, X: Any) -> NDArray[np.bool_]:
        """Return which rows have crossing boundaries, so that a middle class would get a negative probability.

        Parameters
        ----------
        X : array-like of shape (n, p)

        Returns
        -------
        bool array of shape (n,)
        """
        return crossed_rows(self._spacings(X))

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n K"]:
        """Return class probabilities, columns as in ``classes_`` (sorted, as everywhere in scikit-learn).

        Negative middle probabilities are clipped at 0 and the row renormalised; a warning says in how many rows.

        Parameters
        ----------
        X : array-like of shape (n, p)

        Returns
        -------
        float64 array of shape (n, K)
        """
        T = self._spacings(X)
        crossed = int(crossed_rows(T).sum())
        if crossed:
            warnings.warn(
                f"boundaries cross in {crossed} of {len(T)} rows: negative probabilities were set to 0 and the rows "
                "renormalised. crossed_rows(X) tells which; rare_proba(X) is valid for them too.",
                GnomonWarning,
                stacklevel=2,
            )
        P: Float[np.ndarray, "n K"] = class_probabilities(T)[:, np.argsort(self.classes_order_, kind="stable")]
        return P

    def predict_log_proba(self, X: Any) -> Float[np.ndarray, "n K"]:
        """Return the logarithm of `predict_proba`; minus infinity where a probability was clipped."""
        with np.errstate(divide="ignore"):
            return np.log(self.predict_proba(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable class of each row.

        Parameters
        ----------
        X : array-like of shape (n, p)

        Returns
        -------
        array of shape (n,)
        """
        best = class_probabilities(self._spacings(X)).argmax(axis=1)
        found: NDArray[Any] = self.classes_order_[best]
        return found
