"""What stands before the model's forward: it lays out the pass, gives it a bounded cache and minds long positions."""

from __future__ import annotations

import contextvars
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from gnomon.context.lm_infinite.cache import LambdaCache
from gnomon.context.lm_infinite.layout import Kind, Layout
from gnomon.context.lm_infinite.options import IMPLEMENTATION, Options
from gnomon.context.lm_infinite.rotation import Turn, frequencies, turn_by, turned
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["AfterForward", "BeforeForward", "GenerationCache", "current_layout"]

_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("gnomon_lm_infinite", default=None)

REBASE_AT = 65536
"""Positions beyond this one are set back: angles of later ones lose digits in float32."""


def current_layout() -> Layout | None:
    """Return the layout of the forward pass that is running."""
    return _CURRENT.get()


class BeforeForward:
    """Pre-hook of the model below the head.

    Parameters
    ----------
    options : Options
    interleaved : bool
        How the family rotates channels.
    alibi : str
        The family, where positions are biases; empty where they are rotations.
    previous : str
        The attention implementation to restore.
    parameters : sequence of str
        Names of the forward's parameters, for arguments given by place.
    """

    def __init__(
        self, options: Options, interleaved: bool, alibi: str, previous: str | None, parameters: Sequence[str]
    ) -> None:
        self.options, self.interleaved, self.alibi, self.previous = options, interleaved, alibi, previous
        self.parameters = tuple(parameters)

    def __repr__(self) -> str:
        return f"LMInfinite({', '.join(f'{k}={v}' for k, v in asdict(self.options).items() if v is not None)})"

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with cache and positions filled in; the layout waits for the mask's making."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        config: Any = module.config
        if config._attn_implementation != IMPLEMENTATION:
            raise ModelError(
                f"the attention implementation of this model was set to {config._attn_implementation!r} after "
                "apply_lm_infinite. Call remove_lm_infinite(model) to use another one."
            )
        if given.get("output_attentions"):
            warnings.warn(
                "output_attentions=True: lm-infinite never forms the attention matrix, so no attentions are returned.",
                GnomonWarning,
                stacklevel=2,
            )
            given["output_attentions"] = False
        cache = given.pop("past_key_values", None) if given.get("cache") is None else given["cache"]
        if cache is None and self._wants_cache(module, given):
            cache = LambdaCache(self.options.sinks, self.options.local)
        if cache is not None:
            given["cache"] = cache
            self._check_cache(cache)
        layout = self._layout(module, given, cache)
        _CURRENT.set(layout)
        return (), given

    def _wants_cache(self, module: nn.Module, given: dict[str, Any]) -> bool:
        use = given.get("use_cache")
        use = module.config.use_cache if use is None else use  # type: ignore[union-attr]
        training = module.training and torch.is_grad_enabled()
        return bool(use) and self.options.top_k is None and not training

    def _check_cache(self, cache: Any) -> None:
        options = self.options
        if not isinstance(cache, Cache) or cache.is_compileable or any(cache.is_sliding):
            raise MethodError(
                f"a {type(cache).__name__} cannot be used with lm-infinite. Allowed: LambdaCache (of fixed size) or "
                "transformers.DynamicCache without a sliding window (keeps all keys)."
            )
        if not isinstance(cache, LambdaCache):
            return
        if options.top_k is not None:
            raise MethodError(
                f"top_k = {options.top_k} looks at the keys between sinks and window, which a LambdaCache drops. "
                "Use transformers.DynamicCache, or apply lm-infinite without top_k."
            )
        if (cache.sinks, cache.window) != (options.sinks, options.local):
            raise MethodError(
                f"the cache keeps {cache.sinks} sinks and {cache.window} tokens, the model attends to "
                f"{options.sinks} sinks and {options.local} tokens. "
                f"Make it with LambdaCache({options.sinks}, {options.local})."
            )

    def _layout(self, module: nn.Module, given: dict[str, Any], cache: Cache | None) -> Layout:
        inputs: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows, tokens = inputs.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        padding, least, most = _padding(given.get("attention_mask"), rows, seen, tokens, cache)
        kind: Kind = "all"
        if isinstance(cache, LambdaCache):
            cache.prepare(padding)
            kind = "all" if seen == 0 else "slots" if tokens == 1 else "split"
        layout = Layout(self.options, seen, tokens, kind, padding, least, most)
        if self.alibi:
            layout.slopes = _slopes(module, self.alibi, inputs.device)
            return layout
        layout.inv_freq, layout.interleaved = frequencies(module.rotary_emb), self.interleaved
        self._place(layout, given, inputs, cache)
        return layout

    def _place(self, layout: Layout, given: dict[str, Any], inputs: Tensor, cache: Cache | None) -> None:
        """Fill in the positions; set them back where they have become too large."""
        seen, tokens = layout.seen, layout.tokens
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(seen, seen + tokens, device=inputs.device)[None]
        if positions.dim() != 2 or positions.shape[1] != tokens:
            raise MethodError(
                f"position_ids has shape {tuple(positions.shape)}: allowed is (rows, {tokens}), a position per token."
            )
        _check_steps(positions, given.get("attention_mask"))
        shift = 0
        if isinstance(cache, LambdaCache):
            self._rebase(layout, cache, tokens)
            shift = cache.shift
        first = 0 if layout.padding is None else (layout.padding - seen).clamp(0, tokens - 1).to(positions.device)
        at = torch.as_tensor(first, device=positions.device).view(-1, 1)
        begin = positions.expand(max(len(at), len(positions)), -1).gather(1, at.expand(max(len(at), len(positions)), 1))
        layout.offset = (seen + at - begin)[:, 0]
        layout.positions = positions - shift
        given["position_ids"] = layout.positions

    def _rebase(self, layout: Layout, cache: LambdaCache, tokens: int) -> None:
        g, window = self.options.sinks, self.options.local
        limit = max(REBASE_AT, 2 * (g + window))
        oldest = layout.seen - window
        if layout.seen + tokens - cache.shift <= limit or layout.seen - layout.most < g + window:
            return

        def rotate(keys: Tensor, by: int) -> Tensor:
            assert layout.inv_freq is not None
            offsets = torch.tensor([by], device=keys.device)
            turn: Turn = turn_by(offsets, layout.inv_freq, layout.interleaved, keys.dtype)
            return turned(keys, turn)

        if oldest > cache.shift:
            cache.rebase(oldest - cache.shift, rotate)


class AfterForward:
    """Forward hook: the layout's pass is over."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forget the layout."""
        _CURRENT.set(None)


def _padding(mask: Any, rows: int, seen: int, tokens: int, cache: Cache | None) -> tuple[Tensor | None, int, int]:
    """Return each row's number of leading padding tokens with its extremes, None without padding on the left."""
    known = cache.padding if isinstance(cache, LambdaCache) else None
    if mask is None:
        return (None, 0, 0) if known is None else (known, int(known.min()), int(known.max()))
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MethodError(
            f"attention_mask is given as {shape}: lm-infinite makes its own mask. Allowed: (rows, tokens), "
            "1 for a token, 0 for padding."
        )
    if mask.shape != (rows, seen + tokens):
        raise MethodError(
            f"attention_mask has shape {tuple(mask.shape)}, expected {(rows, seen + tokens)}: "
            f"{seen} tokens in the cache and {tokens} new ones."
        )
    settled = isinstance(cache, LambdaCache) and seen and (known is None or int(known.max()) < seen)
    real = (mask[:, -tokens - 1 :] if settled else mask) != 0
    rises = (real[:, 1:] & ~real[:, :-1]).sum(1) + (0 if settled else real[:, 0])
    if int(rises.max()) > (0 if settled else 1):
        raise MethodError(
            "attention_mask has padding between the tokens of a row: allowed is padding before the first and after the "
            "last token. Pad on the left (tokenizer.padding_side = 'left')."
        )
    if settled:
        return (None, 0, 0) if known is None else (known, int(known.min()), int(known.max()))
    padding = (real.cumsum(1) == 0).sum(1)
    least, most = int(padding.min()), int(padding.max())
    return (padding, least, most) if most else (None, 0, 0)


def _check_steps(positions: Tensor, mask: Tensor | None) -> None:
    """Refuse positions that jump between real tokens: several texts in one row would see each other."""
    jumps = positions[:, 1:] - positions[:, :-1] != 1
    if mask is not None:
        real = mask[:, -positions.shape[1] :] != 0
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if bool(jumps.any()):
        raise MethodError(
            "position_ids jump inside a row, as in packed sequences: lm-infinite takes one text a row. "
            "Unpack the batch and pad it, or leave position_ids out."
        )


def _slopes(module: Any, family: str, device: torch.device) -> Tensor:
    """Read the ALiBi slopes off the model's own biases at distances 0 and 1, (H,)."""
    if family == "mpt":
        bias: Tensor = module.build_mpt_alibi_tensor(module.num_heads, 2, device=device)
    else:
        bias = module.build_alibi_tensor(torch.ones(1, 2, device=device), module.num_heads, torch.float32)
    return bias[:, 0, 1] - bias[:, 0, 0]


class GenerationCache:
    """Stands for a model's `_prepare_cache_for_generation`, so that `generate` starts from a `LambdaCache`."""

    def __init__(self, model: Any, options: Options) -> None:
        self.model, self.options = model, options

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Offer a bounded cache where the caller asked for nothing else and `generate` never goes back."""
        plain = generation_config.cache_implementation in (None, "dynamic") and generation_config.use_cache is not False
        forward_only = generation_mode != GenerationMode.ASSISTED_GENERATION and not generation_config.is_assistant
        if model_kwargs.get("cache") is None and plain and forward_only and self.options.top_k is None:
            model_kwargs["cache"] = LambdaCache(self.options.sinks, self.options.local)
            return None
        original = type(self.model)._prepare_cache_for_generation
        return original(self.model, generation_config, model_kwargs, generation_mode, *args, **kwargs)
