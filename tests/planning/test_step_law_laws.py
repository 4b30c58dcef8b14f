"""Other laws as the paper tabulates them, what a law's choice costs on real runs, and the loss law."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import check_grad, minimize

from gnomon.errors import DataError, GnomonWarning, MethodError
from gnomon.planning import (
    LAWS,
    PAPER,
    chinchilla_allocation,
    compare_laws,
    compare_laws_on_runs,
    dense_parameters,
    excess_loss,
    fit_loss_law,
    fit_step_law,
    flops_per_token,
    optimum,
    predict_with,
    read_runs,
)
from gnomon.planning.step_law.loss_law import huber_objective, minimise_all

N, D, L = 1e9, 1e11, 2.4


@pytest.fixture(scope="module")
def dense(shared_data):
    return read_runs(shared_data("step-law") / "dense_lr_bs_loss.csv.gz")


@pytest.mark.parametrize(
    ("name", "lr", "batch"),
    [
        ("openai", 3.239e-3 - 1.395e-4 * math.log(N), 2e8 * L**-4.76190),
        ("deepseek", 0.3188 * (6 * N * D) ** -0.125, 0.2920 * (6 * N * D) ** 0.3271),
        ("porian", 3.7 * N**-0.36, 0.7576 * N**0.703),
        ("minicpm", None, 1.21e9 / L**6.24),
        ("step-law", math.exp(0.586308) * N**-0.712922 * D**0.307491, math.exp(-0.543542) * D**0.570944),
    ],
)
def test_the_laws_are_their_formulas(name, lr, batch):
    found = predict_with(name, N, D, loss=L)
    assert found[0] is None if lr is None else float(found[0]) == pytest.approx(lr, rel=1e-12)
    assert float(found[1]) == pytest.approx(batch, rel=1e-12)


def test_the_printed_constant_of_the_laws_by_loss_is_an_option():
    for name, exponent in (("openai", 4.76190), ("minicpm", 6.24)):
        assert float(predict_with(name, N, D, loss=L, printed=True)[1]) == pytest.approx(2e18 * L**-exponent)
        assert predict_with(name, N, D)[1] is None, "no batch without a loss"


def test_deepseeks_law_takes_the_compute_it_is_given():
    per_token = flops_per_token(960, 9368, 7, 2048)
    compute = per_token * D
    n = dense_parameters(960, 9368, 7)
    assert per_token > 6 * n
    lr, _ = predict_with("deepseek", n, D, compute=compute)
    assert float(lr) == pytest.approx(0.3188 * compute**-0.125)


def test_openais_rate_ends_where_it_would_be_negative():
    assert np.isnan(predict_with("openai", 2e10, D)[0])
    assert float(predict_with("openai", 1e10, D)[0]) > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [("microsoft", "units"), ("meituan", "neither constant given"), ("deepsek", "Did you mean 'deepseek'")],
)
def test_laws_that_cannot_be_used_are_refused(name, words):
    with pytest.raises(MethodError, match=words):
        predict_with(name, N, D)


def test_microsofts_law_works_in_the_units_it_is_given():
    lr, batch = predict_with("microsoft", N, D, units=(1e9, 1e9))
    assert float(lr) == pytest.approx(1.3192e-5 * 1.0 * 100**-0.32)
    assert batch is None
    assert float(predict_with("microsoft", N, D, units=(1, 1))[0]) < 1e-10
    assert "microsoft" in compare_laws(N, D, units=(1e9, 1e9)).index


def test_the_comparison_lists_what_each_law_chooses():
    table = compare_laws(N, D, loss=L)
    assert list(table.index) == ["step-law", "openai", "deepseek", "porian", "minicpm"]
    assert table.loc["step-law", "batch_tokens"] == float(optimum(N, D)[1])
    assert np.isnan(table.loc["minicpm", "lr"])
    assert (table["batch_sequences"] * 2048).tolist() == pytest.approx(table["batch_tokens"].tolist())
    assert table.loc["porian", "steps"] == math.ceil(D / table.loc["porian", "batch_tokens"])
    assert table.loc[["step-law", "porian", "deepseek", "openai"], "paper_excess"].tolist() == [0.94, 3.71, 9.26, 9.51]
    assert "expected loss" in compare_laws(N, D, laws=["openai"]).loc["openai", "note"]
    for bad in ({"n_params": -1}, {"seq_len": 0}, {"loss": 0.0}, {"compute": float("nan")}):
        with pytest.raises(MethodError, match=next(iter(bad))):
            compare_laws(**{"n_params": N, "n_tokens": D, **bad})


def test_every_law_is_named_with_its_source():
    assert {"step-law", "openai", "microsoft", "deepseek", "porian", "minicpm", "meituan"} == set(LAWS)
    assert all(law.source for law in LAWS.values())


def test_chinchilla_only_splits_compute():
    n, d = chinchilla_allocation(compute=6 * 20 * 1e18)
    assert (n, d) == pytest.approx((1e9, 2e10))
    assert chinchilla_allocation(n_tokens=2e10) == (1e9, 2e10)
    assert chinchilla_allocation(n_params=1e9, ratio=10) == (1e9, 1e10)
    for given in ({}, {"compute": 1e20, "n_params": 1e9}):
        with pytest.raises(MethodError, match="exactly one"):
            chinchilla_allocation(**given)


def test_published_costs_of_the_laws_on_the_shared_groups(dense):
    paper = excess_loss(dense, lambda best: PAPER(best["N"], best["D"]))["excess"]
    assert paper.mean() == pytest.approx(0.917, abs=5e-4)
    assert paper.max() == pytest.approx(3.1, abs=0.05)
    fit = fit_step_law(dense_path(dense), bootstrap=0)
    refit = compare_laws_on_runs(dense, {"refit": lambda best: fit.predict(best["N"], best["D"])})
    assert refit.loc["refit", "mean"] == pytest.approx(1.121, abs=5e-4)
    table = compare_laws_on_runs(dense)
    assert table.index[0] == "step-law"
    assert table.loc["step-law", "mean"] < 1.5
    assert table.loc["deepseek", "mean"] > 4 * table.loc["step-law", "mean"]
    assert table.loc["openai", "mean"] == pytest.approx(13.1, abs=0.2)
    assert table.loc["constant", "mean"] == pytest.approx(16.6, abs=0.2)
    assert (table["groups"] == 12).all()


def dense_path(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns `fit_step_law` reads, from a table that was read already."""
    return runs.assign(bs=runs["batch"] / 2048)[["N", "D", "lr", "bs", "loss"]]


def test_mixtures_count_all_their_parameters(shared_data):
    runs = read_runs(shared_data("step-law") / "moe_lr_bs_loss.csv.gz")
    laws = {name: (lambda best, c=c: PAPER(best[c], best["D"])) for name, c in (("all", "N"), ("active", "Na"))}
    table = compare_laws_on_runs(runs, laws)
    assert table.loc["all", "mean"] < 1.6
    assert table.loc["active", "mean"] > 6 * table.loc["all", "mean"]


def test_the_nearest_run_is_by_factors_not_differences():
    rows = [(1e8, 2e9, 1e-3, 64, 2.0), (1e8, 2e9, 4e-3, 64, 2.2), (1e8, 2e9, 1e-3, 512, 2.1)]
    runs = read_runs(pd.DataFrame(rows, columns=["N", "D", "lr", "bs", "loss"]))
    # 2.2e-3 is nearer to 1e-3 in difference, to 4e-3 in factor
    assert excess_loss(runs, lambda best: ([2.2e-3], [64 * 2048]))["excess"].item() == pytest.approx(100)
    assert excess_loss(runs, lambda best: (1e-3, 1e6))["excess"].item() == pytest.approx(50)
    assert excess_loss(runs, lambda best: (1e-3, None))["excess"].item() == 0
    with pytest.raises(DataError, match="'minicpm' gives no learning rate"):
        compare_laws_on_runs(runs, ["minicpm"])
    huge = runs.assign(N=2e10)
    with pytest.raises(DataError, match=r"'openai' gives no learning rate for N = 2e\+10"):
        compare_laws_on_runs(huge, ["openai"])
    with pytest.warns(GnomonWarning, match="left out: the law 'openai'"):
        assert "openai" not in compare_laws_on_runs(huge).index
    with pytest.raises(MethodError, match="the law's batch = 0"):
        excess_loss(runs, lambda best: (1e-3, 0))


PLANTED = np.array([0.5, 4.0, 6.0, 0.25, 0.28])


def planted(noise: float = 0.0) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    E, A, B, alpha, beta = PLANTED
    rows = []
    for n in (1e8, 3e8, 1e9, 4e9):
        for d in (2e9, 1e10, 5e10, 3e11):
            loss = (math.exp(E) + math.exp(A) / n**alpha + math.exp(B) / d**beta) * math.exp(
                noise * rng.standard_normal()
            )
            rows += [(n, d, 1e-3, 64, loss), (n, d, 2e-3, 64, 11.0)]  # the second diverged
    return pd.DataFrame(rows, columns=["N", "D", "lr", "bs", "loss"])


def test_a_planted_loss_law_comes_back_and_diverged_runs_do_not_enter():
    law = fit_loss_law(planted(), bootstrap=30)
    assert law.coefficients == pytest.approx(PLANTED, abs=2e-4)
    assert law.mode == pytest.approx(PLANTED, abs=2e-2)
    assert law.fit_error < 1e-6
    assert law.held_out is not None
    assert abs(law.held_out["error"]) < 1e-5
    assert (law.held_out["N"], law.held_out["D"]) == (4e9, 3e11), "the group with the smallest loss"
    loss = float(law.predict(7e9, 1.4e12))
    expected = math.exp(0.5) + math.exp(4) / 7e9**0.25 + math.exp(6) / 1.4e12**0.28
    assert loss == pytest.approx(expected, rel=1e-4)
    assert law.predict([1e9, 2e9], 1e11).shape == (2,)


def test_the_bootstrap_of_a_noisy_loss_law():
    law = fit_loss_law(planted(0.003), bootstrap=200, seed=1)
    low, high = law.interval(2e9, 1e11)
    assert low < float(law.predict(2e9, 1e11)) < high
    assert law.rows.shape == (200, 5)
    assert list(law.summary().index) == ["E", "A", "B", "alpha", "beta"]
    again = fit_loss_law(planted(0.003), bootstrap=200, seed=1)
    assert np.array_equal(law.rows, again.rows)
    bare = fit_loss_law(planted(), bootstrap=0, hold_out=False)
    assert bare.held_out is None
    with pytest.raises(MethodError, match="bootstrap=2000"):
        bare.interval(1e9, 1e11)


def test_the_batched_minimiser_finds_what_scipys_does(dense):
    best = dense.loc[dense.groupby("group")["loss"].idxmin()]
    data = [np.log(best[name].to_numpy()) for name in ("N", "D", "loss")]
    ones = np.ones(len(best))

    def one(theta):
        value, gradient = huber_objective(theta[None], *data, ones)
        return float(value[0]), gradient[0]

    law = fit_loss_law(dense, bootstrap=0, hold_out=False)
    ours = one(law.coefficients)[0]
    rng = np.random.default_rng(0)
    theirs = min(
        minimize(one, rng.uniform([-1, 0, 0, 0.1, 0.1], [1, 12, 12, 0.8, 0.8]), jac=True, method="BFGS").fun
        for _ in range(40)
    )
    assert ours <= theirs * (1 + 1e-6)
    # and on a classic, from many starts at once
    rosen = lambda x: (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2  # noqa: E731

    def rosenbrock(x, _):
        a, b = x.T
        gradient = np.stack([-2 * (1 - a) - 400 * a * (b - a * a), 200 * (b - a * a)], axis=1)
        return rosen(x), gradient

    points, values = minimise_all(rosenbrock, rng.uniform(-2, 2, (20, 2)))
    assert np.allclose(points, 1, atol=1e-4)
    assert values.max() < 1e-9


def test_the_objective_is_hubers_and_its_gradient_is_right():
    rng = np.random.default_rng(0)
    log_n, log_d = rng.uniform(-2, 2, (2, 9))
    theta = np.array([0.3, -1.0, -2.0, 0.3, 0.5])
    E, A, B, alpha, beta = theta
    surface = np.log(np.exp(E) + np.exp(A) / np.exp(log_n) ** alpha + np.exp(B) / np.exp(log_d) ** beta)
    log_loss = surface + rng.uniform(-3, 3, 9)
    counts = rng.integers(0, 3, 9).astype(float)
    delta = 1.0
    expected = sum(
        c * (0.5 * r * r if abs(r) <= delta else delta * (abs(r) - 0.5 * delta))
        for c, r in zip(counts, surface - log_loss, strict=True)
    )
    value, _ = huber_objective(theta[None], log_n, log_d, log_loss, counts, delta)
    assert float(value[0]) == pytest.approx(expected)
    small = huber_objective(theta[None], log_n, log_d, log_loss, counts, 0.5)[0]
    assert float(small[0]) == pytest.approx(
        sum(
            c * (0.5 * (r / 0.5) ** 2 if abs(r) <= 0.5 else abs(r) / 0.5 - 0.5)
            for c, r in zip(counts, surface - log_loss, strict=True)
        )
    )
    off = check_grad(
        lambda t: float(huber_objective(t[None], log_n, log_d, log_loss, counts, delta)[0][0]),
        lambda t: huber_objective(t[None], log_n, log_d, log_loss, counts, delta)[1][0],
        theta,
    )
    assert off < 1e-5


@pytest.mark.parametrize(
    ("rows", "words"),
    [("N < 1e9", "column N has 2 distinct"), ("(N < 2e9 and D < 4e9) or N == 1e8", "5 groups to fit .* besides")],
)
def test_too_few_groups_for_a_loss_law_are_refused(rows, words):
    with pytest.raises(DataError, match=words):
        fit_loss_law(planted().query(rows))
    for options in ({"delta": 0}, {"bootstrap": -1}):
        with pytest.raises(MethodError, match=r"delta = .*bootstrap = "):
            fit_loss_law(planted(), **options)
