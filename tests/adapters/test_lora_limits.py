"""Polynomial attention: features, forward, the chained backward, and the gradients of LoRA's factors."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gnomon.adapters.lora_limits import (
    PolyAttention,
    approximate_lora_gradient,
    attention_gradients,
    error_bound,
    exp_coefficients,
    feature_count,
    head_scores,
    needed_degree,
    poly_attention,
    poly_features,
    polynomial_gradients,
    relative_errors,
    scaling_report,
)
from gnomon.errors import MethodError

F64 = torch.float64


def normal(*shape: int, seed: int = 0, largest: float | None = None, dtype: torch.dtype = F64) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (x if largest is None else x / x.abs().max() * largest).to(dtype)


def four(tokens: int = 24, width: int = 3, heads: int = 2, largest: float = 1.0) -> list[Tensor]:
    return [normal(1, heads, tokens, width, seed=i, largest=largest) for i in range(4)]


def by_loops(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, weight) -> tuple[Tensor, ...]:
    """The equations, entry by entry, for one head; weight(i, j, q . k) is unnormalised, None where not seen."""
    tokens = len(q)
    p = torch.zeros(tokens, tokens, dtype=F64)
    for i, j in itertools.product(range(tokens), range(tokens)):
        p[i, j] = weight(i, j, float(q[i] @ k[j])) or 0.0
    p = p / p.sum(1, keepdim=True)
    out, dq, dk, dv = torch.zeros_like(v), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(tokens):
        out[i] = sum(p[i, j] * v[j] for j in range(tokens))
        rho = d_out[i] @ out[i]
        for j in range(tokens):
            ds = p[i, j] * (d_out[i] @ v[j] - rho)
            dq[i] += ds * k[j]
            dk[j] += ds * q[i]
            dv[j] += p[i, j] * d_out[i]
    return out, dq, dk, dv


def ours(q, k, v, d_out, degree, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = poly_attention(*leaves, degree, scale=1.0, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out))


def taylor(z: float, degree: int) -> float:
    return sum(z**j / math.factorial(j) for j in range(degree + 1))


# features


@given(dim=st.integers(1, 5), degree=st.integers(0, 7), seed=st.integers(0, 100))
def test_features_give_the_taylor_polynomial_of_the_dot_product(dim, degree, seed):
    q, k = normal(7, dim, seed=seed), normal(7, dim, seed=seed + 1)
    phi = poly_features(q, degree)
    assert phi.shape == (7, math.comb(dim + degree, degree)) == (7, feature_count(dim, degree))
    z = (q * k).sum(-1)
    expected = sum(z**j / math.factorial(j) for j in range(degree + 1))
    torch.testing.assert_close((phi * poly_features(k, degree)).sum(-1), expected, rtol=1e-9, atol=1e-9)


def test_features_are_the_monomials_over_the_root_of_the_factorials():
    x = torch.tensor([2.0, 3.0], dtype=F64)
    expected = sorted(
        2.0**a * 3.0**b / math.sqrt(math.factorial(a) * math.factorial(b))
        for a in range(5) for b in range(5) if a + b <= 4
    )  # fmt: skip
    assert sorted(poly_features(x, 4).tolist()) == pytest.approx(expected)
    assert poly_features(x.half(), 8).dtype == torch.float32
    assert bool(torch.isfinite(poly_features(torch.full((2,), 60.0).half(), 8)).all())


def test_even_degrees_are_positive_and_odd_ones_are_not():
    z = torch.linspace(-60, 20, 4001, dtype=F64)
    for degree in (2, 4, 6, 8):
        assert all(taylor(x, degree) > 0 for x in z.tolist())
    for degree, root in ((1, -1.0), (3, -1.6)):
        assert taylor(root - 0.01, degree) < 0 < taylor(root + 0.05, degree)
    # rows of features: one key at -2, so that the normaliser of degree 1 is -1
    q, k = torch.tensor([[1.0]], dtype=F64), torch.tensor([[-2.0]], dtype=F64)
    assert float(poly_features(q, 1) @ poly_features(k, 1).T) == -1.0


def test_the_bound_is_above_the_error_and_the_degree_is_the_smallest():
    for z, degree in itertools.product((0.3, 1.0, 3.0), (2, 4, 8)):
        for x in (-z, z):
            assert abs(math.exp(x) - taylor(x, degree)) <= error_bound(z, degree) / 2 * 1.0000001
    for z, eps in itertools.product((0.01, 1.0, 5.0, 20.0), (1e-1, 1e-3)):
        degree = needed_degree(z, eps)
        assert degree % 2 == 0
        assert error_bound(z, degree) <= eps
        assert degree == 2 or error_bound(z, degree - 2) > eps
    assert error_bound(0.0, 2) == 0.0
    assert error_bound(1e4, 2) == math.inf


def test_chebyshev_has_a_smaller_largest_error_on_its_span():
    z = torch.linspace(-3, 3, 301, dtype=F64)
    values = [sum(c * z**j for j, c in enumerate(exp_coefficients(6, s))) for s in (None, 3.0)]
    errors = [float((v - z.exp()).abs().max()) for v in values]
    assert errors[1] < errors[0] / 10
    assert exp_coefficients(3) == pytest.approx((1, 1, 1 / 2, 1 / 6))


# attention


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("center", [True, False])
def test_output_and_gradients_are_those_of_the_equations(degree, center):
    q, k, v, d_out = four()
    found = ours(q, k, v, d_out, degree, center=center, chunk=5)
    for h in range(2):
        keys = k[0, h] - k[0, h].mean(0) if center else k[0, h]
        expected = by_loops(q[0, h], keys, v[0, h], d_out[0, h], lambda i, j, z: taylor(z, degree))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[0, h], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 5, 7, 24, 100])
def test_causal_has_exp_inside_chunks_and_the_polynomial_between(chunk):
    q, k, v, d_out = four()
    found = ours(q, k, v, d_out, 2, center=False, causal=True, chunk=chunk)

    def weight(i: int, j: int, z: float) -> float | None:
        return None if j > i else math.exp(z) if i // chunk == j // chunk else taylor(z, 2)

    for h in range(2):
        expected = by_loops(q[0, h], k[0, h], v[0, h], d_out[0, h], weight)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[0, h], b, rtol=1e-10, atol=1e-12)


def test_one_causal_chunk_is_exact_attention_also_for_large_scores():
    q, k, v, d_out = (30 * x if i < 2 else x for i, x in enumerate(four(tokens=40)))
    found = ours(q, k, v, d_out, 2, causal=True, chunk=40)
    exact = attention_gradients(q[0], k[0], v[0], d_out[0], causal=True)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_high_degrees_reach_machine_precision(causal):
    q, k, v, d_out = four(tokens=64, width=2, largest=2.0)
    found = ours(q, k, v, d_out, 24, causal=causal, chunk=16)
    exact = attention_gradients(q[0], k[0], v[0], d_out[0], causal=causal)
    assert float(relative_errors([x[0] for x in found], exact).max()) < 1e-12


def test_exact_gradients_are_those_of_the_equations():
    q, k, v, d_out = (x[0] for x in four())
    found = attention_gradients(q, k, v, d_out)
    for h in range(2):
        for a, b in zip(found, by_loops(q[h], k[h], v[h], d_out[h], lambda i, j, z: math.exp(z)), strict=True):
            torch.testing.assert_close(a[h], b, rtol=1e-12, atol=1e-13)


TABLE = {  # Gamma -> relative errors at degrees 2, 4, 6, 8, to an order of magnitude; d 4, L 256
    0.25: (1e-6, 8e-11), 0.5: (8e-5, 8e-8), 1.0: (5e-3, 8e-5, 1e-6, 1e-8), 1.5: (4e-2, 3e-3, 3e-4, 2e-5),
    2.0: (0.15, 3e-2, 8e-3, 1e-3), 3.0: (0.46, 0.25, 0.13, 0.07),
}  # fmt: skip


@pytest.mark.parametrize("gamma", TABLE)
def test_errors_are_of_the_known_size(gamma):
    q, k, v, d_out = (normal(1, 1, 256, 4, seed=10 + i, largest=gamma) for i in range(4))
    exact = attention_gradients(q[0], k[0], v[0], d_out[0])
    for degree, expected in zip((2, 4, 6, 8), TABLE[gamma], strict=False):
        errors = relative_errors([x[0] for x in ours(q, k, v, d_out, degree)], exact)
        assert expected / 10 < float(errors.mean()) < expected * 10, degree


def test_centring_and_shifts_of_keys():
    q, k, v, d_out = four()
    shifted = k + 3.0
    exact = [attention_gradients(q[0], x[0], v[0], d_out[0]) for x in (k, shifted)]
    for a, b in zip(*exact, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(ours(q, k, v, d_out, 2), ours(q, shifted, v, d_out, 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(ours(q, k, v, d_out, 2, center=False)[0], ours(q, shifted, v, d_out, 2, center=False)[0])


def test_rows_of_the_score_gradient_add_up_to_zero():
    """Seen from outside: the gradients of all keys add up to zero, and those of a constant v vanish."""
    q, k, v, d_out = four()
    for causal in (False, True):
        _, _, dk, _ = ours(q, k, v, d_out, 2, causal=causal, chunk=7, center=False)
        probe = ours(q, k + normal(1, 1, 1, 3, seed=9), v, d_out, 2, causal=causal, chunk=24, center=False)
        if causal:  # exact inside one chunk: a shift of the keys changes nothing, so the gradients add up to 0
            assert float(probe[2].sum(2).abs().max()) < 1e-12
        flat = ours(q, k, torch.ones_like(v), d_out, 2, causal=causal, chunk=7)
        assert float(flat[1].abs().max()) < 1e-12
        assert float(flat[2].abs().max()) < 1e-12
        assert torch.isfinite(dk).all()


def test_the_score_gradient_has_low_rank():
    q, k, v, d_out = (normal(80, 2, seed=i) for i in range(4))
    phi_q, phi_k = poly_features(q, 2), poly_features(k, 2)
    p = phi_q @ phi_k.T / (phi_q @ phi_k.sum(0))[:, None]
    hadamard = p * (d_out @ v.T)
    assert int(torch.linalg.matrix_rank(hadamard)) <= feature_count(2, 2) * 2
    dense = polynomial_gradients(q[None], k[None], v[None], d_out[None], 2)
    torch.testing.assert_close(dense[0][0], p @ v)
    torch.testing.assert_close(dense[1][0], (hadamard - p * (d_out * (p @ v)).sum(1, keepdim=True)) @ k)


@pytest.mark.parametrize("causal", [False, True])
def test_padded_keys_are_dropped(causal):
    q, k, v, d_out = four(tokens=20)
    keep = torch.ones(1, 20, dtype=torch.bool)
    keep[0, 15:] = False
    d_out = d_out * keep[:, None, :, None]
    k[:, :, 15:] = 1e3  # what stands in padding must not matter
    padded = ours(q, k, v, d_out, 4, causal=causal, key_mask=keep, chunk=6)
    short = ours(*(x[:, :, :15] for x in (q, k, v, d_out)), 4, causal=causal, chunk=6)
    for a, b in zip(padded, short, strict=True):
        torch.testing.assert_close(a[:, :, :15], b, rtol=1e-10, atol=1e-12)
    assert not padded[2][:, :, 15:].any()
    assert not padded[3][:, :, 15:].any()


def test_a_query_that_sees_no_key_gives_zeros():
    q, k, v, d_out = four(tokens=8)
    keep = torch.ones(1, 8, dtype=torch.bool)
    keep[0, :3] = False
    found = ours(q, k, v, d_out, 2, causal=True, key_mask=keep, chunk=4)
    assert not found[0][:, :, :3].any()
    assert all(torch.isfinite(x).all() for x in found)


def test_grouped_queries_share_keys():
    q, k, v, d_out = normal(2, 4, 12, 3), normal(2, 2, 12, 3, seed=1), normal(2, 2, 12, 5, seed=2), normal(2, 4, 12, 5)
    found = ours(q, k, v, d_out, 2)
    full = ours(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), d_out, 2)
    torch.testing.assert_close(found[0], full[0])
    torch.testing.assert_close(found[2], full[2].unflatten(1, (2, 2)).sum(2))
    assert found[3].shape == (2, 2, 12, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_autocast(dtype):
    q, k, v, _ = (x.to(dtype) for x in four())
    leaf = q.clone().requires_grad_()
    out = poly_attention(leaf, k, v, 8)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert leaf.grad.dtype == dtype
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert float((out.detach().double() - exact).norm() / exact.norm()) < {torch.float32: 1e-5}.get(dtype, 1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(poly_attention(q, k, v, 8), out.detach())


def test_heads_in_groups_and_the_module_give_the_same(monkeypatch):
    q, k, v, d_out = four(heads=5)
    whole = ours(q, k, v, d_out, 2)
    monkeypatch.setattr("gnomon.adapters.lora_limits.attention._STATE_BYTES", 1)
    for a, b in zip(whole, ours(q, k, v, d_out, 2), strict=True):
        torch.testing.assert_close(a, b)
    module = PolyAttention(2, center=False, causal=True, scale=1.0, chunk=4)
    expected = poly_attention(q, k, v, 2, center=False, causal=True, scale=1.0, chunk=4)
    assert torch.equal(module(q, k, v), expected)
    assert "degree=2, center=False, causal=True, scale=1.0, chunk=4" in repr(module)


def test_span_is_a_lower_error_and_a_negative_normaliser_is_refused():
    """Lower where scores fill the span; where most are near 0, Taylor is better on average."""
    q, k = torch.ones(1, 1, 61, 1, dtype=F64), torch.linspace(-3, 3, 61, dtype=F64).reshape(1, 1, 61, 1)
    v, d_out = normal(1, 1, 61, 1), normal(1, 1, 61, 1, seed=1)
    exact = attention_gradients(q[0], k[0], v[0], d_out[0])
    taylors, chebyshevs = (
        float(relative_errors([x[0] for x in ours(q, k, v, d_out, 6, span=s)], exact).max()) for s in (None, 3.0)
    )
    assert chebyshevs < taylors / 5
    z = torch.linspace(-20, 20, 401, dtype=F64)
    values = sum(c * z**j for j, c in enumerate(exp_coefficients(4, 20.0)))
    assert float(values.min()) < 0
    with pytest.raises(MethodError, match=r"a normaliser is -.*Leave span out"):
        poly_attention(q, torch.full_like(k, float(z[values.argmin()])), v, 4, span=20.0, scale=1.0, center=False)


# LoRA factors


def layer(full: bool = True, heads: int = 2, width: int = 3, model: int = 7, size: float = 1.0):
    rows = heads * width
    weights = {n: 0.3 * size * normal(rows, model, seed=i) for i, n in enumerate("qkv")}
    factors = {
        n: (normal(2, model, seed=10 + i), 0.2 * size * normal(rows, 2, seed=20 + i))
        for i, n in enumerate("qkv" if full else "qv")
    }
    return normal(20, model, seed=30), weights, factors, normal(20, rows, seed=31)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_lora_gradients_follow_the_formulas(full, causal):
    x, weights, factors, d_out = layer(full)
    options = {"degree": 2, "causal": causal, "chunk": 6}
    found = approximate_lora_gradient(x, weights, factors, d_out, scaling=0.5, heads=2, **options)
    projected = {
        n: x @ (w + (0.5 * factors[n][1] @ factors[n][0] if n in factors else 0)).T for n, w in weights.items()
    }
    split = [projected[n].unflatten(1, (2, 3)).transpose(0, 1)[None] for n in "qkv"]
    leaves = [t.clone().requires_grad_() for t in split]
    out = poly_attention(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, d_out.unflatten(1, (2, 3)).transpose(0, 1)[None])
    for n, g in zip("qkv", grads, strict=True):
        if n in factors:
            flat, (a, b) = g[0].transpose(0, 1).flatten(1), factors[n]
            torch.testing.assert_close(found.grads[n][0], 0.5 * b.T @ flat.T @ x)
            torch.testing.assert_close(found.grads[n][1], 0.5 * flat.T @ x @ a.T)
    assert set(found.grads) == set(factors)
    assert set(found.errors) == set(found.largest_errors) == {"output"} | {f"{n}/{f}" for n in factors for f in "AB"}


def test_lora_gradients_become_exact_and_exact_ones_are_optional():
    x, weights, factors, d_out = layer(size=0.5)
    errors = [
        max(approximate_lora_gradient(x, weights, factors, d_out, degree=g, heads=2).errors.values())
        for g in (2, 6, 20)
    ]
    assert errors[0] > errors[1] > 1e-10 > errors[2]
    assert approximate_lora_gradient(x, weights, factors, d_out, exact=False).errors == {}
    assert all(t.grad is None and not t.requires_grad for pair in factors.values() for t in pair)


def test_without_factors_of_k_its_sums_are_not_made(monkeypatch):
    import gnomon.adapters.lora_limits.attention as module

    asked = []
    original = module._backward_keys
    monkeypatch.setattr(module, "_backward_keys", lambda *a, keys: asked.append(keys) or original(*a, keys=keys))
    approximate_lora_gradient(*layer(full=False), exact=False)
    approximate_lora_gradient(*layer(full=True), exact=False)
    assert asked == [False, True]


# measuring


def test_head_scores_are_largest_entries_and_errors():
    q, k, v, _ = (x[0] for x in four(largest=2.0))
    found = head_scores(q, k, v, [2, 4], causal=True, seed=3)
    z = torch.einsum("nid,njd->nij", q, k).tril()
    centred = torch.einsum("nid,njd->nij", q, k - k.mean(1, keepdim=True)).tril()
    torch.testing.assert_close(found.largest, z.abs().amax((1, 2)))
    torch.testing.assert_close(found.centred, centred.abs().amax((1, 2)))
    d_out = torch.randn(24, 3, generator=torch.Generator().manual_seed(3), dtype=F64)
    for h in range(2):
        keys = k[h] - k[h].mean(0)
        dense = by_loops(q[h], keys, v[h], d_out, lambda i, j, z: taylor(z, 4) if j <= i else None)
        exact = by_loops(q[h], keys, v[h], d_out, lambda i, j, z: math.exp(z) if j <= i else None)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(dense, exact, strict=True)]
        assert float(found.output[1, h]) == pytest.approx(errors[0])
        assert float(found.gradient[1, h]) == pytest.approx(max(errors[1:]))


def test_scaling_report_measures_and_fits():
    report = scaling_report(4, 2, lengths=(64, 128, 256), rounds=1, causal=True)
    assert list(report.table.columns) == ["L", "exact_s", "approximate_s", "error_output", "error_gradient"]
    assert report.features == 15
    assert set(report.summary()) >= {"exact_exponent", "approximate_exponent"}
    from gnomon.adapters.lora_limits.scaling import _fitted

    made = report.table.assign(exact_s=report.table["L"] ** 2 / 128.0, approximate_s=report.table["L"] * 1.5)
    fitted = _fitted(made, 4, 2)
    assert fitted.exact_exponent == pytest.approx(2)
    assert fitted.approximate_exponent == pytest.approx(1)
    assert fitted.crossover == pytest.approx(192)
    assert fitted.constant == pytest.approx(192 / 60)
    assert math.isnan(_fitted(made.assign(approximate_s=1e9), 4, 2).crossover)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    q, k, v, _ = (x[0] for x in four())
    head_scores(q, k, v, [2])
    scaling_report(2, 2, lengths=(8, 16), rounds=1)
    assert torch.equal(before, torch.random.get_rng_state())


# refusals

BAD = [
    (lambda q, k, v: poly_attention(q, k, v, 3), "degree = 3: give an even number of at least 2"),
    (lambda q, k, v: PolyAttention(0), "degree = 0: give an even number"),
    (lambda q, k, v: PolyAttention(2, dropout=0.1), "unknown option 'dropout'. Allowed: degree"),
    (lambda q, k, v: poly_attention(q[0], k, v), "give (batch, heads, tokens, width)"),
    (lambda q, k, v: poly_attention(q, k[:, :, :3], v[:, :, :3]), "the same number of tokens"),
    (lambda q, k, v: poly_attention(q.long(), k, v), "give floating-point tensors"),
    (lambda q, k, v: poly_attention(q, k, v, chunk=0), "chunk = 0: a chunk has at least 1 token"),
    (lambda q, k, v: poly_attention(q, k, v, key_mask=torch.ones(1, 24)), "give booleans of shape (1, 24)"),
    (lambda q, k, v: poly_attention(*(x.repeat(1, 1, 1, 40) for x in (q, k, v)), 4), "Take degree=2 (7,381 features)"),
    (lambda q, k, v: poly_attention(q * torch.nan, k, v), "a normaliser is NaN: q, k or v hold NaN or infinity"),
    (lambda q, k, v: exp_coefficients(-1), "degree = -1"),
    (lambda q, k, v: exp_coefficients(2, 0.0), "span = 0.0: it is the largest"),
    (lambda q, k, v: needed_degree(-1.0, 0.1), "z = -1.0"),
    (lambda q, k, v: needed_degree(1.0, 0.0), "eps = 0.0"),
    (lambda q, k, v: scaling_report(lengths=(8,)), "give two different numbers of tokens"),
    (lambda q, k, v: scaling_report(gamma=0.0), "all are positive"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m[:25] for _, m in BAD])
def test_bad_arguments_are_refused(call, message):
    q, k, v, _ = four()
    with pytest.raises(MethodError, match=re.escape(message)):
        call(q, k, v)


def test_bad_layers_are_refused():
    x, weights, factors, d_out = layer()
    for changes, message in (
        ({"weights": {"q": weights["q"]}}, "it needs the weights of q, k and v"),
        ({"factors": {}}, "factors has nothing"),
        ({"x": x[:3]}, "of the same tokens"),
        ({"heads": 4}, "which 4 heads cannot share"),
        ({"weights": {**weights, "q": weights["q"].T}}, "give (out, in) as torch stores it"),
        ({"factors": {"q": factors["q"][::-1]}}, "the factors of q are A (6, 2) and B (2, 7): give (r, 7) and (6, r)"),
    ):
        given_ = {"x": x, "weights": weights, "factors": factors, "d_out": d_out, "heads": 2, **changes}
        with pytest.raises(MethodError, match=re.escape(message)):
            approximate_lora_gradient(**given_)
