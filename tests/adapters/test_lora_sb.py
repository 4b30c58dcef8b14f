"""LoRA-SB's mathematics: the equations in float64, the recorded arrays, identities of the factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gnomon.adapters import LoRASBConfig, LoRAXSConfig
from gnomon.adapters.lora_sb.factors import (
    Factors,
    Sketch,
    authors_factors,
    captured,
    first_update,
    sketched_factors,
    update_factors,
    weight_factors,
)
from gnomon.adapters.lora_sb.tuner import LoRASBLinear
from gnomon.errors import MethodError

REFERENCE = Path(__file__).parents[1] / "reference" / "lora-sb.npz"


def recorded() -> dict[str, Tensor]:
    with np.load(REFERENCE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(factors: Factors, W: Tensor, **options: Any) -> LoRASBLinear:
    base = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    base.weight.data = W.clone()
    layer = LoRASBLinear(base, "default", LoRASBConfig(r=len(factors.R), init="given", **options), key="layer")
    layer.to(W.dtype)
    layer.fill("default", factors)
    return layer


def test_the_recorded_factors_output_and_gradient() -> None:
    data = recorded()
    found = authors_factors(data["dW"], 6)
    for letter in "ABR":
        given, expected = getattr(found, letter), data[letter]
        assert (given == expected).float().mean() > 0.97  # the rest lies on the edge of a rounding
        torch.testing.assert_close(given, expected, rtol=2**-7, atol=1e-7)
    layer = linear(Factors(data["A"], data["B"], data["R"]), data["W0"])
    x = data["x"].requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, data["y"], rtol=1e-5, atol=1e-6)
    y.backward(data["gy"])
    torch.testing.assert_close(layer.lorasb_R["default"].grad, data["gR"], rtol=1e-5, atol=2e-6)
    by_hand = data["B"].T @ data["gy"].T @ data["x"] @ data["A"].T
    torch.testing.assert_close(by_hand, data["gR"], rtol=1e-5, atol=2e-6)
    delta = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(delta, data["B"] @ data["R"] @ data["A"])


def test_the_authors_random_state_is_restored() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    authors_factors(recorded()["dW"], 6)
    update_factors(gaussian(40, 30), 3, method="randomized")
    assert torch.equal(torch.rand(3), expected)


def test_the_first_update_is_a_sign() -> None:
    given = torch.tensor([[3.0, 0.0], [-1e-30, float("inf")]])
    assert torch.equal(first_update(given, 0.25), torch.tensor([[-0.25, 0.0], [0.25, -0.25]]))


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
@pytest.mark.parametrize(("m", "n", "r"), [(32, 48, 6), (7, 5, 5), (9, 9, 1)])
def test_the_error_is_what_was_dropped(m: int, n: int, r: int, scaling: float) -> None:
    dW = first_update(gaussian(m, n), 1e-3)
    A, B, R = update_factors(dW, r, scaling=scaling, method="exact")
    dropped = torch.linalg.svdvals(dW)[r:].square().sum().sqrt()
    assert torch.allclose((dW - scaling * B @ R @ A).norm(), dropped, atol=1e-12)
    assert torch.allclose(A @ A.T, torch.eye(r, dtype=A.dtype))
    assert torch.allclose(B.T @ B, torch.eye(r, dtype=A.dtype))
    share = captured(dW, Factors(A, B, R), scaling)
    assert share == pytest.approx(1 - float(dropped**2 / dW.square().sum()))


def test_randomised_factors_are_nearly_as_good_and_the_authors_a_little_less() -> None:
    dW = first_update(gaussian(120, 90), 1.0)
    exact, ours, authors = (
        captured(dW, f)
        for f in (update_factors(dW, 12), update_factors(dW, 12, method="randomized"), authors_factors(dW.float(), 12))
    )
    assert exact - 0.006 < ours <= exact + 1e-12  # the spectrum of a sign matrix is flat
    assert exact - 0.012 < authors < exact


def test_the_gradient_of_r_is_the_projection() -> None:
    W, x, gy = gaussian(10, 14), gaussian(5, 14, seed=1), gaussian(5, 10, seed=2)
    factors = update_factors(gaussian(10, 14, seed=3), 4, method="exact")
    layer = linear(factors, W)
    layer(x).backward(gy)
    G = gy.T @ x
    A, B, _ = (t.detach() for t in layer.tensors("default"))
    gR = layer.lorasb_R["default"].grad
    torch.testing.assert_close(gR, B.T @ G @ A.T)
    torch.testing.assert_close(B @ gR @ A, (B @ B.T) @ G @ (A.T @ A))
    assert layer.lorasb_A["default"].grad is None


def test_factors_that_are_not_orthonormal_need_the_correction() -> None:
    G, A, B, s = gaussian(10, 14), gaussian(3, 14, seed=1), gaussian(10, 3, seed=2), 0.5
    gR = s * B.T @ G @ A.T
    best = torch.linalg.inv(B.T @ B) @ gR @ torch.linalg.inv(A @ A.T) / s**2
    flat = s * torch.kron(B, A.T.contiguous())
    solved = torch.linalg.lstsq(flat, G.reshape(-1, 1)).solution.reshape(3, 3)
    torch.testing.assert_close(best, solved)


def test_full_rank_is_full_fine_tuning() -> None:
    W, x, gy = gaussian(6, 9), gaussian(4, 9, seed=1), gaussian(4, 6, seed=2)
    dW = first_update(gy.T @ x, 1e-2)
    layer = linear(update_factors(dW, 6, method="exact"), W)
    torch.testing.assert_close(W + layer.get_delta_weight("default").detach(), W + dW)
    layer(x).backward(gy)
    A, B, R = (t.detach() for t in layer.tensors("default"))
    stepped = B @ (R - 0.1 * layer.lorasb_R["default"].grad) @ A
    torch.testing.assert_close(stepped, dW - 0.1 * (gy.T @ x) @ (A.T @ A))


@pytest.mark.parametrize("scaling", [2.0, 0.25])
def test_nothing_but_the_learning_rate_depends_on_the_scale(scaling: float) -> None:
    W, x, target = gaussian(8, 11), gaussian(5, 11, seed=1), gaussian(5, 8, seed=2)
    dW = first_update(gaussian(8, 11, seed=3), 1e-2)

    def run(s: float) -> Tensor:
        layer = linear(update_factors(dW, 3, scaling=s, method="exact"), W, lora_alpha=3 * s)
        optimizer = torch.optim.SGD([layer.lorasb_R["default"]], lr=0.05 / s**2)
        for _ in range(5):
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
        return layer.get_delta_weight("default").detach()

    torch.testing.assert_close(run(scaling), run(1.0))


def test_the_layer_in_values_and_gradients_by_gradcheck() -> None:
    layer = linear(update_factors(gaussian(5, 7), 3), gaussian(5, 7, seed=1), lora_alpha=1.5)
    R = gaussian(3, 3, seed=4).requires_grad_()

    def output(x: Tensor, R: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lorasb_R.default": R}, (x,))

    assert torch.autograd.gradcheck(output, (gaussian(2, 7, seed=5).requires_grad_(), R))


def test_the_factors_of_a_weight() -> None:
    W = gaussian(12, 9)
    A, B = weight_factors(W, 4)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(B @ A, (U[:, :4] * S[:4]) @ Vh[:4])
    torch.testing.assert_close(A @ A.T, torch.eye(4, dtype=A.dtype))
    torch.testing.assert_close(B.norm(dim=0), S[:4])


@pytest.mark.parametrize(("size", "k"), [(17, 5), (8, 8), (6, 40)])
def test_a_sketch_is_orthonormal_and_stores_exactly(size: int, k: int) -> None:
    sketch = Sketch.make(size, k, seed=3)
    S = sketch.rows()
    assert S.shape == (min(k, size), size)
    torch.testing.assert_close(S @ S.T, torch.eye(len(S)))
    x = gaussian(size, 2).float()
    torch.testing.assert_close(sketch.project(x), S @ x)
    y = gaussian(len(S), 2, seed=1).float()
    torch.testing.assert_close(sketch.lift(y), S.T @ y)
    lifted = sketch.lift(y)
    assert torch.equal(sketch.expand(sketch.pick(lifted)), lifted)
    again = Sketch.make(size, k, seed=3)
    assert torch.equal(again.bucket, sketch.bucket)
    assert torch.equal(again.sign, sketch.sign)


def test_sketched_factors_are_the_best_in_their_space() -> None:
    dW = gaussian(20, 16)
    rows, columns = Sketch.make(20, 8, seed=1), Sketch.make(16, 8, seed=2)
    A, B, R = sketched_factors(dW, 3, rows, columns, scaling=2.0)
    P, Q = rows.rows().double(), columns.rows().double()
    inside = P.T @ (P @ dW @ Q.T) @ Q
    U, S, Vh = torch.linalg.svd(inside)
    torch.testing.assert_close(2.0 * B @ R @ A, (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-5, atol=1e-6)
    full = sketched_factors(dW, 3, Sketch.make(20, 20, 1), Sketch.make(16, 16, 2))
    assert captured(dW, full) == pytest.approx(captured(dW, update_factors(dW, 3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "pissa"}, r"init = 'pissa'\. Allowed: 'sb', 'xs', 'given'"),
        ({"svd": "fast"}, "svd = 'fast'. Allowed: 'auto', 'exact', 'randomized'"),
        ({"save_factors": "fp8"}, "save_factors = 'fp8'. Allowed: True, 'bf16', 'seeded-sketch', False"),
        ({"lora_alpha": 0.0}, "lora_alpha = 0.0: a number above 0"),
        ({"seed": -1}, "seed = -1: a whole number of at least 0"),
        ({"r": 0}, "r = 0: the rank is a whole number"),
        ({"init": "xs", "parity": True}, "parity has a meaning only with init = 'sb', not with 'xs'"),
        ({"init": "given", "save_factors": "seeded-sketch"}, "seeded-sketch\" has a meaning only with init = 'sb'"),
        ({"parity": True, "save_factors": "seeded-sketch"}, "lie in no sketch"),
        ({"sketch_size": 2, "save_factors": "seeded-sketch", "r": 4}, "sketch_size = 2 with r = 4"),
        ({"sketch_size": 20}, "sketch_size = 20 with r = 96"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        LoRASBConfig(**options)
    if options.get("init") == "pissa":
        with pytest.raises(MethodError, match="LoRA-XS has 'xs' only"):
            LoRAXSConfig(init="sb")


def test_matrices_that_are_refused() -> None:
    with pytest.raises(MethodError, match=r"r = 6 for a weight of 5 x 7. Allowed: 1 to 5"):
        update_factors(gaussian(5, 7), 6)
    with pytest.raises(MethodError, match="svd = 'fast'"):
        update_factors(gaussian(5, 7), 2, method="fast")  # type: ignore[arg-type]
    good = update_factors(gaussian(5, 7), 2)
    layer = linear(good, gaussian(5, 7))
    with pytest.raises(MethodError, match=r"layer: A is to be finite and \(2, 7\), but has the shape \(2, 6\)"):
        layer.fill("default", good._replace(A=good.A[:, :6]))
    with pytest.raises(MethodError, match=r"R is to be finite.* holds NaN"):
        layer.fill("default", good._replace(R=good.R * float("nan")))
