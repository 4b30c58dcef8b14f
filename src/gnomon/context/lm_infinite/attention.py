"""The attention of many queries, as a function of tensors: block by block.

Symbols: B rows, H query heads, K key heads (H is a multiple of K), T queries, P keys before the first query, G sinks,
L window, D ceiling, h head size. `rank` is the index of a token among the real tokens of its row, from 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

__all__ = ["Sinks", "lambda_attention", "repeat", "sink_logits"]

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Sinks(NamedTuple):
    """The sinks of a call, and what the queries look like to them beyond the ceiling.

    Attributes
    ----------
    key, value : Tensor (B, K, G, h)
        As the model made them (rotated at their own positions).
    far_query : Tensor (B, H, T, h)
        The queries for distances >= `ceiling`: rotated at D. The queries themselves where positions are biases.
    far_key : Tensor (B, K, G, h)
        The keys to meet them: not rotated.
    ceiling : int or None
        D, at least L. None: there is none, sinks keep their true distance.
    far_distance : int or Tensor (G,)
        The distance by which a bias is computed at and beyond the ceiling; D itself, or one per sink.
    """

    key: Float[Tensor, "B K G h"]
    value: Float[Tensor, "B K G h"]
    far_query: Float[Tensor, "B H T h"]
    far_key: Float[Tensor, "B K G h"]
    ceiling: int | None
    far_distance: int | Int[Tensor, " G"] = 0


def lambda_attention(
    query: Float[Tensor, "B H T h"],
    key: Float[Tensor, "B K S h"],
    value: Float[Tensor, "B K S h"],
    *,
    window: int,
    sinks: Sinks | None = None,
    first: int | Int[Tensor, " B"] = 0,
    past_valid: Int[Tensor, " B"] | None = None,
    scale: float | None = None,
    slopes: Float[Tensor, " H"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T h"]:
    """Attend under the Lambda mask with the distance ceiling, block by block: O(T (L + G)) time.

    The last T of the S keys belong to the queries; the P = S - T before them are the nearest of the past.

    Parameters
    ----------
    query, key, value : Tensor
        Rotated at the tokens' positions where the model rotates.
    window : int
        L: a query sees the keys at distance 0 to L - 1, itself included.
    sinks : Sinks, optional
        Seen at distances >= L. None: no query has one there (or G = 0).
    first : int or Tensor (B,), default 0
        Rank of the first query.
    past_valid : Tensor (B,), optional
        How many of the P past keys, counted from the last, are real tokens of that row; default all.
    scale : float, optional
        Factor of the logits, default ``1/sqrt(h)``.
    slopes : Tensor (H,), optional
        ALiBi: each logit loses ``slope * distance``.
    dropout : float, default 0.0
        Probability with which attention weights are dropped.

    Returns
    -------
    Tensor (B, H, T, h)
        In the dtype of `query`.

    Examples
    --------
    >>> x = torch.randn(1, 2, 6, 4)
    >>> lambda_attention(x, x, x, window=3).shape
    torch.Size([1, 2, 6, 4])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    if past == 0 and tokens <= window and sinks is None and slopes is None:
        # the model's own call, so short inputs give what they gave before
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(
            query, key, value, is_causal=tokens > 1, scale=scale, dropout_p=dropout, enable_gqa=gqa
        )
    if past_valid is None and slopes is None and dropout == 0.0 and _flash_can(query, key, value):
        return _by_flash(query, key, value, window, sinks, first, scale)
    return _by_masks(query, key, value, window, sinks, first, past_valid, scale, slopes, dropout)


def _flash_can(*tensors: Tensor) -> bool:
    if _FLASH is None or torch.compiler.is_compiling():
        return False
    if tensors[2].shape[-1] != tensors[0].shape[-1]:
        return False
    recording = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recording and all(t.device.type == "cpu" and t.dtype in _FLASH_TYPES for t in tensors)


def _sink_distance(first: int | Tensor, start: int, rows: int, sinks: Sinks) -> Tensor:
    """Distances of queries `start` ... to each sink: (rows, G), or (B, 1, rows, G) where rows of the batch differ."""
    device = sinks.key.device
    ranks = torch.arange(start, start + rows, device=device)[:, None] - torch.arange(sinks.key.shape[2], device=device)
    return ranks + (first[:, None, None, None] if isinstance(first, Tensor) else first)


def repeat(keys: Tensor, heads: int) -> Tensor:
    """Repeat key heads for their query heads: (B, K, S, h) -> (B, H, S, h)."""
    times = heads // keys.shape[1]
    return keys if times == 1 else keys.repeat_interleave(times, dim=1)


def _by_flash(
    query: Tensor, key: Tensor, value: Tensor, window: int, sinks: Sinks | None, first: int | Tensor, scale: float
) -> Tensor:
    """Split the keys of a block into those all its rows see, its own triangle and the window's edge; merge by lse."""
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    # small blocks waste less on the edge, large ones call less often
    size = window if window <= 256 else max(256, -(-window // 4))
    out = torch.empty_like(query)
    edges: dict[tuple[int, int, int], Tensor] = {}
    for start in range(0, tokens, size):
        rows = min(size, tokens - start)
        here = past + start
        q = query[:, :, start : start + rows]
        parts = [_flash(q, key[:, :, here : here + rows], value[:, :, here : here + rows], scale, causal=True)]
        oldest = here - window + 1
        low, middle = max(0, oldest), max(0, min(here, oldest + rows - 1))
        if middle < here:
            parts.append(_flash(q, key[:, :, middle:here], value[:, :, middle:here], scale))
        if low < middle:
            shape = (rows - 1, middle - low, low - oldest)
            if shape not in edges:
                hidden = torch.ones(shape[:2], dtype=torch.bool).tril(-1 - shape[2])
                edges[shape] = torch.zeros(shape[:2], dtype=query.dtype).masked_fill_(hidden, -math.inf)
            edge = _flash(q[:, :, :-1], key[:, :, low:middle], value[:, :, low:middle], scale, mask=edges[shape])
            # the last row sees no key of the edge
            parts.append((pad(edge[0], (0, 0, 0, 1)), pad(edge[1], (0, 1), value=-math.inf)))
        if sinks is not None:
            distance = _sink_distance(first, start, rows, sinks)
            far = sinks.far_query[:, :, start : start + rows]
            parts.append(_sink_part(q, far, distance, window, sinks, scale))
        out[:, :, start : start + rows] = _merge(parts)
    return out


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    assert _FLASH is not None
    found: tuple[Tensor, Tensor] = _FLASH(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return found


def sink_logits(query: Tensor, far_query: Tensor, distance: Tensor, sinks: Sinks, scale: float) -> Tensor:
    """Logits to the sinks, by true distance below the ceiling and by the ceiling from there on: (B, H, T, G)."""
    heads = query.shape[1]
    far = (far_query * scale) @ repeat(sinks.far_key, heads).mT
    if sinks.ceiling is not None and bool((distance >= sinks.ceiling).all()):
        return far
    near = (query * scale) @ repeat(sinks.key, heads).mT
    return near if sinks.ceiling is None else torch.where(distance >= sinks.ceiling, far, near)


def _sink_part(
    query: Tensor, far_query: Tensor, distance: Tensor, window: int, sinks: Sinks, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the sinks at distance >= L; -inf where a row has none."""
    logits = sink_logits(query, far_query, distance, sinks, scale)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).masked_fill(distance < window, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return weights.to(query.dtype) @ repeat(sinks.value, query.shape[1]), lse


def _merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmax over the union of key groups from each group's output and log-sum-exp."""
    if len(parts) == 1:
        return parts[0][0]
    lse = torch.stack([part[1] for part in parts])
    weights = lse.softmax(0)  # the first part, a row's own triangle, is never empty
    out = parts[0][0] * weights[0][..., None]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = out.addcmul_(part.to(out.dtype), weight[..., None])
    return out.to(parts[0][0].dtype)


def _by_masks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sinks: Sinks | None,
    first: int | Tensor,
    past_valid: Tensor | None,
    scale: float,
    slopes: Tensor | None,
    dropout: float,
) -> Tensor:
    """One masked call a block on [sinks | window]; differentiable, on any device, with dropout and biases."""
    tokens, past, heads = query.shape[2], key.shape[2] - query.shape[2], query.shape[1]
    size = min(max(window, 64), 512)
    outputs = []
    for start in range(0, tokens, size):
        rows = min(size, tokens - start)
        low, high = max(0, past + start - window + 1), past + start + rows
        columns = torch.arange(low, high, device=query.device)
        distance = torch.arange(past + start, high, device=query.device)[:, None] - columns
        seen = (distance >= 0) & (distance < window)
        if past_valid is not None:
            seen = seen & (columns >= past - past_valid[:, None, None, None])
        q, k, v = query[:, :, start : start + rows], key[:, :, low:high], value[:, :, low:high]
        mask: Tensor = seen
        if sinks is not None:
            of_sinks = _sink_distance(first, start, rows, sinks)
            far = sinks.far_query[:, :, start : start + rows]
            q, k, v, seen, distance = _join(q, k, v, seen, distance, far, of_sinks, window, sinks, slopes is not None)
            mask = seen
        kept = query.dtype
        if slopes is not None:
            # a bias of some thousands has no precision left in half types
            q, k, v = (t.to(torch.promote_types(kept, torch.float32)) for t in (q, k, v))
            mask = torch.where(seen, -slopes.to(q)[:, None, None] * distance.to(q), -math.inf)
        size_v = v.shape[-1]
        v = pad(v, (0, max(0, k.shape[-1] - size_v)))  # kernels want equal head sizes
        found = scaled_dot_product_attention(
            q, repeat(k, heads), repeat(v, heads), attn_mask=mask, scale=scale, dropout_p=dropout
        )
        outputs.append(found[..., :size_v].to(kept))
    return torch.cat(outputs, dim=2)


def _join(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    distance: Tensor,
    far: Tensor,
    of_sinks: Tensor,
    window: int,
    sinks: Sinks,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Put the sinks before the window's keys.

    Where the far logits need another query, both queries stand in one doubled head: [q ; far q] meets [k ; 0] and
    [0 ; far k]. With biases the query is the same and the distance alone says it.
    """
    beyond = of_sinks >= (math.inf if sinks.ceiling is None else sinks.ceiling)
    near = (of_sinks >= window) & ~beyond
    keys, values, visible = [k], [v], [seen]
    if biased:
        keys, values, visible = [sinks.key, k], [sinks.value, v], [of_sinks >= window, seen]
        effective = torch.where(beyond, torch.as_tensor(sinks.far_distance, device=q.device), of_sinks)
        distance = _beside(effective, distance)
    else:
        h = q.shape[-1]
        q = torch.cat([q, far], dim=-1)
        keys = [pad(sinks.far_key, (h, 0)), pad(k, (0, h))]
        values, visible = [sinks.value, v], [beyond, seen]
        if sinks.ceiling != window:
            keys, values, visible = [pad(sinks.key, (0, h)), *keys], [sinks.value, *values], [near, *visible]
    return q, torch.cat(keys, dim=2), torch.cat(values, dim=2), _beside(*visible), distance


def _beside(*tables: Tensor) -> Tensor:
    """Join tables of shapes (rows, n) or (B, 1, rows, n) along the keys."""
    if any(table.dim() == 4 for table in tables):
        batch = max(table.shape[0] for table in tables if table.dim() == 4)
        tables = tuple(t.expand(batch, 1, *t.shape[-2:]) for t in tables)
    return torch.cat(tables, dim=-1)
