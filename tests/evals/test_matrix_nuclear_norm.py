"""The measures against their definitions written out in float64, their identities, bounds and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.errors import MethodError
from gnomon.evals.matrix_nuclear_norm import (
    column_norms,
    combine_entropies,
    effective_rank,
    isotropic_mnn,
    matrix_entropy,
    matrix_nuclear_norm,
    measure,
    measures,
    mnn_bounds,
    nuclear_norm,
    rankme,
    spectrum,
    without_first,
)

SIZES = [(2, 5), (7, 7), (5, 16), (33, 8), (64, 32), (3, 2), (40, 1)]


def states(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Gaussian states with unequal scales and a common shift, in float64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    shift = torch.randn(features, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0.1, 3, features, dtype=torch.float64) + 0.5 * shift


def normalised(hidden: torch.Tensor) -> torch.Tensor:
    rows = []
    for row in hidden.double():
        centred = row - sum(hidden.double()) / len(hidden)
        rows.append(centred / math.sqrt(float(centred @ centred)))
    return torch.stack(rows)


def mnn_by_definition(hidden: torch.Tensor) -> float:
    R = normalised(hidden)
    columns = sorted((math.sqrt(float((R[:, j] ** 2).sum())) for j in range(R.shape[1])), reverse=True)
    return sum(columns[: min(R.shape)]) / len(R)


def entropy_by_definition(hidden: torch.Tensor) -> float:
    """As the authors do it: the d x d covariance and its SVD, 0 log 0 left out."""
    R = normalised(hidden)
    values = torch.linalg.svdvals(R.T @ R / len(R))
    return -sum(float(v) * math.log(float(v)) for v in values if v > 0)


@pytest.mark.parametrize(("tokens", "features"), SIZES)
def test_mnn_is_its_definition(tokens, features):
    H = states(tokens, features)
    assert float(matrix_nuclear_norm(H)) == pytest.approx(mnn_by_definition(H), abs=1e-12)


@pytest.mark.parametrize(("tokens", "features"), [s for s in SIZES if s[1] > 1])
def test_entropy_rank_and_nuclear_norm_are_their_definitions(tokens, features):
    H = states(tokens, features)
    R = normalised(H)
    entropy = entropy_by_definition(H)
    values = torch.linalg.svdvals(R)
    p = values[values > 1e-12] / values.sum()
    assert float(matrix_entropy(H)) == pytest.approx(entropy / math.log(features), abs=1e-9)
    assert float(effective_rank(H)) == pytest.approx(math.exp(entropy), rel=1e-9)
    assert float(nuclear_norm(H)) == pytest.approx(float(values.sum()) / tokens, abs=1e-7)
    assert float(rankme(H)) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)


@pytest.mark.parametrize(("tokens", "features"), [(5, 16), (33, 8)])
def test_the_spectrum_is_that_of_r(tokens, features):
    H = states(tokens, features)
    found = spectrum(H[None])[0]
    assert float(found.sum()) == pytest.approx(tokens, abs=1e-9)  # ||R||_F^2 = L
    torch.testing.assert_close(found.sqrt(), torch.linalg.svdvals(normalised(H)), atol=1e-6, rtol=0)


def test_the_squares_of_the_column_norms_sum_to_the_length():
    norms, lengths, zeros = column_norms(torch.stack([states(9, 4, s) for s in range(3)]))
    torch.testing.assert_close(norms.square().sum(1), torch.full((3,), 9.0, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (lengths.tolist(), zeros.tolist()) == ([9, 9, 9], [0, 0, 0])


def test_two_tokens_have_a_closed_form():
    H = states(2, 6)
    direction = ((H[0] - H[1]) / (H[0] - H[1]).norm()).abs().sort(descending=True).values
    assert float(matrix_nuclear_norm(H)) == pytest.approx(float(direction[0] + direction[1]) / math.sqrt(2), abs=1e-12)
    assert float(nuclear_norm(H)) == pytest.approx(1 / math.sqrt(2), abs=1e-7)
    assert float(matrix_entropy(H)) == pytest.approx(0, abs=1e-9)
    assert float(effective_rank(H)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("features", [4, 7, 16])
def test_states_without_direction_reach_the_isotropic_reference(features):
    """Columns 1 to 7 of a Hadamard matrix sum to 0 and are orthogonal; repeated, they still have equal norms."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    H = torch.kron(torch.kron(two, two), two)[:, 1:].repeat(1, 3)[:, :features]
    assert float(matrix_nuclear_norm(H)) == pytest.approx(isotropic_mnn(8, features), abs=1e-12)
    if features < 8:
        assert float(matrix_entropy(H)) == pytest.approx(1, abs=1e-9)
        assert float(effective_rank(H)) == pytest.approx(features, rel=1e-9)
        assert float(rankme(H)) == pytest.approx(features, rel=1e-6)
        assert float(nuclear_norm(H)) == pytest.approx(isotropic_mnn(8, features), abs=1e-9)


def test_isotropic_reference_peaks_where_length_equals_width():
    assert isotropic_mnn(64, 64) == 1
    assert isotropic_mnn(16, 64) == isotropic_mnn(256, 64) == 0.5


@given(tokens=st.integers(2, 40), features=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_bounds(tokens, features, seed):
    H = states(tokens, features, seed)
    score = float(matrix_nuclear_norm(H))
    low, high = mnn_bounds(tokens, features)
    assert low - 1e-9 <= score <= high + 1e-9
    if tokens >= features:
        assert score >= float(nuclear_norm(H)) - 1e-6


def test_below_the_width_the_score_bounds_nothing():
    H = torch.randn(16, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(matrix_nuclear_norm(H)) < float(nuclear_norm(H)) - 0.1


@pytest.mark.parametrize(("tokens", "features"), [(20, 8), (8, 20)])
def test_invariances(tokens, features):
    H = states(tokens, features)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(features, generator=generator, dtype=torch.float64)
    orders = torch.randperm(tokens, generator=generator), torch.randperm(features, generator=generator)
    for name, changed in {
        "scaled": -7.5 * H, "shifted": H + 3 * shift, "tokens": H[orders[0]], "features": H[:, orders[1]],
    }.items():  # fmt: skip
        for score in (matrix_nuclear_norm, matrix_entropy, effective_rank, nuclear_norm):
            assert float(score(changed)) == pytest.approx(float(score(H)), abs=1e-6), (name, score.__name__)


def test_rotation_changes_the_score_but_not_the_spectrum():
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(64, 32, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(32)
    Q = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    assert float(matrix_nuclear_norm(H @ Q)) > float(matrix_nuclear_norm(H)) + 0.1
    for score in (matrix_entropy, effective_rank, nuclear_norm):
        assert float(score(H @ Q)) == pytest.approx(float(score(H)), abs=1e-6)


def padded(rows: list[torch.Tensor], width: int, side: str, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.full((len(rows), width, rows[0].shape[1]), fill, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for k, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        hidden[k, where], mask[k, where] = row, 1
    return hidden, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fill", [0.0, 1e6, math.nan])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 64])
def test_a_padded_batch_equals_one_sequence_at_a_time(side, fill, cache_bytes, monkeypatch):
    # A tiny cache takes the path of long sequences: one at a time, a row at a time.
    monkeypatch.setattr(measures, "CACHE_BYTES", cache_bytes)
    rows = [states(n, 8, n) for n in (5, 12, 9, 2, 3)]
    hidden, mask = padded(rows, 14, side, fill)
    together = measure(hidden, mask)
    assert together["length"].tolist() == [5, 12, 9, 2, 3]
    for k, row in enumerate(rows):
        assert float(together["mnn"][k]) == pytest.approx(mnn_by_definition(row), abs=1e-9)
        for score in (nuclear_norm, matrix_entropy, effective_rank, rankme):
            assert float(together[score.__name__][k]) == pytest.approx(float(score(row)), abs=1e-9), score.__name__


def test_a_mask_with_holes_is_a_choice_of_rows():
    H = states(10, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0, 1]])
    kept = H[mask[0].bool()]
    assert float(matrix_nuclear_norm(H[None], mask)) == pytest.approx(float(matrix_nuclear_norm(kept)), abs=1e-12)
    assert float(matrix_entropy(H[None], mask)) == pytest.approx(float(matrix_entropy(kept)), abs=1e-9)


def test_two_dimensions_give_a_number_and_three_a_vector():
    H = states(6, 4)
    for score in (matrix_nuclear_norm, matrix_entropy, effective_rank, nuclear_norm, rankme):
        assert score(H).shape == ()
        assert score(H, torch.ones(6)).shape == ()
        assert score(H[None]).shape == (1,)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("tokens", "features"), [(700, 300), (300, 700)])
def test_float32_stays_close_to_float64(tokens, features, mean):
    H = (states(tokens, features) + mean).float()
    exact = float(matrix_nuclear_norm(H.double()))
    assert float(matrix_nuclear_norm(H)) == pytest.approx(exact, rel=1e-6)
    assert float(matrix_entropy(H)) == pytest.approx(float(matrix_entropy(H.double())), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_brought_to_float32_first(dtype):
    H = states(50, 20).to(dtype)
    assert matrix_nuclear_norm(H).dtype == torch.float32
    assert float(matrix_nuclear_norm(H)) == pytest.approx(float(matrix_nuclear_norm(H.double())), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 100, 2048])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 256])
def test_tokens_of_one_state_have_no_score(dtype, tokens, cache_bytes, monkeypatch):
    monkeypatch.setattr(measures, "CACHE_BYTES", cache_bytes)
    same = (1000 * states(1, 16) + 3).to(dtype).expand(tokens, 16)
    numbers = measure(torch.stack([same, states(tokens, 16, 1).to(dtype)]))
    assert numbers["zero_rows"][0] == tokens
    for name in ("mnn", "nuclear_norm", "matrix_entropy", "effective_rank", "rankme"):
        assert math.isnan(float(numbers[name][0])), name
        assert math.isfinite(float(numbers[name][1])) == (tokens > 1), name


def test_states_that_differ_by_one_unit_in_the_last_place_are_distinct():
    H = torch.full((100, 8), 1000.0)
    H[0, 0] += 2**-14  # the next float32
    assert float(matrix_nuclear_norm(H)) == pytest.approx(mnn_by_definition(H), rel=1e-5)
    assert column_norms(H[None]).zero_rows.tolist() == [0]


def test_a_row_equal_to_the_mean_becomes_zero_and_is_reported():
    u = states(1, 6)[0]
    v = states(1, 6, 2)[0]
    H = torch.stack([u, -u, torch.zeros(6, dtype=torch.float64), v, -v])
    norms, lengths, zeros = column_norms(H[None])
    assert (lengths.tolist(), zeros.tolist()) == ([5], [1])
    R = torch.stack([x / x.norm() for x in (u, -u, v, -v)])
    torch.testing.assert_close(norms[0], R.norm(dim=0))
    expected = R.norm(dim=0).sort(descending=True).values[:5].sum() / 5
    assert float(matrix_nuclear_norm(H)) == pytest.approx(float(expected), abs=1e-12)
    p = torch.linalg.svdvals(R).square() / 4
    assert float(effective_rank(H)) == pytest.approx(math.exp(-sum(float(x * x.log()) for x in p if x > 1e-12)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 8])
def test_a_row_that_rounds_to_the_mean_is_not_blown_up(dtype, cache_bytes, monkeypatch):
    monkeypatch.setattr(measures, "CACHE_BYTES", cache_bytes)
    H = torch.tensor([[1, 5, 3], [3, 1, 7], [2, 3, 5]], dtype=dtype) + 96  # the third is the mean; a third is inexact
    assert column_norms(H[None]).zero_rows.tolist() == [1]
    direction = torch.tensor([1.0, 2.0, 2.0]) / 3
    assert float(matrix_nuclear_norm(H)) == pytest.approx(float(direction.sum()) * math.sqrt(2) / 3, rel=1e-6)


def test_padding_alone_gives_nan_for_that_sequence_only():
    numbers = measure(torch.stack([states(4, 3), states(4, 3, 1)]), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]))
    assert numbers["length"].tolist() == [0, 4]
    assert math.isnan(float(numbers["mnn"][0]))
    assert math.isnan(float(numbers["matrix_entropy"][0]))
    assert math.isfinite(float(numbers["mnn"][1]))


def test_corpus_algorithms():
    entropies, d = torch.tensor([0.2, 0.5, math.nan, 0.9]), 32
    finite = [0.2, 0.5, 0.9]
    mean = sum(finite) / 3
    assert combine_entropies(entropies, d) == pytest.approx(mean)
    assert combine_entropies(entropies, d, "b") == pytest.approx(math.exp(mean * math.log(d)) / d)
    assert combine_entropies(entropies, d, "c") == pytest.approx(sum(math.exp(e * math.log(d)) / d for e in finite) / 3)
    with pytest.raises(MethodError, match="algorithm is 'd'"):
        combine_entropies(entropies, d, "d")
    with pytest.raises(MethodError, match="No text has a finite matrix entropy"):
        combine_entropies(torch.tensor([math.nan]), d)


def test_leading_tokens_are_left_out_on_either_side_of_padding():
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    assert without_first(mask, 1).long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert torch.equal(without_first(mask, 0), mask.bool())


def test_the_input_is_not_changed_and_needs_no_gradient():
    H = states(600, 600).float().requires_grad_()
    before = H.detach().clone()
    for hidden in (H, H[:5]):
        assert not matrix_nuclear_norm(hidden).requires_grad
        assert not matrix_entropy(hidden).requires_grad
    assert torch.equal(H.detach(), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("cache_bytes", [1 << 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_that_are_not_finite_are_refused(bad, cache_bytes, dtype, monkeypatch):
    monkeypatch.setattr(measures, "CACHE_BYTES", cache_bytes)
    H = torch.stack([states(5, 4, s) for s in range(3)]).to(dtype)
    H[1, 2, 3] = bad
    for score in (matrix_nuclear_norm, matrix_entropy):
        with pytest.raises(MethodError, match="Hidden states of sequence 1 hold NaN or infinity"):
            score(H)


@pytest.mark.parametrize("scale", [1e30, 1e18, 1e-30])
def test_squares_beyond_the_range_of_float32_are_no_obstacle(scale):
    H = (states(40, 6) * scale).float()
    assert float(matrix_nuclear_norm(H)) == pytest.approx(mnn_by_definition(H), rel=1e-6)


@pytest.mark.parametrize(
    ("hidden", "mask", "message"),
    [
        (torch.zeros(0, 3, 4), None, r"got torch.float32 of shape \(0, 3, 4\)"),
        (torch.zeros(2, 0, 4), None, "nothing empty"),
        (torch.zeros(2, 3, 4, dtype=torch.long), None, "must be floating point"),
        (torch.zeros(4), None, r"of shape \(4,\)"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4), r"The mask has shape \(2, 4\), the hidden states have \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(hidden, mask, message):
    with pytest.raises(MethodError, match=message):
        matrix_nuclear_norm(hidden, mask)


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(MethodError, match="2 features or more; got 1"):
        matrix_entropy(states(5, 1))
    with pytest.raises(MethodError, match="length is 0, features is 4"):
        isotropic_mnn(0, 4)
    with pytest.raises(MethodError, match="length is 3, features is 0"):
        mnn_bounds(3, 0)
