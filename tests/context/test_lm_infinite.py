"""The attention functions against the equations, in value and gradient, on every path."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gnomon.context.lm_infinite import Sinks, lambda_attention, lambda_step, lambda_top_k
from gnomon.context.lm_infinite import attention as module

sys.path.insert(0, str(Path(__file__).parent))
import lm_infinite_definition as definition
from lm_infinite_definition import rotated

SETTINGS = [  # T, L, G; T = 1, T not a multiple of L, G = 0, G > L, G > T, L = 1
    (1, 4, 2), (7, 3, 2), (20, 5, 0), (23, 5, 3), (16, 4, 6), (9, 1, 2), (5, 8, 10), (40, 7, 40), (13, 13, 4),
    (14, 13, 4),
]  # fmt: skip


def drawn(tokens: int, *, heads: int = 4, groups: int = 2, size: int = 8, batch: int = 2, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, n, tokens, size, dtype=torch.float64, generator=generator) for n in (heads, groups, groups)
    )


def near(q: Tensor, k: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys as a RoPE model makes them, at their absolute positions."""
    at = torch.arange(k.shape[2])
    return rotated(q, at[start:]), rotated(k, at)


def sinks_of(q: Tensor, k: Tensor, v: Tensor, g: int, window: int, ceiling: int | None = None, start: int = 0) -> Sinks:
    ceiling = window if ceiling is None else ceiling
    at = torch.arange(min(g, k.shape[2]))
    g = len(at)
    return Sinks(
        rotated(k[:, :, :g], at), v[:, :, :g], rotated(q, torch.tensor(ceiling)), k[:, :, :g], ceiling, ceiling
    )


def ours(q: Tensor, k: Tensor, v: Tensor, window: int, g: int, start: int = 0, **options: Any) -> Tensor:
    """Queries `start` ... of the text, with only those past keys that a window holds."""
    rq, rk = near(q[:, :, start:], k, start)
    oldest = start - min(start, window - 1)
    beyond = k.shape[2] - 1 >= window and g > 0
    return lambda_attention(
        rq,
        rk[:, :, oldest:],
        v[:, :, oldest:],
        window=window,
        sinks=sinks_of(q[:, :, start:], k, v, g, window, start=start) if beyond else None,
        first=start,
        **options,
    )


@pytest.mark.parametrize(("tokens", "window", "g"), SETTINGS)
@pytest.mark.parametrize("flash", [True, False])
def test_the_blocks_equal_the_dense_formula(
    tokens: int, window: int, g: int, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash:
        monkeypatch.setattr(module, "_FLASH", None)
    q, k, v = drawn(tokens)
    expected = definition.attention(q, k, v, window=window, sinks=g)
    torch.testing.assert_close(ours(q, k, v, window, g), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [300, 600])
def test_windows_that_are_cut_into_smaller_blocks(window: int) -> None:
    q, k, v = drawn(2 * window + 77, heads=2, groups=1, size=4, batch=1)
    rq, rk = near(q, k)
    sinks = sinks_of(q, k, v, 5, window)
    found = lambda_attention(rq, rk, v, window=window, sinks=sinks)
    with torch.enable_grad():
        masked = lambda_attention(rq.requires_grad_(), rk, v, window=window, sinks=sinks)
    torch.testing.assert_close(found, masked.detach(), rtol=0, atol=1e-12)
    rows = slice(window + 100, window + 130)
    few = definition.attention(q[:, :, rows], k[:, :, : rows.stop], v[:, :, : rows.stop], window=window, sinks=5)
    torch.testing.assert_close(found[:, :, rows], few, rtol=0, atol=1e-12)


@given(
    tokens=st.integers(1, 24),
    window=st.integers(1, 12),
    g=st.integers(0, 12),
    start=st.integers(0, 23),
    flash=st.booleans(),
)
def test_any_chunk_equals_its_rows_of_the_whole(tokens: int, window: int, g: int, start: int, flash: bool) -> None:
    start = min(start, tokens - 1)
    q, k, v = drawn(tokens, batch=1, heads=2, groups=1, size=4, seed=tokens)
    expected = definition.attention(q, k, v, window=window, sinks=g)[:, :, start:]
    with torch.set_grad_enabled(not flash):
        found = ours(q.requires_grad_(not flash), k, v, window, g, start)
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-12)


def test_the_window_ends_where_the_sinks_begin() -> None:
    """Values are one-hot, so the output shows who was seen: at d = L - 1 and d = L the sink counts once."""
    window, tokens = 4, 10
    q = torch.zeros(1, 1, tokens, 2, dtype=torch.float64)
    v = torch.eye(tokens, dtype=torch.float64)[None, None]
    sinks = Sinks(q[:, :, :1], v[:, :, :1], q, q[:, :, :1], window, window)
    weights = lambda_attention(q, q, v, window=window, sinks=sinks)[0, 0]
    for i in range(tokens):
        expected = {j for j in range(i + 1) if i - j < window or j < 1}
        assert {j for j in range(tokens) if weights[i, j] > 0} == expected
        assert weights[i].max() == pytest.approx(1 / len(expected))
    assert weights[window - 1].count_nonzero() == window
    assert weights[window].count_nonzero() == window + 1


def test_short_inputs_are_the_models_own_call() -> None:
    q, k, v = (t.float() for t in drawn(6))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(lambda_attention(q, k, v, window=6), plain)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("ceiling", [5, 6, 9, 40])
def test_a_ceiling_above_the_window(ceiling: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flash:
        monkeypatch.setattr(module, "_FLASH", None)
    q, k, v = drawn(25)
    rq, rk = near(q, k)
    found = lambda_attention(rq, rk, v, window=5, sinks=sinks_of(q, k, v, 3, 5, ceiling))
    expected = definition.attention(q, k, v, window=5, sinks=3, ceiling=ceiling)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flash", [True, False])
def test_streaming_llm_is_the_same_mask_with_distances_of_the_cache(
    flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash:
        monkeypatch.setattr(module, "_FLASH", None)
    window, g = 5, 3
    q, k, v = drawn(22)
    rq, rk = near(q, k)
    at = torch.arange(g)
    far_query, far_key = rotated(q, torch.tensor(g + window - 1)), rotated(k[:, :, :g], at)
    found = lambda_attention(rq, rk, v, window=window, sinks=Sinks(far_key, v[:, :, :g], far_query, far_key, window))
    expected = definition.attention(
        q, k, v, window=window, sinks=g, distance_of_sinks=lambda i, j: g + window - 1 - j + 0 * i
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # and as that scheme says it: the kept tokens of query i, renumbered from 0
    i = 20
    kept = [*range(g), *range(i - window + 1, i + 1)]
    keys = rotated(k[:, :, kept], torch.arange(len(kept))).repeat_interleave(2, 1)
    logits = rotated(q[:, :, i : i + 1], torch.tensor(len(kept) - 1)) @ keys.mT / 8**0.5
    torch.testing.assert_close(
        found[:, :, i : i + 1], logits.softmax(-1) @ v[:, :, kept].repeat_interleave(2, 1), rtol=0, atol=1e-12
    )


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "window", "g"), SETTINGS)
@pytest.mark.parametrize("ceiling", [0, 3])
def test_alibi_clips_the_offset(tokens: int, window: int, g: int, ceiling: int) -> None:
    q, k, v = drawn(tokens)
    n, top = min(g, tokens), window + ceiling
    sinks = Sinks(k[:, :, :n], v[:, :, :n], q, k[:, :, :n], top, top) if g and tokens > window else None
    found = lambda_attention(q, k, v, window=window, sinks=sinks, slopes=SLOPES)
    expected = definition.attention(q, k, v, window=window, sinks=g, ceiling=top, slopes=SLOPES)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def slots(x: Tensor, rank: int, window: int, g: int) -> Tensor:
    """The slots of a cache that has just taken the token of this rank: sinks, then the ring."""
    held = list(range(min(g, rank + 1)))
    ring: dict[int, int] = {}
    for r in range(g, rank + 1):
        ring[(r - g) % window] = r
    return x[:, :, held + [ring[s] for s in sorted(ring)]]


@pytest.mark.parametrize(("rank", "window", "g"), [(0, 4, 2), (1, 4, 2), (4, 4, 2), (5, 4, 2), (6, 4, 2), (19, 4, 2),
                                             (19, 7, 0), (8, 3, 9), (19, 1, 1), (11, 6, 6)])  # fmt: skip
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_on_slots_is_the_last_row(rank: int, window: int, g: int, alibi: bool, tensor: bool) -> None:
    q, k, v = drawn(rank + 1)
    slopes = SLOPES if alibi else None
    expected = definition.attention(q, k, v, window=window, sinks=g, slopes=slopes)[:, :, -1:]
    rq, rk = (q, k) if alibi else near(q, k)
    held, values = slots(rk, rank, window, g), slots(v, rank, window, g)
    last = q[:, :, -1:]
    far = Sinks(held[:, :, :g], values[:, :, :g], last, k[:, :, :g], window, window)
    far = far if alibi else far._replace(far_query=rotated(last, torch.tensor(window)))
    found = lambda_step(
        rq[:, :, -1:],
        held,
        values,
        window=window,
        sinks=far if g and rank >= window else None,
        rank=torch.tensor([rank, rank]) if tensor else rank,
        count=g,
        slopes=slopes,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_order_of_the_ring_does_not_matter() -> None:
    q, k, v = drawn(30)
    rq, rk = near(q, k)
    held, values = slots(rk, 29, 6, 3), slots(v, 29, 6, 3)
    far = Sinks(held[:, :, :3], values[:, :, :3], rotated(q[:, :, -1:], torch.tensor(6)), k[:, :, :3], 6, 6)
    first = lambda_step(rq[:, :, -1:], held, values, window=6, sinks=far, rank=29, count=3)
    for order in list(itertools.permutations(range(3, 9)))[::97]:
        index = [0, 1, 2, *order]
        again = lambda_step(
            rq[:, :, -1:], held[:, :, index], values[:, :, index], window=6, sinks=far, rank=29, count=3
        )
        torch.testing.assert_close(again, first, rtol=0, atol=1e-13)


@pytest.mark.parametrize("k_best", [1, 3, 8])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("tokens", [10, 14, 30])
def test_top_k_of_the_middle(tokens: int, k_best: int, alibi: bool) -> None:
    window, g, middle = 5, 2, 3
    q, k, v = drawn(tokens)
    slopes = SLOPES if alibi else None
    expected = definition.attention(q, k, v, window=window, sinks=g, slopes=slopes, top_k=k_best, middle=middle)[
        :, :, -1:
    ]
    last = q[:, :, -1:]
    rq, rk = (q, k) if alibi else near(q, k)
    found = lambda_top_k(
        rq[:, :, -1:],
        rk,
        v,
        plain_key=k,
        far_query=last if alibi else rotated(last, torch.tensor(window)),
        middle_query=last if alibi else rotated(last, torch.tensor(middle)),
        window=window,
        sinks=g,
        k=k_best,
        ceiling=window,
        distances=(window, middle),
        slopes=slopes,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_formula() -> None:
    tensors = drawn(13, batch=1)
    got: list[list[Tensor]] = []
    for run in (lambda *t: ours(*t, 4, 2), lambda *t: definition.attention(*t, window=4, sinks=2)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        run(*leaves).square().sum().backward()
        got.append([t.grad for t in leaves])
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    q, k, v = (t.requires_grad_() for t in drawn(7, batch=1, heads=2, groups=1, size=4))
    assert torch.autograd.gradcheck(lambda *t: ours(*t, 3, 2), (q, k, v))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("flash", [True, False])
def test_other_types(dtype: torch.dtype, bound: float, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flash:
        monkeypatch.setattr(module, "_FLASH", None)
    q, k, v = drawn(30)
    expected = definition.attention(q, k, v, window=7, sinks=3)
    rq, rk = (t.to(dtype) for t in near(q, k))
    sinks = sinks_of(q, k, v, 3, 7)
    sinks = Sinks(*(t.to(dtype) for t in sinks[:4]), 7, 7)
    found = lambda_attention(rq, rk, v.to(dtype), window=7, sinks=sinks)
    assert found.dtype == dtype
    assert float((found.double() - expected).abs().max()) < bound


def test_large_half_logits_and_biases_do_not_overflow() -> None:
    q, k, v = (t.half() for t in drawn(20))
    q, k = q * 60, k * 60
    sinks = Sinks(k[:, :, :2], v[:, :, :2], q, k[:, :, :2], 4, 4)
    for slopes in (None, SLOPES * 8):
        assert bool(torch.isfinite(lambda_attention(q, k, v, window=4, sinks=sinks, slopes=slopes)).all())


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    q, k, v = (t.float() for t in drawn(12, batch=1))
    torch.manual_seed(0)
    runs = torch.stack([ours(q.double(), k.double(), v.double(), 4, 2, dropout=0.3) for _ in range(600)])
    expected = definition.attention(q.double(), k.double(), v.double(), window=4, sinks=2)
    assert float((runs[0] - expected).abs().max()) > 0.05
    assert float((runs.mean(0) - expected).abs().max()) < 0.25


def test_rows_of_a_batch_may_stand_elsewhere() -> None:
    """Each row with its own first rank and number of valid past keys equals itself alone."""
    window, g, start = 5, 2, 9
    q, k, v = drawn(16, batch=1)
    alone = ours(q, k, v, window, g, start)
    short = 2  # this row's text begins two tokens before the chunk
    q2, k2, v2 = (t[:, :, start - short :] for t in (q, k, v))
    alone2 = ours(q2, k2, v2, window, g, short)
    rq, rk = near(q[:, :, start:], k, start)
    both_sinks = sinks_of(q[:, :, start:], k, v, g, window, start=start)
    own = sinks_of(q2[:, :, short:], k2, v2, g, window, start=short)
    sinks = Sinks(*(torch.cat(pair) for pair in zip(both_sinks[:4], own[:4], strict=True)), window, window)
    oldest = start - window + 1
    found = lambda_attention(
        rq.repeat(2, 1, 1, 1),
        rk[:, :, oldest:].repeat(2, 1, 1, 1),
        v[:, :, oldest:].repeat(2, 1, 1, 1),
        window=window,
        sinks=sinks,
        first=torch.tensor([start, short]),
        past_valid=torch.tensor([window - 1, short]),
    )
    torch.testing.assert_close(found, torch.cat([alone, alone2]), rtol=0, atol=1e-12)


def test_rotations_in_both_layouts_follow_the_angle() -> None:
    from gnomon.context.lm_infinite.rotation import turn_by, turned

    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inv_freq = torch.tensor([1.0, 0.1, 0.01])
    at = torch.tensor([[3, 0, -4, 70000, 1]])
    angles = at.double()[..., None] * inv_freq.double()
    for interleaved in (False, True):
        got = turned(x, turn_by(at, inv_freq, interleaved, x.dtype))
        pairs = [(2 * n, 2 * n + 1) if interleaved else (n, n + 3) for n in range(3)]
        for n, (a, b) in enumerate(pairs):
            z = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles[..., n])
            torch.testing.assert_close(got[..., a], z.real, rtol=0, atol=1e-12)
            torch.testing.assert_close(got[..., b], z.imag, rtol=0, atol=1e-12)
        assert torch.equal(got[..., 6:], x[..., 6:])
        back = turned(got, turn_by(-at, inv_freq, interleaved, x.dtype))
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    assert math.isclose(float(got.norm()), float(x.norm()), rel_tol=1e-12)
