"""The law as a scikit-learn estimator: scikit-learn's own checks, planted and published coefficients."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn.compose import TransformedTargetRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from gnomon.errors import GnomonWarning, MethodError
from gnomon.planning import StepLawRegressor, near_optimal, read_runs


class Shifted(StepLawRegressor):
    """scikit-learn's checks of positive-only estimators use data that begin at 0, of which there is no log."""

    def _logs(self, X):
        return super()._logs(X + 1.0 if (X >= 0).all() else X)


@pytest.mark.filterwarnings("ignore:.*distinct rows do not determine")
@parametrize_with_checks([Shifted(), Shifted(n_bootstrap=20, random_state=0)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_without_the_shift_nothing_but_the_zero_fails():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(StepLawRegressor(), on_fail=None)
    failed = [entry for entry in found if entry["status"] == "failed"]
    assert 0 < len(failed) < len(found)
    for entry in failed:
        chain = [entry["exception"]]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        assert any("or zeros: column" in str(error) for error in chain), entry["check_name"]


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    X = np.exp(rng.uniform(np.log([1e8, 1e9]), np.log([1e10, 1e12]), (60, 2)))
    return X, 1.79 * X[:, 0] ** -0.713 * X[:, 1] ** 0.307


def test_planted_exponents_come_back_exactly(table):
    X, y = table
    law = StepLawRegressor().fit(X, y)
    assert law.coef_ == pytest.approx([-0.713, 0.307], abs=1e-11)
    assert law.intercept_ == pytest.approx(np.log(1.79), abs=1e-9)
    assert law.predict(X) == pytest.approx(y, rel=1e-10)
    assert law.score(X, y) == pytest.approx(1)
    batch = StepLawRegressor().fit(X[:, 1:], 0.58 * X[:, 1] ** 0.571)
    assert batch.coef_ == pytest.approx([0.571], abs=1e-11)


def test_it_is_linear_regression_in_logs(table):
    X, y = table
    y = y * np.exp(0.1 * np.random.default_rng(1).standard_normal(60))
    weights = np.random.default_rng(2).uniform(0, 3, 60)
    peer = TransformedTargetRegressor(
        make_pipeline(FunctionTransformer(np.log), LinearRegression()), func=np.log, inverse_func=np.exp
    )
    assert StepLawRegressor().fit(X, y).predict(X) == pytest.approx(peer.fit(X, y).predict(X), rel=1e-9)
    linear = LinearRegression().fit(np.log(X), np.log(y), sample_weight=weights)
    assert StepLawRegressor().fit(X, y, sample_weight=weights).coef_ == pytest.approx(linear.coef_, rel=1e-9)


def test_published_refit_of_the_shared_table(shared_data):
    runs = read_runs(shared_data("step-law") / "dense_lr_bs_loss.csv.gz")
    kept = near_optimal(runs)
    law = StepLawRegressor(n_bootstrap=1000, random_state=0).fit(kept[["N", "D"]], kept["lr"])
    assert [law.intercept_, *law.coef_] == pytest.approx([4.17651, -0.74082, 0.18356], abs=5e-6)
    assert list(law.feature_names_in_) == ["N", "D"]
    assert law.bootstrap_.shape == (1000, 3)
    ends = law.predict_interval(kept[["N", "D"]], confidence=0.9)
    assert ends.shape == (90, 2)
    inside = (ends[:, 0] < law.predict(kept[["N", "D"]])) & (law.predict(kept[["N", "D"]]) < ends[:, 1])
    assert inside.mean() > 0.95
    log = TransformedTargetRegressor(law, func=lambda y: y, inverse_func=lambda y: y)
    scores = cross_val_score(log, kept[["N", "D"]], kept["lr"], groups=kept["group"], cv=LeaveOneGroupOut(),
                             scoring="neg_mean_absolute_percentage_error")  # fmt: skip
    assert scores.mean() > -(2**0.5 - 1), "a group left out is predicted to within a step of the grid"


def test_the_random_state_decides(table):
    X, y = table
    y = y * np.exp(0.1 * np.random.default_rng(1).standard_normal(60))
    one, two, other = (StepLawRegressor(n_bootstrap=10, random_state=s).fit(X, y).bootstrap_ for s in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    narrow, wide = (StepLawRegressor(200, random_state=0).fit(X, y).predict_interval(X, c) for c in (0.5, 0.9))
    assert (wide[:, 0] <= narrow[:, 0]).all()
    assert (narrow[:, 1] <= wide[:, 1]).all()


def test_weights_of_zero_leave_rows_out_of_the_bootstrap_too(table):
    X, y = table
    weights = np.r_[np.ones(40), np.zeros(20)]
    wrong = np.r_[y[:40], np.full(20, 1e3)]
    law = StepLawRegressor(n_bootstrap=50, random_state=0).fit(X, wrong, sample_weight=weights)
    assert np.abs(law.bootstrap_ - [np.log(1.79), -0.713, 0.307]).max() < 1e-6


@pytest.mark.parametrize(
    ("X", "y", "words"),
    [
        ([[1e8, 0.0], [1e9, 1e9], [1e9, 2e9], [2e9, 4e9]], [1, 2, 3, 4], r"zeros: column 1 of X has 0\."),
        ([[1e8, 1e9], [1e9, 1e9], [-1e9, 2e9], [2e9, 4e9]], [1, 2, 3, 4], "Negative values.* column 0"),
        ([[1e8, 1e9], [1e9, 1e9], [1e9, 2e9], [2e9, 4e9]], [1, 0, 3, 4], "y holds 0"),
        ([[1e8, 1e9], [1e9, 1e9], [2e9, 1e9], [3e9, 1e9]], [1, 2, 3, 4], "column 1 of X has one value"),
        ([[1e8, 2e9], [1e9, 2e10], [2e9, 4e10], [3e9, 6e10]], [1, 2, 3, 4], "depend on each other"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(X, y, words):
    with pytest.raises(MethodError, match=words):
        StepLawRegressor().fit(X, y)
    if "column" in words and "one value" not in words:
        frame = pd.DataFrame(X, columns=["N", "D"])
        with pytest.raises(MethodError, match=r"column [ND] of X"):
            StepLawRegressor().fit(frame, y)


def test_too_few_rows_are_told(table):
    X, y = table
    with pytest.warns(GnomonWarning, match="2 distinct rows do not determine 2 exponents and a factor"):
        StepLawRegressor().fit(X[:2], y[:2])


def test_options_that_cannot_be_are_refused(table):
    X, y = table
    law = StepLawRegressor().fit(X, y)
    with pytest.raises(MethodError, match="n_bootstrap=1000"):
        law.predict_interval(X)
    with pytest.raises(MethodError, match="n_bootstrap = -1"):
        StepLawRegressor(n_bootstrap=-1).fit(X, y)
    with pytest.raises(MethodError, match="confidence = 95"):
        StepLawRegressor(n_bootstrap=5).fit(X, y).predict_interval(X, 95)
    with pytest.raises(MethodError, match="column 0 of X has -1"):
        law.predict([[-1.0, 1e9]])
