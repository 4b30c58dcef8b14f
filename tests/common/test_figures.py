"""Clustered standard errors and intervals against Inspect, statsmodels, simulation and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from inspect_ai.scorer import SampleScore, Score, ci, mean, stderr

from gnomon.common.figures import Figure, bootstrap_figures, mean_figure
from gnomon.errors import MethodError


def drawn(seed=0, clusters=30, size=4):
    generator = np.random.default_rng(seed)
    names = np.repeat(np.arange(clusters), generator.integers(1, size + 1, clusters))
    return generator.normal(size=clusters)[names] + 0.3 * generator.normal(size=len(names)), names.tolist()


@given(st.integers(0, 1000))
def test_a_mean_agrees_with_inspect(seed):
    values, names = drawn(seed, clusters=6)
    scores = [
        SampleScore(score=Score(value=float(v)), sample_metadata={"cluster": c})
        for v, c in zip(values, names, strict=True)
    ]
    figure = mean_figure(values, names)
    interval = ci(cluster="cluster")(scores)
    assert figure.value == pytest.approx(mean()(scores))
    assert figure.stderr == pytest.approx(stderr(cluster="cluster")(scores))
    assert (figure.low, figure.high) == pytest.approx((interval["lower"], interval["upper"]))
    assert mean_figure(values).stderr == pytest.approx(stderr()(scores))


def test_a_mean_agrees_with_clustered_least_squares():
    values, names = drawn(1)
    fit = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": np.asarray(names), "use_correction": False}
    )
    count = len(set(names))
    assert mean_figure(values, names).stderr == pytest.approx(fit.bse[0] * math.sqrt(count / (count - 1)))
    assert mean_figure(values, names).stderr > 1.5 * mean_figure(values).stderr


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    hits = sum(f.low <= 0 <= f.high for f in (mean_figure(*drawn(seed, clusters=25), 0.9) for seed in range(400)))
    assert 335 <= hits <= 385


def test_missing_values_bounds_and_small_counts():
    figure = mean_figure([1.0, math.nan, 0.0, 1.0], ["a", "b", "c", "d"])
    assert (figure.value, figure.n) == (pytest.approx(2 / 3), 3)
    assert figure.high > 1 == mean_figure([1.0, 0.0, 1.0], bounds=(0, 1)).high
    assert math.isnan(mean_figure([]).value)
    assert mean_figure([math.nan]).n == 0
    for one in (mean_figure([0.5]), mean_figure([0.0, 1.0], ["a", "a"])):
        assert one.value == 0.5
        assert math.isnan(one.stderr)
    assert mean_figure([]).plain() == {"value": None, "stderr": None, "low": None, "high": None, "n": 0}
    assert Figure(1.0, 0.5, 0.0, 2.0, 3).plain() == {"value": 1.0, "stderr": 0.5, "low": 0.0, "high": 2.0, "n": 3}


def test_a_bootstrapped_mean_has_about_the_clustered_error():
    values, names = drawn(2)
    found = bootstrap_figures(lambda i: {"mean": values[i].mean()}, len(values), names)["mean"]
    exact = mean_figure(values, names)
    assert found.value == pytest.approx(exact.value)
    assert found.stderr == pytest.approx(exact.stderr, rel=0.12)
    assert found.low < found.value < found.high


def test_the_order_of_rows_and_the_global_generator_do_not_matter():
    values, names = drawn(3)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = bootstrap_figures(lambda i: {"median": np.median(values[i])}, len(values), names, resamples=50)
    order = np.random.default_rng(0).permutation(len(values))
    moved = values[order]
    second = bootstrap_figures(
        lambda i: {"median": np.median(moved[i])}, len(values), [names[k] for k in order], resamples=50
    )
    assert first == second
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    other = bootstrap_figures(lambda i: {"median": np.median(values[i])}, len(values), names, resamples=50, seed=1)
    assert other["median"].stderr != first["median"].stderr


def test_statistics_that_are_undefined_in_some_draws_keep_the_others():
    flags = np.array([1.0, 0.0, 0.0, 0.0])
    found = bootstrap_figures(lambda i: {"share": flags[i].mean() if flags[i].any() else math.nan}, 4)["share"]
    assert found.low >= 0.25
    assert bootstrap_figures(lambda i: {}, 0) == {}
    single = bootstrap_figures(lambda i: {"x": 1.0}, 2, ["a", "a"])["x"]
    assert single.value == 1.0
    assert math.isnan(single.low)


def test_arguments_are_checked():
    with pytest.raises(MethodError, match="2 cluster names for 1 values"):
        mean_figure([1.0], ["a", "b"])
    with pytest.raises(MethodError, match="confidence = 95"):
        mean_figure([1.0], confidence=95)
    with pytest.raises(MethodError, match="resamples = 0"):
        bootstrap_figures(lambda i: {}, 1, resamples=0)
