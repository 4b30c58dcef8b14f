"""Decompositions against their definitions, numpy and each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.common.linalg import dominant_basis, fix_signs, project_out, randomized_svd, svd, whitening
from gnomon.errors import MethodError


def falling(m: int, n: int, decay: float, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix whose singular values are 1, decay, decay^2, ..."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return (U * decay ** torch.arange(k, dtype=torch.float64) @ V.T).to(dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_svd_rebuilds_the_matrix_and_agrees_with_numpy(m: int, n: int, seed: int) -> None:
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, S, Vh = svd(a)
    assert torch.allclose(U * S @ Vh, a, atol=1e-12)
    assert np.allclose(S.numpy(), np.linalg.svd(a.numpy(), compute_uv=False), atol=1e-12)
    assert torch.allclose(U.T @ U, torch.eye(min(m, n), dtype=torch.float64), atol=1e-12)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_signs_do_not_depend_on_the_sign_of_the_matrix() -> None:
    a = falling(7, 5, 0.5)
    U, S, Vh = svd(a)
    V, T, Wh = svd(-a)
    assert torch.allclose(U, V, atol=1e-5)
    assert torch.allclose(S, T, atol=1e-6)
    assert torch.allclose(Vh, -Wh, atol=1e-5)


def test_fix_signs_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(3)
    U, Vh = torch.randn(6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    U2, Vh2 = fix_signs(U, Vh)
    assert torch.allclose(U2 @ Vh2, U @ Vh, atol=1e-6)
    assert (U2.gather(0, U2.abs().argmax(0, keepdim=True)) >= 0).all()


def test_kept_parts_do_not_hold_the_whole_decomposition() -> None:
    U, _, Vh = svd(falling(40, 30, 0.9), rank=2)
    assert U.untyped_storage().nbytes() == 40 * 2 * 4
    assert Vh.untyped_storage().nbytes() == 2 * 30 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    a = falling(12, 9, 0.7, dtype=dtype)
    U, S, Vh = svd(a)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    assert torch.allclose(U * S @ Vh, a.float(), atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(120, 90), (90, 120), (100, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_randomised_equals_exact_where_the_spectrum_falls(m: int, n: int, dtype: torch.dtype) -> None:
    a = falling(m, n, 0.6, dtype=dtype)
    U, S, Vh = randomized_svd(a, 6)
    U0, S0, Vh0 = svd(a, 6)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert torch.allclose(S, S0, rtol=tolerance)
    assert torch.allclose(U, U0, atol=tolerance)
    assert torch.allclose(Vh, Vh0, atol=tolerance)
    assert U.shape == (m, 6)
    assert Vh.shape == (6, n)


def test_randomised_is_near_optimal_on_a_flat_spectrum() -> None:
    a = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    U, S, Vh = randomized_svd(a, 20)
    _, S0, _ = svd(a)
    error = torch.linalg.norm(a - U * S @ Vh)
    assert error <= 1.03 * S0[20:].norm()
    assert torch.allclose(U.T @ U, torch.eye(20), atol=1e-5)


def test_more_power_iterations_help() -> None:
    a = torch.randn(150, 200, generator=torch.Generator().manual_seed(0))
    kept = [float(randomized_svd(a, 20, power_iterations=k)[1].norm()) for k in (0, 2, 6)]
    assert kept[0] < kept[1] < kept[2]


def test_randomised_falls_back_to_exact() -> None:
    a = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    for options in ({"rank": 12}, {"rank": 3, "exact_below": 20}, {"rank": 50}):
        rank = min(options["rank"], 20)
        for left, right in zip(randomized_svd(a, **options), svd(a, rank), strict=True):
            assert torch.equal(left, right)
    assert not torch.equal(randomized_svd(a, 3, exact_below=19, power_iterations=0)[1], svd(a, 3)[1])


def test_randomised_repeats_and_leaves_the_global_generator_alone() -> None:
    a = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first, second = randomized_svd(a, 4), randomized_svd(a, 4)
    other = randomized_svd(a, 4, generator=torch.Generator().manual_seed(7), power_iterations=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_randomised_survives_a_matrix_of_lower_rank() -> None:
    a = falling(60, 50, 0.5)[:, :1] @ torch.ones(1, 50)
    U, S, Vh = randomized_svd(a, 5)
    assert torch.allclose(U * S @ Vh, a, atol=1e-5)
    assert torch.isfinite(U).all()
    assert torch.linalg.norm(S[1:]) < 1e-5


def captured(a: torch.Tensor, basis: torch.Tensor) -> float:
    """Energy of `a` in the basis over that in the best basis of the same size."""
    return float(torch.linalg.norm(basis.T @ a) / svd(a)[1][: basis.shape[1]].norm())


@pytest.mark.parametrize(("d", "n"), [(150, 220), (220, 150), (180, 180)])
def test_dominant_basis_from_nothing_and_from_a_start(d: int, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    before = falling(d, n, 0.97)
    after = before + 1.0 * falling(d, n, 0.97, seed=5) + 0.002 * torch.randn(d, n, generator=generator)
    old = svd(before, 24)[0]
    cold, warm = dominant_basis(after, 24), dominant_basis(after, 24, start=old)
    for basis in (cold, warm):
        assert basis.shape == (d, 24)
        assert torch.allclose(basis.T @ basis, torch.eye(24), atol=1e-5)
    assert captured(after, old) < 0.95
    assert captured(after, warm) > 0.96
    assert captured(after, cold) > 0.99
    more = dominant_basis(after, 24, start=old, power_iterations=8)
    assert captured(after, more) > 0.9995
    overlap = (more.T @ svd(after, 24)[0]).diagonal().abs()
    assert overlap[:10].min() > 0.99  # the vectors themselves, not only their span


def test_a_warm_start_finds_a_direction_outside_the_start() -> None:
    a = falling(150, 150, 0.9)
    new = torch.linalg.qr(torch.cat([svd(a, 20)[0], torch.randn(150, 1, generator=torch.Generator())], 1)).Q
    changed = a + 5 * new[:, 20:] @ new[:, 20:].T
    basis = dominant_basis(changed, 20, start=new[:, :20])
    assert float((basis[:, 0] @ new[:, 20]).abs()) > 0.99


def test_a_basis_that_is_right_stays_as_it_is() -> None:
    a = falling(150, 150, 0.8)
    start = svd(a, 6)[0] * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    assert torch.allclose(dominant_basis(a, 6, start=start), start, atol=1e-4)
    # also where the exact decomposition is taken
    assert torch.allclose(dominant_basis(a, 6, start=start, oversample=200), start, atol=1e-4)


def test_dominant_basis_edges() -> None:
    low = torch.outer(torch.arange(1.0, 101.0), torch.ones(90))
    for start in (None, torch.eye(100)[:, :5]):
        basis = dominant_basis(low, 5, start=start)
        assert torch.isfinite(basis).all()
        assert torch.allclose(basis @ (basis.T @ low), low, rtol=1e-3)
    assert torch.isfinite(dominant_basis(torch.zeros(60, 50), 3)).all()
    small = falling(20, 12, 0.7, dtype=torch.bfloat16)
    assert torch.equal(dominant_basis(small, 5), svd(small, 5)[0])
    assert dominant_basis(small, 50).shape == (20, 12)
    assert dominant_basis(falling(90, 90, 0.9, dtype=torch.float64), 3).dtype == torch.float64
    a = falling(90, 90, 0.9)
    state = torch.get_rng_state()
    assert torch.equal(dominant_basis(a, 4, start=svd(a, 2)[0]), dominant_basis(a, 4, start=svd(a, 2)[0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_whitening_of_a_full_rank_gram() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    M, M_pinv = whitening(gram)
    assert M.dtype == M_pinv.dtype == torch.float64
    assert torch.allclose(M @ M.T, gram.double(), rtol=1e-6)
    assert torch.allclose(M_pinv @ M, torch.eye(8, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(M_pinv @ gram.double() @ M_pinv.T, torch.eye(8, dtype=torch.float64), atol=1e-6)


def test_whitening_drops_what_was_never_seen() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    M, M_pinv = whitening(x.T @ x)
    assert M.shape == (8, 3)
    assert M_pinv.shape == (3, 8)
    assert torch.isfinite(M_pinv).all()
    assert torch.allclose(M @ M.T, (x.T @ x).double(), atol=1e-5)
    assert (M_pinv[:, 5].abs() < 1e-12).all()
    # scaling the Gram matrix scales the factors and drops nothing else
    M2, _ = whitening(1e-12 * (x.T @ x))
    assert torch.allclose(M2, 1e-6 * M, rtol=1e-4, atol=1e-12)
    assert whitening(x.T @ x, cutoff=0.0)[0].shape[1] >= 3


def test_project_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, basis = torch.randn(2, 3, 7, generator=generator), torch.randn(7, 2, generator=generator)
    out = project_out(x, basis)
    assert torch.allclose(out @ basis, torch.zeros(2, 3, 2), atol=1e-5)
    assert torch.allclose(project_out(out, basis), out, atol=1e-5)
    doubled = torch.cat([basis, basis @ torch.ones(2, 1)], 1)  # linearly dependent columns
    assert torch.allclose(project_out(x, doubled), out, atol=1e-5)
    assert torch.allclose(project_out(x, basis[:, 0]) @ basis[:, 0], torch.zeros(2, 3), atol=1e-5)
    assert project_out(x.bfloat16(), basis).dtype == torch.bfloat16
    assert torch.equal(project_out(x, torch.zeros(7, 1)), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: svd(torch.ones(3)), r"shape \(3,\); a matrix with 2 dimensions"),
        (lambda: svd(torch.ones(3, 3, dtype=torch.long)), r"torch.int64; a real floating dtype"),
        (lambda: svd(torch.full((2, 2), float("nan"))), "NaN or infinite"),
        (lambda: svd(torch.ones(2, 2), rank=0), "rank = 0; it must be at least 1"),
        (lambda: randomized_svd(torch.ones(4, 4), -1), "rank = -1; it must be at least 1"),
        (lambda: randomized_svd(torch.ones(4, 4), 1, oversample=-1), "oversample = -1, power_iterations = 2"),
        (lambda: randomized_svd(torch.full((40, 40), float("inf")), 2), "NaN or infinite"),
        (lambda: randomized_svd(torch.ones(4), 2), "a matrix with 2 dimensions"),
        (lambda: dominant_basis(torch.full((40, 40), float("nan")), 2), "NaN or infinite"),
        (lambda: dominant_basis(torch.ones(40, 40), 0), "rank = 0"),
        (lambda: whitening(torch.ones(2, 3)), r"gram has the shape \(2, 3\); a Gram matrix is square"),
        (lambda: whitening(torch.zeros(3, 3)), "No eigenvalue of gram is above"),
        (lambda: project_out(torch.ones(3), torch.ones(4)), "x has 3 features and basis 4"),
    ],
)
def test_messages(call: object, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        call()
