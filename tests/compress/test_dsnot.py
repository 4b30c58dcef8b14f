"""DSnoT on one layer, against a loop over rows in float64 that follows the method's own words."""

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
    dsnot_layer,
    magnitude_mask,
    scaled_cycles,
    scaled_threshold,
    selection,
    wanda_mask,
)
from gnomon.errors import MethodError


def dsnot_row(
    w: np.ndarray,
    S: np.ndarray,
    q: np.ndarray,
    V: np.ndarray,
    keep: np.ndarray,
    m: int | None = None,
    cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    same_sign: bool = False,
    scale: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """The definition for one row: return the new mask (True = kept) and the expected error after the last swap."""
    c = w * S
    keep = keep.copy()
    err = c[~keep].sum()
    first_sign = np.sign(err)
    growing = np.where(keep, 0.0, c / np.maximum(V, 1e-12) ** power)
    order = np.argsort(growing, kind="stable")
    grow_low = [j for j in order if growing[j] < 0]
    grow_high = [j for j in order[::-1] if growing[j] > 0]
    by_wanda = [j for j in np.argsort(np.abs(w) * np.sqrt(q), kind="stable") if keep[j]]
    positive = [j for j in by_wanda if c[j] > 0]
    negative = [j for j in by_wanda if c[j] < 0]
    base = np.abs(w) * (np.sqrt(q) if scale is None else scale)
    base = np.where(keep, base, math.inf)
    for _ in range(cycles):
        if abs(err) <= threshold:
            break
        grow_from = grow_high if err > 0 else grow_low
        if not grow_from:
            break
        grown = grow_from.pop(0)
        if m is None:
            prune_from = positive if err < 0 else negative
            if not prune_from:
                break
            pruned = prune_from.pop(0)
        else:
            start = grown // m * m
            pruned = start + int(np.argmin(base[start : start + m]))
            if base[pruned] == math.inf:
                break
            base[pruned] = math.inf
        after = err + c[pruned] - c[grown]
        if (same_sign or m is not None) and np.sign(after) != first_sign:
            break
        keep[grown], keep[pruned] = True, False
        err = after
    return keep, err


def statistics(x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = [row.double() for row in x]
    S = sum(r.sum(0) for r in rows) / len(rows)
    q = sum((r**2).sum(0) for r in rows) / len(rows)
    V = sum(len(r) * r.var(0, unbiased=False) for r in rows) / sum(len(r) for r in rows)
    return S.numpy(), q.numpy(), V.numpy()


def definition(
    weight: Tensor, x: Tensor | LayerInputs, keep: Tensor, pattern: str | None = None, **options: object
) -> Tensor:
    if isinstance(x, LayerInputs):  # for ties, where one bit more or less in the statistics would decide
        S, q, V = (v.numpy() for v in (x.mean_sum, x.mean_square, x.variance))
    else:
        S, q, V = statistics(x)
    m = None if pattern is None else int(pattern.split(":")[1])
    rows = [
        dsnot_row(w, S, q, V, k, m, **options)[0]  # type: ignore[arg-type]
        for w, k in zip(weight.double().numpy(), keep.numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(rows))


def wanda_definition(weight: Tensor, x: Tensor, sparsity: float, pattern: str | None = None) -> Tensor:
    _, q, _ = statistics(x)
    scores = np.abs(weight.double().numpy()) * np.sqrt(q)
    keep = np.ones(scores.shape, dtype=bool)
    n, m = (int(scores.shape[1] * sparsity), scores.shape[1]) if pattern is None else map(int, pattern.split(":"))
    for row, kept in zip(scores, keep, strict=True):
        for start in range(0, len(row), m):
            kept[start + np.argsort(row[start : start + m], kind="stable")[:n]] = False
    return torch.from_numpy(keep)


def layer(
    rows: int, width: int, *, seed: int = 0, sequences: int = 4, tokens: int = 32, mean: float = 0.5
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(sequences, tokens, width, generator=generator) * torch.rand(width, generator=generator)
    return weight, x + mean * torch.randn(width, generator=generator)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
@pytest.mark.parametrize(("rows", "width"), [(17, 192), (5, 33), (64, 7), (1, 1)])
def test_unstructured_masks_equal_the_definition(rows: int, width: int, sparsity: float) -> None:
    weight, x = layer(rows, width)
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, sparsity)
    assert torch.equal(keep, wanda_definition(weight, x, sparsity))
    for options in ({}, {"threshold": 0.0}, {"power": 0.0}, {"power": 0.5}):
        assert torch.equal(dsnot_layer(weight, inputs, keep, **options), definition(weight, x, keep, **options))
    refined = dsnot_layer(weight, inputs, keep, max_cycles=3, without_same_sign=False)
    assert torch.equal(refined, definition(weight, x, keep, cycles=3, same_sign=True))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4", "5:32"])
def test_block_masks_equal_the_definition(pattern: str) -> None:
    weight, x = layer(23, 160)
    inputs = LayerInputs.from_tensor(x)
    n, m = map(int, pattern.split(":"))
    keep = wanda_mask(weight, inputs, pattern=pattern)
    assert torch.equal(keep, wanda_definition(weight, x, 0, pattern))
    refined = dsnot_layer(weight, inputs, keep, pattern=pattern)
    assert torch.equal(refined, definition(weight, x, keep, pattern))
    assert not torch.equal(refined, keep)
    assert bool(((~refined).view(23, -1, m).sum(-1) == n).all())
    magnitude = magnitude_mask(weight, pattern=pattern)
    ones = torch.ones(160)
    refined = dsnot_layer(weight, inputs, magnitude, pattern=pattern, scale=ones, threshold=0.0)
    assert torch.equal(refined, definition(weight, x, magnitude, pattern, scale=np.ones(160), threshold=0.0))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 24),
    sparsity=st.floats(0, 0.99),
    cycles=st.integers(0, 30),
    levels=st.sampled_from([0, 2, 5]),
    seed=st.integers(0, 10_000),
    same_sign=st.booleans(),
)
def test_any_shape_and_many_ties(
    rows: int, width: int, sparsity: float, cycles: int, levels: int, seed: int, same_sign: bool
) -> None:
    weight, x = layer(rows, width, seed=seed, sequences=2, tokens=5)
    if levels:  # few distinct values and columns: ties everywhere, contributions and inputs of exactly zero
        weight, x = (weight * levels / 2).round(), (x * levels / 2).round()[..., torch.arange(width) % 3]
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, sparsity)
    assert torch.equal(keep, wanda_definition(weight, x, sparsity))
    refined = dsnot_layer(weight, inputs, keep, max_cycles=cycles, threshold=0.0, without_same_sign=not same_sign)
    assert torch.equal(refined, definition(weight, inputs, keep, cycles=cycles, threshold=0.0, same_sign=same_sign))
    assert torch.equal(refined.sum(1), keep.sum(1))


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(1, 6),
    pattern=st.sampled_from(["2:4", "4:8", "1:2", "2:3", "9:18"]),
    levels=st.sampled_from([0, 3]),
    seed=st.integers(0, 10_000),
)
def test_any_block_shape_and_many_ties(blocks: int, pattern: str, levels: int, seed: int) -> None:
    weight, x = layer(5, blocks * int(pattern.split(":")[1]), seed=seed, sequences=2, tokens=5)
    if levels:
        weight, x = (weight * levels / 2).round(), (x * levels / 2).round()[..., torch.arange(weight.shape[1]) % 3]
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, pattern=pattern)
    assert torch.equal(keep, wanda_definition(weight, x, 0, pattern))
    refined = dsnot_layer(weight, inputs, keep, pattern=pattern, threshold=0.0)
    assert torch.equal(refined, definition(weight, inputs, keep, pattern, threshold=0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_equal_the_definition(dtype: torch.dtype) -> None:
    weight, x = layer(9, 96)
    weight = weight.to(dtype)
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, 0.6)
    assert torch.equal(keep, wanda_definition(weight, x, 0.6))
    assert torch.equal(dsnot_layer(weight, inputs, keep), definition(weight, x, keep))


def test_a_start_mask_of_any_kind_keeps_its_row_budgets() -> None:
    weight, x = layer(12, 64)
    inputs = LayerInputs.from_tensor(x)
    keep = torch.rand(12, 64, generator=torch.Generator().manual_seed(3)) < torch.linspace(0, 1, 12)[:, None]
    refined = dsnot_layer(weight, inputs, keep)
    assert torch.equal(refined, definition(weight, x, keep))
    assert torch.equal(refined.sum(1), keep.sum(1))
    assert torch.equal(refined[[0, 11]], keep[[0, 11]])  # all pruned, all kept: nothing to swap


def test_the_loop_by_hand_on_six_inputs() -> None:
    # One sequence of one token, so S = x and V = 0 (clamped): contributions are the weights themselves.
    weight = torch.tensor([[0.5, -0.4, 0.3, 2.0, -1.0, 3.0]])
    inputs = LayerInputs.from_tensor(torch.ones(1, 1, 6))
    keep = torch.tensor([[False, False, False, True, True, True]])
    # err = .5 - .4 + .3 = .4 > 0: grow the largest positive (0), prune the smallest negative kept (4)
    # err = .4 - 1.0 - .5 = -1.1 < 0: grow the most negative (1), prune the smallest positive kept (3)
    # err = -1.1 + 2.0 + .4 = 1.3 > 0: grow the next positive (2), no negative kept weight left: stop
    assert dsnot_layer(weight, inputs, keep, max_cycles=1).int().tolist() == [[1, 0, 0, 1, 0, 1]]
    for cycles in (2, 3, 50):
        assert dsnot_layer(weight, inputs, keep, max_cycles=cycles).int().tolist() == [[1, 1, 0, 0, 0, 1]]
    # the first swap would change the sign of the error
    assert torch.equal(dsnot_layer(weight, inputs, keep, without_same_sign=False), keep)


def test_nothing_to_do_returns_the_start() -> None:
    weight, x = layer(8, 40)
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, 0.5)
    assert torch.equal(dsnot_layer(weight, inputs, keep, max_cycles=0), keep)
    assert torch.equal(dsnot_layer(weight, inputs, keep, threshold=math.inf), keep)
    assert torch.equal(dsnot_layer(weight, inputs, torch.ones_like(keep)), torch.ones_like(keep))
    before = keep.clone()
    assert dsnot_layer(weight, inputs, keep) is not keep
    assert torch.equal(keep, before)


def test_expected_error_falls_by_orders_of_magnitude() -> None:
    weight, x = layer(64, 512, mean=0.1)
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, 0.5)
    refined = dsnot_layer(weight, inputs, keep)
    S, q, V = statistics(x)

    def squared(mask: Tensor) -> float:
        return float(((weight.double() * ~mask) @ torch.from_numpy(S)).square().mean())

    assert squared(refined) < 1e-2 * squared(keep)
    for i in range(8):  # the error the loop tracks is the one the final mask has
        mask, err = dsnot_row(weight[i].double().numpy(), S, q, V, keep[i].numpy())
        assert abs(err - (weight[i].double().numpy() * S)[~mask].sum()) < 1e-4
        assert np.array_equal(mask, refined[i].numpy())


def test_permuting_rows_permutes_the_result_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(40, 64)
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, 0.5)
    refined = dsnot_layer(weight, inputs, keep)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(wanda_mask(weight[order], inputs, 0.5), keep[order])
    assert torch.equal(dsnot_layer(weight[order], inputs, keep[order]), refined[order])
    monkeypatch.setattr(selection, "_CHUNK", 200)
    assert torch.equal(wanda_mask(weight, inputs, 0.5), keep)
    assert torch.equal(dsnot_layer(weight, inputs, keep), refined)


def test_dead_and_constant_inputs() -> None:
    weight, x = layer(16, 32)
    x[..., :4] = 0.0  # dead: contribution 0, never grown
    x[..., 4:8] = 1.5  # constant: no variance
    inputs = LayerInputs.from_tensor(x)
    keep = wanda_mask(weight, inputs, 0.5)
    assert not keep[:, :4].any()
    refined = dsnot_layer(weight, inputs, keep)
    assert torch.equal(refined, definition(weight, x, keep))
    assert not refined[:, :4].any()


def test_scores_float32_cannot_tell_apart_are_ordered_as_in_float64() -> None:
    q = torch.tensor([1.0, 1.0 + 3e-8, 1.0 - 3e-8, 2.0], dtype=torch.float64)
    inputs = LayerInputs.from_tensor(q.sqrt().view(1, 1, 4))
    assert wanda_mask(torch.ones(1, 4), inputs, 0.25).tolist() == [[True, True, False, True]]
    assert wanda_mask(torch.ones(1, 4), inputs, 0.5).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(("scale", "score"), [(1.0, 1.0), (1e-22, 1000.5 * 2.0**-149)])
def test_rows_of_scores_that_are_nearly_equal_are_ordered_as_in_float64(scale: float, score: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(1, 1, 64, generator=generator, dtype=torch.float64) + 0.5) * scale
    weight = (score / x[0]).float().repeat(50, 1) * (1 + 1e-7 * torch.randn(50, 64, generator=generator))
    inputs = LayerInputs.from_tensor(x)
    for sparsity in (0.1, 0.5, 0.9):
        assert torch.equal(wanda_mask(weight, inputs, sparsity), wanda_definition(weight, x, sparsity))


def test_the_scale_rule() -> None:
    assert [scaled_cycles(width) for width in (96, 80, 4096, 3999, 11008)] == [2, 1, 50, 50, 50]
    assert scaled_threshold(LayerInputs.from_tensor(torch.ones(3, 2048, 1))) == pytest.approx(0.1)
    assert scaled_threshold(LayerInputs.from_tensor(torch.ones(3, 128, 1))) == pytest.approx(0.1 / 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": torch.ones(3, 8)}, r"keep has shape \(3, 8\) and dtype torch.float32; it must be bool"),
        ({"keep": torch.ones(3, 7, dtype=torch.bool)}, r"keep has shape \(3, 7\)"),
        ({"max_cycles": -1}, "max_cycles = -1. It must be at least 0"),
        ({"threshold": -0.1}, "threshold = -0.1. It must be at least 0"),
        ({"threshold": math.nan}, "threshold = nan"),
        ({"power": -1.0}, "power = -1.0. It must be a finite number"),
        ({"pattern": "3:8"}, "keep breaks the pattern '3:8': 3 of 3 blocks"),
        ({"pattern": "2:3"}, "A row of 8 inputs cannot be cut into blocks of 3"),
        ({"weight": torch.full((3, 8), math.nan)}, "The weight holds NaN or infinite values"),
        ({"weight": torch.ones(3, 8, dtype=torch.int8)}, "dtype torch.int8: it is quantised"),
        ({"weight": torch.ones(3, 8).to(torch.float8_e4m3fn)}, "it is quantised"),
        ({"weight": torch.ones(3, 9)}, "The weight has 9 inputs, the statistics 8 features"),
        ({"inputs": LayerInputs(8)}, "The statistics hold no tokens"),
    ],
)
def test_bad_arguments_are_told(change: dict[str, object], message: str) -> None:
    weight, x = layer(3, 8)
    inputs = LayerInputs.from_tensor(x)
    arguments = {"weight": weight, "inputs": inputs, "keep": wanda_mask(weight, inputs, 0.5), **change}
    with pytest.raises(MethodError, match=message):
        dsnot_layer(**arguments)  # type: ignore[arg-type]
