"""Tables of runs: reading, near-optimal rows, least squares and its bootstrap, against published refits."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter1d

from gnomon.errors import DataError, GnomonWarning, MethodError
from gnomon.planning import convexity, fit_step_law, is_complete, near_optimal, read_runs, smooth_loss, step_law
from gnomon.planning.step_law.fitting import bootstrap_least_squares, least_squares, resample_counts

NS, DS = (1e8, 3e8, 1e9), (2e9, 1e10, 6e10)


def grid(lr_law=lambda n, d: 1.79 * n**-0.713 * d**0.307, bs_law=lambda n, d: 0.58 * d**0.571 / 2048) -> pd.DataFrame:
    """Runs whose loss is an exact bowl around planted laws, the bottom among them."""
    rows = []
    for n, d in itertools.product(NS, DS):
        lr, bs = lr_law(n, d), bs_law(n, d)
        for i, j in itertools.product(range(-3, 4), range(-3, 4)):
            loss = 2 * (1 + 0.004 * i * i + 0.003 * j * j + 0.001 * i * j)
            rows.append((n, d, lr * 2 ** (i / 2), bs * 2 ** (j / 2), loss))
    return pd.DataFrame(rows, columns=["N", "D", "lr", "bs", "loss"])


@pytest.fixture(scope="module")
def dense(shared_data):
    return shared_data("step-law") / "dense_lr_bs_loss.csv.gz"


def test_published_refits_of_the_shared_table(dense):
    fit = fit_step_law(dense, bootstrap=0)
    assert (fit.kept, fit.rows, fit.groups) == (90, 1334, 12)
    assert fit.coefficients.lr == pytest.approx((4.17651, -0.74082, 0.18356), abs=5e-6)
    assert fit.coefficients.batch == pytest.approx((-1.96691, 0.62921), abs=5e-6)


def test_the_fit_is_numpys_least_squares(dense):
    kept = near_optimal(read_runs(dense))
    X = np.stack([np.ones(90), np.log(kept["N"]), np.log(kept["D"])], axis=1)
    for batch_on_n, columns in ((False, [0, 2]), (True, [0, 1, 2])):
        fit = fit_step_law(dense, bootstrap=0, batch_on_n=batch_on_n)
        expected = np.linalg.lstsq(X, np.log(kept["lr"]), rcond=None)[0]
        assert np.abs(expected - fit.coefficients.lr).max() < 1e-9
        expected = np.linalg.lstsq(X[:, columns], np.log(kept["batch"]), rcond=None)[0]
        assert np.abs(expected - fit.coefficients.batch).max() < 1e-9
        lr, batch = fit.predict(kept["N"], kept["D"])
        assert np.allclose(np.log(lr), X @ fit.coefficients.lr, atol=1e-12)
        assert np.allclose(np.log(batch), X[:, columns] @ fit.coefficients.batch, atol=1e-12)


def test_planted_exponents_come_back_exactly():
    fit = fit_step_law(grid(), threshold=1e-6, bootstrap=50)
    assert fit.kept == 9
    assert fit.coefficients.lr == pytest.approx((np.log(1.79), -0.713, 0.307), abs=1e-10)
    assert fit.coefficients.batch == pytest.approx((np.log(0.58), 0.571), abs=1e-10)
    assert np.abs(fit.lr_rows - fit.coefficients.lr).max() < 1e-7, "noise-free rows say the same in every resample"
    both = fit_step_law(grid(bs_law=lambda n, d: n**0.1 * d**0.3), threshold=1e-6, bootstrap=0, batch_on_n=True)
    assert both.coefficients.batch == pytest.approx((np.log(2048), 0.1, 0.3), abs=1e-10)
    plan = step_law(3e8, 1e10, fit=fit)
    assert plan.lr == pytest.approx(step_law(3e8, 1e10, variant="paper").lr)
    assert plan.intervals["lr"] == pytest.approx((plan.lr, plan.lr), rel=1e-6)


@given(st.integers(0, 10_000), st.integers(5, 40), st.integers(2, 4))
def test_the_batched_bootstrap_is_a_loop_of_fits(seed, rows, columns):
    rng = np.random.default_rng(seed)
    X = np.concatenate([np.ones((rows, 1)), 20 + 3 * rng.standard_normal((rows, columns - 1))], axis=1)
    y = rng.standard_normal(rows) - 7
    counts = resample_counts(rows, 8, rng)
    assert counts.shape == (8, rows)
    assert (counts.sum(axis=1) == rows).all()
    for found, count in zip(bootstrap_least_squares(X, y, counts), counts, strict=True):
        drawn = np.repeat(np.arange(rows), count.astype(int))
        if np.linalg.matrix_rank(X[drawn]) < columns or np.linalg.cond(X[drawn]) > 1e5:
            continue
        assert np.allclose(found, least_squares(X[drawn], y[drawn]), rtol=1e-5, atol=1e-6)


def test_resamples_that_say_nothing_are_left_out_and_counted():
    X = np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]])
    found = bootstrap_least_squares(X, X @ [1.0, 2.0], np.array([[3.0, 0, 0], [1, 1, 1], [0, 2, 1]]))
    assert np.isnan(found[0]).all()
    assert np.allclose(found[1:], [1.0, 2.0])
    with pytest.warns(GnomonWarning, match=r"\d+ of 4000 resamples had too few"):
        fit = fit_step_law(grid().query("D < 6e10 or N < 3e8"), threshold=1e-6, bootstrap=4000)
    assert fit.lost > 0
    assert len(fit.lr_rows) == len(fit.batch_rows) == 4000 - fit.lost
    assert np.isfinite(fit.lr_rows).all()


def test_bootstrap_summary_and_intervals(dense):
    fit = fit_step_law(dense)
    table = fit.summary()
    assert list(table.index) == ["lr_intercept", "lr_coefN", "lr_coefD", "bs_intercept", "bs_coefD"]
    assert np.allclose(table["mean"], table["fit"], atol=0.2 * table["std"])
    assert np.corrcoef(fit.batch_rows.T)[0, 1] < -0.99, "intercept and exponent go against each other"
    x = np.array([1, np.log(1e9), np.log(1e11)])
    expected = np.exp(np.percentile(fit.lr_rows @ x, [5, 95]))
    found = fit.interval(1e9, 1e11, confidence=0.9)
    assert found["lr"] == pytest.approx(expected)
    assert found["lr"][0] < float(fit.predict(1e9, 1e11)[0]) < found["lr"][1]
    lone = fit_step_law(dense, batch_on_n=True, bootstrap=100)
    assert lone.batch_rows.shape == (100, 3)
    low, high = lone.interval(1e9, 1e11)["batch_tokens"]
    assert low < float(lone.predict(1e9, 1e11)[1]) < high
    assert "bs_coefN" in lone.summary().index
    with pytest.raises(MethodError, match="bootstrap=1000"):
        fit_step_law(dense, bootstrap=0).interval(1e9, 1e11)
    with pytest.raises(MethodError, match="confidence"):
        fit.interval(1e9, 1e11, confidence=95)


def test_the_seed_decides_and_the_global_state_stays():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the legacy state is what is watched
    one, two, other = (fit_step_law(grid(), seed=s, bootstrap=20) for s in (1, 1, 2))
    assert np.array_equal(one.lr_rows, two.lr_rows)
    assert not np.array_equal(one.lr_rows, other.lr_rows)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_every_published_group_is_a_bowl(dense):
    runs = read_runs(dense)
    bowls = convexity(runs)
    assert len(bowls) == 12
    assert bowls["convex"].all()
    assert bowls["r2"].between(0.90, 0.975).all()
    assert bowls["lr_exponent"].between(0.16, 0.66).all()
    last = bowls[(bowls["N"] == 1073741824) & (bowls["D"] == 20e9)].iloc[0]
    assert last["lr"] == pytest.approx(step_law(1073741824, 20e9).lr, rel=0.4)


def test_a_planted_bowl_is_measured_exactly():
    runs = read_runs(grid())
    bowls = convexity(runs, threshold=1)
    hessian = 4 * np.array([[0.008, 0.001], [0.001, 0.006]])  # half steps in log2
    eigenvalues = np.linalg.eigvalsh(hessian)
    assert np.allclose(bowls["eigenvalue_low"], eigenvalues[0])
    assert np.allclose(bowls["eigenvalue_high"], eigenvalues[1])
    assert np.allclose(bowls["lr"], 1.79 * bowls["N"] ** -0.713 * bowls["D"] ** 0.307)
    assert np.allclose(bowls["batch"], 0.58 * bowls["D"] ** 0.571)
    assert np.allclose(bowls["lr_exponent"], -1 / 8)
    assert np.allclose(bowls["r2"], 1)
    saddle = grid()
    saddle["loss"] = 2 + 0.01 * np.log2(saddle["lr"]) ** 2 - 0.002 * np.log2(saddle["bs"]) ** 2
    found = convexity(read_runs(saddle), threshold=1)
    assert not found["convex"].any()
    assert found["lr"].isna().all()
    few = convexity(read_runs(grid().groupby(["N", "D"]).head(5)), threshold=1)
    assert few["convex"].isna().all()


def test_what_is_kept(dense):
    runs = read_runs(dense)
    assert len(near_optimal(runs, 0.001)) < 90 < len(near_optimal(runs, 0.005))
    smallest = runs.groupby(["N", "D"])["loss"].transform("min")
    assert np.allclose(runs["excess"], runs["loss"] / smallest - 1)
    assert (near_optimal(runs)["loss"] / smallest[runs["excess"] < 0.0025].to_numpy() - 1 < 0.0025).all()
    assert (runs["batch"] % 2048 == 0).all()
    assert float((runs["excess"] > 0.2).mean()) == pytest.approx(0.093, abs=0.002)
    assert runs["M"].iloc[0] == 6 * (4 * 960 + 3 * 9368 + 4096) * 7 * 960


def test_groups_of_one_run_are_left_out():
    table = pd.concat([grid(), pd.DataFrame([(5e8, 5e9, 0.5, 1.0, 9.0)], columns=["N", "D", "lr", "bs", "loss"])])
    with pytest.warns(GnomonWarning, match="1 groups of a single run"):
        fit = fit_step_law(table, threshold=1e-6, bootstrap=0)
    assert fit.coefficients.lr[1] == pytest.approx(-0.713)
    with pytest.raises(DataError, match=r"every .* single run"):
        near_optimal(read_runs(grid().drop_duplicates(["N", "D"])))


def test_repeated_rows_count_once():
    table = grid()
    with pytest.warns(GnomonWarning, match="441 rows repeat another one"):
        doubled = read_runs(pd.concat([table, table]))
    assert doubled.equals(read_runs(table))


def test_mixtures_are_grouped_by_their_active_parameters(shared_data):
    runs = read_runs(shared_data("step-law") / "moe_lr_bs_loss.csv.gz")
    assert runs["group"].nunique() == 11
    assert runs.groupby("group")["Na"].nunique().max() == 1
    assert runs["M"].iloc[0] == 1681489920


@pytest.mark.parametrize(
    ("change", "words", "row"),
    [
        (
            lambda t: t.drop(columns=["bs", "loss"]),
            r"columns missing: bs, smooth loss \(or loss\)\..* has N, D, lr",
            None,
        ),
        (lambda t: t.head(0), "without a row", None),
        (lambda t: t.assign(lr=t["lr"].where(t.index != 4, -1.0)), "lr = -1.0: every lr is a positive", 5),
        (lambda t: t.assign(loss=t["loss"].where(t.index != 2)), r"loss = .*nan.*\(1 rows are not\)", 3),
        (lambda t: t.assign(lr=t["lr"].map("{:.6f}".format).str.replace(".", ",")), "decimal comma", 1),
        (lambda t: t.assign(N=0), "N = .*0.*: every N", 1),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, change, words, row):
    path = tmp_path / "runs.csv"
    change(grid()).to_csv(path, index=False)
    with pytest.raises(DataError, match=words) as caught:
        fit_step_law(path)
    assert caught.value.file == str(path)
    assert caught.value.row == row
    with pytest.raises(DataError, match=words) as caught:
        read_runs(change(grid()))
    assert caught.value.file is None


def test_a_file_with_decimal_commas_is_read_when_told(tmp_path):
    path = tmp_path / "runs.csv"
    grid().to_csv(path, index=False, sep=";", decimal=",")
    assert np.allclose(read_runs(path, decimal=",")["lr"], grid()["lr"])
    with pytest.raises(DataError, match="columns missing"):
        read_runs(path)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x81"])
def test_files_that_are_no_tables_are_refused(tmp_path, content):
    path = tmp_path / "runs.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"no such file|no csv file|columns missing"):
        read_runs(path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("N == 1e8", "column N has 1 distinct values .1e.08. among"),
        ("D > 2e9", "column D has 2 distinct values"),
        ("(N == 1e8 and D == 2e9) or (N == 3e8 and D == 1e10) or (N == 1e9 and D == 6e10)", "rise together"),
    ],
)
def test_tables_that_do_not_determine_the_exponents_are_refused(rows, words):
    table = grid().query(rows)
    if "rise" in words:
        table = table.assign(D=20 * table["N"])
    with pytest.raises(DataError, match=words):
        fit_step_law(table)


@pytest.mark.parametrize("options", [{"threshold": 0}, {"threshold": float("nan")}, {"bootstrap": -1}, {"seq_len": 0}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(MethodError, match=next(iter(options))):
        fit_step_law(grid(), **options)


def test_the_smooth_loss_is_the_filtered_curves_end():
    rng = np.random.default_rng(0)
    curve = 3 + 5 / np.arange(1, 5001) ** 0.3 + 0.1 * rng.standard_normal(5000)
    # by hand: weights of a Gaussian over the last points, the curve reflected at its end
    sigma = min(100, 0.01 * 5000)
    away = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (away / sigma) ** 2)
    reflected = np.where(away > 0, curve[-np.maximum(away, 1)], curve[np.minimum(away, 0) - 1])
    assert smooth_loss(curve) == pytest.approx((weights * reflected).sum() / weights.sum(), rel=1e-12)
    assert smooth_loss(iter(curve), 10) == pytest.approx(gaussian_filter1d(curve, 5.0)[-1])
    long = np.tile(curve, 4)
    assert smooth_loss(long) == pytest.approx(gaussian_filter1d(long, 100.0)[-1])
    assert smooth_loss([2.5]) == 2.5
    with pytest.raises(DataError, match="nan is not finite"):
        smooth_loss([3.0, float("nan")])
    with pytest.raises(DataError, match="without a point"):
        smooth_loss([])
    with pytest.raises(MethodError, match="log_interval"):
        smooth_loss([3.0], 0)


def test_runs_that_stopped_early_are_told():
    assert is_complete(10_000, 10_000)
    assert is_complete(9_980, 10_009, log_interval=20)
    assert not is_complete(9_960, 10_000, log_interval=20)
    assert not is_complete(9_998, 10_000)
