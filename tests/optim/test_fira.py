"""Fira's and GaLore's arithmetic: published values, the equations as written, identities and limits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gnomon.common import projection
from gnomon.common.projection import LEFT, RIGHT
from gnomon.optim import Fira, FiraRMSProp, GaLoreAdamW, limit_growth, norm_based_scaling, scaling_factor

sys.path.insert(0, str(Path(__file__).parent))
from fira_definition import definition, gradients, run

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "fira.npz")
SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (14, 14)}
CLASSES = {"fira": Fira, "galore": GaLoreAdamW, "firarms": FiraRMSProp}
GROUP = {"rank": 3, "update_proj_gap": 3, "alpha": 0.25}


@pytest.fixture
def global_generator_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def reference(name: str) -> torch.Tensor:
    return torch.tensor(REFERENCE[name])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.filterwarnings("ignore:weight_decay")
def test_published_trajectories_with_the_stored_projectors(method: str, shape: str, monkeypatch) -> None:
    key = f"{method}_{shape}"
    steps = [t for t in range(7) if f"{key}_W{t + 1}" in REFERENCE]
    weight = torch.nn.Parameter(reference(f"{key}_W0"))
    options = {} if method == "firarms" else {"weight_decay": 0.01}
    optimizer = CLASSES[method]([{"params": [weight], **GROUP}], lr=0.01, **options)
    current = iter(range(7))
    monkeypatch.setattr(projection, "gradient_basis", lambda *a, **k: [reference(f"{key}_P{3 * next(current)}")])
    assert len(steps) >= 3
    for t in steps:
        weight.grad = reference(f"{key}_G{t}")
        optimizer.step()
        assert torch.equal(optimizer.state[weight]["proj"], reference(f"{key}_P{t}"))
        assert (weight - reference(f"{key}_W{t + 1}")).abs().max() <= 3e-7
        if f"{key}_q{t}" in REFERENCE:
            q = float(optimizer.state[weight]["residual_norm"])
            assert q == pytest.approx(float(REFERENCE[f"{key}_q{t}"]), rel=1e-6)


def test_published_figures_with_our_own_projectors() -> None:
    torch_state = torch.get_rng_state()
    torch.manual_seed(0)
    W = torch.randn(12, 20) * 0.3
    torch.set_rng_state(torch_state)
    grads = gradients(12, 20, 7, torch.float32)
    seen, optimizer = run(Fira, W, grads[:3], GROUP, lr=0.01, weight_decay=0.01)
    assert seen[0, :3].tolist() == pytest.approx([-0.372004, -0.353073, -0.066402], abs=2e-6)
    seen, optimizer = run(Fira, W, grads, GROUP, lr=0.01, weight_decay=0.01)
    assert float(seen.sum()) == pytest.approx(1.496906, abs=1e-5)
    assert float(seen.norm()) == pytest.approx(4.363450, abs=1e-5)
    assert next(iter(optimizer.diagnostics().values()))["residual_norm"] == pytest.approx(29.2586, abs=1e-3)
    galore, _ = run(GaLoreAdamW, W, grads, GROUP, lr=0.01, weight_decay=0.01)
    assert (float(galore.sum()), float(galore.norm())) == pytest.approx((1.779768, 4.349309), abs=1e-5)
    rms, _ = run(FiraRMSProp, W, grads[:3], GROUP, lr=0.01)
    assert rms[0, :3].tolist() == pytest.approx([-0.452781, -0.356610, -0.048515], abs=2e-6)


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6), (13, 4), (1, 9), (9, 1)])
@pytest.mark.parametrize("residual", ["authors", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fira_is_its_equations(m: int, n: int, residual: str, dtype: torch.dtype) -> None:
    W, grads = gradients(m, n, 1, dtype, seed=1)[0], gradients(m, n, 8, dtype)
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
    rank = min(2, m, n)
    expected, qs = definition(W, grads, rank, 3, alpha=0.3, residual=residual, **options)
    group = {"rank": rank, "update_proj_gap": 3, "alpha": 0.3}
    seen, optimizer = run(Fira, W, grads, group, residual=residual, **options)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    if rank < min(m, n) or residual == "authors":
        assert float(next(iter(optimizer.state.values()))["residual_norm"]) == pytest.approx(qs[-1], rel=1e-3)
    assert torch.allclose(seen, expected, atol=tolerance)


@pytest.mark.parametrize("side", ["reverse_std", "left", "right"])
@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6)])
def test_other_sides(m: int, n: int, side: str) -> None:
    W, grads = gradients(m, n, 1, seed=1)[0], gradients(m, n, 5)
    for optimizer_class, residual in ((Fira, "authors"), (GaLoreAdamW, None)):
        expected, _ = definition(W, grads, 3, 2, alpha=0.5, residual=residual, side=side)
        group = {"rank": 3, "update_proj_gap": 2, "alpha": 0.5, "proj_type": side}
        seen, _ = run(optimizer_class, W, grads, group, lr=0.01)
        assert torch.allclose(seen, expected, atol=1e-11)


def test_both_sides_in_galore() -> None:
    W, G = gradients(7, 5, 2, seed=1)
    seen, optimizer = run(GaLoreAdamW, W, [G], {"rank": 2, "proj_type": "full", "alpha": 0.5}, lr=0.01)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    R = U[:, :2].T @ G @ Vh[:2].T
    N = 0.1 * R / (R.abs() * 0.001**0.5 + 1e-6)
    expected = W - 0.01 * 0.001**0.5 / 0.1 * 0.5 * U[:, :2] @ N @ Vh[:2]
    assert torch.allclose(seen, expected, atol=1e-12)
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].shape == (2, 2)
    assert state["proj_right"].shape == (2, 5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_rmsprop_is_its_equations(centered: bool, momentum: float) -> None:
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 6)
    options = {"momentum": momentum, "centered": centered}
    expected, _ = definition(W, grads, 2, 4, alpha=0.5, inner="rmsprop", **options)
    seen, _ = run(FiraRMSProp, W, grads, {"rank": 2, "update_proj_gap": 4, "alpha": 0.5}, lr=0.01, **options)
    assert torch.allclose(seen, expected, atol=1e-11)
    plain, _ = run(FiraRMSProp, W, grads, {}, lr=0.01, **options)
    weight = torch.nn.Parameter(W.clone())
    stock = torch.optim.RMSprop([weight], lr=0.01, alpha=0.9, eps=1e-6, **options)
    for grad in grads:
        weight.grad = grad
        stock.step()
    assert torch.allclose(plain, weight, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(5, 9), (9, 5)])
def test_identity_projector_is_adam_exactly(m: int, n: int, monkeypatch) -> None:
    rank = min(m, n)
    monkeypatch.setattr(projection, "gradient_basis", lambda *a, **k: [torch.eye(rank)])
    W, grads = gradients(m, n, 1, torch.float32, seed=1)[0], gradients(m, n, 6, torch.float32)
    projected, _ = run(Fira, W, grads, {"rank": rank}, lr=0.01)
    plain, _ = run(Fira, W, grads, {}, lr=0.01)
    assert torch.equal(projected, plain)


def test_an_svd_basis_of_full_rank_is_not_adam() -> None:
    W, grads = gradients(5, 9, 1, seed=1)[0], gradients(5, 9, 6)
    projected, _ = run(Fira, W, grads, {"rank": 5}, lr=0.01)
    plain, _ = run(Fira, W, grads, {}, lr=0.01)
    assert (projected - plain).abs().max() > 1e-3


def test_groups_without_a_rank_are_adamw() -> None:
    W, grads = gradients(5, 9, 1, seed=1)[0], gradients(5, 9, 8)
    for eps, difference in ((1e-12, 1.5e-8), (1e-6, 1e-3)):
        weight = torch.nn.Parameter(W.clone())
        stock = torch.optim.AdamW([weight], lr=0.01, eps=eps, weight_decay=0.0)
        for grad in grads:
            weight.grad = grad.clone()
            stock.step()
        for optimizer_class in (Fira, GaLoreAdamW):
            seen, _ = run(optimizer_class, W, grads, {}, lr=0.01, eps=eps)
            assert (seen - weight).abs().max() < difference
    expected, _ = definition(W, grads, 9, 1000, residual=None, weight_decay=0.1, projectors=[torch.eye(5).double()] * 8)
    seen, _ = run(Fira, W, grads, {}, lr=0.01, weight_decay=0.1)
    assert torch.allclose(seen, expected, atol=1e-12)


def test_without_bias_correction() -> None:
    W, G = gradients(5, 9, 2, seed=1)
    seen, _ = run(Fira, W, [G], {}, lr=0.01, correct_bias=False)
    assert torch.allclose(seen, W - 0.01 * 0.1 * G / (0.001**0.5 * G.abs() + 1e-6), atol=1e-12)


@pytest.mark.parametrize("optimizer_class", [Fira, GaLoreAdamW, FiraRMSProp])
def test_the_sign_of_a_projector_column_does_not_matter(optimizer_class: type, monkeypatch) -> None:
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 6)
    group = {"rank": 3, "update_proj_gap": 1000}
    first, optimizer = run(optimizer_class, W, grads, group, lr=0.01)
    P = next(iter(optimizer.state.values()))["proj"]
    monkeypatch.setattr(projection, "gradient_basis", lambda *a, **k: [P * torch.tensor([1.0, -1.0, -1.0])])
    second, _ = run(optimizer_class, W, grads, group, lr=0.01)
    assert torch.allclose(first, second, atol=1e-13)


@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_the_residual_is_orthogonal_to_the_subspace_at_alpha_one(m: int, n: int) -> None:
    G = gradients(m, n, 1)[0]
    side = RIGHT if m >= n else LEFT
    basis = projection.gradient_basis(G, 2, side)
    R = projection.project(G, basis, side)
    scaled = norm_based_scaling(G, R, R.clone(), side, previous=None, alpha=1.0)
    residual = projection.back(scaled.inner - R, basis, side) + scaled.column * G
    assert abs(float((residual * projection.back(R, basis, side)).sum())) < 1e-9
    phi = scaled.phi if side == LEFT else scaled.phi[:, None]
    expected = (G * phi).norm() ** 2 - (R * phi).norm() ** 2
    assert float(residual.norm() ** 2) == pytest.approx(float(expected))
    assert float(scaled.norm) == pytest.approx(float(residual.norm()))
    assert torch.allclose(phi, torch.ones(()).double())  # N = R


def test_scaling_factor() -> None:
    N, R = torch.tensor([[3.0, 0.0], [4.0, 2.0]]), torch.tensor([[0.0, 0.0], [10.0, 4.0]])
    assert scaling_factor(N, R, 0).tolist() == pytest.approx([0.5, 0.5])
    assert scaling_factor(N, R, 1)[1].item() == pytest.approx(20**0.5 / 116**0.5)
    assert scaling_factor(N.bfloat16(), R.bfloat16(), 0).dtype == torch.float32


def test_limiter_by_hand() -> None:
    one = torch.tensor(1.0)
    limiter, q = limit_growth(one, None)
    assert (float(limiter), float(q)) == (1.0, 1.0)
    limiter, q = limit_growth(3 * one, one)  # cut to 1.01
    assert (float(limiter), float(q)) == pytest.approx((3 / 1.01, 1.01))
    limiter, q = limit_growth(1.005 * one, one)  # may grow a little
    assert (float(limiter), float(q)) == pytest.approx((1.0, 1.005))
    limiter, q = limit_growth(0.1 * one, one)  # may fall as it likes
    assert (float(limiter), float(q)) == pytest.approx((1.0, 0.1))
    limiter, q = limit_growth(0 * one, one)
    assert (float(limiter), float(q)) == (1.0, 1.0)
    limiter, q = limit_growth(3 * one, 1e-8 * one)
    assert (float(limiter), float(q)) == (1.0, 3.0)
    assert float(limit_growth(3 * one, one, gamma=2.0)[1]) == pytest.approx(2.0)


def test_a_zero_gradient_does_not_switch_the_residual_off() -> None:
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 8)
    zeros = torch.zeros_like(W)
    group = {"rank": 2, "update_proj_gap": 1000}
    _, before = run(Fira, W, grads[:4], group)
    _, with_zero = run(Fira, W, [*grads[:4], zeros], group)
    _, after = run(Fira, W, [*grads[:4], zeros, grads[4]], group)
    q = [o.diagnostics()["0"]["residual_norm"] for o in (before, with_zero, after)]
    assert q[0] == q[1]
    assert q[2] > 0.5 * q[0]
    # zeros from the start: the first real gradient starts the limiter
    _, late = run(Fira, W, [zeros, zeros, grads[0]], group)
    assert late.diagnostics()["0"]["residual_norm"] > 1.0
    assert late.diagnostics()["0"]["limiter"] == 1.0


def test_a_zero_gradient_at_a_refresh_keeps_the_projector() -> None:
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 3)
    _, optimizer = run(Fira, W, [*grads, torch.zeros_like(W)], {"rank": 2, "update_proj_gap": 3})
    _, before = run(Fira, W, grads, {"rank": 2, "update_proj_gap": 3})
    assert torch.equal(*(next(iter(o.state.values()))["proj"] for o in (optimizer, before)))


def test_refresh_counts_finished_steps() -> None:
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 8)
    seen = []
    for steps in range(1, 9):
        _, optimizer = run(Fira, W, grads[:steps], {"rank": 2, "update_proj_gap": 3})
        seen.append(next(iter(optimizer.state.values()))["proj"])
    changes = [t for t in range(1, 8) if not torch.equal(seen[t], seen[t - 1])]
    assert changes == [3, 6]


def test_rotating_the_first_moment_makes_signs_irrelevant(monkeypatch) -> None:
    W, grads = gradients(6, 9, 1, seed=1)[0], gradients(6, 9, 8)
    honest = projection.gradient_basis
    results = {}
    for align in ("none", "rotate"):
        for flip in (1.0, -1.0):
            calls = []

            def basis(*arguments, flip=flip, calls=calls, **options):
                calls.append(0)
                return [part * (flip if len(calls) == 2 else 1.0) for part in honest(*arguments, **options)]

            monkeypatch.setattr(projection, "gradient_basis", basis)
            group = {"rank": 2, "update_proj_gap": 4, "align": align}
            results[align, flip], _ = run(Fira, W, grads, group, lr=0.01)
    assert torch.allclose(results["rotate", 1.0], results["rotate", -1.0], atol=1e-13)
    assert (results["none", 1.0] - results["none", -1.0]).abs().max() > 1e-3


@pytest.mark.usefixtures("global_generator_untouched")
def test_randomised_refresh_follows_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 3, generator=generator) @ torch.randn(3, 80, generator=generator)
    grads = [base + 0.01 * torch.randn(60, 80, generator=generator) for _ in range(6)]
    W = torch.zeros(60, 80)
    results = [
        run(Fira, W, grads, {"rank": 3, "update_proj_gap": 2, "refresh": refresh, "align": "rotate"}, lr=0.01)[0]
        for refresh in ("exact", "randomized", "randomized")
    ]
    assert torch.equal(results[1], results[2])
    assert torch.allclose(results[0], results[1], atol=2e-3)
    assert not torch.equal(results[0], results[1])
