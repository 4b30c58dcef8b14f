"""A key/value cache of fixed size: the first G tokens and a ring of the last L."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gnomon.errors import MethodError, ModelError

__all__ = ["LambdaCache", "LambdaLayer"]


class _Rows:
    """What all layers of one cache know of the rows: how many padding tokens stand before the first real one."""

    def __init__(self) -> None:
        self.padding: Tensor | None = None
        self.ready = False


class LambdaLayer(CacheLayerMixin):
    """The slots of one layer. Token of rank r: slot r while r < G, then slot ``G + (r - G) mod L``."""

    is_compileable = False
    is_croppable = False

    def __init__(self, sinks: int, window: int, rows: _Rows) -> None:
        super().__init__()
        self.sinks, self.window, self.rows = sinks, window, rows
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate all slots."""
        batch, heads, _, size = key_states.shape
        slots = self.sinks + self.window
        self.device, self.dtype = key_states.device, key_states.dtype
        self.keys = key_states.new_zeros(batch, heads, slots, size)
        self.values = value_states.new_zeros(batch, heads, slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return what the queries of these tokens may need.

        The first call gives the new tokens themselves; a single token gives the filled slots as they lie; several
        tokens give sinks, then the last ``min(seen, L - 1)`` tokens in order, then the new ones.
        """
        if not self.rows.ready:
            raise ModelError(
                "this LambdaCache was given to a model without lm-infinite, which would misplace its keys. "
                "Call apply_lm_infinite(model) first, or use transformers.DynamicCache."
            )
        if self.seen and torch.is_grad_enabled() and key_states.requires_grad:
            raise ModelError(
                "a LambdaCache keeps no gradients of earlier tokens. Run the model under torch.no_grad(), or train on "
                "whole sequences with use_cache=False."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count, seen = key_states.shape[2], self.seen
        past = self._past() if seen and count > 1 else None
        with torch.no_grad():
            self._write(key_states, value_states)
        self.seen += count
        if not seen:
            return key_states, value_states
        if past is None:
            filled = min(self.seen, self.sinks + self.window)
            return self.keys[:, :, :filled], self.values[:, :, :filled]
        g = self.sinks
        return (
            torch.cat([self.keys[:, :, :g], past[0], key_states], dim=2),
            torch.cat([self.values[:, :, :g], past[1], value_states], dim=2),
        )

    def _slots(self, ranks: Tensor) -> Tensor:
        """Slot of each rank; padding (negative ranks) gets slot 0, which its row's first token will fill."""
        wrapped = self.sinks + (ranks - self.sinks) % self.window
        return torch.where(ranks < self.sinks, ranks.clamp(min=0), wrapped) if self.sinks else ranks % self.window

    def _past(self) -> tuple[Tensor, Tensor]:
        """Return the last min(seen, L - 1) tokens in order."""
        indices = torch.arange(self.seen - min(self.seen, self.window - 1), self.seen, device=self.keys.device)
        padding = self.rows.padding
        if padding is None:
            slots = self._slots(indices)
            return self.keys.index_select(2, slots), self.values.index_select(2, slots)
        slots = self._slots(indices - padding.to(indices.device)[:, None])[:, None, :, None]
        shapes = [(*t.shape[:2], len(indices), t.shape[3]) for t in (self.keys, self.values)]
        return self.keys.gather(2, slots.expand(shapes[0])), self.values.gather(2, slots.expand(shapes[1]))

    def _write(self, keys: Tensor, values: Tensor) -> None:
        count, padding = keys.shape[2], self.rows.padding
        if padding is None:
            self._write_rows(slice(None), keys, values, self.seen)
        elif count == 1:
            rows = torch.arange(len(keys), device=keys.device)
            slots = self._slots(self.seen - padding.to(keys.device))
            self.keys[rows, :, slots] = keys[:, :, 0].to(self.keys.dtype)
            self.values[rows, :, slots] = values[:, :, 0].to(self.values.dtype)
        else:
            for row, pads in enumerate(padding.tolist()):
                skip = min(max(0, pads - self.seen), count)
                here = slice(row, row + 1)
                self._write_rows(here, keys[here, :, skip:], values[here, :, skip:], self.seen + skip - pads)

    def _write_rows(self, rows: slice, keys: Tensor, values: Tensor, rank: int) -> None:
        """Write tokens of consecutive ranks, leaving out those that later ones would overwrite."""
        count, g, window = keys.shape[2], self.sinks, self.window
        if count == 0:
            return
        if count == 1:
            slot = rank if rank < g else g + (rank - g) % window
            self.keys[rows, :, slot] = keys[:, :, 0]
            self.values[rows, :, slot] = values[:, :, 0]
            return
        first = max(rank + count - window, g)
        ranks = [*range(rank, min(rank + count, g)), *range(max(rank, first), rank + count)]
        at = torch.tensor(ranks, dtype=torch.int64, device=keys.device)
        slots = self._slots(at)
        self.keys[rows].index_copy_(2, slots, keys[:, :, at - rank].to(self.keys.dtype))
        self.values[rows].index_copy_(2, slots, values[:, :, at - rank].to(self.values.dtype))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys the next `update` gives, and 0."""
        if not self.seen:
            return query_length, 0
        if query_length == 1:
            return min(self.seen + 1, self.sinks + self.window), 0
        return self.sinks + min(self.seen, self.window - 1) + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, not of those kept."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: the cache is never full."""
        return -1

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what the ring has overwritten cannot come back."""
        if tokens_to_remove:
            raise MethodError(
                f"crop({tokens_to_remove}): a LambdaCache cannot go back, since its ring has overwritten older tokens. "
                "Assisted decoding needs transformers.DynamicCache."
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.is_initialized:
            self.keys, self.values = (t.repeat_interleave(repeats, dim=0) for t in (self.keys, self.values))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.is_initialized:
            self.keys, self.values = self.keys[indices, ...], self.values[indices, ...]


class LambdaCache(Cache):
    """Keys and values of the first `sinks` real tokens of each row and of its last `window`, whatever the length.

    It takes ``2 * layers * B * K * (sinks + window) * head size`` numbers from the first token on. `generate` makes
    one by itself on a model with lm-infinite; pass one as ``past_key_values=`` to go on with it in the next turn.
    Beam search, contrastive reordering and batches with left padding work; assisted decoding does not, since it goes
    back (`generate` then keeps all keys by itself).

    Parameters
    ----------
    sinks : int
        G >= 0, as given to `apply_lm_infinite`.
    window : int
        L >= 1, as given to `apply_lm_infinite` (`local`).

    Attributes
    ----------
    shift : int
        How far the positions of the ring were set back so far, to keep rotation angles small and exact.

    Raises
    ------
    MethodError
        For a size out of range.

    Examples
    --------
    >>> cache = LambdaCache(sinks=4, window=16)
    >>> cache.get_seq_length(), cache.get_max_length(0)
    (0, -1)
    """

    def __init__(self, sinks: int, window: int) -> None:
        if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
            raise MethodError(f"sinks = {sinks!r}: allowed is a whole number from 0, such as 10.")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise MethodError(f"window = {window!r}: allowed is a whole number from 1: the length seen in training.")
        self.sinks, self.window, self.shift = sinks, window, 0
        self._rows = _Rows()
        super().__init__(layer_class_to_replicate=partial(LambdaLayer, sinks, window, self._rows))

    @property
    def padding(self) -> Tensor | None:
        """Number of padding tokens before each row's first real one, (B,), or None."""
        return self._rows.padding

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the cache is never full."""
        return -1

    def prepare(self, padding: Int[Tensor, " B"] | None) -> None:
        """Tell the cache the padding of its rows; the model's hook does, before each forward pass."""
        self._rows.padding, self._rows.ready = padding, True

    def rebase(self, offset: int, rotate: Callable[[Float[Tensor, "B K L h"], int], Float[Tensor, "B K L h"]]) -> None:
        """Set the positions of the ring back by `offset`: `rotate` turns keys by a number of positions.

        Rotations depend on differences only, so nothing changes but the rounding.
        """
        for layer in self.layers:
            layer.keys[:, :, self.sinks :] = rotate(layer.keys[:, :, self.sinks :], -offset)
        self.shift += offset

    def reset(self) -> None:
        """Forget all tokens, keep the memory."""
        super().reset()
        self.shift, self._rows.padding = 0, None

    def _reorder_rows(self, indices: Tensor) -> None:
        if self._rows.padding is not None:
            self._rows.padding = self._rows.padding[indices.to(self._rows.padding.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row the past of row ``beam_idx[row]``."""
        super().reorder_cache(beam_idx)
        self._reorder_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if self._rows.padding is not None:
            self._rows.padding = self._rows.padding.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._reorder_rows(torch.as_tensor(indices))
