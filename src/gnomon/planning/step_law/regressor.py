"""The law as a scikit-learn estimator."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from gnomon.errors import GnomonWarning, MethodError
from gnomon.planning.step_law.fitting import bootstrap_least_squares, least_squares, resample_counts

__all__ = ["StepLawRegressor"]


class StepLawRegressor(RegressorMixin, BaseEstimator):
    """Power law ``y = exp(intercept) * prod_j x_j^coef_j``, fitted by least squares in natural logs.

    With X = [N, D] and y the best learning rates it is the step law; with X = [D] and y the best batches in tokens,
    its law of the batch. Any number of columns is taken, all of them positive.

    Parameters
    ----------
    n_bootstrap : int, default 0
        Resamples of the rows for `predict_interval`.
    random_state : int, RandomState or None, default None
        Of the resampling.

    Attributes
    ----------
    coef_ : float64 array, (n_features,)
        Exponents.
    intercept_ : float
        Natural log of the factor.
    bootstrap_ : float64 array, (n_bootstrap, 1 + n_features)
        Intercept and exponents of each resample that determined them.
    n_features_in_ : int
    feature_names_in_ : array of str
        With a DataFrame.

    Raises
    ------
    MethodError
        In `fit` and `predict` when X or y holds a value that is not positive; in `fit` when a column does not vary or
        the columns do not determine the exponents.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.array([[1e8, 1e9], [1e9, 1e9], [1e9, 1e11], [4e9, 1e10]])
    >>> law = StepLawRegressor().fit(X, 1.79 * X[:, 0] ** -0.713 * X[:, 1] ** 0.307)
    >>> law.coef_.round(6).tolist()
    [-0.713, 0.307]
    """

    def __init__(self, n_bootstrap: int = 0, random_state: Any = None) -> None:
        self.n_bootstrap = n_bootstrap
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.target_tags.positive_only = True
        return tags

    def _logs(self, X: Any) -> NDArray[np.float64]:
        if not (X > 0).all():
            column = int(np.argmin((X > 0).all(axis=0)))
            names = getattr(self, "feature_names_in_", None)
            name = column if names is None else names[column]
            raise MethodError(
                f"Negative values in data passed to {type(self).__name__}, or zeros: column {name} of X has "
                f"{X[:, column].min():g}. A power law takes positive numbers."
            )
        return np.concatenate([np.ones((len(X), 1)), np.log(X)], axis=1)

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> StepLawRegressor:
        """Fit the exponents.

        Parameters
        ----------
        X : array_like, (n, n_features)
            Positive; [N, D] for the step law.
        y : array_like, (n,)
            Positive: learning rates, or batches in tokens.
        sample_weight : array_like, (n,), optional
            How much each row counts; the paper weighs all alike.

        Returns
        -------
        StepLawRegressor
        """
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        if not (y > 0).all():
            raise MethodError(f"y holds {y.min():g}. A power law takes positive numbers.")
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, dtype=np.float64)
        Z, target = self._logs(X), np.log(y)
        self._check_rank(Z if weights is None else Z[weights > 0])
        beta = least_squares(Z, target, weights)
        self.intercept_, self.coef_ = float(beta[0]), beta[1:]
        counts = self._counts(len(Z), weights)
        rows = bootstrap_least_squares(Z, target, counts)
        self.bootstrap_ = rows[np.isfinite(rows).all(axis=1)]
        return self

    def _check_rank(self, Z: NDArray[np.float64]) -> None:
        logs = Z[:, 1:] - Z[:, 1:].mean(axis=0)
        constant = np.ptp(logs, axis=0) == 0
        names = getattr(self, "feature_names_in_", range(len(constant)))
        if constant.any():
            raise MethodError(
                f"column {names[int(np.argmax(constant))]} of X has one value (n_samples = {len(Z)}), so its exponent "
                "cannot be told. Give rows in which it varies, or leave it out."
            )
        distinct = len(np.unique(Z, axis=0))
        if distinct <= logs.shape[1]:
            warnings.warn(
                f"{distinct} distinct rows do not determine {logs.shape[1]} exponents and a factor; the smallest ones "
                "that fit are taken. Give more rows.",
                GnomonWarning,
                stacklevel=3,
            )
        elif np.linalg.matrix_rank(logs / logs.std(axis=0)) < logs.shape[1]:
            raise MethodError(
                f"the logs of the columns of X ({', '.join(map(str, names))}) depend on each other, so their exponents "
                "cannot be told apart. Give rows with other ratios."
            )

    def _counts(self, rows: int, weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if self.n_bootstrap < 0:
            raise MethodError(f"n_bootstrap = {self.n_bootstrap}: a number of resamples, 0 for none.")
        seed = check_random_state(self.random_state).randint(2**31 - 1) if self.n_bootstrap else 0
        counts = resample_counts(rows, self.n_bootstrap, np.random.default_rng(seed))
        return counts if weights is None else counts * (weights / weights.mean())

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the law's values.

        Parameters
        ----------
        X : array_like, (n, n_features)

        Returns
        -------
        float64 array, (n,)
        """
        check_is_fitted(self)
        Z = self._logs(validate_data(self, X, dtype=np.float64, reset=False))
        return np.exp(Z[:, 1:] @ self.coef_ + self.intercept_)

    def predict_interval(self, X: ArrayLike, confidence: float = 0.95) -> NDArray[np.float64]:
        """Return percentiles of the prediction over the bootstrap.

        Parameters
        ----------
        X : array_like, (n, n_features)
        confidence : float, default 0.95

        Returns
        -------
        float64 array, (n, 2)
            Lower and upper end.

        Raises
        ------
        MethodError
            When it was fitted without a bootstrap, or the level is not between 0 and 1.
        """
        check_is_fitted(self)
        if not len(self.bootstrap_):
            raise MethodError("n_bootstrap = 0: there is nothing to take percentiles over. Fit with n_bootstrap=1000.")
        if not 0 < confidence < 1:
            raise MethodError(f"confidence = {confidence!r}: a level lies between 0 and 1, such as 0.95.")
        Z = self._logs(validate_data(self, X, dtype=np.float64, reset=False))
        ends = [50 * (1 - confidence), 50 * (1 + confidence)]
        return np.exp(np.percentile(Z @ self.bootstrap_.T, ends, axis=1)).T
