"""PRESTO and PRESTOCV as estimators: labels, weights, cross-validation, warnings, what is refused and how."""

from __future__ import annotations

import functools
import pickle
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gnomon.errors import GnomonWarning, MethodError, NoEffectWarning
from gnomon.estimators import PRESTO, PRESTOCV, PrestoConvergenceWarning, SolverOptions
from gnomon.estimators.presto.likelihood import class_probabilities

sys.path.insert(0, str(Path(__file__).parent))
import presto_definition as definition

NAMES = np.array(["no reaction", "click", "basket", "purchase"])


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    return definition.simulated(n=400, spread=0.1, seed=2)


# labels


def test_names_need_their_order_and_columns_follow_the_sorted_classes():
    X, y = data()
    numbers = PRESTO(0.02).fit(X, y)
    model = PRESTO(0.02, classes_order=list(NAMES)).fit(X, NAMES[y])
    assert model.classes_order_.tolist() == NAMES.tolist()
    assert model.classes_.tolist() == sorted(NAMES)
    np.testing.assert_array_equal(model.coef_, numbers.coef_)
    P = model.predict_proba(X)
    for k, name in enumerate(NAMES):
        np.testing.assert_array_equal(P[:, model.classes_ == name][:, 0], numbers.predict_proba(X)[:, k])
    assert (model.predict(X) == NAMES[numbers.predict(X)]).all()
    # which is what scikit-learn's scorers take for granted
    loss = -np.log(P[np.arange(len(y)), np.searchsorted(model.classes_, NAMES[y])]).mean()
    assert log_loss(NAMES[y], P) == pytest.approx(loss)
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X)), P)


def test_ordered_categoricals_bring_their_order():
    X, y = data()
    kind = pd.CategoricalDtype(["never", *NAMES], ordered=True)
    for labels in (pd.Series(NAMES[y], dtype=kind), pd.Categorical(NAMES[y], dtype=kind)):
        model = PRESTO(0.02).fit(X, labels)
        assert model.classes_order_.tolist() == NAMES.tolist()
    with pytest.raises(MethodError, match="have no order of their own"):
        PRESTO().fit(X, pd.Series(NAMES[y], dtype="category"))


@pytest.mark.parametrize("kind", [float, np.int8])
def test_numbers_are_ordered_by_size(kind):
    X, y = data()
    labels = (y * 10 - 5).astype(kind)
    model = PRESTO(0.02).fit(X, labels)
    assert model.classes_order_.tolist() == [-5, 5, 15, 25]
    np.testing.assert_array_equal(model.coef_, PRESTO(0.02).fit(X, y).coef_)


def test_reverse_turns_the_order_round():
    X, y = data()
    expected = PRESTO(0.02).fit(X, y)
    model = PRESTO(0.02, reverse=True).fit(X, 3 - y)
    assert model.classes_order_.tolist() == [3, 2, 1, 0]
    np.testing.assert_array_equal(model.coef_, expected.coef_)
    np.testing.assert_array_equal(model.rare_proba(X), expected.rare_proba(X))
    np.testing.assert_array_equal(model.predict_proba(X)[:, 0], expected.predict_proba(X)[:, 3])
    # without L1 on the differences, turning round is a reflection of the same model
    parallel = np.full((4, 3), np.inf)
    parallel[:, 0] = 0
    there = PRESTO(0.0, penalty_weights=parallel).fit(X, y)
    back = PRESTO(0.0, penalty_weights=parallel, reverse=True).fit(X, y)
    np.testing.assert_allclose(there.coef_, -back.coef_, atol=1e-8)
    np.testing.assert_allclose(there.predict_proba(X), back.predict_proba(X), atol=1e-9)


def test_two_classes_say_that_this_is_logistic_regression():
    X, y = data()
    with pytest.warns(NoEffectWarning, match="LogisticRegression does the same"):
        model = PRESTO(0.02).fit(X, y > 1)
    assert model.coef_.shape == (4, 1)
    np.testing.assert_allclose(model.predict_proba(X)[:, 1], model.rare_proba(X))


# weights


def test_weights_are_numbers_of_rows():
    X, y = data()
    w = np.random.default_rng(0).integers(0, 4, len(y))
    again = np.repeat(np.arange(len(y)), w)
    for model in (PRESTO(0.01), PRESTO(0.01, alpha=0.3, penalize_first=False)):
        weighted = clone(model).fit(X, y, sample_weight=w)
        repeated = clone(model).fit(X[again], y[again])
        np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-8)
        assert weighted.log_likelihood_ == pytest.approx(repeated.log_likelihood_, abs=1e-7)
        np.testing.assert_allclose(clone(model).fit(X, y, 7.5 * w).coef_, weighted.coef_, atol=1e-8)


def test_cross_validation_weighs_its_scores_and_skips_rows_without_weight():
    X, y = data()
    w = np.random.default_rng(0).integers(0, 4, len(y))
    folds = np.arange(len(y)) % 3
    again = np.repeat(np.arange(len(y)), w)

    def splits(f: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(np.flatnonzero(f != k), np.flatnonzero(f == k)) for k in range(3)]

    weighted = PRESTOCV(n_lambda=4, cv=splits(folds)).fit(X, y, sample_weight=w)
    repeated = PRESTOCV(n_lambda=4, cv=splits(folds[again])).fit(X[again], y[again])
    np.testing.assert_allclose(weighted.cv_scores_, repeated.cv_scores_, atol=1e-9)
    assert weighted.lam_ == pytest.approx(repeated.lam_)


# choosing the penalty


def test_scores_are_those_of_models_fitted_without_the_fold():
    X, y = data()
    cv = StratifiedKFold(3, shuffle=True, random_state=0)
    scores = {}
    for scoring in ("brier", "log_loss", "rare_brier"):
        scores[scoring] = PRESTOCV(n_lambda=5, cv=cv, scoring=scoring).fit(X, y)
    model = scores["brier"]
    for fold, (train, test) in enumerate(cv.split(X, y)):
        for i in (1, 4):
            P = PRESTO(model.path_.lambdas[i]).fit(X[train], y[train]).predict_proba(X[test])
            truth = np.eye(4)[y[test]]
            assert model.cv_scores_[i, fold] == pytest.approx(((P - truth) ** 2).sum(1).mean(), abs=1e-8)
            rare = ((P - truth)[:, 3] ** 2).mean()
            assert scores["rare_brier"].cv_scores_[i, fold] == pytest.approx(rare, abs=1e-8)
            own = -np.log(P[np.arange(len(test)), y[test]]).mean()
            assert scores["log_loss"].cv_scores_[i, fold] == pytest.approx(own, abs=1e-7)
    means = model.cv_scores_.mean(axis=1)
    assert model.best_index_ == means.argmin()
    assert model.lam_ == model.path_.lambdas[means.argmin()]
    np.testing.assert_allclose(model.coef_, PRESTO(model.lam_).fit(X, y).coef_, atol=1e-7)


def test_the_largest_of_equal_penalties_is_taken():
    X, y = data()
    largest = PRESTO().path(X, y, n_lambda=1).lambda_max
    model = PRESTOCV([8 * largest, 4 * largest, 2 * largest]).fit(X, y)
    assert model.lam_ == 8 * largest


def test_the_default_folds_are_stratified_in_the_order_of_the_rows():
    X, y = data()
    order = np.argsort(y, kind="stable")  # unstratified folds of sorted rows would lack classes
    model = PRESTOCV(n_lambda=3).fit(X[order], y[order])
    assert model.cv_scores_.shape == (3, 5)
    explicit = PRESTOCV(n_lambda=3, cv=StratifiedKFold(5)).fit(X[order], y[order])
    np.testing.assert_array_equal(model.cv_scores_, explicit.cv_scores_)


def test_a_stopped_path_leaves_scores_out():
    X, y = definition.simulated(n=120, p=2, seed=1, spread=1.0)
    with pytest.warns(PrestoConvergenceWarning, match="boundary"):
        model = PRESTOCV(n_lambda=8, boundary="stop", cv=3).fit(X, y)
    assert np.isfinite(model.cv_scores_[model.best_index_]).all()
    assert len(model.cv_scores_) == len(model.path_.lambdas) < 8


def test_grids_pipelines_and_pickles():
    X, y = data()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), PRESTO()), {"presto__lam": [0.1, 0.01]}, scoring="neg_log_loss", cv=3
    ).fit(X, y)
    assert search.best_params_["presto__lam"] == 0.01
    # standardising twice is standardising once
    np.testing.assert_allclose(search.predict_proba(X), PRESTO(0.01).fit(X, y).predict_proba(X), atol=1e-8)
    model = PRESTOCV(n_lambda=3, cv=2, solver=SolverOptions(tol=1e-8)).fit(X, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert clone(model).solver == SolverOptions(tol=1e-8)


@pytest.mark.slow
def test_folds_on_ray_are_the_folds_here():
    pytest.importorskip("ray")
    X, y = data()
    here = PRESTOCV(n_lambda=4, cv=3).fit(X, y)
    there = PRESTOCV(n_lambda=4, cv=3, solver=SolverOptions(engine="ray")).fit(X, y)
    np.testing.assert_allclose(there.cv_scores_, here.cv_scores_, atol=1e-12)


def test_the_path_falls_and_sorts_what_it_is_given():
    X, y = data()
    path = PRESTO().path(X, y)
    assert len(path.lambdas) == 20
    assert path.lambdas[0] == path.lambda_max
    assert path.lambdas[-1] == pytest.approx(0.01 * path.lambda_max)
    assert np.ptp(np.diff(np.log(path.lambdas))) < 1e-12
    assert (np.diff(path.objective) < 0).all()
    mixed = PRESTO().path(X, y, [0.01, 0.1, 0.03])
    assert mixed.lambdas.tolist() == [0.1, 0.03, 0.01]
    np.testing.assert_allclose(mixed.coefs[2], PRESTO(0.01).fit(X, y).coef_, atol=1e-8)
    T = mixed.spacings(X)
    np.testing.assert_allclose(T.cumsum(2)[1], mixed.intercepts[1] + X @ mixed.coefs[1], atol=1e-12)
    np.testing.assert_allclose(mixed.probabilities(X)[1], class_probabilities(T[1]))


# prediction


def test_crossing_boundaries_are_reported_and_mended():
    X, y = data()
    model = PRESTO(0.001).fit(X, y)
    far = np.random.default_rng(0).normal(size=(300, 4)) * 40
    crossed = model.crossed_rows(far)
    assert 0 < crossed.sum() < 300
    with pytest.warns(GnomonWarning, match=f"boundaries cross in {crossed.sum()} of 300 rows"):
        P = model.predict_proba(far)
    assert (P >= 0).all()
    np.testing.assert_allclose(P.sum(1), 1)
    F = model.cumulative_proba(far)
    raw = np.diff(F, axis=1, prepend=0, append=1)
    np.testing.assert_allclose(P[~crossed], raw[~crossed], atol=1e-12)
    np.testing.assert_array_equal(crossed, (np.diff(model.intercept_ + far @ model.coef_, axis=1) < 0).any(1))
    assert crossed[(raw < 0).any(1)].all()
    assert ((model.rare_proba(far) >= 0) & (model.rare_proba(far) <= 1)).all()
    np.testing.assert_allclose(model.rare_proba(far), 1 - F[:, -1], atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(far)
        assert not model.crossed_rows(X).any()
        model.predict_proba(X)


# warnings


def test_separated_classes_are_told():
    X = np.arange(30.0)[:, None]
    y = np.repeat([0, 1, 2], 10)
    for lam in (0.0, 1e-6):
        with pytest.warns(PrestoConvergenceWarning, match="classes are separated at lam"):
            model = PRESTO(lam).fit(X, y)
        assert model.separated_
        assert np.isfinite(model.coef_).all()
        assert (model.predict(X) == y).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not PRESTO(0.1).fit(X, y).separated_


def test_a_fit_that_did_not_converge_is_told():
    X, y = data()
    with pytest.warns(ConvergenceWarning, match=r"not converged at lam = 0.001: after 1 steps .* missed by"):
        model = PRESTO(0.001, solver=SolverOptions(max_iter=1)).fit(X, y)
    assert not model.converged_
    assert issubclass(PrestoConvergenceWarning, GnomonWarning)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "lam = -0.1; a penalty must be a finite number, 0 or above"),
        ({"lam": np.nan}, "lam = nan; a penalty must be"),
        ({"lam": None}, "PRESTOCV chooses it"),
        ({"alpha": 1.5}, r"alpha = 1.5; it must lie in \[0, 1\]"),
        ({"alpha": "l1"}, "alpha = 'l1'; it must be a number"),
        ({"boundary": "ignore"}, "boundary = 'ignore'; allowed are 'barrier' and 'stop'"),
        ({"solver": "fischer"}, "solver = 'fischer'. Did you mean 'fisher'?"),
        ({"penalty_weights": [1.0, 2.0]}, r"has the shape \(2,\); allowed are \(4,\).*\(4, 3\)"),
        ({"penalty_weights": [1.0, 2.0, -1.0, 0.0]}, "holds a negative number or NaN"),
        ({"classes_order": "alphabet"}, "classes_order = 'alphabet'; allowed are"),
        ({"classes_order": [0, 1, 2]}, "lacks 3, which occurs in y"),
        ({"classes_order": [0, 1, 2, 3, 3]}, "names a label twice"),
        ({"classes_order": [0, 1, 2, 3, 4]}, "names 4, of which y holds no row"),
    ],
)
def test_options_out_of_range(options, message):
    X, y = data()
    with pytest.raises(MethodError, match=message):
        PRESTO(**options).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "brie"}, "scoring = 'brie'. Did you mean 'brier'"),
        ({"n_lambda": 0}, "n_lambda = 0; it must be a whole number of at least 1"),
        ({"lambda_min_ratio": 1.0}, "lambda_min_ratio = 1.0; it must lie between 0 and 1"),
        ({"lambdas": []}, r"the penalties have the shape \(0,\)"),
        ({"lambdas": [0.1, -0.1]}, "lam = -0.1; a penalty must be"),
        ({"cv": 1}, "cv = 1; at least 2 folds are needed"),
        ({"cv": 200}, r"cv = 200, but the class \d has \d+ rows only"),
        ({"cv": "five"}, "cv = 'five'; allowed are a number of folds"),
    ],
)
def test_options_of_the_cross_validation_out_of_range(options, message):
    X, y = data()
    with pytest.raises(MethodError, match=message):
        PRESTOCV(**options).fit(X, y)


def test_a_fold_without_a_class_is_refused():
    X, y = data()
    rare = np.flatnonzero(y == 3)
    rest = np.flatnonzero(y != 3)
    with pytest.raises(MethodError, match=r"training rows of fold 0 lack the class 3\. Stratify the folds"):
        PRESTOCV(cv=[(rest, rare)]).fit(X, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, "tol = 0.0; it must lie between 0 and 1"),
        ({"barrier": 2.0}, "barrier = 2.0; it must lie between"),
        ({"max_iter": 0}, "max_iter = 0; it must be a whole number"),
        ({"engine": "dask"}, "engine = 'dask'"),
    ],
)
def test_solver_options_out_of_range(options, message):
    with pytest.raises(MethodError, match=message):
        SolverOptions(**options)


def test_data_out_of_range():
    X, y = data()
    bad = X.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        PRESTO().fit(bad, y)
    bad[3, 1] = np.inf
    with pytest.raises(ValueError, match="contains infinity"):
        PRESTO().fit(bad, y)
    with pytest.raises(MethodError, match=re.escape("y holds 1 class only (0.0); ordered regression needs 3")):
        PRESTO().fit(X, np.zeros(len(y)))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        PRESTO().fit(X, y + 0.5 * X[:, 0])
    with pytest.raises(ValueError, match="Negative values in data passed to `sample_weight`"):
        PRESTO().fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match="at least one non-zero number"):
        PRESTO().fit(X, y, sample_weight=np.zeros(len(y)))
    with pytest.raises(NotFittedError):
        PRESTO().rare_proba(X)
    with pytest.raises(ValueError, match="X has 3 features, but PRESTO is expecting 4"):
        PRESTO().fit(X, y).crossed_rows(X[:, :3])
