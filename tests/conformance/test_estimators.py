"""What every scikit-learn estimator owes, over all that the cards' modules make public; an exception is a line."""

from __future__ import annotations

import importlib
import inspect
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, clone, is_classifier, is_outlier_detector
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from gnomon import catalog

pytestmark = pytest.mark.filterwarnings("ignore::gnomon.errors.GnomonWarning")


def classes() -> dict[str, type[BaseEstimator]]:
    """All public estimators of the methods that plug in as estimators or planners, by name."""
    found = {}
    for card in [*catalog.methods(plugs="estimator"), *catalog.methods(plugs="planner")]:
        module = importlib.import_module(card.entry.partition(":")[0])
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, BaseEstimator):
                found[name] = value
    return dict(sorted(found.items()))


# Arguments that scikit-learn's checks are run with, one estimator each; without an entry, none.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "PRESTO": [{}, {"classes_order": "sorted"}, {"classes_order": "sorted", "alpha": 0.5, "solver": "fisher"}],
    "PRESTOCV": [{"cv": 2, "n_lambda": 4}, {"classes_order": "sorted", "cv": 2, "n_lambda": 4}],
}

# (estimator as printed, check): why it fails. One that passes fails the suite.
_NO_ORDER = "the check fits names, which have no order of their own: classes_order is required for them"
EXPECTED: dict[tuple[str, str], str] = {
    ("PRESTO()", "check_classifiers_classes"): _NO_ORDER,
    ("PRESTOCV(cv=2, n_lambda=4)", "check_classifiers_classes"): _NO_ORDER,
}

# A parameter to search over, and two values; without an entry, the first number among the defaults.
GRIDS: dict[str, dict[str, list[Any]]] = {
    "PRESTO": {"lam": [0.1, 0.01]},
    "PRESTOCV": {"alpha": [1.0, 0.5]},
    "StepLawRegressor": {"n_bootstrap": [0, 5]},
}


def _shifted(cls: type[BaseEstimator]) -> type[BaseEstimator]:
    def logs(self: Any, X: Any) -> Any:
        return cls._logs(self, X + 1.0 if (X >= 0).all() else X)

    made = type(cls.__name__, (cls,), {"_logs": logs, "__init__": cls.__init__, "__module__": __name__})
    globals()[cls.__name__] = made  # where pickle looks for it
    return made


# Changed for scikit-learn's checks alone: why.
ADAPTED: dict[str, tuple[Callable[[type[BaseEstimator]], type[BaseEstimator]], str]] = {
    "StepLawRegressor": (_shifted, "the checks of positive data begin at 0, of which there is no logarithm"),
}

CLASSES = classes()
every = pytest.mark.parametrize("name", CLASSES)


def checked() -> list[BaseEstimator]:
    instances = []
    for name, cls in CLASSES.items():
        adapted = ADAPTED[name][0](cls) if name in ADAPTED else cls
        instances += [adapted(**options) for options in OPTIONS.get(name, [{}])]
    return instances


def expected_failures(estimator: BaseEstimator) -> dict[str, str]:
    return {check: reason for (shown, check), reason in EXPECTED.items() if shown == " ".join(str(estimator).split())}


@parametrize_with_checks(checked(), expected_failed_checks=expected_failures, xfail_strict=True)
def test_scikit_learns_checks(estimator: BaseEstimator, check: Callable[[BaseEstimator], None]) -> None:
    check(estimator)


def make(name: str) -> BaseEstimator:
    estimator = CLASSES[name](**OPTIONS.get(name, [{}])[0])
    return estimator.set_params(random_state=0) if "random_state" in estimator.get_params() else estimator


def data(estimator: BaseEstimator, n: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a signal: three classes (two where more are not taken), or a positive power of positive columns."""
    tags, rng = get_tags(estimator), np.random.default_rng(0)
    Z = rng.uniform(-1, 1, (n, 3))
    X = np.exp(Z) if tags.input_tags.positive_only else Z
    score = 2 * Z[:, 0] - Z[:, 1] + 0.5 * rng.logistic(size=n)
    if is_classifier(estimator):
        return X, np.digitize(score, [-1.0, 1.0] if tags.classifier_tags.multi_class else [0.0])
    return X, np.exp(0.3 * score) if tags.target_tags.positive_only else score


def output(estimator: BaseEstimator, X: Any) -> np.ndarray:
    for method in ("predict_proba", "decision_function", "predict", "transform"):
        if hasattr(estimator, method):
            return np.asarray(getattr(estimator, method)(X))
    raise AssertionError(f"{estimator} has nothing to give")


def skip_outlier_detectors(estimator: BaseEstimator) -> None:
    if is_outlier_detector(estimator):
        pytest.skip("fits without labels")


def test_the_expected_failures_name_estimators_that_are_here() -> None:
    shown = {" ".join(str(estimator).split()) for estimator in checked()}
    assert {estimator for estimator, _ in EXPECTED} <= shown
    assert {*OPTIONS, *GRIDS, *ADAPTED} <= set(CLASSES)


@every
def test_the_pillar_gives_it(name: str) -> None:
    package = importlib.import_module(".".join(CLASSES[name].__module__.split(".")[:2]))
    assert getattr(package, name) is CLASSES[name]
    assert set(inspect.signature(CLASSES[name]).parameters) == set(CLASSES[name]().get_params())
    assert len(inspect.signature(CLASSES[name]).parameters) <= 12


@every
def test_fitting_again_and_a_clone_give_the_same(name: str) -> None:
    estimator = make(name)
    X, y = data(estimator)
    first = output(estimator.fit(X, y), X)
    np.testing.assert_array_equal(output(clone(estimator).fit(X, y), X), first)
    np.testing.assert_array_equal(output(estimator.fit(X, y), X), first)
    estimator.fit(X[:100], y[:100])
    np.testing.assert_array_equal(output(estimator.fit(X, y), X), first)


@every
def test_the_random_states_and_the_data_are_left_as_they_were(name: str) -> None:
    estimator = make(name)
    X, y = data(estimator)
    kept = X.copy(), y.copy()
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    output(estimator.fit(X, y), X)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert np.array_equal(X, kept[0])
    assert np.array_equal(y, kept[1])


@every
def test_a_pickle_gives_the_same(name: str) -> None:
    estimator = make(name)
    X, y = data(estimator)
    expected = output(estimator.fit(X, y), X)
    np.testing.assert_array_equal(output(pickle.loads(pickle.dumps(estimator)), X), expected)


@every
def test_pandas_goes_in_with_its_names(name: str) -> None:
    estimator = make(name)
    X, y = data(estimator)
    expected = output(clone(estimator).fit(X, y), X)
    frame = pd.DataFrame(X, columns=["a", "b", "c"], index=np.arange(len(X)) * 7 + 3)
    estimator.fit(frame, pd.Series(y, index=frame.index))
    assert list(estimator.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_allclose(output(estimator, frame), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="feature names should match"):
        output(estimator, frame[["b", "a", "c"]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        output(estimator, X)


@every
def test_lists_and_other_number_types_go_in(name: str) -> None:
    estimator = make(name)
    X, y = data(estimator)
    X = X.astype(np.float32)
    expected = output(clone(estimator).fit(X.astype(np.float64), y), X.astype(np.float64))
    np.testing.assert_allclose(output(clone(estimator).fit(X, y), X), expected, atol=1e-5)
    np.testing.assert_allclose(output(clone(estimator).fit(X.tolist(), y.tolist()), X.tolist()), expected, atol=1e-5)
    np.testing.assert_allclose(output(clone(estimator).fit(np.asfortranarray(X), y), X[::2]), expected[::2], atol=1e-5)


@every
def test_it_stands_at_the_end_of_a_pipeline_and_in_a_grid(name: str) -> None:
    estimator = make(name)
    skip_outlier_detectors(estimator)
    X, y = data(estimator)
    pipeline = make_pipeline(FunctionTransformer(np.asarray), estimator)
    np.testing.assert_array_equal(output(pipeline.fit(X, y), X), output(clone(estimator).fit(X, y), X))
    grid = GRIDS.get(name) or next(
        {key: [value, value]} for key, value in estimator.get_params().items() if isinstance(value, (int, float))
    )
    search = GridSearchCV(clone(estimator), grid, cv=3, error_score="raise").fit(X, y)
    assert set(search.best_params_) == set(grid)
    prefixed = {f"{name.lower()}__{key}": values for key, values in grid.items()}
    again = GridSearchCV(pipeline, prefixed, cv=3, error_score="raise").fit(X, y)
    np.testing.assert_allclose(again.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"])


@every
def test_it_learns_the_signal_and_cross_validates(name: str) -> None:
    estimator = make(name)
    skip_outlier_detectors(estimator)
    X, y = data(estimator)
    scores = cross_val_score(estimator, X, y, cv=3, error_score="raise")
    baseline = np.unique(y, return_counts=True)[1].max() / len(y) if is_classifier(estimator) else 0.2
    assert scores.mean() > baseline + 0.05
    if is_classifier(estimator) and hasattr(estimator, "predict_proba"):
        P = cross_val_predict(estimator, X, y, cv=3, method="predict_proba")
        assert P.shape == (len(y), len(np.unique(y)))
        np.testing.assert_allclose(P.sum(1), 1)
        fitted = clone(estimator).fit(X, y)
        assert np.array_equal(fitted.classes_, np.unique(y))
        assert np.array_equal(fitted.classes_[fitted.predict_proba(X).argmax(1)], fitted.predict(X))
        assert set(cross_val_score(estimator, X, y, cv=3, scoring="neg_log_loss", error_score="raise") < 0) == {True}


@every
def test_a_weight_is_a_number_of_rows(name: str) -> None:
    estimator = make(name)
    if "sample_weight" not in inspect.signature(estimator.fit).parameters:
        pytest.skip(f"{name} takes no sample_weight")
    X, y = data(estimator)
    w, folds = np.random.default_rng(1).integers(0, 3, len(y)), np.arange(len(y)) % 3
    again = np.repeat(np.arange(len(y)), w)

    def fitted(rows: np.ndarray, weights: np.ndarray | None) -> BaseEstimator:
        one = clone(estimator)
        if "cv" in one.get_params():  # the folds of repeated rows must be the same folds
            one.set_params(cv=[(np.flatnonzero(folds[rows] != k), np.flatnonzero(folds[rows] == k)) for k in range(3)])
        return one.fit(X[rows], y[rows], sample_weight=weights)

    everything = np.arange(len(y))
    repeated = output(fitted(again, None), X)
    np.testing.assert_allclose(output(fitted(everything, w), X), repeated, atol=1e-6, rtol=1e-6)
    ones = output(fitted(everything, np.ones(len(y))), X)
    np.testing.assert_allclose(ones, output(fitted(everything, None), X), atol=1e-9, rtol=1e-9)
    assert np.abs(ones - repeated).max() > 1e-6


@every
def test_what_cannot_be_fitted_is_refused_with_a_reason(name: str) -> None:
    estimator = make(name)
    X, y = data(estimator)
    for bad in (np.nan, np.inf):
        broken = X.copy()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match=r"NaN|infinity|not finite"):
            clone(estimator).fit(broken, y)
        with pytest.raises(ValueError, match=r"NaN|infinity|not finite"):
            output(clone(estimator).fit(X, y), broken)
    with pytest.raises(ValueError, match="inconsistent"):
        clone(estimator).fit(X, y[:-1])
    with pytest.raises(ValueError, match="features"):
        output(clone(estimator).fit(X, y), X[:, :2])
