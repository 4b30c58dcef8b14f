"""The attention of one query: on the slots of a bounded cache, and with the best keys of the middle.

Symbols as in `gnomon.context.lm_infinite.attention`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from gnomon.context.lm_infinite.attention import Sinks, repeat, sink_logits

__all__ = ["lambda_step", "lambda_top_k"]


def lambda_step(
    query: Float[Tensor, "B H 1 h"],
    key: Float[Tensor, "B K n h"],
    value: Float[Tensor, "B K n h"],
    *,
    window: int,
    sinks: Sinks | None,
    rank: int | Int[Tensor, " B"],
    count: int,
    scale: float | None = None,
    slopes: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H 1 h"]:
    """Attend from one query to the slots of a `LambdaCache`: O(L + G), whatever the query's rank.

    Slot c < G holds the token of rank c; slot c >= G the newest token whose rank is c modulo L.

    Parameters
    ----------
    query, key, value : Tensor
        `key` and `value` are the first n <= G + L slots, the query's own token among them.
    window : int
        L.
    sinks : Sinks, optional
        Of the first G slots; needed once ``rank >= L`` (and G > 0).
    rank : int or Tensor (B,)
        Of the query. A row whose real tokens have not begun may have any value below 1.
    count : int
        G, the number of slots that are sinks.
    scale, slopes
        As for `lambda_attention`.

    Returns
    -------
    Tensor (B, H, 1, h)
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, _, size = query.shape
    groups, slots = key.shape[1], key.shape[2]
    steady = not isinstance(rank, Tensor) and rank >= window + count - 1 and slopes is None
    grouped = (query * scale).view(batch, groups, heads // groups, size)
    logits = (grouped @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
    if steady:
        if sinks is not None:
            far = _steady_sinks(query, rank, count, sinks, scale)
            logits[..., :count] = far.view(batch, groups, heads // groups, count)
    else:
        logits = _unsteady(logits, query, window, sinks, rank, count, scale, slopes)
    weights = logits.softmax(-1).to(value.dtype)
    return (weights @ value[:, :, :slots]).view(batch, heads, 1, size)


def _steady_sinks(query: Tensor, rank: int | Tensor, count: int, sinks: Sinks, scale: float) -> Tensor:
    if sinks.ceiling is not None and rank - count + 1 >= sinks.ceiling:
        return (sinks.far_query * scale) @ repeat(sinks.far_key, query.shape[1]).mT
    return sink_logits(query, sinks.far_query, rank - torch.arange(count, device=query.device), sinks, scale)


def _unsteady(
    logits: Tensor,
    query: Tensor,
    window: int,
    sinks: Sinks | None,
    rank: int | Tensor,
    count: int,
    scale: float,
    slopes: Tensor | None,
) -> Tensor:
    """Logits of a step where some slots are empty, some sinks are near, rows differ, or distances are biases."""
    batch, groups, per, slots = logits.shape
    ranks = torch.as_tensor(rank, device=logits.device).clamp(min=0).view(-1, 1, 1, 1)
    slot = torch.arange(slots, device=logits.device)
    is_sink = slot < count
    distance = torch.where(is_sink, ranks - slot, (ranks - slot) % window)
    empty = slot > ranks
    if sinks is not None and slopes is None:
        own = distance[..., :count]
        far = sink_logits(query, sinks.far_query, own, sinks, scale).view(batch, groups, per, count)
        logits = torch.cat(
            [torch.where(own >= window, far.to(logits.dtype), logits[..., :count]), logits[..., count:]], -1
        )
    if slopes is not None:
        if sinks is not None and sinks.ceiling is not None:
            target = torch.as_tensor(sinks.far_distance, device=slot.device).expand(count)
            target = pad(target, (0, slots - count))
            distance = torch.where(is_sink & (distance >= sinks.ceiling), target, distance)
        logits = logits - (slopes.to(logits)[:, None] * distance.to(logits)).view(-1, groups, per, slots)
    return logits.masked_fill(empty, -math.inf)


def lambda_top_k(
    query: Float[Tensor, "B H 1 h"],
    key: Float[Tensor, "B K S h"],
    value: Float[Tensor, "B K S h"],
    *,
    plain_key: Float[Tensor, "B K S h"],
    far_query: Float[Tensor, "B H 1 h"],
    middle_query: Float[Tensor, "B H 1 h"],
    window: int,
    sinks: int,
    k: int,
    ceiling: int | None,
    distances: tuple[int, int],
    start: Int[Tensor, " B"] | None = None,
    scale: float | None = None,
    slopes: Float[Tensor, " H"] | None = None,
) -> Float[Tensor, "B H 1 h"]:
    """Attend from the last query to window, sinks and, per head, the k best keys between them.

    All keys of the middle are scored at one distance; the k largest scores enter the softmax as they are. With fewer
    than k keys in the middle, none enters.

    Parameters
    ----------
    query, key, value : Tensor
        The last query and every key so far, rotated at their positions.
    plain_key : Tensor (B, K, S, h)
        The keys not rotated.
    far_query, middle_query : Tensor (B, H, 1, h)
        The query rotated at the ceiling and at the middle's distance.
    window, sinks, k : int
        L, G and the number of middle keys kept.
    ceiling : int or None
        D, as in `Sinks`.
    distances : (int, int)
        The distances of far sinks and of the middle, for biases.
    start : Tensor (B,), optional
        Index of each row's first real token, default 0.
    scale, slopes
        As for `lambda_attention`.

    Returns
    -------
    Tensor (B, H, 1, h)
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, _, size = query.shape
    groups, total = key.shape[1], key.shape[2]
    index = torch.arange(total, device=key.device)
    rank = index - (0 if start is None else start[:, None, None, None])  # (S,) or (B, 1, 1, S)
    distance = total - 1 - index
    near = (distance < window) & (rank >= 0)
    sink = (distance >= window) & (rank >= 0) & (rank < sinks)
    middle = (distance >= window) & (rank >= sinks)
    beyond = distance >= (math.inf if ceiling is None else ceiling)

    def score(q: Tensor, keys: Tensor, at: Tensor | int) -> Tensor:
        logits = ((q * scale).view(batch, groups, heads // groups, size) @ keys.mT).view(batch, heads, 1, total)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if slopes is None else logits - slopes.to(logits)[:, None, None] * at

    true = score(query, key, distance)
    logits = torch.where(sink & beyond, score(far_query, plain_key, distances[0]), true)
    logits = logits.masked_fill(~(near | sink), -math.inf)
    if int(middle.sum(-1).max()) >= k:
        scores = score(middle_query, plain_key, distances[1]).masked_fill(~middle, -math.inf)
        best = scores.topk(k, dim=-1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        enough = middle.sum(-1, keepdim=True) >= k
        logits = torch.where(chosen & middle & enough, scores, logits)
    weights = logits.softmax(-1).to(value.dtype).view(batch, groups, heads // groups, total)
    return (weights @ value).view(batch, heads, 1, size)
