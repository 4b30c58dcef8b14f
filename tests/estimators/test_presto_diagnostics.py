"""The test of parallel lines and the calibration of the rare class."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from gnomon.errors import MethodError
from gnomon.estimators import PRESTO, parallel_lines_test, rare_calibration_error

sys.path.insert(0, str(Path(__file__).parent))
import presto_definition as definition


def parallel(n: int, seed: int, differing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.uniform(-1, 1, (n, 3))
    slopes = np.tile([[0.8], [-0.5], [0.0]], 3)
    slopes[0, 2] += differing
    below = 1 / (1 + np.exp(-(np.array([-1.5, 0.5, 2.5]) + X @ slopes)))
    return X, (rng.random((n, 1)) > below).sum(1)


def test_the_score_statistic_is_that_of_its_definition():
    """U^T I^-1 U with U and I (the mean Hessian over classes) by autograd at the proportional odds fit."""
    X, y = parallel(250, 0)
    held = np.full((3, 3), np.inf)
    held[:, 0] = 0.0
    null = PRESTO(0.0, penalty_weights=held).fit(X, y)
    start = torch.as_tensor(np.concatenate([null.intercept_, null.coef_.ravel()]))
    Z = torch.as_tensor(X)

    def log_p(v: torch.Tensor) -> torch.Tensor:
        F = torch.sigmoid(v[:3] + Z @ v[3:].reshape(3, 3))
        edge = torch.ones(len(Z), 1, dtype=torch.float64)
        return torch.log(torch.cat([F, edge], 1) - torch.cat([0 * edge, F], 1))

    target = torch.as_tensor(y)[:, None]
    U = torch.autograd.functional.jacobian(lambda v: log_p(v).gather(1, target).sum(), start)
    P = log_p(start).exp()
    information = -torch.autograd.functional.hessian(lambda v: (P * log_p(v)).sum(), start)
    statistic = (U @ torch.linalg.solve(information, U)).item()
    test = parallel_lines_test(X, y)
    assert test.overall.statistic == pytest.approx(statistic, rel=1e-6)
    assert test.overall.df == 6
    assert test.log_likelihood == pytest.approx(null.log_likelihood_, abs=1e-9)
    assert test.trustworthy


def test_the_likelihood_ratio_is_twice_the_gain_of_free_slopes():
    X, y = parallel(400, 1)
    test = parallel_lines_test(X, y, method="likelihood-ratio")
    free = PRESTO(0.0).fit(X, y)
    assert not free.boundary_reached_
    assert test.overall.statistic == pytest.approx(2 * (free.log_likelihood_ - test.log_likelihood), abs=1e-7)
    other = parallel_lines_test(X, y)
    assert other.overall.statistic == pytest.approx(test.overall.statistic, rel=0.3)


def test_sizes_under_the_null_and_power_against_one_feature():
    p = [parallel_lines_test(*parallel(400, seed)).overall.p_value for seed in range(200)]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.1
    assert 0.4 < np.mean(p) < 0.6
    X, y = parallel(2000, 3, differing=1.2)
    test = parallel_lines_test(pd.DataFrame(X, columns=["price", "age", "noise"]), y)
    assert test.overall.p_value < 1e-3
    assert test.by_feature["price"].p_value < 1e-4
    assert test.by_feature["noise"].p_value > 0.01
    assert test.by_feature["noise"].df == 2


def test_weights_count_rows_and_constant_columns_count_nothing():
    X, y = parallel(200, 4)
    w = np.random.default_rng(0).integers(1, 3, 200)
    again = np.repeat(np.arange(200), w)
    for method in ("score", "likelihood-ratio"):
        weighted = parallel_lines_test(X, y, method=method, sample_weight=w)
        repeated = parallel_lines_test(X[again], y[again], method=method)
        assert weighted.overall.statistic == pytest.approx(repeated.overall.statistic, abs=1e-6)
        wide = parallel_lines_test(np.column_stack([X, np.ones(200)]), y, method=method, sample_weight=w)
        assert wide.overall.df == 6
        assert wide.overall.statistic == pytest.approx(weighted.overall.statistic, abs=1e-6)
        assert wide.by_feature["x3"] == (pytest.approx(0, abs=1e-6), 0, 1.0)


def test_a_boundary_fit_is_not_trusted_and_two_classes_are_refused():
    X, y = definition.simulated(n=60, p=2, seed=1, spread=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not parallel_lines_test(X, y, method="likelihood-ratio").trustworthy
        with pytest.raises(MethodError, match="y holds 2 classes; with one boundary"):
            parallel_lines_test(X, y > 1)
    with pytest.raises(MethodError, match="method = 'wald'; allowed are"):
        parallel_lines_test(X, y, method="wald")
    names = np.array(["a", "b", "c", "d"])
    ordered = parallel_lines_test(X, names[y], classes_order=list(names))
    assert ordered.overall == parallel_lines_test(X, y).overall


def test_calibration_takes_sorted_predictions_in_bins():
    rng = np.random.default_rng(0)
    p = rng.random(20_000) ** 3
    rare = rng.random(20_000) < p
    assert rare_calibration_error(rare, p) < 0.015
    assert rare_calibration_error(rare, np.minimum(1, p + 0.2)) == pytest.approx(0.2, abs=0.04)
    assert rare_calibration_error(rare, np.full(20_000, rare.mean()), bins=1) == pytest.approx(0, abs=1e-12)
    # by hand: bins {0.1, 0.2}, {0.6, 0.9}
    assert rare_calibration_error([1, 0, 0, 1], [0.9, 0.2, 0.1, 0.6], bins=2) == pytest.approx((0.15 + 0.25) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [0.5]), "is_rare has 2 rows and probability 1"),
        (([0, 2], [0.5, 0.5]), "must hold 0 and 1 only"),
        (([0, 1], [0.5, 1.5]), r"numbers in \[0, 1\]"),
        (([0, 1], [0.5, 0.5], 3), "bins = 3; it must lie between 1 and the number of rows, 2"),
    ],
)
def test_calibration_refuses(arguments, message):
    with pytest.raises(MethodError, match=message):
        rare_calibration_error(*arguments)
