"""The dynamic map and block-wise quantisation against their description."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.common.quantized_state import BLOCK, dequantize, dynamic_map, load_moment, quantize, store_moment
from gnomon.errors import MethodError


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_what_the_paper_describes(signed: bool) -> None:
    values = dynamic_map(signed)
    assert len(values) == len(set(values.tolist())) == 256
    assert torch.equal(values, values.sort().values)
    assert values[-1] == 1.0
    assert (values == 0).sum() == 1
    positive = values[values > 0]
    assert len(positive) == (128 if signed else 255)
    for power in range(7):  # every decade is split twice as finely as the one below
        decade = positive[(positive > 10.0 ** (power - 7)) & (positive < 10.0 ** (power - 6))]
        assert len(decade) == (2**power if signed else 2 ** (power + 1))
        if len(decade) > 1:
            assert torch.allclose(decade.diff(), decade.diff()[:1], rtol=1e-3)
    if signed:
        assert torch.equal(values[values < 0], -positive[positive < 1].flip(0))


def naive(x: torch.Tensor, signed: bool, block: int) -> torch.Tensor:
    """Nearest value of the map by trying them all, block by block."""
    values, out = dynamic_map(signed), []
    for part in x.flatten().split(block):
        top = part.abs().max()
        scaled = part / top if top > 0 else part
        out.append(values[(scaled[:, None] - values).abs().argmin(1)] * top)
    return torch.cat(out).view(x.shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.booleans(), st.sampled_from([16, 100, BLOCK]), st.integers(0, 99))
def test_quantisation_takes_the_nearest_value(size: int, signed: bool, block: int, seed: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) ** 3
    x = x if signed else x.abs()
    codes, absmax = quantize(x, signed=signed, block=block)
    assert codes.shape == (size,)
    assert absmax.shape == (-(-size // block),)
    seen = dequantize(codes, absmax, x.shape, signed=signed, block=block)
    best = naive(x, signed, block)
    assert torch.allclose((seen - x).abs(), (best - x).abs(), atol=1e-7)


def test_error_is_small_and_blocks_are_apart() -> None:
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    error = (dequantize(*quantize(x), x.shape) - x).norm() / x.norm()
    assert error < 0.02
    unsigned = (dequantize(*quantize(x**2, signed=False), x.shape, signed=False) - x**2).norm() / (x**2).norm()
    assert unsigned < 0.01
    loud = x.clone().flatten()
    loud[0] = 1e6
    seen = dequantize(*quantize(loud), loud.shape)
    assert torch.equal(seen[BLOCK:], dequantize(*quantize(x), x.shape).flatten()[BLOCK:])


def test_zeros_extremes_and_dtypes() -> None:
    zeros = torch.zeros(3, 300)
    codes, absmax = quantize(zeros)
    assert torch.equal(dequantize(codes, absmax, zeros.shape), zeros)
    x = torch.tensor([-5.0, 5.0, 0.0])
    assert dequantize(*quantize(x), (3,)).tolist()[1:] == [5.0, 0.0]
    back = dequantize(*quantize(x.bfloat16()), (3,), dtype=torch.bfloat16)
    assert back.dtype == torch.bfloat16
    assert codes.dtype == torch.uint8
    assert codes.untyped_storage().nbytes() == 900
    with pytest.raises(MethodError, match=r"block = 0; it must be at least 1"):
        quantize(x, block=0)


def test_moments_move_between_the_two_forms() -> None:
    like = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
    state: dict = {}
    moment = load_moment(state, "exp_avg", like)
    assert torch.equal(moment, torch.zeros_like(like))
    moment += like
    store_moment(state, "exp_avg", moment)
    assert load_moment(state, "exp_avg", like) is moment
    store_moment(state, "exp_avg", moment, bits=8)
    assert set(state) == {"exp_avg_codes", "exp_avg_absmax"}
    assert torch.allclose(load_moment(state, "exp_avg", like), like, atol=0.1)
    store_moment(state, "exp_avg", moment)
    assert set(state) == {"exp_avg"}
    small = torch.ones(40, 40)
    store_moment(state, "small", small, bits=8)
    assert state["small"] is small
