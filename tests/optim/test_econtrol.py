"""Compressors contract as they say; the state machines are the equations; the simulation is the loop."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from econtrol_definition import loop, top

from gnomon.errors import MethodError
from gnomon.optim import (
    EControlState,
    ErrorFeedback,
    Identity,
    LowRank,
    RandK,
    Rounding,
    ScaledSign,
    TopK,
    simulate,
)
from gnomon.optim.econtrol.compressors import top_indices
from gnomon.optim.econtrol.feedback import Memory, absorb, default_eta, message_input

KINDS = ["none", "ec", "ef21", "ef21-sgdm", "econtrol"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- compressors


@pytest.mark.parametrize("shape", [(1,), (7,), (50,), (6, 9), (3, 4, 5)])
@pytest.mark.parametrize(
    "squash", [Identity(), TopK(0.3), ScaledSign(), LowRank(2), Rounding(8), Rounding(4), Rounding(2)]
)
def test_every_compressor_contracts_as_it_says(squash, shape):
    for seed in range(5):
        x = normal(*shape, seed=seed)
        left = float((squash(x) - x).norm() ** 2)
        assert left <= (1 - squash.delta(shape)) * float(x.norm() ** 2) * (1 + 1e-5) + 1e-12
        assert torch.equal(squash(torch.zeros(shape)), torch.zeros(shape))


def test_rand_k_contracts_on_average_and_is_not_rescaled():
    x, squash = normal(40), RandK(0.25)
    left = [float((squash(x, seed) - x).norm() ** 2) for seed in range(400)]
    assert sum(left) / len(left) == pytest.approx(0.75 * float(x.norm() ** 2), rel=0.03)
    kept = squash(x, 3)
    assert int((kept != 0).sum()) == 10
    assert torch.equal(kept[kept != 0], x[kept != 0])
    assert torch.equal(squash(x, 3), kept)
    assert not torch.equal(squash(x, 4), kept)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_top_k_keeps_the_largest_and_the_lowest_of_ties(values, ratio):
    x, squash = torch.tensor(values, dtype=torch.float64), TopK(ratio)
    assert torch.equal(squash(x), top(x, squash.count(tuple(x.shape))))


def test_top_k_of_equal_sizes_meets_its_bound_and_k_is_at_least_one():
    x = torch.ones(20)
    assert float(((TopK(0.25)(x) - x) ** 2).sum()) == (1 - 0.25) * 20
    assert TopK(0.001).count((5,)) == 1


@pytest.mark.parametrize(
    "make", [lambda d: normal(d), lambda d: torch.zeros(d), lambda d: (torch.arange(d) % 3).double()]
)
def test_the_threshold_finds_the_same_entries_in_large_vectors(make):
    x = make(300_000)
    k = 3000
    found = top_indices(x, k)
    assert found.numel() == k
    expected = x.abs().argsort(descending=True, stable=True)[:k].sort().values
    assert torch.equal(found, expected)


def test_the_scaled_sign_is_its_formula_with_nothing_for_zero():
    x = torch.tensor([1.0, -3.0, 0.0, 2.0, 0.0, -0.5, 4.0])
    assert torch.equal(ScaledSign()(x), 1.5 * torch.sign(x))
    assert ScaledSign().message_bytes((1000,)) == 200 + 4
    left = float((ScaledSign()(x) - x).norm() ** 2)
    exact = 1 - float(x.abs().sum() ** 2 / (7 * (x**2).sum()))
    assert left <= exact * float((x**2).sum()) + 1e-6


@pytest.mark.parametrize(("bits", "each"), [(8, 1), (4, 2), (2, 4)])
def test_rounding_is_to_the_levels_and_packs_them(bits, each):
    x, levels = normal(37), 2 ** (bits - 1) - 1
    expected = torch.round(x / x.abs().max() * levels) * x.abs().max() / levels
    torch.testing.assert_close(Rounding(bits)(x), expected)
    assert Rounding(bits).message_bytes((1000,)) == 1000 // each + 4
    assert torch.equal(Rounding(bits)(torch.zeros(5)), torch.zeros(5))


def test_low_rank_is_the_truncated_svd_and_vectors_go_whole():
    x = normal(12, 8)
    u, s, vh = torch.linalg.svd(x)
    torch.testing.assert_close(LowRank(3)(x), (u[:, :3] * s[:3]) @ vh[:3], rtol=0.05, atol=0.05)
    assert torch.equal(LowRank(3)(x[0]), x[0])


def test_values_may_travel_in_bfloat16_and_what_is_sent_is_what_is_remembered():
    x, squash = normal(100, dtype=torch.float32), TopK(0.1, values=torch.bfloat16)
    assert squash.message_bytes((100,)) == 10 * (4 + 2)
    memory = Memory.start("econtrol", x, dense=False)
    message = squash.encode(message_input("econtrol", x, memory, eta=0.1))
    absorb("econtrol", x, memory, squash, message)
    torch.testing.assert_close(memory.e + memory.h, x)
    assert torch.equal(memory.h, memory.h.bfloat16().float())


# -- state machines


def test_the_example_worked_by_hand():
    g, squash = torch.tensor([1.0, 3.0]), TopK(0.5)
    memory = Memory.start("econtrol", g, dense=False)
    expected = [([0.0, 3.0], [1.0, 0.0], [0.0, 3.0]), ([1.5, 0.0], [0.5, 0.0], [1.5, 3.0])]
    for sent, e, h in expected:
        message = squash.encode(message_input("econtrol", g, memory, eta=0.5))
        assert squash.add(torch.zeros(2), message).tolist() == sent
        absorb("econtrol", g, memory, squash, message)
        assert memory.e.tolist() == e
        assert memory.h.tolist() == h


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_in_place_updates_are_the_equations(kind, dense):
    n, squash = 3, TopK(0.2)
    grads = [[normal(25, seed=10 * t + i) for i in range(n)] for t in range(6)]
    expected = loop(kind, grads, lambda x: top(x, 5), dense=dense)
    memories = [Memory.start(kind, grads[0][i], dense=dense) for i in range(n)]
    starts = kind.startswith("e") and kind != "ec" and dense
    average = sum(grads[0]) / n if starts else torch.zeros(25, dtype=torch.float64)
    for t, gs in enumerate(grads):
        if kind in ("none", "ec"):
            average = torch.zeros(25, dtype=torch.float64)
        for memory, g in zip(memories, gs, strict=True):
            message = squash.encode(message_input(kind, g, memory, eta=0.3, beta=0.1))
            squash.add(average, message, 1 / n)
            absorb(kind, g, memory, squash, message, beta=0.1)
        torch.testing.assert_close(average, expected[t])


@given(st.integers(0, 1000), st.floats(0, 1))
def test_the_error_is_what_was_not_sent_and_the_average_is_the_mean_of_the_estimates(seed, eta):
    grads = [[normal(9, seed=seed + 10 * t + i) for i in range(2)] for t in range(5)]
    squash = TopK(0.3)
    memories = [Memory.start("econtrol", g, dense=True) for g in grads[0]]
    average, owed = sum(grads[0]) / 2, [torch.zeros(9, dtype=torch.float64) for _ in range(2)]
    for gs in grads:
        for i, (memory, g) in enumerate(zip(memories, gs, strict=True)):
            message = squash.encode(message_input("econtrol", g, memory, eta=eta))
            squash.add(average, message, 0.5)
            absorb("econtrol", g, memory, squash, message)
            owed[i] += g - memory.h
            torch.testing.assert_close(memory.e, owed[i])
        torch.testing.assert_close(average, (memories[0].h + memories[1].h) / 2)


# -- simulation


def quadratic(n: int, d: int, noise: float = 0.0):
    scale = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    centre = normal(n, d, seed=5)

    def gradients(x, generator):
        shape = (*x.shape[:-1], n, d)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return scale * (x[..., None, :] - centre) + noise * drawn

    return gradients


@pytest.mark.parametrize("kind", KINDS)
def test_the_simulation_is_the_loop(kind):
    n, d, steps = 3, 20, 8
    gradients, x = quadratic(n, d), torch.zeros(d, dtype=torch.float64)
    given_grads, iterate = [], x.clone()
    for _ in range(steps):
        given_grads.append(list(gradients(iterate, torch.Generator())))
        update = loop(kind, given_grads, lambda v: top(v, 4), eta=0.2)[-1]
        iterate = iterate - 0.05 * update
    found = simulate(gradients, x, workers=n, steps=steps, step_size=0.05, algorithm=kind, ratio=0.2, eta=0.2)
    torch.testing.assert_close(found.x, iterate)
    assert found.sent_bytes == steps * 4 * (4 + 8)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_without_compression_it_is_gradient_descent_for_any_eta(eta):
    gradients, x = quadratic(4, 10, noise=0.3), torch.zeros(10, dtype=torch.float64)
    plain = simulate(gradients, x, workers=4, steps=30, step_size=0.05, algorithm="sgd")
    for algorithm in ("econtrol", "ec", "ef21", "none"):
        same = simulate(
            gradients, x, workers=4, steps=30, step_size=0.05, algorithm=algorithm, compressor="identity", eta=eta
        )
        assert float((same.x - plain.x).abs().max()) < 1e-12
        assert float(same.errors.abs().max()) < 1e-12


def test_eta_zero_is_ef21_and_a_frozen_estimate_with_eta_one_is_ec():
    gradients, x = quadratic(4, 12, noise=0.1), torch.ones(12, dtype=torch.float64)
    options = {"workers": 4, "steps": 25, "step_size": 0.05, "ratio": 0.25}
    a = simulate(gradients, x, algorithm="econtrol", eta=0.0, **options)
    b = simulate(gradients, x, algorithm="ef21", **options)
    assert torch.equal(a.x, b.x)
    ec = simulate(gradients, x, algorithm="ec", **options)
    ideal = simulate(gradients, x, algorithm="ideal", ideal=torch.zeros(4, 12), **options)
    assert torch.equal(ec.x, ideal.x)
    assert not torch.allclose(ec.x, b.x)


def test_a_grid_of_step_sizes_runs_side_by_side():
    gradients, x = quadratic(3, 8), torch.zeros(8, dtype=torch.float64)
    steps, etas = torch.tensor([[0.02], [0.1]], dtype=torch.float64), torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    both = simulate(gradients, x.expand(2, 8), workers=3, steps=20, step_size=steps, eta=etas, ratio=0.3,
                    record=lambda v: v.norm(dim=-1), every=5)  # fmt: skip
    assert both.trace.shape == (4, 2)
    for i in range(2):
        one = simulate(gradients, x, workers=3, steps=20, step_size=float(steps[i]), eta=float(etas[i]), ratio=0.3)
        torch.testing.assert_close(both.x[i], one.x)


def test_the_same_seed_gives_the_same_run_and_global_randomness_is_left_alone():
    before = torch.random.get_rng_state()
    runs = [
        simulate(quadratic(2, 6, 1.0), torch.zeros(6, dtype=torch.float64), workers=2, steps=5, step_size=0.1,
                 compressor=name, ratio=0.5, seed=seed)
        for name, seed in (("randk", 3), ("randk", 3), ("randk", 4))
    ]  # fmt: skip
    assert torch.equal(runs[0].x, runs[1].x)
    assert not torch.equal(runs[0].x, runs[2].x)
    assert torch.equal(before, torch.random.get_rng_state())


# -- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, r"ratio = 0.0: allowed is a share above 0 and at most 1"),
        ({"ratio": 1.5}, r"ratio = 1.5"),
        ({"eta": -0.1}, r"eta = -0.1: allowed is a number from 0 to 1"),
        ({"eta": 1.1}, r"eta = 1.1"),
        ({"compressor": "topp"}, r"compressor = 'topp'. Did you mean 'topk'"),
        ({"init": "zero"}, r"init = 'zero'. Allowed: 'dense' or 'compressed'"),
        ({"granularity": "bucket"}, r"granularity = 'bucket'"),
        ({"nonfinite": "ignore"}, r"nonfinite = 'ignore'"),
        ({"start_iter": -1}, r"start_iter = -1"),
        ({"granularity": "global", "compressor": LowRank(2)}, r"'lowrank' needs matrices"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MethodError, match=message):
        EControlState(**options)


def test_more_bad_input():
    with pytest.raises(MethodError, match=r"kind = 'ef22'. Did you mean"):
        ErrorFeedback("ef22")
    with pytest.raises(MethodError, match=r"beta = 0.*above 0"):
        ErrorFeedback("ef21-sgdm", beta=0.0)
    with pytest.raises(MethodError, match=r"rank = 0"):
        LowRank(0)
    with pytest.raises(MethodError, match=r"bits = 3: allowed are 8, 4 and 2"):
        Rounding(3)
    x = torch.zeros(3)
    with pytest.raises(MethodError, match=r"algorithm = 'econtrl'. Did you mean 'econtrol'"):
        simulate(quadratic(1, 3), x, workers=1, steps=1, step_size=1.0, algorithm="econtrl")
    with pytest.raises(MethodError, match="needs every worker's gradient at the solution"):
        simulate(quadratic(1, 3), x, workers=1, steps=1, step_size=1.0, algorithm="ideal")
    with pytest.raises(MethodError, match=r"shape \(1, 3\); \(2, 3\) is needed"):
        simulate(quadratic(1, 3), x, workers=2, steps=1, step_size=1.0)


def test_eta_by_default_is_the_contraction_within_bounds():
    assert [default_eta(d) for d in (1e-4, 0.05, 0.9)] == [0.01, 0.05, 0.3]
    assert EControlState(ratio=0.05).strength((1000,)) == pytest.approx(0.05)
    assert EControlState(eta=0.0).strength((10,)) == 0.0
    assert math.isnan(EControlState().statistics()["ratio"])
