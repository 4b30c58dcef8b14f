"""EoRA on one layer, held against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from gnomon.compress.eora import eora_layer, gradient_fit, input_space, output_error, quantise_adapter
from gnomon.errors import MethodError

SHAPES = [(16, 24), (24, 16), (31, 17), (1, 9), (9, 1)]


def problem(out=16, size=24, tokens=200, seed=0, dtype=torch.float64):
    """Return a weight error and correlated inputs with unequal scales."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=g, dtype=torch.float64) * torch.logspace(0, -2, size, dtype=torch.float64)
    x = torch.randn(tokens, size, generator=g, dtype=torch.float64) @ mix
    return torch.randn(out, size, generator=g, dtype=torch.float64).to(dtype), x.to(dtype)


def definition(delta, gram, rank, M=None):
    """The method as it is written down: eigenvectors, weighted error, SVD, pseudo-inverse."""
    values, Q = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1]
    values, Q = values[kept], Q[:, kept]
    M, M_inverse = (Q * values.sqrt(), (Q / values.sqrt()).T) if M is None else (M, torch.linalg.pinv(M))
    U, S, Vh = torch.linalg.svd(delta @ M, full_matrices=False)
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank] @ M_inverse, U[:, :rank] * root, S


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_equals_the_definition(out, size, exact):
    delta, x = problem(out, size)
    gram = x.T @ x
    for rank in {1, math.ceil(min(out, size) / 2), min(out, size)}:
        A, B = eora_layer(delta, gram, rank, exact=exact)
        wanted_A, wanted_B, _ = definition(delta, gram, rank)
        assert A.shape == (rank, size)
        assert B.shape == (out, rank)
        torch.testing.assert_close(B @ A, wanted_B @ wanted_A, rtol=1e-7, atol=1e-9)
        # each factor by itself, up to the sign of each pair
        torch.testing.assert_close(A.norm(dim=1), wanted_A.norm(dim=1), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(B.norm(dim=0), wanted_B.norm(dim=0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
def test_objective_is_the_tail_of_the_spectrum(exact):
    delta, x = problem()
    gram = x.T @ x
    S = definition(delta, gram, 1)[2]
    for rank in range(1, 16):
        A, B = eora_layer(delta, gram, rank, exact=exact)
        assert output_error(delta - B @ A, gram) == pytest.approx(float(S[rank:].square().sum()), rel=1e-5)


@pytest.mark.parametrize(("out", "size", "tokens"), [(90, 130, 400), (130, 90, 400), (90, 130, 60)])
def test_range_finder_finds_a_falling_spectrum(out, size, tokens):
    delta, x = problem(out, size, tokens=tokens)
    gram = x.T @ x
    A, B = eora_layer(delta, gram, 6, exact=False)
    C, D = eora_layer(delta, gram, 6, exact=True)
    assert A.shape == (6, size)
    torch.testing.assert_close(B @ A @ x.T, D @ C @ x.T, rtol=1e-3, atol=1e-3 * float((delta @ x.T).abs().max()))
    best = definition(delta, gram, 6)[2][6:].square().sum()
    assert output_error(delta - B @ A, gram) == pytest.approx(float(best), rel=1e-4)
    assert input_space(gram, exact=False).effective_rank == min(size, tokens)
    norms = (A.norm(dim=1), B.norm(dim=0)), (C.norm(dim=1), D.norm(dim=0))
    torch.testing.assert_close(*norms, rtol=0.02, atol=0)


def test_randomised_path_is_within_a_percent_on_a_flat_spectrum():
    g = torch.Generator().manual_seed(3)
    delta = torch.randn(300, 280, generator=g)
    x = torch.randn(600, 280, generator=g)
    gram = x.T @ x
    A, B = eora_layer(delta, gram, 16, exact=False)
    C, D = eora_layer(delta, gram, 16, exact=True)
    assert output_error(delta - B @ A, gram) <= 1.01 * output_error(delta - D @ C, gram)


@pytest.mark.parametrize("seed", range(3))
def test_beats_every_other_adapter_of_the_rank(seed):
    delta, x = problem(seed=seed)
    gram = x.T @ x
    A, B = eora_layer(delta, gram, 4)
    best = output_error(delta - B @ A, gram)
    g = torch.Generator().manual_seed(seed)
    rivals = [
        eora_layer(delta, None, 4, method="svd"),
        eora_layer(delta, None, 4, method="act_s", abs_mean=x.abs().mean(0)),
    ]
    rivals += [
        (torch.randn(4, 24, generator=g, dtype=torch.float64), torch.randn(16, 4, generator=g, dtype=torch.float64))
        for _ in range(5)
    ]
    rivals += [(A + 1e-3 * torch.randn(A.shape, generator=g, dtype=torch.float64), B) for _ in range(5)]
    for C, D in rivals:
        assert best < output_error(delta - D @ C, gram)


def test_full_rank_repairs_everything_on_the_data():
    delta, x = problem()
    A, B = eora_layer(delta, x.T @ x, 16)
    torch.testing.assert_close(x @ (B @ A).T, x @ delta.T)


def test_identity_is_plain_svd_and_a_diagonal_is_scaled_svd():
    delta, x = problem()
    A, B = eora_layer(delta, torch.eye(24, dtype=torch.float64), 3)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(B @ A, U[:, :3] * S[:3] @ Vh[:3])
    C, D = eora_layer(delta, None, 3, method="svd")
    torch.testing.assert_close(D @ C, B @ A)
    scale = x.abs().mean(0)
    A, B = eora_layer(delta, torch.diag(scale**2), 3)
    U, S, Vh = torch.linalg.svd(delta * scale, full_matrices=False)
    torch.testing.assert_close(B @ A, U[:, :3] * S[:3] @ Vh[:3] / scale)
    C, D = eora_layer(delta, None, 3, method="act_s", abs_mean=scale)
    torch.testing.assert_close(D @ C, B @ A)


def test_any_root_of_the_gram_matrix_gives_the_same_adapter():
    delta, x = problem()
    gram = x.T @ x
    values, Q = torch.linalg.eigh(gram)
    A, B = eora_layer(delta, gram, 5)
    for M in (torch.linalg.cholesky(gram), Q @ torch.diag(values.sqrt()) @ Q.T, Q * values.sqrt()):
        C, D, _ = definition(delta, gram, 5, M)
        torch.testing.assert_close(B @ A, D @ C, rtol=1e-5, atol=1e-7)
    cholesky = input_space(gram, exact=False)
    eigen = input_space(gram, exact=True)
    assert cholesky.effective_rank == eigen.effective_rank == 24
    for space in (cholesky, eigen):
        torch.testing.assert_close(space.root @ space.root.T, gram)


def test_scale_of_the_statistics_moves_between_the_factors_only():
    delta, x = problem()
    A, B = eora_layer(delta, x.T @ x, 5)
    for c in (1e-6, 16.0, 1e8):
        C, D = eora_layer(delta, c * (x.T @ x), 5)
        torch.testing.assert_close(D @ C, B @ A)
        torch.testing.assert_close(C, A * c**-0.25)
        torch.testing.assert_close(D, B * c**0.25)


def test_order_of_the_samples_does_not_matter():
    delta, x = problem()
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    A, B = eora_layer(delta, x.T @ x, 5)
    C, D = eora_layer(delta, y.T @ y, 5)
    torch.testing.assert_close(D @ C, B @ A)


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_of_the_objective_vanishes(exact):
    delta, x = problem()
    gram = x.T @ x
    A, B = (t.requires_grad_(True) for t in eora_layer(delta, gram, 5, exact=exact))
    rest = delta - B @ A
    objective = torch.trace(rest @ gram @ rest.T)
    objective.backward()
    size = torch.trace(delta @ gram @ delta.T)
    assert A.grad.abs().max() < 1e-8 * size
    assert B.grad.abs().max() < 1e-8 * size


@pytest.mark.parametrize("exact", [True, False])
def test_no_error_gives_a_zero_adapter(exact):
    _, x = problem()
    A, B = eora_layer(torch.zeros(16, 24), (x.T @ x).float(), 4, exact=exact)
    assert not A.any()
    assert not B.any()
    assert A.shape == (4, 24)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_tokens_than_inputs(exact, dtype):
    delta, x = problem(tokens=10, dtype=dtype)
    gram = x.T @ x
    space = input_space(gram, exact=exact)
    assert space.effective_rank == 10
    A, B = eora_layer(delta, gram, 12, exact=exact)
    assert torch.isfinite(A).all()
    assert torch.isfinite(B).all()
    # everything that was seen is repaired, and what was never seen is left as it is
    torch.testing.assert_close(x @ (B @ A).T, x @ delta.T, rtol=1e-3, atol=1e-3)
    unseen = torch.linalg.svd(x.double()).Vh[10:].to(dtype)
    assert (unseen @ (B @ A).T).abs().max() < 1e-3 * delta.abs().max()


def test_unseen_directions_can_be_corrected_too():
    delta, x = problem(tokens=10)
    gram = x.T @ x
    skip = eora_layer(delta, gram, 4)
    both = eora_layer(delta, gram, 4, unseen="correct")
    assert output_error(delta - both[1] @ both[0], gram) == pytest.approx(
        output_error(delta - skip[1] @ skip[0], gram), rel=1e-9
    )
    # then no input whatever is served worse than by the compressed layer alone
    everything = torch.randn(500, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    left = (everything @ (delta - both[1] @ both[0]).T).norm(dim=1)
    assert (left <= (everything @ delta.T).norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("exact", [True, False])
def test_dead_inputs(exact):
    delta, x = problem()
    x[:, 3] = 0
    A, B = eora_layer(delta, x.T @ x, 6, exact=exact)
    assert torch.isfinite(A).all()
    assert A[:, 3].abs().max() < 1e-9
    keep = [i for i in range(24) if i != 3]
    C, D = eora_layer(delta[:, keep], x[:, keep].T @ x[:, keep], 6)
    torch.testing.assert_close((B @ A)[:, keep], D @ C)
    A, B = eora_layer(delta, torch.zeros(24, 24), 6, exact=exact)
    assert not (B @ A).any()
    C, D = eora_layer(delta, None, 6, method="act_s", abs_mean=x.abs().mean(0))
    assert not C[:, 3].any()
    assert torch.isfinite(C).all()


def test_negative_eigenvalues_of_rounding_are_dropped():
    delta, x = problem(tokens=10)
    gram = x.T @ x - 1e-13 * x.square().sum() * torch.eye(24, dtype=torch.float64)
    A, B = eora_layer(delta, gram, 4)
    C, D = eora_layer(delta, x.T @ x, 4)
    torch.testing.assert_close(B @ A, D @ C, rtol=1e-5, atol=1e-6)


def test_outliers_do_not_hide_the_other_directions():
    g = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(256, 256, generator=g)).Q * torch.logspace(0, -1.5, 256)
    x = torch.randn(2000, 256, generator=g) @ mix
    x[0] *= 300
    gram = x.T @ x
    delta = torch.randn(64, 256, generator=g)
    assert input_space(gram).effective_rank == 256
    usual = input_space(gram, cutoff=256 * torch.finfo(torch.float32).eps).effective_rank
    assert usual < 200
    A, B = eora_layer(delta, gram, 32)
    C, D = eora_layer(delta, gram, 32, cutoff=256 * torch.finfo(torch.float32).eps)
    rest = x[1:]
    assert (rest @ (delta - B @ A).T).square().sum() < (rest @ (delta - D @ C).T).square().sum()


def test_cutoff_is_a_part_of_the_largest_eigenvalue():
    gram = torch.diag(torch.tensor([100.0, 10.0, 1.0, 0.1], dtype=torch.float64))
    for exact in (True, False):
        assert [input_space(gram, exact=exact, cutoff=c).effective_rank for c in (0.0, 0.005, 0.05, 0.5)] == [
            4,
            3,
            2,
            1,
        ]


def test_runs_are_equal_and_leave_the_global_random_state_alone():
    delta, x = problem(64, 80)
    gram = x.T @ x
    state = torch.get_rng_state()
    first = eora_layer(delta, gram, 4, exact=False)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    second = eora_layer(delta, gram, 4, exact=False)
    gradient_fit(delta, [x], 2, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    other = eora_layer(delta, gram, 4, exact=False, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(other[1] @ other[0], first[1] @ first[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_errors_are_worked_on_in_float32(dtype):
    delta, x = problem()
    A, B = eora_layer(delta.to(dtype), (x.T @ x).float(), 4)
    assert A.dtype == B.dtype == torch.float32
    C, D = eora_layer(delta.to(dtype).double(), x.T @ x, 4)
    gram, exact = x.T @ x, delta.to(dtype).double()
    assert output_error(exact - (B @ A).double(), gram) == pytest.approx(output_error(exact - D @ C, gram), rel=1e-3)


def test_a_rank_beyond_the_layer_is_lowered_with_a_warning():
    delta, x = problem()
    with pytest.warns(UserWarning, match=r"rank = 99 exceeds min\(out, in\) = 16 .* rank 16 already"):
        A, _ = eora_layer(delta, x.T @ x, 99)
    assert A.shape == (16, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank = 0: a whole number >= 1"),
        ({"rank": 2.5}, "rank = 2.5"),
        ({"rank": True}, "rank = True"),
        ({"gram": torch.eye(16)}, "has 24 inputs, the statistics have 16.*Conv1D"),
        ({"gram": torch.ones(24, 5)}, r"\(24, 5\); a square matrix"),
        ({"gram": torch.full((24, 24), float("nan"))}, "NaN or infinite"),
        ({"gram": torch.triu(torch.ones(24, 24))}, "not symmetric"),
        ({"gram": torch.eye(24).half()}, "torch.float16: sums of squares overflow"),
        ({"gram": None}, "needs gram"),
        ({"delta": torch.full((16, 24), float("inf"))}, "delta holds NaN or infinite"),
        ({"delta": torch.ones(24)}, r"\(24,\); a matrix \(out, in\)"),
        ({"method": "eoar"}, "Did you mean 'eora'"),
        ({"method": "act_s"}, "pass abs_mean"),
        ({"method": "act_s", "abs_mean": -torch.ones(24)}, "mean of |x| >= 0"),
        ({"unseen": "drop"}, "'skip' or 'correct'"),
        ({"cutoff": 1.5}, "cutoff = 1.5"),
    ],
)
def test_bad_arguments(change, message):
    delta, x = problem()
    arguments = {"delta": delta, "gram": x.T @ x, "rank": 2} | change
    with pytest.raises(MethodError, match=message):
        eora_layer(arguments.pop("delta"), arguments.pop("gram"), arguments.pop("rank"), **arguments)


def test_gradient_fit_comes_close_to_the_closed_form_and_not_below():
    delta, x = problem(tokens=240)
    gram = x.T @ x
    A, B = eora_layer(delta, gram, 4)
    C, D = gradient_fit(delta, list(x.view(4, 60, 24)), 4, steps=1500, lr=0.02)
    best, found = output_error(delta - B @ A, gram), output_error(delta - D @ C, gram)
    assert best <= found <= 1.05 * best
    assert output_error(delta, gram) > 1.5 * best


def test_gradient_fit_starts_from_zero_b_and_xavier_a():
    delta, x = problem()
    A, B = gradient_fit(delta, [x], 4, steps=1, lr=0.0)
    assert not B.any()
    bound = math.sqrt(6 / (24 + 4))
    assert 0.9 * bound < A.abs().max() <= bound
    with pytest.raises(MethodError, match="0 sequences"):
        gradient_fit(delta, [], 4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 8), (2, -1)])
def test_quantised_adapters_lie_on_a_grid(method, bits, group):
    delta, x = problem()
    A, B = eora_layer(delta, x.T @ x, 6)
    for before, after in zip(
        (A, B), quantise_adapter(A, B, x.T @ x, bits, group_size=group, method=method), strict=True
    ):
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        width = before.shape[1] if group == -1 else group
        for row, rounded in zip(before, after, strict=True):
            for part, found in zip(row.split(width), rounded.split(width), strict=True):
                assert len(found.unique()) <= 2**bits
                if method == "rtn":
                    step = (part.max().clamp(min=0) - part.min().clamp(max=0)) / (2**bits - 1)
                    torch.testing.assert_close(found / step, (found / step).round(), rtol=0, atol=1e-9)
                    assert (found - part).abs().max() <= step * (1 + 1e-9)


def test_quantised_adapters_lose_little_and_less_with_error_feedback():
    delta, x = problem(64, 96, tokens=500)
    gram = x.T @ x
    A, B = eora_layer(delta, gram, 16)
    best = output_error(delta - B @ A, gram)

    def loss(bits, method):
        C, D = quantise_adapter(A, B, gram, bits, method=method)
        return output_error(delta - D @ C, gram) / best - 1

    assert loss(8, "gptq") < 1e-3
    assert loss(4, "gptq") < 0.15 * (output_error(delta, gram) / best - 1)
    for bits in (2, 3, 4):
        assert loss(bits, "gptq") < loss(bits, "rtn")
    assert loss(4, "gptq") < loss(3, "gptq") < loss(2, "gptq")


@pytest.mark.parametrize("size", [10, 140])  # the second is worked on in two blocks of columns
def test_error_feedback_equals_its_definition(size):
    """Round a column, solve for the best change of the columns to come, go on."""
    delta, x = problem(6, size, tokens=3 * size)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    A = delta[:4]
    work, wanted = A.clone(), torch.zeros_like(A)
    low, high = work.amin(1, keepdim=True).clamp(max=0), work.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    for j in range(size):
        column = work[:, j : j + 1]
        wanted[:, j : j + 1] = scale * (((column / scale).round() + zero).clamp(0, 15) - zero)
        error = column - wanted[:, j : j + 1]
        rest = slice(j + 1, size)
        if j + 1 < size:
            work[:, rest] += error @ torch.linalg.solve(damped[rest, rest], damped[rest, j : j + 1]).T
    found, _ = quantise_adapter(A, delta[:, :4], gram, 4, group_size=-1)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "adapter_bits = 1: a whole number from 2 to 8"),
        ({"bits": 4, "group_size": 0}, "adapter_group_size = 0"),
        ({"bits": 4, "method": "awq"}, "'gptq' or 'rtn'"),
        ({"bits": 4, "gram": None}, "needs gram"),
    ],
)
def test_bad_rounding(change, message):
    arguments = {"gram": torch.eye(8)} | change
    with pytest.raises(MethodError, match=message):
        quantise_adapter(torch.ones(2, 8), torch.ones(4, 2), **arguments)
