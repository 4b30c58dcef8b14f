"""What an attention layer computes with: q and k after rotary embedding, v, the scale, and what else changes scores.

Every attention layer of transformers asks `AttentionInterface.get_interface` for the function that attends (sdpa,
eager, flash, ...), and hands it q, k and v as they are used: split out of fused projections, rotated, normalised. In
`watching` that function is wrapped, whichever it is, so the model computes what it computes otherwise. What adapters
add is found by letting a layer make q, k and v of the same input twice, with its adapters and without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

__all__ = ["AttentionCall", "attend_with", "obstacle", "watching"]

Attend = Callable[..., Any]
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_patching = threading.RLock()  # get_interface is one for the process


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function.

    Attributes
    ----------
    name : str
        Path of the attention layer in the model.
    module : nn.Module
    query, key, value : Tensor (batch, heads, tokens, width)
        Keys and values as the layer holds them, possibly with fewer heads.
    mask : Tensor or None
        What the model hands to its attention function.
    scaling : float
    options : mapping
        Everything else the function was given (softcap, sliding_window, ...).
    bare : tuple of three Tensors, optional
        q, k and v of the same input without the adapters in this layer; None where there are none.
    """

    name: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    options: Mapping[str, Any]
    bare: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def causal(self) -> bool:
        """Whether the layer says that a query sees no later keys."""
        stated = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if stated is None else stated)


class _BareDoneError(Exception):
    """Ends the pass without adapters once q, k and v are there."""


@contextmanager
def attend_with(model: nn.Module, attend: Callable[[str, Attend, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[
    None
]:  # fmt: skip
    """Route the attention calls of a model's layers through `attend(name, original, args, kwargs)`; others as ever.

    Parameters
    ----------
    model : nn.Module
    attend : callable
        Gets the layer's path, the attention function the model would have called, and what it would have been given
        (module, query, key, value, mask, ...). Returns what that function returns.
    """
    names = {module: name for name, module in model.named_modules()}
    original_lookup = AttentionInterface.get_interface

    def lookup(self: AttentionInterface, implementation: str, default: Attend) -> Attend:
        function: Attend = original_lookup(self, implementation, default)

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module not in names:
                return function(module, *args, **kwargs)
            return attend(names[module], function, (module, *args), kwargs)

        return call

    with _patching:
        AttentionInterface.get_interface = lookup
        try:
            yield
        finally:
            AttentionInterface.get_interface = original_lookup


@contextmanager
def watching(model: nn.Module, see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Hand every attention call of a model to `see`, and compute as ever.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode, or dropout in adapters would count as theirs.
    see : callable
    """
    bare: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}
    only: list[nn.Module] = []  # the layer that is run without its adapters now

    def attend(name: str, function: Attend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, query, key, value = args[:4]
        if only and only[-1] is module:
            bare[module] = (query.detach(), key.detach(), value.detach())
            raise _BareDoneError
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        scaling = kwargs.get("scaling")
        options = {k: v for k, v in kwargs.items() if k not in ("scaling", "attention_mask")}
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        see(AttentionCall(name, module, query.detach(), key.detach(), value.detach(), mask, scale, options,
                          bare.pop(module, None)))  # fmt: skip
        return function(*args, **kwargs)

    def without_adapters(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tuned = _tuned(module)
        if not tuned:
            return
        # a cache would keep these keys too
        kwargs = {name: None if name in _CACHES else value for name, value in kwargs.items()}
        only.append(module)
        try:
            with _disabled(tuned), torch.no_grad():
                module.forward(*args, **kwargs)
        except _BareDoneError:
            pass
        finally:
            only.pop()

    layers = [m for m in model.modules() if hasattr(m, "is_causal") and next(_adapted(m), None) is not None]
    hooks = [layer.register_forward_pre_hook(without_adapters, with_kwargs=True) for layer in layers]
    try:
        with attend_with(model, attend):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _tuned(module: nn.Module) -> list[Any]:
    """Return the layers with adapters that are in use and not merged."""
    return [m for m in _adapted(module) if not m.disable_adapters and not m.merged]


def _adapted(module: nn.Module) -> Iterator[Any]:
    return (m for m in module.modules() if isinstance(m, BaseTunerLayer))


@contextmanager
def _disabled(layers: list[Any]) -> Iterator[None]:
    # enable_adapters(False) would also change what requires a gradient
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def obstacle(call: AttentionCall, longest: int) -> str:
    """Return why the scores of a layer are more than plain dot products, or an empty string.

    Parameters
    ----------
    call : AttentionCall
    longest : int
        Tokens of the longest sequence: a sliding window that long hides nothing.
    """
    options, module = call.options, call.module
    softcap = options.get("softcap") or getattr(module, "attn_logit_softcapping", None)
    if softcap:
        return f"scores are capped at {float(softcap):g}"
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)
    if window and int(window) < longest:
        return f"a sliding window of {int(window)} tokens"
    if options.get("position_bias") is not None or options.get("alibi") is not None:
        return "a bias is added to scores"
    if options.get("s_aux") is not None:
        return "attention sinks are added to the normaliser"
    if options.get("cu_seq_lens_q") is not None:
        return "several sequences packed into one"
    if call.query.shape[2] != call.key.shape[2]:
        return "queries and keys of different tokens"
    return ""
