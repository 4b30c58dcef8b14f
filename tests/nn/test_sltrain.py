"""The sparse plus low-rank linear map and its layer: against the definition, in value and gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gnomon.errors import MethodError
from gnomon.nn import SparseLowRankLinear, dense_weight, draw_support, sparse_low_rank_linear, spectra
from gnomon.nn.sltrain.functional import takes_factored_path
from gnomon.nn.sltrain.layer import default_alpha

REFERENCE = Path(__file__).parent.parent / "reference" / "sltrain.npz"
PATHS = ["dense", "factored"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def defined(x: Tensor, A: Tensor, B: Tensor, values: Tensor, indices: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The equations as they stand: W = s B A, W.flat[I] += V, y = x W^T + bias."""
    W = scale * (B @ A)
    W = W.reshape(-1).index_put((indices.long(),), values, accumulate=True).view(W.shape)
    return x @ W.T + bias


def drawn(m: int, n: int, r: int, k: int, batch: tuple[int, ...], seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    g = seeded(seed)
    shapes = ((*batch, n), (r, n), (m, r), (k,), (m,))
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    indices = torch.randperm(m * n, generator=g)[:k].sort().values.int()
    return leaves, indices, torch.randn(*batch, m, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_reference_arrays(path: Any) -> None:
    arrays = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE).items()}
    leaves = [arrays[name].clone().requires_grad_() for name in ("x", "A", "B", "V", "bias")]
    x, A, B, values, bias = leaves
    y = sparse_low_rank_linear(x, A, B, values, arrays["I"], bias, scale=float(arrays["scale"]), path=path)
    y.backward(arrays["gy"])
    found = {"y": y.detach()} | {f"g{n}": t.grad for n, t in zip(("x", "A", "B", "V", "bias"), leaves, strict=True)}
    for name, value in found.items():
        assert float((value - arrays[name]).abs().max()) <= 1e-6 * float(arrays[name].abs().max()), name


@pytest.mark.parametrize("path", [*PATHS, "auto"])
@pytest.mark.parametrize(("m", "n", "r", "k"), [(7, 5, 2, 9), (1, 6, 3, 2), (6, 1, 1, 5), (5, 5, 8, 25)])
@pytest.mark.parametrize("batch", [(3,), (2, 3), (), (0, 4)])
def test_value_and_gradient_of_the_definition(path: Any, m: int, n: int, r: int, k: int, batch: Any) -> None:
    leaves, indices, gy = drawn(m, n, r, k, batch)
    x, A, B, values, bias = leaves
    expected = defined(x, A, B, values, indices, bias, 0.75)
    wanted = torch.autograd.grad(expected, leaves, gy)
    y = sparse_low_rank_linear(x, A, B, values, indices, bias, scale=0.75, path=path)
    torch.testing.assert_close(y, expected)
    for found, right in zip(torch.autograd.grad(y, leaves, gy), wanted, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck_first_and_second_order(path: Any) -> None:
    leaves, indices, _ = drawn(4, 3, 2, 5, (3,))

    def run(x: Tensor, A: Tensor, B: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_low_rank_linear(x, A, B, values, indices, bias, scale=0.5, path=path)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen", range(5))
def test_frozen_parts_get_no_gradient_and_the_others_the_same(path: Any, frozen: int) -> None:
    leaves, indices, gy = drawn(6, 5, 2, 7, (4,))
    names = ("x", "A", "B", "values", "bias")

    def gradients() -> list[Tensor | None]:
        for leaf in leaves:
            leaf.grad = None
        x, A, B, values, bias = leaves
        sparse_low_rank_linear(x, A, B, values, indices, bias, path=path).backward(gy)
        return [leaf.grad for leaf in leaves]

    full = gradients()
    leaves[frozen].requires_grad_(False)
    for name, index, gradient in zip(names, range(5), gradients(), strict=True):
        if index == frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, full[index], msg=name)


def test_limits_without_sparse_entries_and_without_a_low_rank_part() -> None:
    (x, A, B, values, bias), indices, _ = drawn(6, 5, 2, 7, (4,))
    empty = values[:0]
    for path in PATHS:
        factored = sparse_low_rank_linear(x, A, B, empty, indices[:0], bias, scale=2.0, path=path)  # type: ignore[arg-type]
        torch.testing.assert_close(factored, 2.0 * (x @ A.T) @ B.T + bias)
        sparse = sparse_low_rank_linear(x, A, 0 * B, values, indices, bias, path=path)  # type: ignore[arg-type]
        S = torch.zeros(30, dtype=torch.float64)
        S[indices.long()] = values.detach()
        torch.testing.assert_close(sparse, x @ S.view(6, 5).T + bias)


def test_only_input_and_factors_are_kept_between_the_passes() -> None:
    m, n, r, k = 96, 80, 4, 30
    leaves, indices, gy = drawn(m, n, r, k, (200,))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        x, A, B, values, bias = leaves
        y = sparse_low_rank_linear(x, A, B, values, indices, bias)
    assert sorted(kept) == sorted([200 * n, r * n, m * r, k, k])
    y.backward(gy)


def test_the_switch_between_the_paths() -> None:
    assert takes_factored_path(1, 64, 64)
    assert takes_factored_path(31, 64, 64)
    assert not takes_factored_path(32, 64, 64)
    with pytest.raises(MethodError, match="path = 'fast' is unknown"):
        sparse_low_rank_linear(
            torch.ones(1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.zeros(1).int(), path="fast"
        )  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_rounds_the_weight_once(path: Any) -> None:
    (x, A, B, values, bias), indices, _ = drawn(40, 30, 8, 120, (64,))
    low = [t.detach().bfloat16() for t in (x, A, B, values, bias)]
    exact = defined(*[t.double() for t in low[:4]], indices, low[4].double(), 0.5)  # type: ignore[arg-type]
    found = sparse_low_rank_linear(*low[:4], indices, low[4], scale=0.5, path=path)  # type: ignore[arg-type]
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.01
    W = dense_weight(low[1], low[2], low[3], indices, 0.5)
    whole = dense_weight(*[t.float() for t in low[1:4]], indices, 0.5)  # type: ignore[arg-type]
    assert torch.equal(W, whole.bfloat16())


@pytest.mark.parametrize("path", PATHS)
def test_autocast_casts_like_a_linear_layer(path: Any) -> None:
    leaves, indices, gy = drawn(12, 10, 3, 20, (5,))
    x, A, B, values, bias = (leaf.detach().float().requires_grad_() for leaf in leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_low_rank_linear(x, A, B, values, indices, bias, path=path)
        linear = nn.functional.linear(x, torch.zeros(12, 10))
        y.backward(gy.bfloat16())  # inside as well: the backward pass must not be cast again
    assert y.dtype == linear.dtype == torch.bfloat16
    exact = torch.autograd.grad(defined(*leaves[:4], indices, leaves[4], 1.0), leaves, gy)  # type: ignore[arg-type]
    for leaf, right in zip((x, A, B, values, bias), exact, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert float((leaf.grad.double() - right).norm() / right.norm()) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert sparse_low_rank_linear(x, A, B, values, indices, bias, path=path).dtype == torch.float32


def test_gradients_of_single_examples() -> None:
    (x, A, B, values, bias), indices, _ = drawn(6, 5, 2, 7, (4,))
    fixed = [t.detach() for t in (A, B, values, bias)]

    def loss(values: Tensor, row: Tensor) -> Tensor:
        return sparse_low_rank_linear(row, fixed[0], fixed[1], values, indices, fixed[3]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(fixed[2], x.detach())
    for row, gradient in zip(x.detach(), each, strict=True):
        torch.testing.assert_close(gradient, torch.func.grad(loss)(fixed[2], row))


def test_torch_compile_takes_the_layer_whole() -> None:
    layer = SparseLowRankLinear(20, 16, rank=4, sparsity=0.1)
    with torch.no_grad():
        layer.B.uniform_(-1, 1, generator=seeded())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (3, 40):
        x = torch.randn(rows, 20, generator=seeded())
        torch.testing.assert_close(compiled(x), layer(x))
        layer.zero_grad()
        layer(x).square().sum().backward()
        right = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        compiled(x).square().sum().backward()
        for parameter, gradient in zip(layer.parameters(), right, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


# ---- the support -------------------------------------------------------------------------------------------------


@given(m=st.integers(1, 40), n=st.integers(1, 40), sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_a_support_has_its_size_and_different_ascending_positions(m: int, n: int, sparsity: float, seed: int) -> None:
    support = draw_support(m, n, sparsity, seeded(seed))
    assert support.dtype == torch.int32
    assert len(support) == int(sparsity * m * n)
    assert bool((support[1:] > support[:-1]).all())
    assert len(support) == 0 or (int(support[0]) >= 0 and int(support[-1]) < m * n)
    assert torch.equal(support, draw_support(m, n, sparsity, seeded(seed)))


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_every_support_is_equally_likely(sparsity: float) -> None:
    generator, counts = seeded(), np.zeros(1024)
    draws, size = 6000, int(sparsity * 10)
    for _ in range(draws):
        counts[sum(1 << int(i) for i in draw_support(2, 5, sparsity, generator))] += 1
    kinds = [c for code, c in enumerate(counts) if bin(code).count("1") == size]
    assert len(kinds) == math.comb(10, size)
    assert sum(kinds) == draws
    expected = draws / len(kinds)
    chi_square = sum((c - expected) ** 2 / expected for c in kinds)
    assert chi_square < 170  # 119 degrees of freedom: 170 is exceeded with probability 0.002


def test_the_support_of_a_wide_layer_is_drawn_without_a_permutation() -> None:
    support = draw_support(4096, 4096, 0.01, seeded())
    assert len(support) == 167772
    assert abs(float(support.double().mean()) / 4096**2 - 0.5) < 0.005


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_seed_gives_the_same_layer_on_an_accelerator() -> None:
    here, there = (SparseLowRankLinear(64, 48, rank=4, device=device) for device in ("cpu", "cuda"))
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor.cpu(), here.state_dict()[name]), name


# ---- the layer ---------------------------------------------------------------------------------------------------


def test_initial_values() -> None:
    layer = SparseLowRankLinear(400, 100, rank=16, sparsity=0.05, generator=seeded(3))
    assert not layer.B.any()
    for tensor, bound in ((layer.A, 0.05), (layer.values, 0.05), (layer.bias, 0.1)):
        assert 0.9 * bound < float(tensor.detach().abs().max()) <= bound
        assert abs(float(tensor.detach().std()) / (bound / math.sqrt(3)) - 1) < 0.15
    assert layer.scale == 1.0
    again = SparseLowRankLinear(400, 100, rank=16, sparsity=0.05, generator=seeded(3), dtype=torch.bfloat16)
    assert torch.equal(again.A, layer.A.bfloat16())
    assert torch.equal(again.indices, layer.indices)
    assert again.indices.dtype == torch.int32


def test_default_alpha_is_the_papers_at_its_ranks() -> None:
    assert [default_alpha(r) for r in (1, 32, 64, 128, 256, 512, 1024)] == [1, 32, 32, 32, 16, 8, 8]


def test_layer_equals_the_dense_layer_it_becomes() -> None:
    for bias in (True, False):
        layer = SparseLowRankLinear(21, 16, rank=4, sparsity=0.1, alpha=3.0, bias=bias)
        with torch.no_grad():
            layer.B.uniform_(-1, 1, generator=seeded())
        dense = layer.to_dense()
        assert isinstance(dense, nn.Linear)
        assert (dense.bias is None) == (not bias)
        for rows in (2, 60):
            x = torch.randn(rows, 21, generator=seeded())
            assert float((layer(x) - dense(x)).detach().abs().max()) < 1e-6
        torch.testing.assert_close(layer.weight, dense.weight)
    layer.weight.sum().backward()
    assert bool(layer.values.grad.eq(1).all())


def test_conv1d_is_transposed_there_and_back() -> None:
    stock = Conv1D(12, 20)
    layer = SparseLowRankLinear.from_linear(stock, rank=12, sparsity=0.5, init="svd")
    assert (layer.in_features, layer.out_features) == (20, 12)
    back = layer.to_dense()
    assert isinstance(back, Conv1D)
    torch.testing.assert_close(back.weight, stock.weight, atol=1e-6, rtol=1e-5)
    x = torch.randn(3, 20, generator=seeded())
    torch.testing.assert_close(back(x), layer(x), atol=1e-5, rtol=1e-5)
    assert "transposed" not in layer.state_dict()


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_svd_start_is_the_best_low_rank_weight_and_the_rest_on_the_support(alpha: float | None) -> None:
    stock = nn.Linear(30, 24)
    layer = SparseLowRankLinear.from_linear(stock, 5, 0.2, alpha, init="svd", generator=seeded())
    U, S, Vh = torch.linalg.svd(stock.weight.detach())
    best = (U[:, :5] * S[:5]) @ Vh[:5]
    torch.testing.assert_close(layer.scale * layer.B @ layer.A, best, atol=1e-5, rtol=1e-4)
    found, flat = layer.weight.detach().reshape(-1), stock.weight.detach().reshape(-1)
    on = torch.zeros(720, dtype=torch.bool)
    on[layer.indices.long()] = True
    torch.testing.assert_close(found[on], flat[on], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[~on], best.reshape(-1)[~on], atol=1e-5, rtol=1e-4)
    assert torch.equal(layer.bias, stock.bias)


def test_trainable_scale_starts_at_tanh_of_one_and_learns() -> None:
    layer = SparseLowRankLinear(20, 16, rank=4, sparsity=0.1, trainable_scale=True)
    assert layer.scale == pytest.approx(math.tanh(1.0))
    with torch.no_grad():
        layer.B.uniform_(-1, 1, generator=seeded())
    x = torch.randn(5, 20, generator=seeded())
    layer(x).sum().backward()
    low_rank = float((x @ layer.A.T @ layer.B.T).sum().detach())
    assert float(layer.scaling.grad) == pytest.approx(low_rank * (1 - math.tanh(1.0) ** 2), rel=1e-4)
    torch.testing.assert_close(layer.to_dense()(x), layer(x), atol=1e-5, rtol=1e-5)
    assert "scale=trained" in repr(layer)


def test_spectra_are_those_of_the_parts() -> None:
    layer = SparseLowRankLinear(20, 16, rank=4, sparsity=0.1)
    with torch.no_grad():
        layer.B.uniform_(-1, 1, generator=seeded())
    found = spectra(layer)
    torch.testing.assert_close(found["weight"], torch.linalg.svdvals(layer.weight.detach()))
    assert int((found["low_rank"] > 1e-5).sum()) == 4
    total = float(found["sparse"].square().sum())
    assert total == pytest.approx(float(layer.values.detach().square().sum()), rel=1e-5)


def test_global_randomness_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    layer = SparseLowRankLinear(20, 16, rank=4, sparsity=0.1)
    layer.to_dense()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank = 0; it must be a whole number of at least 1"),
        ({"rank": 2.0}, r"rank = 2.0; it must be a whole number"),
        ({"rank": 2, "sparsity": 0.0}, r"sparsity = 0.0; it is the share .* between 0 and 1"),
        ({"rank": 2, "sparsity": 1.0}, r"sparsity = 1.0"),
        ({"rank": 2, "sparsity": float("nan")}, r"sparsity = nan"),
        ({"rank": 2, "alpha": 0.0}, r"alpha = 0.0; it must be above 0"),
        ({"rank": 2, "alpha": float("inf")}, r"alpha = inf"),
        ({"rank": 2, "sparsity": 0.001}, r"sparsity = 0.001 of a weight of 16 x 20 is no entry at all"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        SparseLowRankLinear(20, 16, **options)
