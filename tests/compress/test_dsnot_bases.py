"""Magnitude, Wanda and SparseGPT against the words of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gnomon.common.calibration import LayerInputs
from gnomon.compress.dsnot import (
    inverse_factor,
    layer_error,
    magnitude_mask,
    sparsegpt_layer,
    sparsegpt_mask,
    wanda_mask,
)
from gnomon.compress.dsnot.selection import Budget, first_indices, smallest_mask
from gnomon.errors import MethodError


def correlated(rows: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=dtype) / math.sqrt(width)
    spread = torch.exp(torch.randn(width, generator=generator, dtype=dtype))
    x = torch.randn(4, 100, width, generator=generator, dtype=dtype) @ mix * spread
    return torch.randn(rows, width, generator=generator, dtype=dtype), x


def inverse_hessian_factor(x: Tensor, damping: float) -> np.ndarray:
    flat = x.double().reshape(-1, x.shape[-1]).numpy()
    hessian = 2 / len(x) * flat.T @ flat
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    return np.linalg.cholesky(np.linalg.inv(hessian)).T


def sparsegpt_definition(
    weight: Tensor,
    x: Tensor,
    sparsity: float,
    pattern: str | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    inclusive: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT column by column in float64: the pruned, updated weight and the mask (True = kept)."""
    W = weight.double().numpy().copy()
    U = inverse_hessian_factor(x, damping)
    W[:, (x == 0).all(0).all(0).numpy()] = 0
    width = W.shape[1]
    n, m = (0, 1) if pattern is None else map(int, pattern.split(":"))
    pruned = np.zeros(W.shape, dtype=bool)
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        errors = np.zeros((len(W), end - start))
        if pattern is None:
            scores = W[:, start:end] ** 2 / np.diag(U)[start:end] ** 2
            k = int(scores.size * sparsity)
            limit = np.sort(scores, axis=None)[k]
            pruned[:, start:end] = scores <= limit if inclusive else scores < limit
        for i in range(start, end):
            if pattern is not None and i % m == 0:
                scores = W[:, i : i + m] ** 2 / np.diag(U)[i : i + m] ** 2
                np.put_along_axis(pruned[:, i : i + m], np.argsort(scores, 1, kind="stable")[:, :n], True, 1)
            q = np.where(pruned[:, i], 0.0, W[:, i])
            e = (W[:, i] - q) / U[i, i]
            W[:, i:end] -= np.outer(e, U[i, i:end])
            W[:, i] = q
            errors[:, i - start] = e
        W[:, end:] -= errors @ U[start:end, end:]
    return W, ~pruned


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "width", "block"), [(12, 64, 128), (7, 150, 128), (33, 90, 40), (1, 3, 2)])
def test_sparsegpt_equals_its_definition(rows: int, width: int, block: int, sparsity: float) -> None:
    weight, x = correlated(rows, width)
    x[..., 1:2] = 0.0  # a dead input
    inputs = LayerInputs.from_tensor(x)
    new, keep = sparsegpt_layer(weight, inputs, sparsity, block_size=block)
    wanted, mask = sparsegpt_definition(weight, x, sparsity, block_size=block)
    assert np.array_equal(keep.numpy(), mask)
    np.testing.assert_allclose(new.numpy(), wanted, rtol=1e-7, atol=1e-9)
    assert bool((new[~keep] == 0).all())
    assert int((~keep).sum()) == sum(int(rows * min(block, width - s) * sparsity) for s in range(0, width, block))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3", "20:40"])
def test_sparsegpt_with_a_pattern_equals_its_definition(pattern: str) -> None:
    weight, x = correlated(11, 240)
    m = int(pattern.split(":")[1])
    new, keep = sparsegpt_layer(weight, LayerInputs.from_tensor(x), pattern=pattern)
    wanted, mask = sparsegpt_definition(weight, x, 0, pattern, block_size=-(-128 // m) * m)
    assert np.array_equal(keep.numpy(), mask)
    np.testing.assert_allclose(new.numpy(), wanted, rtol=1e-7, atol=1e-9)
    assert bool(((~keep).view(11, -1, m).sum(-1) == int(pattern.split(":")[0])).all())


def test_inclusive_thresholds_prune_what_the_original_codes_prune() -> None:
    weight, x = correlated(9, 64)
    _, keep = sparsegpt_layer(weight, LayerInputs.from_tensor(x), 0.5, inclusive=True)
    assert np.array_equal(keep.numpy(), sparsegpt_definition(weight, x, 0.5, inclusive=True)[1])
    limit = weight.abs().flatten().sort().values[int(weight.numel() * 0.3)]
    assert torch.equal(magnitude_mask(weight, 0.3, inclusive=True), weight.abs() > limit)
    coarse = weight.sign()  # ties: all of them go
    assert not magnitude_mask(coarse, 0.0, inclusive=True).any()


def test_sparsegpt_keeps_the_dtype_and_survives_dead_inputs_and_few_tokens() -> None:
    weight, x = correlated(6, 32, dtype=torch.float32)
    x = x[:1, :5]
    x[..., 3] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        new, keep = sparsegpt_layer(weight.to(dtype), LayerInputs.from_tensor(x), 0.5)
        assert new.dtype == dtype
        assert bool(torch.isfinite(new).all())
        assert not new[:, 3].any()
        assert torch.equal(new == 0, ~keep | (new == 0))


@pytest.mark.parametrize("width", [1, 5, 300, 700])
def test_inverse_factor(width: int) -> None:
    _, x = correlated(1, width, seed=width)
    upper = inverse_factor(LayerInputs.from_tensor(x))
    np.testing.assert_allclose(upper.numpy(), inverse_hessian_factor(x, 0.01), rtol=1e-6, atol=1e-9)
    assert torch.equal(upper, upper.triu())


def test_sparsegpt_mask_is_the_score_of_the_dense_weight_per_row() -> None:
    weight, x = correlated(8, 48)
    inputs = LayerInputs.from_tensor(x)
    scores = weight.numpy() ** 2 / np.diag(inverse_hessian_factor(x, 0.01)) ** 2
    keep = np.ones(scores.shape, dtype=bool)
    np.put_along_axis(keep, np.argsort(scores, 1, kind="stable")[:, : int(48 * 0.6)], False, 1)
    assert np.array_equal(sparsegpt_mask(weight, inputs, 0.6).numpy(), keep)
    assert torch.equal(sparsegpt_mask(weight, inputs, 0.6, factor=inverse_factor(inputs)), torch.from_numpy(keep))


def test_bases_rank_on_correlated_inputs() -> None:
    weight, x = correlated(64, 128)
    inputs = LayerInputs.from_tensor(x)
    pruned = {
        "magnitude": weight * magnitude_mask(weight, 0.6),
        "wanda": weight * wanda_mask(weight, inputs, 0.6),
        "sparsegpt": sparsegpt_layer(weight, inputs, 0.6)[0],
    }
    errors = {name: layer_error(weight, new, inputs)["mse"] for name, new in pruned.items()}
    assert errors["sparsegpt"] < 0.9 * errors["wanda"] < 0.9 * 0.8 * errors["magnitude"]


def test_layer_error_is_what_its_words_say() -> None:
    weight, x = correlated(5, 16)
    pruned = weight * wanda_mask(weight, LayerInputs.from_tensor(x), 0.5)
    found = layer_error(weight, pruned, LayerInputs.from_tensor(x))
    out = x @ (weight - pruned).T
    flat = out.reshape(-1, 5)
    assert found["mse"] == pytest.approx(float(flat.square().mean()))
    assert found["mean_term"] == pytest.approx(float(flat.mean(0).square().mean()))
    assert found["covariance_term"] == pytest.approx(float(flat.var(0, unbiased=False).mean()))
    assert found["expected_error"] == pytest.approx(float(out.sum(1).mean(0).square().mean()))
    assert found["error"] == pytest.approx(float(flat.square().sum() / (x @ weight.T).square().sum()))
    assert set(layer_error(weight, pruned, LayerInputs.from_tensor(x, gram=False))) == {"mean_term", "expected_error"}


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_prunes_exactly_the_smallest(sparsity: float, dtype: torch.dtype) -> None:
    weight = torch.randn(17, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = magnitude_mask(weight, sparsity)
    order = torch.argsort(weight.abs().flatten(), stable=True)
    wanted = torch.ones(1700, dtype=torch.bool)
    wanted[order[: int(1700 * sparsity)]] = False
    assert torch.equal(keep.flatten(), wanted)
    rows = magnitude_mask(weight, sparsity, scope="row")
    assert ((~rows).sum(1) == int(100 * sparsity)).all()
    assert bool((weight.abs().masked_fill(rows, 0).amax(1) <= weight.abs().masked_fill(~rows, math.inf).amin(1)).all())


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 12),
    share=st.floats(0, 1),
    levels=st.integers(1, 6),
    infinite=st.booleans(),
    seed=st.integers(0, 9999),
    high=st.booleans(),
)
def test_selection_is_a_stable_sort(
    rows: int, width: int, share: float, levels: int, infinite: bool, seed: int, high: bool
) -> None:
    keys = torch.randint(0, levels, (rows, width), generator=torch.Generator().manual_seed(seed)).double()
    if infinite:
        keys[keys == 0] = math.inf
    k = int(width * share)
    if high:
        order = width - 1 - torch.argsort(keys.flip(1), dim=1, stable=True)
    else:
        order = torch.argsort(keys, dim=1, stable=True)
    ties = "high" if high else "low"
    mask = torch.zeros(rows, width, dtype=torch.bool).scatter_(1, order[:, :k], True)
    assert torch.equal(smallest_mask(keys, k, ties=ties), mask)
    found, values = first_indices(keys, k, ties=ties)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), order[:, :k])
    assert torch.equal(values, keys.gather(1, order[:, :k]))


def test_the_selection_used_on_accelerators_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from gnomon.compress.dsnot import selection

    keys = torch.randint(0, 9, (20, 30), generator=torch.Generator().manual_seed(0)).float()
    wanted = [smallest_mask(keys, k) for k in (1, 15, 30)]

    monkeypatch.setattr(selection, "_kth_and_next", selection._by_torch)
    assert all(torch.equal(a, smallest_mask(keys, k)) for a, k in zip(wanted, (1, 15, 30), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, None), r"sparsity = 1.0. Allowed is 0 <= sparsity < 1"),
        ((-0.1, None), "sparsity = -0.1"),
        ((math.nan, None), "sparsity = nan"),
        ((0.5, "1:4"), "sparsity = 0.5 contradicts pattern = '1:4', which prunes 0.25"),
        ((None, "4:4"), "pattern = '4:4'. Allowed is the text 'n:m' with 0 < n < m"),
        ((None, "0:4"), "pattern = '0:4'"),
        ((None, "two of four"), "pattern = 'two of four'"),
        ((None, 124), "in YAML with its quotes"),
        (("2:4", "4:8"), "differ. Give one of them"),
        ((None, "3:7"), "A row of 16 inputs cannot be cut into blocks of 7"),
    ],
)
def test_bad_budgets_are_told(arguments: tuple[object, object], message: str) -> None:
    weight, x = correlated(3, 16)
    inputs = LayerInputs.from_tensor(x)
    calls = (
        lambda: wanda_mask(weight, inputs, *arguments),  # type: ignore[arg-type]
        lambda: magnitude_mask(weight, *arguments),  # type: ignore[arg-type]
        lambda: sparsegpt_layer(weight, inputs, *arguments),  # type: ignore[arg-type]
        lambda: sparsegpt_mask(weight, inputs, *arguments),  # type: ignore[arg-type]
    )
    for call in calls:
        with pytest.raises(MethodError, match=message):
            call()


def test_budgets_that_agree() -> None:
    assert Budget().sparsity == 0.5
    assert Budget("2:4").block == Budget(0.5, "2:4").block == Budget(None, "2:4").block == (2, 4)
    assert Budget(None, "1:4").sparsity == 0.25


def test_other_bad_arguments_are_told() -> None:
    weight, x = correlated(3, 16)
    with pytest.raises(MethodError, match="These statistics hold no Gram matrix"):
        sparsegpt_layer(weight, LayerInputs.from_tensor(x, gram=False), 0.5)
    with pytest.raises(MethodError, match="not positive definite with damping = -2"):
        sparsegpt_layer(weight, LayerInputs.from_tensor(x), 0.5, damping=-2)
    with pytest.raises(MethodError, match=r"scope = 'column'\. Allowed are 'layer' and 'row'"):
        magnitude_mask(weight, 0.5, scope="column")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"A weight of shape \(16,\) is no matrix"):
        magnitude_mask(weight[0], 0.5)
