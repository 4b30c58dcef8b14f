"""GradNormLoRP's arithmetic: published values, the equations as written, autograd, rows without direction."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gnomon.common import projection
from gnomon.errors import GnomonWarning
from gnomon.optim import GradNormLoRP, weight_norm_gradients
from gnomon.optim.gradnorm_lorp.weight_norm import SMALLEST_MAGNITUDE, new_magnitudes

sys.path.insert(0, str(Path(__file__).parent))
from gradnorm_lorp_definition import definition, draws, run

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "gradnorm-lorp.npz")
SHAPES = [(7, 5), (5, 7), (6, 6), (13, 4), (3, 9)]


def reference(name: str) -> torch.Tensor:
    return torch.tensor(REFERENCE[name])


@pytest.mark.parametrize("key", ["wide", "tall", "plain", "vec"])
def test_the_authors_trajectories(key: str, monkeypatch) -> None:
    weight = torch.nn.Parameter(reference(f"{key}_W0"))
    group = {"rank": 3, "update_proj_gap": 3, "scale": 4.0} if key in ("wide", "tall") else {}
    optimizer = GradNormLoRP([{"params": [weight], **group}], lr=0.01, mode="authors", weight_decay=0.1)
    steps = iter(range(7))
    monkeypatch.setattr(projection, "gradient_basis", lambda *a, **k: [reference(f"{key}_P{3 * next(steps)}")])
    for t in range(7):
        weight.grad = reference(f"{key}_G{t}")
        optimizer.step()
        assert (weight - reference(f"{key}_W{t + 1}")).abs().max() <= 4e-7
        if group:
            assert torch.equal(optimizer.state[weight]["proj"], reference(f"{key}_P{t}"))


def test_published_figures_with_our_own_projectors() -> None:
    seen = {}
    for key, shape in {"wide": (12, 20), "tall": (20, 12), "plain": (12, 20), "vec": (9,)}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            W = torch.randn(shape) * 0.3
        generator = torch.Generator().manual_seed(5)
        grads = [torch.randn(shape, generator=generator) for _ in range(7)]
        group = {"rank": 3, "update_proj_gap": 3, "alpha": 4.0} if key in ("wide", "tall") else {}
        steps = 3 if group else 7
        seen[key], _ = run(GradNormLoRP, W, grads[:steps], group, lr=0.01, mode="authors", weight_decay=0.1)
    assert seen["wide"][0, :3].tolist() == pytest.approx([-0.321913, -0.353293, 0.001769], abs=2e-6)
    assert seen["tall"][0, :3].tolist() == pytest.approx([-0.357177, -0.378977, -0.011409], abs=2e-6)
    assert seen["plain"][0, :3].tolist() == pytest.approx([-0.369394, -0.371407, -0.031929], abs=2e-6)
    assert float(seen["plain"].sum()) == pytest.approx(1.508622, abs=1e-5)
    assert (float(seen["vec"].sum()), float(seen["vec"].norm())) == pytest.approx((-0.576706, 1.056569), abs=2e-6)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("mode", ["weightnorm", "authors"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_its_equations(m: int, n: int, mode: str, side: str, dtype: torch.dtype) -> None:
    W, grads = draws(m, n, 1, dtype, seed=1)[0], draws(m, n, 8, dtype)
    options = {"mode": mode, "lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}
    expected = definition(W.double(), [g.double() for g in grads], 2, 3, alpha=0.3, side=side, **options)
    group = {"rank": 2, "update_proj_gap": 3, "alpha": 0.3, "proj_type": side}
    # on both sides the coordinates off the diagonal are rounding noise at a refresh, which Adam brings to size
    tolerance = 1e-10 if dtype == torch.float64 else 3e-2 if side == "full" else 1e-4
    seen, _ = run(GradNormLoRP, W, grads, group, **options)
    assert seen.dtype == dtype
    assert torch.allclose(seen.double(), expected, atol=tolerance)
    # a weight stored as (in, out) takes the same steps
    stored = [g.T.contiguous() for g in grads]
    turned, _ = run(GradNormLoRP, W.T.contiguous(), stored, {**group, "fan_in_fan_out": True}, **options)
    assert torch.allclose(turned.T.double(), expected, atol=tolerance)


def test_groups_without_a_rank() -> None:
    W, grads = draws(5, 9, 1, seed=1)[0], draws(5, 9, 8)
    plain, _ = run(GradNormLoRP, W, grads, {}, lr=0.01, eps=1e-12)
    weight = torch.nn.Parameter(W.clone())
    stock = torch.optim.AdamW([weight], lr=0.01, eps=1e-12, weight_decay=0.0)
    for grad in grads:
        weight.grad = grad.clone()
        stock.step()
    assert torch.allclose(plain, weight, atol=1e-8)
    expected = definition(W, grads, None, 1, mode="authors", lr=0.01)
    seen, optimizer = run(GradNormLoRP, W, grads, {}, lr=0.01, mode="authors")
    assert torch.allclose(seen, expected, atol=1e-12)
    turned, _ = run(
        GradNormLoRP, W.T.contiguous(), [g.T for g in grads], {"fan_in_fan_out": True}, lr=0.01, mode="authors"
    )
    assert torch.allclose(turned.T, expected, atol=1e-12)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["direction"].shape == W.shape
    number, _ = run(GradNormLoRP, torch.tensor(2.0), [torch.tensor(1.0)], {}, lr=0.01, mode="authors")
    assert float(number) == pytest.approx(1.99, abs=1e-4)  # a number has no direction: Adam


def test_gradients_are_autograds() -> None:
    W, A = draws(6, 9, 2, seed=3)
    g = W.norm(dim=1).requires_grad_()
    v = (W / W.norm(dim=1, keepdim=True)).requires_grad_()
    weight = g[:, None] * v / v.norm(dim=1, keepdim=True)
    (weight * A).sin().sum().backward()
    G = A * (W * A).cos()
    found = weight_norm_gradients(W, G)
    assert torch.allclose(found.norms, W.norm(dim=1))
    assert torch.allclose(found.magnitude, g.grad, atol=1e-12)
    assert torch.allclose(found.direction, v.grad, atol=1e-12)
    assert (found.direction * W).sum(1).abs().max() < 1e-12  # tangent to the sphere
    half = weight_norm_gradients(W.bfloat16(), G.bfloat16())
    assert (half.norms.dtype, half.magnitude.dtype, half.direction.dtype) == (torch.float32,) * 2 + (torch.bfloat16,)


def test_a_basis_of_full_rank_keeps_the_gradient_tangent() -> None:
    W, G = draws(5, 8, 2, seed=2)
    tangent = weight_norm_gradients(W, G).direction
    inner = {}
    for rank in (1, 3, 5):
        basis = projection.gradient_basis(tangent, rank, projection.LEFT)
        back = projection.back(projection.project(tangent, basis, projection.LEFT), basis, projection.LEFT)
        inner[rank] = float((W * back).sum(1).abs().max())
    assert inner[5] < 1e-12 < inner[1]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_norms_of_the_rows_are_the_magnitudes(m: int, n: int, monkeypatch) -> None:
    W, grads = draws(m, n, 1, torch.float32, seed=1)[0], draws(m, n, 5, torch.float32)
    expected = []

    def remember(norms: torch.Tensor, direction: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
        found = new_magnitudes(norms, direction, step)
        expected.append(found[0])
        return found

    module = "gnomon.optim.gradnorm_lorp.optimizer.new_magnitudes"
    monkeypatch.setattr(module, remember)
    seen, _ = run(GradNormLoRP, W, grads, {"rank": 2}, lr=0.05)
    assert torch.allclose(seen.norm(dim=1), expected[-1], atol=1e-6)
    # with a magnitude that stands still, the norms are conserved and only directions move
    monkeypatch.setattr(module, lambda norms, direction, step: new_magnitudes(norms, torch.zeros_like(norms), step))
    seen, _ = run(GradNormLoRP, W, grads, {"rank": 2}, lr=0.05)
    assert torch.allclose(seen.norm(dim=1), W.norm(dim=1), atol=1e-6)
    still = definition(W.double(), [g.double() for g in grads], 2, 200, lr=0.05, still=True)
    assert torch.allclose(seen.double(), still, atol=1e-4)


def test_the_magnitude_of_the_authors_acts_for_one_step_only() -> None:
    W, grads = draws(6, 9, 1, seed=1)[0], draws(6, 9, 2)
    weight = torch.nn.Parameter(W.clone())
    optimizer = GradNormLoRP([{"params": [weight], "rank": 2}], lr=0.05, mode="authors")
    for grad in grads:
        weight.grad = grad
        optimizer.step()
        v = optimizer.state[weight]["direction"]
        assert not torch.allclose(weight.norm(dim=1), v.norm(dim=1))
    # v never saw the magnitudes: GaLore's trajectory
    from gnomon.optim import GaLoreAdamW

    assert torch.allclose(v, run(GaLoreAdamW, W, grads, {"rank": 2}, lr=0.05)[0], atol=1e-12)


@pytest.mark.parametrize("mode", ["weightnorm", "authors"])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_zero_rows_are_stepped_by_adam(mode: str, m: int, n: int) -> None:
    W, grads = draws(m, n, 1, seed=1)[0], draws(m, n, 3)
    W[2] = W[4] = 0.0
    for grad in grads:
        grad[4] = 0.0  # a padding row stays where it is
    with pytest.warns(GnomonWarning, match=rf"2 of {m} rows of parameter '0 of group 0' are zero and have no dir") as w:
        seen, optimizer = run(GradNormLoRP, W, grads[:1], {"rank": 3}, lr=0.01, mode=mode)
    assert len(w) == 1
    state = next(iter(optimizer.state.values()))
    direction = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-6) * 0.001**0.5 / 0.1
    expected = -0.01 * projection.back(direction, [state["proj"]], state["side"])
    assert torch.allclose(seen[2], expected[2], atol=1e-12)
    assert seen[2].norm() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen, _ = run(GradNormLoRP, W, grads, {"rank": 3}, lr=0.01, mode=mode)
    assert torch.isfinite(seen).all()
    assert seen[4].abs().max() < 1e-10


@pytest.mark.parametrize("mode", ["weightnorm", "authors"])
def test_a_row_does_not_change_its_sign(mode: str) -> None:
    W, G = draws(4, 6, 2, seed=1)
    W[1] *= 1e-3 / W[1].norm()
    G[1] = 50 * W[1] / W[1].norm()  # pulls the row to zero and beyond
    with pytest.warns(GnomonWarning, match=r"magnitude of 1 rows of parameter '0 of group 0' negative.*at step 0"):
        seen, _ = run(GradNormLoRP, W, [G], {"rank": 2}, lr=0.1, mode=mode)
    assert float(seen[1].norm()) == pytest.approx(SMALLEST_MAGNITUDE, rel=1e-5)
    assert torch.isfinite(seen).all()


def test_new_magnitudes_by_hand() -> None:
    norms = torch.tensor([1.0, 0.1, 1e-9, 0.0], dtype=torch.float64)
    magnitudes, crossed = new_magnitudes(norms, torch.ones_like(norms), 0.5)
    assert magnitudes.tolist() == [0.5, SMALLEST_MAGNITUDE, 1e-9, 0.0]
    assert crossed.tolist() == [False, True, True, False]


def test_changes_of_the_weight_from_outside() -> None:
    """Nothing of the weight is stored, so a pruned or loaded weight is what the next step starts from."""
    W, grads = draws(6, 9, 1, seed=1)[0], draws(6, 9, 2)
    moved = []
    for mode in ("weightnorm", "authors"):
        weight = torch.nn.Parameter(W.clone())
        optimizer = GradNormLoRP([{"params": [weight], "rank": 2}], lr=0.01, mode=mode)
        for grad in grads:
            with torch.no_grad():
                weight.mul_(3.0)
            weight.grad = grad
            before = weight.detach().norm()
            optimizer.step()
        moved.append(float((weight.detach().norm() - before).abs() / before))
    assert moved[0] < 0.05 < moved[1]  # the authors' copy of the weight brings the old one back
