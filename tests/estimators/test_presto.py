"""PRESTO's likelihood and optimum: the equations as written, autograd, another solver, identities and limits."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from gnomon.estimators import PRESTO, SolverOptions
from gnomon.estimators.presto.likelihood import (
    class_probabilities,
    crossed_rows,
    curvature,
    fisher_information,
    negative_log_likelihood,
    score,
)
from gnomon.estimators.presto.quadratic import minimise_lasso_quadratic

sys.path.insert(0, str(Path(__file__).parent))
import presto_definition as definition

pytestmark = pytest.mark.filterwarnings("ignore::gnomon.errors.GnomonWarning")


def spacings(n: int, b: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(-1, 2, n), rng.exponential(1.0, (n, b - 1)) + 0.02])


# the likelihood


@pytest.mark.parametrize("b", [1, 2, 3, 6])
def test_value_and_score_are_those_of_the_equations(b):
    rng = np.random.default_rng(b)
    T, y, w = spacings(25, b), rng.integers(0, b + 1, 25), rng.uniform(0.2, 2, 25)
    weights = np.eye(b + 1)[y] * w[:, None]
    # one feature a row of its own: eta is then alpha + x.beta with any value wanted
    eta = torch.as_tensor(np.cumsum(T, axis=1)).requires_grad_()
    total = sum(
        definition.negative_log_likelihood(
            eta[i], torch.zeros(1, b, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), y[i : i + 1]
        )
        * w[i]
        for i in range(25)
    )
    assert negative_log_likelihood(T, weights) == pytest.approx(total.item(), rel=1e-12)
    (by_eta,) = torch.autograd.grad(total, eta)
    by_T = by_eta.numpy()[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(score(T, weights), by_T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("b", [1, 2, 5])
def test_curvature_is_the_hessian_and_its_mean_the_tridiagonal_fisher_information(b):
    T = spacings(6, b, seed=b)
    eta = torch.as_tensor(np.cumsum(T, axis=1))
    information = np.zeros((6, b, b))
    for k in range(b + 1):
        weights = np.tile(np.eye(b + 1)[k], (6, 1))
        exact = curvature(T, weights).tridiagonal()
        for i in range(6):

            def loss(e, k=k):
                F = torch.cat([torch.zeros(1), torch.sigmoid(e), torch.ones(1)])
                return -torch.log(F[k + 1] - F[k])

            hessian = torch.autograd.functional.hessian(loss, eta[i]).numpy()
            np.testing.assert_allclose(exact[i], hessian, atol=1e-8, rtol=1e-8)
        information += class_probabilities(T)[:, k, None, None] * exact
    F = 1 / (1 + np.exp(-eta.numpy()))
    q, P = F * (1 - F), np.diff(F, axis=1, prepend=0, append=1)
    paper = np.zeros_like(information)
    for k in range(b):
        paper[:, k, k] = q[:, k] ** 2 * (1 / P[:, k] + 1 / P[:, k + 1])
        if k + 1 < b:
            paper[:, k, k + 1] = paper[:, k + 1, k] = -q[:, k] * q[:, k + 1] / P[:, k + 1]
    np.testing.assert_allclose(information, paper, atol=1e-10, rtol=1e-8)
    np.testing.assert_allclose(fisher_information(eta.numpy()), paper, atol=1e-10, rtol=1e-8)


def test_nothing_is_lost_far_out_and_at_the_wall():
    weights = np.array([[0.0, 1.0, 0.0]])
    # P_2 = sigma(eta_2) - sigma(eta_1) = 0 in floating point, its logarithm is not
    assert negative_log_likelihood(np.array([[60.0, 1.0]]), weights) == pytest.approx(60 - np.log(1 - np.exp(-1)))
    assert np.isfinite(score(np.array([[-800.0, 900.0]]), weights)).all()
    assert np.isfinite(curvature(np.array([[-800.0, 900.0]]), weights).spacing).all()
    for wall in (0.0, -1e-12):
        # a class the row does not belong to counts too
        assert negative_log_likelihood(np.array([[0.0, wall]]), np.array([[1.0, 0.0, 0.0]])) == np.inf


def test_crossed_boundaries_are_clipped_and_renormalised():
    T = np.array([[0.0, 1.0, 1.0], [0.0, -1.0, 2.0]])
    F = 1 / (1 + np.exp(-np.cumsum(T, axis=1)))
    raw = np.diff(F, axis=1, prepend=0, append=1)
    P = class_probabilities(T)
    np.testing.assert_allclose(P[0], raw[0], rtol=1e-12)
    np.testing.assert_allclose(P[1], np.maximum(raw[1], 0) / np.maximum(raw[1], 0).sum(), rtol=1e-12)
    assert crossed_rows(T).tolist() == [False, True]


# the inner problem


@pytest.mark.parametrize("seed", range(8))
def test_the_quadratic_is_minimised_exactly(seed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 30))
    A = rng.normal(size=(d + 3, d)) * np.geomspace(1, 0.05, d)
    H, b = A.T @ A + 1e-8 * np.eye(d), rng.normal(size=d)
    l1 = np.where(rng.random(d) < 0.2, 0.0, rng.uniform(0, 1, d))
    z = minimise_lasso_quadratic(H, b, l1, np.where(rng.random(d) < 0.5, 0.0, rng.normal(size=d)))
    g = H @ z - b
    assert np.abs(g[z != 0] + (l1 * np.sign(z))[z != 0]).max(initial=0) < 1e-9
    assert (np.abs(g[z == 0]) <= l1[z == 0] + 1e-9).all()


# the optimum


@pytest.mark.parametrize(
    ("alpha", "share", "solver"),
    [(1.0, 0.5, "proxnewton"), (1.0, 0.1, "fisher"), (1.0, 0.1, "proxnewton"), (0.5, 0.1, "proxnewton"),
     (0.0, 0.02, "fisher"), (0.0, 0.02, "proxnewton")],
)  # fmt: skip
def test_the_optimum_is_that_of_another_solver(alpha, share, solver):
    X, y = definition.simulated(n=200, p=3)
    lam = share * PRESTO(alpha=alpha).path(X, y, n_lambda=1).lambda_max * max(alpha, 1e-3)
    model = PRESTO(lam, alpha=alpha, solver=solver).fit(X, y)
    other = definition.penalised_optimum(X, y, lam, alpha)
    assert model.converged_
    assert not model.boundary_reached_
    assert model.objective_ == pytest.approx(other["objective"], abs=1e-9)
    assert model.objective_ <= other["objective"] + 1e-12
    np.testing.assert_allclose(model.psi_ * X.std(0)[:, None], other["psi"], atol=2e-4)


def kkt(model: PRESTO, X: np.ndarray, y: np.ndarray, c: np.ndarray | None = None) -> tuple[float, float]:
    """Violations on and off the support, from the gradient of the equations at the coefficients given back."""
    mean, sd = X.mean(0), X.std(0)
    psi = model.psi_ * sd[:, None]
    alpha = model.intercept_ + mean @ model.coef_
    _, by_alpha, g = definition.value_and_gradient(
        torch.as_tensor(alpha), torch.as_tensor(psi), torch.as_tensor((X - mean) / sd), torch.as_tensor(y)
    )
    weight = model.lam_ * (np.ones_like(psi) if c is None else c)
    g = g + (1 - model.alpha) * weight * psi
    on = np.abs(g + model.alpha * weight * np.sign(psi))[psi != 0]
    off = (np.abs(g) - model.alpha * weight)[psi == 0]
    return max(on.max(initial=0), np.abs(by_alpha).max()), off.max(initial=-np.inf)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("lam", [0.1, 0.03, 0.01, 0.003])
def test_the_optimality_conditions_hold_on_the_original_scale(lam, alpha):
    X, y = definition.simulated(n=500, p=6)
    model = PRESTO(lam, alpha=alpha).fit(X, y)
    on, off = kkt(model, X, y)
    assert on < 1e-8
    assert off <= 1e-8
    assert model.violation_ < 1e-8
    assert np.count_nonzero(model.psi_) > 0


def test_penalty_weights_scale_and_infinity_holds():
    X, y = definition.simulated(seed=5)
    c = np.random.default_rng(0).uniform(0.2, 3, (4, 3))
    c[2, 1] = np.inf
    c[0, 0] = 0.0
    model = PRESTO(0.02, penalty_weights=c).fit(X, y)
    assert model.psi_[2, 1] == 0
    assert model.psi_[0, 0] != 0
    free = np.where(np.isinf(c), 1e9, c)
    other = definition.penalised_optimum(X, y, 0.02, c=np.where(np.isinf(c), 1e3, c))
    assert model.objective_ == pytest.approx(other["objective"], abs=1e-8)
    assert kkt(model, X, y, free)[0] < 1e-8
    by_feature = np.array([1.0, 2.0, 0.5, 1.0])
    one = PRESTO(0.02, penalty_weights=by_feature).fit(X, y).coef_
    np.testing.assert_allclose(
        one, PRESTO(0.02, penalty_weights=np.tile(by_feature[:, None], 3)).fit(X, y).coef_, atol=1e-12
    )


def test_from_lambda_max_on_nothing_is_left_and_probabilities_are_the_frequencies():
    X, y = definition.simulated()
    largest = PRESTO().path(X, y, n_lambda=1).lambda_max
    for lam in (largest * (1 + 1e-9), 10 * largest):
        model = PRESTO(lam).fit(X, y)
        assert not model.psi_.any()
        np.testing.assert_allclose(model.predict_proba(X), np.tile(np.bincount(y) / len(y), (len(y), 1)), atol=1e-12)
    assert np.count_nonzero(PRESTO(0.999 * largest).fit(X, y).psi_) == 1


def test_with_the_first_block_free_the_null_model_is_proportional_odds():
    X, y = definition.simulated(n=600)
    parallel = np.full((4, 3), np.inf)
    parallel[:, 0] = 0.0
    common = PRESTO(0.0, penalty_weights=parallel).fit(X, y)
    free = PRESTO(100.0, penalize_first=False).fit(X, y)
    np.testing.assert_allclose(free.coef_, common.coef_, atol=1e-7)
    path = PRESTO(penalize_first=False).path(X, y, n_lambda=5)
    assert path.nonzero[0] == 4
    assert path.nonzero[1] > 4
    assert PRESTO(0.99 * path.lambda_max, penalize_first=False).fit(X, y).psi_[:, 1:].any()


def test_without_penalty_it_is_the_non_parallel_maximum_likelihood_fit():
    X, y = definition.simulated(n=800, p=2, spread=0.05)
    model = PRESTO(0.0).fit(X, y)
    assert not model.boundary_reached_
    assert not model.separated_
    Z = torch.as_tensor(definition.standardised(X))

    def loss(v: np.ndarray) -> tuple[float, np.ndarray]:
        value, a, b = definition.value_and_gradient(
            torch.as_tensor(v[:3]), torch.as_tensor(v[3:].reshape(2, 3)), Z, torch.as_tensor(y)
        )
        return (value, np.concatenate([a, b.ravel()])) if np.isfinite(value) else (1e6, np.zeros_like(v))

    start = np.concatenate([[-1.0, 1.0, 2.5], np.zeros(6)])
    other = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    assert model.log_likelihood_ == pytest.approx(-len(y) * other.fun, abs=1e-7)
    np.testing.assert_allclose(model.psi_ * X.std(0)[:, None], other.x[3:].reshape(2, 3), atol=1e-5)
    # small penalties tend there
    near = PRESTO(1e-7).fit(X, y)
    np.testing.assert_allclose(near.coef_, model.coef_, atol=1e-3)


def test_two_classes_are_l1_logistic_regression():
    X, y = definition.simulated(n=400, thresholds=(0.5,))
    lam = 0.03
    model = PRESTO(lam).fit(X, y)
    saga = LogisticRegression(l1_ratio=1.0, C=1 / (len(y) * lam), solver="saga", tol=1e-13, max_iter=100_000)
    saga.fit(definition.standardised(X), y)
    np.testing.assert_allclose(-model.coef_[:, 0] * X.std(0), saga.coef_[0], atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(X), saga.predict_proba(definition.standardised(X)), atol=1e-6)


def test_row_order_shift_and_scale_leave_predictions_as_they_are():
    X, y = definition.simulated(seed=2)
    expected = PRESTO(0.01).fit(X, y).predict_proba(X)
    order = np.random.default_rng(0).permutation(len(y))
    np.testing.assert_allclose(PRESTO(0.01).fit(X[order], y[order]).predict_proba(X), expected, atol=1e-9)
    scale, shift = np.array([1e3, 1e-3, -2.0, 7.0]), np.array([5.0, -100.0, 0.0, 1.0])
    moved = X * scale + shift
    np.testing.assert_allclose(PRESTO(0.01).fit(moved, y).predict_proba(moved), expected, atol=1e-7)


def test_a_constant_column_and_a_copied_one():
    X, y = definition.simulated()
    expected = PRESTO(0.01).fit(X, y)
    wide = np.column_stack([X, np.full(len(X), 0.1), X[:, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PRESTO(0.01).fit(wide, y)
    assert not model.coef_[4].any()
    assert model.objective_ == pytest.approx(expected.objective_, abs=1e-12)
    np.testing.assert_allclose(model.predict_proba(wide), expected.predict_proba(X), atol=1e-7)
    assert not PRESTO(0.0).fit(wide[:, :5], y).coef_[4].any()


def test_a_ridge_on_many_columns_takes_conjugate_gradients_to_the_same_optimum(monkeypatch):
    from gnomon.estimators.presto import newton

    X, y = definition.simulated(n=120, p=30)
    direct = PRESTO(0.05, alpha=0.0).fit(X, y)
    monkeypatch.setattr(newton, "_LARGE", 10)
    monkeypatch.setattr(newton, "_hessian", None)
    matrix_free = PRESTO(0.05, alpha=0.0).fit(X, y)
    assert matrix_free.converged_
    np.testing.assert_allclose(matrix_free.coef_, direct.coef_, atol=2e-6)


def test_more_columns_than_rows_and_a_small_working_set():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 700))
    y = np.digitize(X[:, :5].sum(1) + rng.logistic(size=150), [-2.0, 1.0, 3.0])
    path = PRESTO().path(X, y, n_lambda=6, lambda_min_ratio=0.2)
    assert path.converged.all()
    assert path.nonzero[-1] > 20
    Z, i = torch.as_tensor(definition.standardised(X)), 5
    psi = path.psi[i] * X.std(0)[:, None]
    alpha = path.intercepts[i] + X.mean(0) @ path.coefs[i]
    _, _, g = definition.value_and_gradient(torch.as_tensor(alpha), torch.as_tensor(psi), Z, torch.as_tensor(y))
    assert (np.abs(g) <= path.lambdas[i] + 1e-8).all()
    np.testing.assert_allclose(g[psi != 0], -path.lambdas[i] * np.sign(psi[psi != 0]), atol=1e-8)


@pytest.mark.parametrize("lam", [0.004, 0.0005])
def test_an_optimum_on_the_boundary_of_the_domain_is_found(lam):
    X, y = definition.simulated(n=60, p=2, seed=1, spread=1.0)
    model = PRESTO(lam).fit(X, y)
    assert model.boundary_reached_
    assert model.converged_
    other = definition.penalised_optimum(X, y, lam, walls=True)
    assert model.objective_ == pytest.approx(other["objective"], abs=2e-7)
    P = model.predict_proba(X)
    assert P.min() > 0
    assert P.min() < 1e-6


def test_the_barrier_sets_how_near_the_boundary_the_fit_comes():
    X, y = definition.simulated(n=60, p=2, seed=1, spread=1.0)
    values = [PRESTO(5e-4, solver=SolverOptions(barrier=mu)).fit(X, y).objective_ for mu in (1e-4, 1e-6, 1e-8)]
    assert values[0] > values[1] > values[2]
    assert values[1] - values[2] < 3e-6


def test_every_fit_of_awkward_data_converges():
    """Heavy tails, rare dummies, more columns than rows, up to seven classes, all penalties and both solvers."""
    fits = 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        n, p, K = int(rng.integers(15, 120)), int(rng.integers(1, 25)), int(rng.integers(3, 8))
        X = [rng.normal(size=(n, p)), rng.standard_t(2, (n, p)) * 10.0 ** rng.integers(-5, 5, p),
             (rng.random((n, p)) < 0.15).astype(float)][seed % 3]  # fmt: skip
        latent = X / (X.std(0) + 1e-9) @ rng.normal(size=p) * 0.5 + rng.logistic(size=n)
        y = np.unique(np.searchsorted(np.quantile(latent, np.sort(rng.random(K - 1))), latent), return_inverse=True)[1]
        model = PRESTO(
            alpha=(1.0, 0.5, 0.0)[seed // 3 % 3],
            penalize_first=bool(seed % 2),
            solver=("proxnewton", "fisher")[seed // 2 % 2],
        )
        path = model.path(X, y, n_lambda=8, lambda_min_ratio=1e-3, sample_weight=rng.exponential(size=n))
        assert path.converged.all(), seed
        assert (np.diff(path.objective) < 1e-8).all(), seed
        assert (path.violation < 1e-6).all(), seed
        fits += path.boundary.sum()
    assert fits > 20
