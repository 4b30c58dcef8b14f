"""LM-Infinite by its equations, in float64: one dense table of logits, every pair by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BASE = 100.0


def rotated(x: Tensor, positions: Tensor, size: int | None = None) -> Tensor:
    """R(p) x in the half-split layout; `positions` fits x without its last axis."""
    size = x.shape[-1] if size is None else size
    half = size // 2
    angles = positions.double()[..., None] * BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b, rest = x[..., :half], x[..., half:size], x[..., size:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)


def visible(queries: int, keys: int, window: int, sinks: int) -> Tensor:
    """Step 1: key j is visible to query i iff 0 <= d and (d < L or j < G); the queries are the last of the tokens."""
    i = torch.arange(keys - queries, keys)[:, None]
    j = torch.arange(keys)
    return (i >= j) & ((i - j < window) | (j < sinks))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    ceiling: int | None = None,
    slopes: Tensor | None = None,
    distance_of_sinks: Any = None,
    top_k: int | None = None,
    middle: int = 0,
) -> Tensor:
    """Unrotated q (B, H, T, h) and k, v (B, K, S, h), the queries last; returns (B, H, T, h).

    `ceiling` None is D = L. `distance_of_sinks(i, j)` replaces min(d, D) for sinks beyond the window.
    """
    ceiling = window if ceiling is None else ceiling
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    seen = visible(queries, keys, window, sinks)
    i = torch.arange(keys - queries, keys)[:, None]
    j = torch.arange(keys)[None]
    distance = (i - j).clamp(max=ceiling)
    if distance_of_sinks is not None:
        distance = torch.where(i - j < window, i - j, distance_of_sinks(i, j))
    h = q.shape[-1]
    if slopes is None:
        # <R(d) q_i, k_j> for the distance of each pair
        turned = rotated(q[:, :, :, None, :].expand(-1, -1, -1, keys, -1), distance[None, None])
        logits = torch.einsum("bhtsd,bhsd->bhts", turned, k) / h**0.5
    else:
        logits = q @ k.mT / h**0.5 - slopes[:, None, None] * distance
    logits = logits.masked_fill(~seen, -torch.inf)
    last = keys - 1
    if top_k is not None and last - window + 1 >= sinks + top_k:
        range_ = slice(sinks, last - window + 1)
        if slopes is None:
            at = rotated(q[:, :, -1:], torch.tensor(middle))
            scores = (at @ k[:, :, range_].mT)[:, :, 0] / h**0.5
        else:
            scores = (q[:, :, -1:] @ k[:, :, range_].mT)[:, :, 0] / h**0.5 - slopes[:, None] * middle
        best = scores.topk(top_k, dim=-1)
        kept = torch.full_like(scores, -torch.inf).scatter(-1, best.indices, best.values)
        logits = logits.clone()
        logits[:, :, -1, range_] = kept
    return logits.softmax(-1) @ v
