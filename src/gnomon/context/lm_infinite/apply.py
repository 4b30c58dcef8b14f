"""Puts LM-Infinite on a model and takes it off again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from gnomon.common import surgery
from gnomon.common.layers import backbone, family, unwrap
from gnomon.context.lm_infinite.alibi import ALIBI
from gnomon.context.lm_infinite.hooks import AfterForward, BeforeForward, GenerationCache, current_layout
from gnomon.context.lm_infinite.layout import Layout, attend
from gnomon.context.lm_infinite.options import IMPLEMENTATION, SLUG, Options, SinkDistance
from gnomon.context.lm_infinite.rotation import INTERLEAVED, UNBOUNDED
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["apply_lm_infinite", "remove_lm_infinite", "using_lm_infinite"]

ROTARY_FAMILIES = (
    "codegen", "cohere", "gemma", "glm", "gpt_neox", "gptj", "granite", "helium", "llama", "mistral", "mixtral",
    "nemotron", "olmo", "olmo2", "olmoe", "persimmon", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm",
    "starcoder2",
)  # fmt: skip
ALIBI_FAMILIES = ("bloom", "mpt")
FAMILIES = (*ROTARY_FAMILIES, *ALIBI_FAMILIES)

_CACHE_MAKER = "_prepare_cache_for_generation"


def apply_lm_infinite(
    model: PreTrainedModel,
    local: int | None = None,
    sinks: int = 10,
    top_k: int | None = None,
    *,
    ceiling: int | None = None,
    sink_distance: SinkDistance = "ceiling",
    top_k_from_layer: int = 4,
    top_k_distance: int | None = None,
) -> Any:
    """Let a model read and write texts of any length: Lambda mask, distance ceiling, cache of fixed size.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal model with RoPE or ALiBi. Changed in place; parameters and their names stay as they are.
    local : int, optional
        L, the window: how many tokens a token sees, itself included. Default: the length the model was trained for
        (``max_position_embeddings``), the paper's choice. Less is allowed.
    sinks : int, default 10
        G, how many of a text's first tokens stay visible for ever (the authors' code takes 10 for generation and 100
        for perplexity; the paper finds 5 to 100 equally good). 0 is a plain window.
    top_k : int, optional
        k, how many keys between sinks and window the last query of a forward pass attends to as well, per head (the
        paper takes 5 for retrieval tasks). Default: none. With it all keys are kept: the cache grows.
    ceiling : int, optional
        D, the largest distance: sinks further away than this stand there. At least `local`, the default.
    sink_distance : {"ceiling", "cache", "true"}, default "ceiling"
        ``"ceiling"`` is the method. To compare with: ``"cache"`` puts sink j at distance ``G + L - 1 - j``, its
        distance in the cache (StreamingLLM); ``"true"`` has no ceiling (the paper's ablation: mask only).
    top_k_from_layer : int, default 4
        The first layer, from 0, with the top-k (authors' code; the paper writes 5, counted from 1).
    top_k_distance : int, optional
        The one distance at which the middle's keys are scored, default ``local // 2`` (authors' code).

    Returns
    -------
    the model

    Raises
    ------
    MethodError
        For an option out of range, or `local` left out where the model does not tell its length.
    ModelError
        Applied twice; learned or relative positions; a native sliding window; rotation frequencies that change with
        the length.

    Warns
    -----
    GnomonWarning
        When `local` is more than the model was trained for.

    Examples
    --------
    >>> import torch
    >>> from gnomon.common.models import tiny
    >>> model = apply_lm_infinite(tiny("llama", max_positions=64).eval(), sinks=4)
    >>> ids = torch.arange(200)[None]
    >>> cache = model(ids, use_cache=True).cache
    >>> cache.get_seq_length(), cache.layers[0].keys.shape[2]
    (200, 68)
    """
    inner = unwrap(model)
    name = _supported(inner)
    if surgery.is_recorded(inner, SLUG) and not surgery.is_replaying():
        raise ModelError(
            "lm-infinite is applied to this model already. Call remove_lm_infinite(model) first to change its options."
        )
    config: Any = inner.config
    _check_positions(config, name)
    trained = _trained_length(config)
    if local is None:
        if trained is None:
            raise MethodError(
                f"local is missing, and a {name!r} configuration does not tell the length the model was trained for. "
                "Give local, such as 2048."
            )
        local = trained
    options = Options(local, sinks, top_k, ceiling, sink_distance, top_k_from_layer, top_k_distance)
    if trained is not None and local > trained:
        warnings.warn(
            f"local = {local} is more than the {trained} tokens the model was trained for: distances beyond "
            f"{trained} are new to it. Leave local out to take {trained}.",
            GnomonWarning,
            stacklevel=2,
        )
    _attach(inner, options, name)
    surgery.record(inner, SLUG, asdict(options))
    return model


def _attach(inner: Any, options: Options, name: str) -> None:
    base = backbone(inner)
    hook = BeforeForward(
        options,
        interleaved=name in INTERLEAVED,
        alibi=name if name in ALIBI_FAMILIES else "",
        previous=inner.config._attn_implementation,
        parameters=list(inspect.signature(base.forward).parameters),
    )
    inner.config._attn_implementation = IMPLEMENTATION
    base.config._attn_implementation = IMPLEMENTATION  # type: ignore[union-attr]
    for module in base.modules():
        module.__class__ = {**ALIBI, **UNBOUNDED}.get(type(module), type(module))
    base.register_forward_pre_hook(hook, with_kwargs=True)
    base.register_forward_hook(AfterForward(), always_call=True)
    if hasattr(inner, _CACHE_MAKER):
        setattr(inner, _CACHE_MAKER, GenerationCache(inner, options))


def remove_lm_infinite(model: PreTrainedModel) -> Any:
    """Give a model its own attention back, bit for bit.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel

    Returns
    -------
    the model

    Raises
    ------
    ModelError
        When lm-infinite is not applied.

    Examples
    --------
    >>> import torch
    >>> from gnomon.common.models import tiny
    >>> remove_lm_infinite(apply_lm_infinite(tiny("llama"))).config._attn_implementation
    'sdpa'
    """
    inner: Any = unwrap(model)
    base = backbone(inner)
    hook = next((h for h in base._forward_pre_hooks.values() if isinstance(h, BeforeForward)), None)
    if hook is None:
        raise ModelError(f"lm-infinite is not applied to this {family(model)!r} model. Call apply_lm_infinite first.")
    for table, extra in (
        (base._forward_pre_hooks, base._forward_pre_hooks_with_kwargs),
        (base._forward_hooks, base._forward_hooks_always_called),
    ):
        for key in [k for k, h in table.items() if isinstance(h, (BeforeForward, AfterForward))]:
            del table[key]
            extra.pop(key, None)
    originals = {ours: theirs for theirs, ours in {**ALIBI, **UNBOUNDED}.items()}
    for module in base.modules():
        module.__class__ = originals.get(type(module), type(module))
    for config in (inner.config, base.config):
        config._attn_implementation = hook.previous  # type: ignore[union-attr]
    vars(inner).pop(_CACHE_MAKER, None)
    surgery.forget(inner, SLUG)
    return model


@contextmanager
def using_lm_infinite(
    model: PreTrainedModel, local: int | None = None, sinks: int = 10, **options: Any
) -> Iterator[Any]:
    """Apply LM-Infinite for the length of a ``with`` block.

    Parameters
    ----------
    model, local, sinks, **options
        As for `apply_lm_infinite`.

    Yields
    ------
    the model

    Examples
    --------
    >>> import torch
    >>> from gnomon.common.models import tiny
    >>> with using_lm_infinite(tiny("llama"), local=16) as model:
    ...     model.config.gnomon[0]["slug"]
    'lm-infinite'
    >>> hasattr(model.config, "gnomon")
    False
    """
    apply_lm_infinite(model, local, sinks, **options)
    try:
        yield model
    finally:
        remove_lm_infinite(model)


def _supported(inner: nn.Module) -> str:
    """Return the family, or refuse it with the kind of positions it has."""
    name = family(inner)
    if name in FAMILIES and isinstance(inner, PreTrainedModel):
        return name
    raise ModelError(
        f"lm-infinite does not support {name!r} models ({type(inner).__name__}): {_positions_of(inner)}. "
        f"It needs a causal model with RoPE or ALiBi. Supported families: {', '.join(sorted(FAMILIES))}."
    )


def _positions_of(inner: nn.Module) -> str:
    names = {name.rpartition(".")[2] for name, _ in inner.named_modules()}
    if "relative_attention_bias" in names:
        return "its positions are relative buckets (T5)"
    if names & {"wpe", "position_embeddings", "embed_positions"}:
        return "its positions are learned absolute embeddings, which do not exist beyond the trained length"
    if getattr(getattr(inner, "config", None), "alibi", False):
        return "its ALiBi attention is not one of the known ones"
    return "its attention is not one of the known ones"


def _check_positions(config: Any, name: str) -> None:
    if getattr(config, "is_causal", True) is False:
        raise ModelError(
            f"this {name!r} model attends in both directions (config.is_causal = False): lm-infinite is for causal "
            "models, whose tokens see only what stands before them."
        )
    kinds = {k for k in getattr(config, "layer_types", None) or () if k != "full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or (window is not None and not getattr(config, "layer_types", None)):
        what = f"layers of {', '.join(sorted(kinds))}" if kinds else f"a native sliding window of {window} tokens"
        raise ModelError(
            f"this {name!r} model has {what}, in which sinks would be invisible. lm-infinite brings its own window: "
            "set model.config.sliding_window = None (and all layer_types to 'full_attention') and give the model's "
            "window as local."
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ModelError(
            f"this {name!r} model has rope_type = {kind!r}, whose frequencies change with the length of the text, so "
            "that cached keys no longer fit. Allowed: default, linear, llama3, yarn. lm-infinite needs no scaling: "
            "build the model with rope_type 'default' and its original length."
        )


def _trained_length(config: Any) -> int | None:
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int):
            return length
    return None


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers: (B, H, T, h) queries, (B, K, S, h) keys -> (B, T, H, h)."""
    if not isinstance(attention_mask, Layout):
        raise ModelError(_NO_LAYOUT)
    if kwargs.get("softcap") is not None:
        raise ModelError(f"softcap = {kwargs['softcap']}: lm-infinite has no soft cap of attention logits.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(getattr(module, "layer_idx", 0) or 0)
    out = attend(attention_mask, query, key, value, scale, dropout, layer)
    return out.transpose(1, 2).contiguous(), None


_NO_LAYOUT = (
    "the attention of lm-infinite was reached without its hook. A model built from another model's configuration "
    "needs apply_lm_infinite of its own; call models as model(...), not model.forward(...)."
)


def _mask_function(*args: Any, **kwargs: Any) -> Layout:
    """The mask function of transformers: the layout of the running pass."""
    layout = current_layout()
    if layout is None:
        raise ModelError(_NO_LAYOUT)
    return layout


AttentionInterface.register(IMPLEMENTATION, _attention_function)
AttentionMaskInterface.register(IMPLEMENTATION, _mask_function)
