"""PRESTO on real ordinal data: recorded optima, published tests of other software, the boundary of the domain."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from statsmodels.miscmodels.ordinal_model import OrderedModel

from gnomon.errors import GnomonWarning, MethodError
from gnomon.estimators import PRESTO, PRESTOCV, PrestoConvergenceWarning, parallel_lines_test, rare_calibration_error

sys.path.insert(0, str(Path(__file__).parent))
import presto_definition as definition

WINE = {0.30054012: 1.440542725, 0.14211665: 1.392614719, 0.06720281: 1.314041171, 0.03177825: 1.259352568,
        0.01502701: 1.227661255}  # fmt: skip
SOUP = {  # penalty over lambda_max: objective, log-likelihood, non-zero differences
    1.0: (1.492205046, -1929.421, 0),
    0.51794747: (1.482684365, -1890.698, 1),
    0.26826958: (1.469758001, -1876.002, 7),
    0.13894955: (1.454230152, -1844.413, 32),
}


@pytest.fixture(scope="module")
def wine(shared_data):
    return definition.wine(shared_data("presto"))


@pytest.fixture(scope="module")
def soup(shared_data):
    return definition.soup(shared_data("presto"))


def test_wine_path(wine):
    path = PRESTO().path(*wine, list(WINE))
    assert path.lambda_max == pytest.approx(0.30054012, abs=1e-8)
    np.testing.assert_allclose(path.objective, list(WINE.values()), atol=1e-8)
    assert not path.boundary_reached
    np.testing.assert_allclose(path.intercepts[3], [-1.51996, 0.94765, 3.15294, 4.63270], atol=1e-5)
    np.testing.assert_allclose(path.psi[3].T, [[-2.05935, -1.22063], [0, 0], [-0.23542, 0], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(path.intercepts[4], [-1.45158, 1.06199, 3.52234, 4.97018], atol=2e-4)
    np.testing.assert_allclose(
        path.psi[4].T, [[-2.15643, -1.35505], [0, 0], [-0.47335, -0.0610], [-0.0584, 0.1714]], atol=2e-4
    )


def test_wine_fits_are_those_of_another_solver(wine):
    X, y = wine
    for lam in (0.06720281, 0.01502701):
        model, other = PRESTO(lam).fit(X, y), definition.penalised_optimum(X, y, lam)
        assert model.objective_ == pytest.approx(other["objective"], abs=1e-9)
        np.testing.assert_allclose(model.psi_ * X.std(0)[:, None], other["psi"], atol=1e-4)


@pytest.mark.parametrize("huge", [1e6, np.inf])
def test_wine_proportional_odds_is_that_of_statsmodels(wine, huge):
    X, y = wine
    weights = np.full((2, 4), huge)
    weights[:, 0] = 0.0
    model = PRESTO(0.0 if np.isinf(huge) else 1.0, penalty_weights=weights).fit(X, y)
    other = OrderedModel(y, X, distr="logit").fit(method="bfgs", gtol=1e-9, disp=False)
    np.testing.assert_allclose(-model.coef_, np.tile(other.params[:2, None], 4), atol=1e-5)
    thresholds = other.model.transform_threshold_params(other.params)[1:-1]
    np.testing.assert_allclose(model.intercept_, thresholds, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), other.predict(), atol=1e-6)
    assert model.log_likelihood_ == pytest.approx(other.llf, abs=1e-7)


def test_wine_nominal_test_is_the_published_one(wine):
    # R's ordinal::nominal_test of rating ~ temp + contact, in the documentation of that package
    test = parallel_lines_test(*wine, method="likelihood-ratio")
    assert test.log_likelihood == pytest.approx(-86.492, abs=5e-4)
    temp, contact = test.by_feature.values()
    assert temp.df == contact.df == 3
    assert temp.statistic == pytest.approx(3.175, abs=2e-3)
    assert temp.p_value == pytest.approx(0.3654, abs=5e-4)
    assert contact.statistic == pytest.approx(0.5667, abs=2e-3)
    assert contact.p_value == pytest.approx(0.9040, abs=5e-4)


@pytest.mark.parametrize("solver", ["proxnewton", "fisher"])
def test_soup_path(soup, solver):
    X, y = soup
    assert np.bincount(y).tolist() == [620, 197, 67, 86, 168, 155]
    largest = PRESTO().path(X, y, n_lambda=1).lambda_max
    assert largest == pytest.approx(0.154800293, abs=1e-9)
    path = PRESTO(solver=solver).path(X, y, [share * largest for share in SOUP])
    expected = np.array(list(SOUP.values()))
    np.testing.assert_allclose(path.objective, expected[:, 0], atol=2e-9)
    np.testing.assert_allclose(path.log_likelihood, expected[:, 1], atol=3e-3)
    assert path.nonzero.tolist() == expected[:, 2].tolist()
    assert path.converged.all()
    assert not path.boundary_reached


def test_soup_small_penalties_lie_on_the_boundary(soup):
    X, y = soup
    path = PRESTO().path(X, y, n_lambda=8)
    assert path.boundary.tolist() == [False] * 4 + [True] * 4
    assert path.boundary_reached
    assert path.converged.all()
    assert path.objective[4] <= 1.435303303
    assert (np.diff(path.objective) < 0).all()
    assert (np.diff(path.log_likelihood) > 0).all()  # no fit is a copy of the one before
    assert (path.spacings(X)[:, :, 1:] > 0).all()
    stopped = PRESTO(boundary="stop").path(X, y, n_lambda=8)
    assert stopped.boundary_reached
    np.testing.assert_allclose(stopped.objective, path.objective[:4], atol=1e-12)


def test_soup_the_last_fit_inside_is_kept_when_asked(soup):
    X, y = soup
    with pytest.warns(PrestoConvergenceWarning, match="boundary of the domain was reached.*last penalty"):
        model = PRESTO(0.002, boundary="stop").fit(X, y)
    assert model.boundary_reached_
    assert model.converged_
    assert model.lam_ > 0.011
    with pytest.warns(PrestoConvergenceWarning, match="barrier of 1e-08"):
        inside = PRESTO(0.002).fit(X, y)
    assert inside.boundary_reached_
    assert inside.lam_ == 0.002
    with pytest.raises(MethodError, match="every penalty has its optimum on the boundary"):
        PRESTOCV([0.001, 0.0001], boundary="stop").fit(X, y)


def test_soup_log_likelihood_is_that_of_the_coefficients_given_back(soup):
    # the intercepts of the later boundaries take the means of all blocks before them
    X, y = soup
    model = PRESTO(0.0415).fit(X, y)
    P = model.predict_proba(X)
    assert np.log(P[np.arange(len(y)), y]).sum() == pytest.approx(model.log_likelihood_, abs=1e-8)
    assert np.count_nonzero(model.psi_[:, 1:]) > 0
    assert (P > 0).all()
    np.testing.assert_allclose(model.coef_, np.cumsum(model.psi_, axis=1))
    eta = model.intercept_ + X @ model.coef_
    np.testing.assert_allclose(model.cumulative_proba(X), 1 / (1 + np.exp(-eta)), atol=1e-12)
    np.testing.assert_allclose(model.rare_proba(X), 1 / (1 + np.exp(eta[:, -1])), atol=1e-12)


def test_soup_cross_validated_beats_the_frequencies_on_held_out_rows(soup):
    X, y = soup
    order = np.random.default_rng(0).permutation(len(y))
    train, test = order[:1000], order[1000:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnomonWarning)
        model = PRESTOCV(n_lambda=10, lambda_min_ratio=0.05).fit(X[train], y[train])
        rare = model.rare_proba(X[test])
        loss = -np.log(model.predict_proba(X[test])[np.arange(len(test)), y[test]]).mean()
    shares = np.bincount(y[train]) / len(train)
    assert loss < -np.log(shares[y[test]]).mean()
    assert rare_calibration_error(y[test] == 5, rare) < 0.08


@pytest.mark.parametrize("cutoff", [30, 50, 65])
def test_prediabetes_three_classes(shared_data, cutoff):
    import pandas as pd

    table = pd.read_csv(shared_data("presto") / "prediabetes.csv")
    X = table[["Age", "Sex", "IMD_Decile", "BMI", "HbA1C"]]
    diabetes, pre = table.Age_Diabetes < cutoff, table.Age_PreDiabetes < cutoff
    labels = np.where(diabetes, "Diabetes", np.where(pre, "PreDiabetes", "NoDiabetes"))
    order = ["NoDiabetes", "PreDiabetes", "Diabetes"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GnomonWarning)
        model = PRESTO(0.002, classes_order=order).fit(X, labels)
        P = model.predict_proba(X)
    assert model.converged_
    assert model.classes_order_.tolist() == order
    assert list(model.feature_names_in_) == list(X.columns)
    # intercepts are free: mean probabilities are the frequencies but for the pull of the penalty
    rare = P[:, model.classes_.tolist().index("Diabetes")]
    assert rare.mean() == pytest.approx(diabetes.mean(), abs=4e-3)
