"""GGPO and MGPO: published values, the equations as written with full matrices, statistics, the report on curves."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gnomon.adapters import (
    GGPO,
    MGPO,
    FlatLoRACallback,
    GGPOCallback,
    MGPOCallback,
    double_descent_report,
    ggpo_deviations,
    gradient_norm,
    gradient_row_norms,
    merged_row_norms,
    mgpo_factors,
)
from gnomon.adapters.lora_ggpo.backends import Noise, draw
from gnomon.adapters.lora_ggpo.layers import layer_noise, layer_seed
from gnomon.adapters.lora_ggpo.rules import next_average
from gnomon.errors import DataError, MethodError

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "lora-ggpo.npz")
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(1, 4))


def reference(name: str) -> Tensor:
    return torch.tensor(REFERENCE[name])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(out: int, into: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B, A and parts of their shapes (gradients, momenta)."""
    shapes = [(out, rank), (rank, into), (out, rank), (rank, into)]
    b, a, db, da = (randn(*shape, seed=10 * seed + i) for i, shape in enumerate(shapes))
    return b, a, db, da


# -- published values ----------------------------------------------------------------------------------------------


def test_six_published_steps() -> None:
    # The scale s of the published run follows from its first gradient norm: s ||g_B A|| with B = 0.
    scaling = float(reference("gbar0") / (reference("gB0") @ reference("A0")).double().norm())
    assert scaling == pytest.approx(round(scaling), abs=1e-6)
    average = None
    for step in range(6):
        b, a, g_b, g_a = (reference(f"{name}{step}") for name in ("B", "A", "gB", "gA"))
        if step:
            m_b, m_a = reference(f"mB{step}"), reference(f"mA{step}")
            left, right, finite = mgpo_factors(b, a, m_b, m_a, round(scaling), MGPO(0.05, 0.9), average)
            torch.testing.assert_close(left @ right, reference(f"eps{step}"), atol=1e-7, rtol=0)
            assert bool(finite)
        average = next_average(average, gradient_norm(b, a, g_b, g_a, round(scaling)), 0.9)
        assert float(average) == pytest.approx(float(reference(f"gbar{step}")), abs=1e-6)


# -- the equations with full matrices ------------------------------------------------------------------------------


def mgpo_definition(
    b: Tensor, a: Tensor, m_b: Tensor, m_a: Tensor, s: float, rho: float, average: float | None
) -> Tensor:
    v = torch.zeros(len(b), a.shape[1], dtype=b.dtype)
    for i in range(v.shape[0]):
        for j in range(v.shape[1]):
            v[i, j] = s * sum(m_b[i, k] * a[k, j] + b[i, k] * m_a[k, j] for k in range(len(a)))
    c = 1.0 if average is None else min(1 / (average + 1e-12), 10)
    return -rho * v / (v.norm() + 1e-12) * c


@given(SHAPES, st.sampled_from([None, 0.01, 0.5, 4.0]))
def test_mgpo_is_its_definition(shape: tuple[int, int, int], average: float | None) -> None:
    b, a, m_b, m_a = factors(*shape)
    given_average = None if average is None else torch.tensor(average, dtype=torch.float64)
    left, right, _ = mgpo_factors(b, a, m_b, m_a, 1.7, MGPO(0.3, 0.5), given_average)
    expected = mgpo_definition(b, a, m_b, m_a, 1.7, 0.3, average)
    torch.testing.assert_close(left @ right, expected, atol=1e-12, rtol=1e-9)
    c = 1.0 if average is None else min(1 / average, 10.0)
    assert float((left @ right).norm()) == pytest.approx(0.3 * c, rel=1e-9)
    ascending, same, _ = mgpo_factors(b, a, m_b, m_a, 1.7, MGPO(0.3, 0.5, sign=1), given_average)
    torch.testing.assert_close(ascending @ same, -expected, atol=1e-12, rtol=1e-9)


@given(SHAPES)
def test_norms_are_those_of_the_full_matrices(shape: tuple[int, int, int]) -> None:
    b, a, g_b, g_a = factors(*shape)
    weight = randn(shape[0], shape[1], seed=7)
    gradient = 0.6 * (b @ g_a + g_b @ a)
    torch.testing.assert_close(gradient_norm(b, a, g_b, g_a, 0.6), gradient.norm())
    torch.testing.assert_close(gradient_row_norms(b, a, g_b, g_a, 0.6), gradient.norm(dim=1))
    torch.testing.assert_close(merged_row_norms(weight, b, a, 0.6), (weight + 0.6 * b @ a).norm(dim=1))


def test_the_gradient_stand_in_is_the_change_of_the_merged_weight() -> None:
    b, a, g_b, g_a = factors(5, 4, 2)
    small = 1e-6
    change = 2.0 * ((b + small * g_b) @ (a + small * g_a) - b @ a) / small
    assert float(gradient_norm(b, a, g_b, g_a, 2.0)) == pytest.approx(float(change.norm()), rel=1e-5)


def test_deviations_add_variances() -> None:
    weight, b, a, g = randn(3, 4), randn(3, 2, seed=1), randn(2, 4, seed=2), randn(3, 4, seed=3)
    merged = weight + 1.5 * b @ a
    expected = [
        math.sqrt(0.2**2 / 4 * (sum(x * x for x in row) + 0.3 * sum(y * y for y in slope)))
        for row, slope in zip(merged.tolist(), g.tolist(), strict=True)
    ]
    found = ggpo_deviations(merged_row_norms(weight, b, a, 1.5), g.norm(dim=1), 0.2, 0.3, 4)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    without = ggpo_deviations(merged.norm(dim=1), None, 0.2, 0.3, 4)
    torch.testing.assert_close(without, 0.2 * merged.norm(dim=1) / 2)


def test_moments_with_b_zero_and_first_average() -> None:
    _, a, m_b, m_a = factors(5, 4, 2)
    left, right, _ = mgpo_factors(torch.zeros(5, 2).double(), a, m_b, m_a, 2.0, MGPO(0.1), None)
    direction = 2.0 * m_b @ a
    torch.testing.assert_close(left @ right, -0.1 * direction / direction.norm())


def test_the_average_is_a_geometric_sum() -> None:
    norms = [3.0, 1.0, 4.0, 1.5]
    average = None
    for norm in norms:
        average = next_average(average, torch.tensor(norm, dtype=torch.float64), 0.8)
    expected = 0.8**3 * norms[0] + 0.2 * sum(0.8 ** (3 - i) * norm for i, norm in enumerate(norms) if i)
    assert average is not None
    assert float(average) == pytest.approx(expected, rel=1e-12)
    assert float(next_average(average, torch.tensor(math.inf), 0.8)) == float(average)
    assert float(next_average(torch.tensor(math.nan), torch.tensor(2.0), 0.8)) == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_momentum_that_is_not_finite_moves_nothing(bad: float) -> None:
    b, a, m_b, m_a = factors(5, 4, 2)
    m_a[0, 0] = bad
    left, right, finite = mgpo_factors(b, a, m_b, m_a, 1.0, MGPO(), None)
    assert not bool(finite)
    assert not left.any()
    assert not right.any()
    left, right, finite = mgpo_factors(b, a, 0 * m_b, 0 * b.T @ b @ a, 1.0, MGPO(), None)
    assert bool(finite)
    assert not left.any()


# -- statistics of GGPO --------------------------------------------------------------------------------------------


def test_variance_over_draws() -> None:
    spread = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    draws = torch.stack([Noise(layer_seed(0, step, "q"), spread, 6).matrix() for step in range(2000)])
    found = draws.square().mean(dim=(0, 2))
    torch.testing.assert_close(found, spread.square(), rtol=0.05, atol=0)
    assert float(draws.mean(dim=0).abs().max()) < 4 * 2.0 / math.sqrt(2000)


def test_mean_loss_rises_by_half_the_trace() -> None:
    """On a quadratic loss the mean rise is half the Hessian's trace against the variances, exactly."""
    x, target, weight = randn(20, 6), randn(20, 3, seed=1), randn(3, 6, seed=2)
    spread = ggpo_deviations(weight.norm(dim=1), None, 0.3, 0.0, 6)

    def loss(moved: Tensor) -> float:
        return float((x @ moved.T - target).square().sum() / 2)

    rises = [loss(weight + Noise(seed, spread, 6).matrix()) - loss(weight) for seed in range(4000)]
    expected = float(x.square().sum() * spread.square().sum()) / 2
    assert np.mean(rises) == pytest.approx(expected, abs=4 * np.std(rises) / math.sqrt(4000))
    assert np.std(rises) / math.sqrt(4000) < 0.05 * expected


def test_noise_comes_from_its_seed_alone() -> None:
    before = torch.random.get_rng_state()
    first = draw(3, 5, 7, torch.float32, torch.device("cpu"))
    assert torch.equal(first, draw(3, 5, 7, torch.float32, torch.device("cpu")))
    assert not torch.equal(first, draw(4, 5, 7, torch.float32, torch.device("cpu")))
    assert torch.equal(before, torch.random.get_rng_state())
    seeds = {layer_seed(run, step, name) for run in range(3) for step in range(3) for name in ("q", "k")}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_noise_of_a_layer_has_the_merged_rows() -> None:
    weight, b, a = randn(4, 5), randn(4, 2, seed=1), randn(2, 5, seed=2)
    base = torch.nn.Linear(5, 4).double()
    base.weight.data = weight
    layer = SimpleNamespace(get_base_layer=lambda: base, fan_in_fan_out=False)
    pair: Any = SimpleNamespace(layer=layer, weight=weight, scaling=3.0, name="q")
    noise = layer_noise(pair, (b, a), None, 0.1, 0.0, 1)
    expected = 0.1 * (weight + 3.0 * b @ a).norm(dim=1) / math.sqrt(5)
    torch.testing.assert_close(noise.deviations, expected)


# -- options -------------------------------------------------------------------------------------------------------


def test_the_ramp() -> None:
    rule = GGPO(0.05, 0.0, "cosine", 10)
    assert [rule.sigma_at(t) for t in range(11)] == pytest.approx(
        [0.05 * (1 - math.cos(math.pi * t / 10)) / 2 for t in range(11)]
    )
    assert rule.sigma_at(0) == 0
    assert rule.sigma_at(99) == 0.05
    assert GGPO(0.05).sigma_at(0) == 0.05
    flat = FlatLoRACallback()
    assert (flat.rule.sigma, flat.rule.beta, flat.rule.ramp) == (0.05, 0.0, "cosine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GGPO(sigma=-0.1), r"sigma = -0.1; it must be a number of 0 or more"),
        (lambda: GGPO(sigma=math.nan), r"sigma = nan"),
        (lambda: GGPO(beta=1.0), r"beta = 1.0; it must be in \[0, 1\)"),
        (lambda: GGPO(ramp="linear"), r"ramp = 'linear'. Allowed: 'none', 'cosine'"),
        (lambda: GGPO(total_steps=0), r"total_steps = 0"),
        (lambda: GGPO(ramp="cosine").sigma_at(1), r"ramp = 'cosine' needs the length of training. Give total_steps"),
        (lambda: MGPO(rho=0.0), r"rho = 0.0; it must be above 0 .* For plain LoRA leave the method out"),
        (lambda: MGPO(rho=math.inf), r"rho = inf"),
        (lambda: MGPO(beta=-0.5), r"beta = -0.5; it must be in \[0, 1\)"),
        (lambda: MGPO(sign=0), r"sign = 0. Allowed: -1 \(look ahead, the authors'\), 1 \(ascend\)"),
        (lambda: GGPOCallback(sigma=-1.0), r"sigma = -1.0"),
        (lambda: MGPOCallback(rho=-1.0), r"rho = -1.0"),
    ],
)
def test_refused_options(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


# -- double descent ------------------------------------------------------------------------------------------------


def curve(seed: int, bump: float, steps: int = 400, noise: float = 0.05) -> list[float]:
    t = np.arange(steps)
    clean = 1.0 + 2.0 * np.exp(-t / 40) + bump * np.exp(-(((t - 200) / 30) ** 2)) - 0.0005 * t
    return (clean + noise * np.random.default_rng(seed).standard_normal(steps)).tolist()


def test_double_descent_is_found_where_it_is() -> None:
    for seed in range(20):
        report = double_descent_report(curve(seed, bump=0.3))
        assert report.found
        assert report.rise > report.band
        assert 120 < report.trough < 180
        assert 185 < report.peak < 215
        assert report.summary()["double_descent"] == 1.0


def test_plain_descent_is_not_taken_for_it() -> None:
    wrong = [seed for seed in range(200) if double_descent_report(curve(seed, bump=0.0)).found]
    assert not wrong
    rising = [1 + 0.01 * t for t in range(100)]
    assert not double_descent_report(rising).found
    diverging = [*curve(0, 0.0), *np.linspace(1, 5, 100)]
    assert not double_descent_report(diverging).found, "a rise without a second fall"


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        ([1.0, math.nan] * 20, {}, DataError, "the loss of step 1 is nan"),
        ([1.0] * 10, {}, DataError, "10 losses; three windows of 5 need 15. Log more often"),
        ([1.0] * 100, {"window": 0}, MethodError, "window = 0"),
        ([1.0] * 100, {"width": 0.0}, MethodError, "width = 0.0"),
    ],
)
def test_refused_curves(losses: list[float], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        double_descent_report(losses, **options)
