"""What one forward pass knows of its tokens: where they stand, which keys come, how far the sinks are.

A `Layout` is made before the model's own forward, goes through the layers in the place of the attention mask and
serves all of them; rotations are computed when the first layer asks. Being an argument of the layers, it is still the
right one when gradient checkpointing runs a layer again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gnomon.context.lm_infinite.attention import Sinks, lambda_attention
from gnomon.context.lm_infinite.options import Options
from gnomon.context.lm_infinite.rotation import Turn, turn_by, turned
from gnomon.context.lm_infinite.step import lambda_step, lambda_top_k

__all__ = ["Layout", "attend"]

Kind = Literal["all", "split", "slots"]


@dataclass
class Layout:
    """One forward pass.

    Attributes
    ----------
    options : Options
    seen, tokens : int
        Tokens before this pass and in it.
    kind : {"all", "split", "slots"}
        The keys that come: all so far; sinks, the past window and the new ones; the slots of a `LambdaCache`.
    padding : Tensor (B,), optional
        Padding tokens before each row's first real one; `least` and `most` are its extremes.
    positions : Tensor (B or 1, T), optional
        The positions at which the queries are rotated.
    offset : Tensor (B or 1,), optional
        Index minus position of a row's tokens, as they were rotated when they were sinks.
    inv_freq : Tensor (rotary size / 2,), optional
    slopes : Tensor (H,), optional
    """

    options: Options
    seen: int
    tokens: int
    kind: Kind = "all"
    padding: Int[Tensor, " B"] | None = None
    least: int = 0
    most: int = 0
    positions: Int[Tensor, "rows T"] | None = None
    offset: Int[Tensor, " rows"] | None = None
    inv_freq: Float[Tensor, " half"] | None = None
    interleaved: bool = False
    slopes: Float[Tensor, " H"] | None = None
    _turns: dict[Any, Turn] = field(default_factory=dict, repr=False)

    ndim = 0  # some models look whether a mask is two-dimensional

    def to(self, *args: Any, **kwargs: Any) -> Layout:
        """Return itself: models cast and move their masks."""
        return self

    @property
    def last_rank(self) -> int:
        """The largest rank of a query."""
        return self.seen + self.tokens - 1 - self.least

    @property
    def rolled(self) -> bool:
        """Whether some row begins with padding inside this pass."""
        return self.most > self.seen

    def shift(self) -> Tensor:
        """Return how many padding tokens each row has inside this pass, (B,)."""
        assert self.padding is not None
        return (self.padding - self.seen).clamp(0, self.tokens)

    def turn(self, which: str, like: Tensor) -> Turn:
        """Return a rotation, (rows, 1, tokens, half): of queries or keys to where this pass needs them."""
        key = (which, like.device, like.dtype == torch.float64)
        if key not in self._turns:
            assert self.inv_freq is not None
            offsets = self._offsets(which).to(like.device)[:, None]
            self._turns[key] = turn_by(offsets, self.inv_freq, self.interleaved, like.dtype)
        return self._turns[key]

    def _offsets(self, which: str) -> Tensor:
        assert self.positions is not None
        assert self.offset is not None
        positions, options = self.positions, self.options
        if which == "queries":
            if self.rolled:
                positions = roll(positions.expand(len(self.shift()), -1), self.shift(), dim=1)
            return options.far_at - positions
        if which == "last query":
            return options.far_at - positions[:, -1:]
        if which == "middle query":
            return options.middle_at - positions[:, -1:]
        if which == "all keys":
            return self.offset[:, None] - torch.arange(self.seen + self.tokens, device=positions.device)
        ranks = torch.arange(options.sinks, device=positions.device)
        first = 0 if self.padding is None else self.padding.to(positions.device)[:, None]
        own = ranks + first - self.offset[:, None]
        return (ranks if options.sink_distance == "cache" else 0) - own

    def sinks(self, query: Tensor, key: Tensor, value: Tensor) -> Sinks | None:
        """Return the sinks for these queries (rolled as they are), None when none is beyond the window."""
        options, count = self.options, key.shape[2]  # fewer than G while the text is shorter than that
        if options.sinks == 0 or self.last_rank < options.local:
            return None
        far_distance: int | Tensor = options.far_at
        if options.sink_distance == "cache":
            far_distance = options.far_at - torch.arange(count, device=query.device)
        if self.slopes is not None or options.threshold is None:
            return Sinks(key, value, query, key, options.threshold, far_distance)
        far_query = turned(query, self.turn("queries", query))
        cos, sin, interleaved = self.turn("sinks", key)
        far_key = turned(key, Turn(cos[..., :count, :], sin[..., :count, :], interleaved))
        return Sinks(key, value, far_query, far_key, options.threshold, far_distance)


def roll(x: Tensor, shift: Int[Tensor, " B"], dim: int = 2, *, back: bool = False) -> Tensor:
    """Move each row's tokens left by its own number, the first ones to the end (`back`: the other way)."""
    count = x.shape[dim]
    steps = torch.arange(count, device=x.device) + (-1 if back else 1) * shift.to(x.device)[:, None]
    shape = [len(shift)] + [count if d == dim else 1 for d in range(1, x.dim())]
    return x.gather(dim, (steps % count).view(shape).expand(x.shape))


def attend(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, layer: int
) -> Float[Tensor, "B H T h"]:
    """Attend in one layer.

    Parameters
    ----------
    layout : Layout
    query : Tensor (B, H, T, h)
    key, value : Tensor (B, K, S, h)
        As the cache gave them; K divides H.
    scale, dropout : float
    layer : int
        From 0; the top-k begins at one.

    Returns
    -------
    Tensor (B, H, T, h)
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # what needs float32 inside keeps it
            return attend(layout, query.to(half), key.to(half), value.to(half), scale, dropout, layer)
    options, g = layout.options, layout.options.sinks
    if layout.kind == "slots":
        return lambda_step(
            query,
            key,
            value,
            window=options.local,
            sinks=layout.sinks(query, key[:, :, :g], value[:, :, :g]),
            rank=layout.seen if layout.padding is None else layout.seen - layout.padding.to(query.device),
            count=min(g, key.shape[2]),
            scale=scale,
            slopes=layout.slopes,
        )
    past = min(layout.seen, options.local - 1)
    near = slice(key.shape[2] - layout.tokens - past, None)
    out = _blocks(layout, query, key[:, :, near], value[:, :, near], _first(layout, key, value), past, scale, dropout)
    enough = layout.last_rank - options.local + 1 >= g + (options.top_k or 0)
    if options.top_k is not None and layer >= options.top_k_from_layer and enough:
        out = torch.cat([out[:, :, :-1], _reattend(layout, query[:, :, -1:], key, value, scale)], dim=2)
    return out


def _first(layout: Layout, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each row's sinks."""
    g = layout.options.sinks
    if layout.padding is None or layout.kind == "split":
        return key[:, :, :g], value[:, :, :g]
    index = (layout.padding.to(key.device)[:, None] + torch.arange(g, device=key.device)).clamp(max=key.shape[2] - 1)
    index = index[:, None, :, None]
    return tuple(t.gather(2, index.expand(-1, t.shape[1], -1, t.shape[3])) for t in (key, value))  # type: ignore[return-value]


def _blocks(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: tuple[Tensor, Tensor],
    past: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attend in blocks; a row that begins with padding is moved to begin with its first real token."""
    rank: int | Tensor = layout.seen
    valid = shift = None
    if layout.padding is not None:
        padding = layout.padding.to(query.device)
        rank = (layout.seen - padding).clamp(min=0)
        if layout.most > layout.seen - past:
            valid = (layout.seen - padding).clamp(0, past) if past else None
        if layout.rolled:
            shift = layout.shift().to(query.device)
            query = roll(query, shift)
            key, value = (torch.cat([t[:, :, :past], roll(t[:, :, past:], shift)], dim=2) for t in (key, value))
    out = lambda_attention(
        query,
        key,
        value,
        window=layout.options.local,
        sinks=layout.sinks(query, *first),
        first=rank,
        past_valid=valid,
        scale=scale,
        slopes=layout.slopes,
        dropout=dropout,
    )
    return out if shift is None else roll(out, shift, back=True)


def _reattend(layout: Layout, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    options = layout.options
    plain, far, middle = key, query, query
    if layout.slopes is None:
        plain = turned(key, layout.turn("all keys", key))
        far = turned(query, layout.turn("last query", query))
        middle = turned(query, layout.turn("middle query", query))
    assert options.top_k is not None
    return lambda_top_k(
        query,
        key,
        value,
        plain_key=plain,
        far_query=far,
        middle_query=middle,
        window=options.local,
        sinks=options.sinks,
        k=options.top_k,
        ceiling=options.threshold,
        distances=(options.far_at, options.middle_at),
        start=None if layout.padding is None else layout.padding.to(query.device),
        scale=scale,
        slopes=layout.slopes,
    )
