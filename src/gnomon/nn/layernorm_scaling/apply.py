"""Applies LayerNorm scaling, its ablations and its learned relatives to a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from gnomon.common import surgery
from gnomon.common.layers import backbone, family, unwrap
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest
from gnomon.nn.layernorm_scaling.fold import write_factors
from gnomon.nn.layernorm_scaling.gains import untouched_gain
from gnomon.nn.layernorm_scaling.hooks import Restart, attach, attached
from gnomon.nn.layernorm_scaling.initial import initialised_by_depth, rescale_init
from gnomon.nn.layernorm_scaling.placement import (
    MODEL_TYPE,
    SLUG,
    Kind,
    Position,
    block_count,
    constants,
    learned,
)
from gnomon.nn.layernorm_scaling.structure import Block, find_blocks

__all__ = [
    "apply_layer_scale",
    "apply_layernorm_scaling",
    "apply_skip_init",
    "check_untrained",
    "unfold_layernorm_scaling",
]


def apply_layernorm_scaling(
    model: PreTrainedModel | PreTrainedConfig,
    *,
    position: Position = "norm",
    kind: Kind = "depth",
    init: float | None = None,
    preserve: bool = False,
    from_scratch: bool | None = None,
    blocks: int | None = None,
) -> Any:
    """Multiply what both pre-norms of block l return by ``1/sqrt(l)``, l = 1 for the first block.

    Parameters
    ----------
    model : PreTrainedModel, PeftModel or LlamaConfig
        Changed in place. A `LlamaConfig` gives an `LNSLlamaConfig` instead.
    position : str, default "norm"
        Where the constant stands. ``"norm"``: behind both norms (the method). The ablations of the paper's
        Table 8: ``"attention_norm"`` and ``"mlp_norm"`` (only the first, only the last norm of a block),
        ``"before_norm"``, ``"branch"`` (behind attention and MLP, before the sum; the paper's choice for vision
        transformers), ``"residual"`` (the sums themselves; diverges).
    kind : str, default "depth"
        ``"depth"`` is the method. ``"layer_scale"`` and ``"skip_init"`` put a learned factor behind each branch
        instead: see `apply_layer_scale` and `apply_skip_init`.
    init : float, optional
        First value of the learned factor.
    preserve : bool, default False
        Multiply the gains by ``sqrt(l)`` as well, so that the model's function stays what it was.
    from_scratch : bool, optional
        True: the weights are untrained, do not look. False: they are trained. Default: they count as trained when
        the model has a ``name_or_path`` (``from_pretrained`` sets it) or a pre-norm's gain is no longer constant
        1 (0 for norms that multiply by 1 + w).
    blocks : int, optional
        The number of blocks the scales were made for; written into the record, checked when a model is loaded.

    Returns
    -------
    the model, or LNSLlamaConfig

    Raises
    ------
    ModelError
        Applied twice; trained weights without `preserve`; no Pre-LN blocks; a number of blocks that differs.
    MethodError
        An unknown or contradictory option.

    Warns
    -----
    UserWarning
        When output projections were initialised smaller by depth, or a norm follows each sub-layer (Gemma 2).

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.nn.layernorm_scaling import depth_scales
    >>> model = apply_layernorm_scaling(tiny("llama", num_layers=4))
    >>> [round(s, 4) for s in depth_scales(model)["model.layers.3.input_layernorm"]]
    [0.5]
    """
    _check_options(position, kind, init, preserve, from_scratch)
    if isinstance(model, PreTrainedConfig):
        return _scaled_config(model, plain=position == "norm" and kind == "depth" and not preserve)
    inner = cast(PreTrainedModel, unwrap(model))
    _check_not_applied(inner)
    found = find_blocks(inner)
    _check_blocks(inner, found, blocks)
    if not surgery.is_replaying():
        if kind == "depth" and not preserve:
            check_untrained(inner, found, from_scratch)
        _warn_of_company(inner, found, kind, position, preserve)
    chosen = list(constants(inner, found, position) if kind == "depth" else learned(inner, found, kind, init))
    if preserve:
        write_factors(inner, found, chosen, inverse=True)
    shared = [hook for _, hook in chosen if len(hook.scales) > 1]
    for name, hook in chosen:
        attach(inner.get_submodule(name), hook)
    if shared:
        attach(backbone(inner), Restart(shared))
    options: dict[str, Any] = {"position": position, "kind": kind, "blocks": block_count(found)}
    surgery.record(inner, SLUG, options | ({} if init is None else {"init": init}))
    return model


def _check_options(position: str, kind: str, init: float | None, preserve: bool, from_scratch: bool | None) -> None:
    for name, value, allowed in (("position", position, get_args(Position)), ("kind", kind, get_args(Kind))):
        if value not in allowed:
            raise MethodError(f"{name} = {value!r} is unknown. {nearest(str(value), allowed, noun=name)}")
    if kind != "depth" and (position not in ("norm", "branch") or preserve):
        raise MethodError(
            f"kind = {kind!r} puts a learned factor behind each branch; it takes neither position = {position!r} nor "
            "preserve = True. Leave both out."
        )
    if kind == "depth" and init is not None:
        raise MethodError(f"init = {init}: the scale 1/sqrt(l) has nothing to initialise. Leave `init` out.")
    if init is not None and not math.isfinite(init):
        raise MethodError(f"init = {init}. It must be a finite number.")
    if preserve and from_scratch:
        raise MethodError(
            "preserve = True keeps what trained weights compute, from_scratch = True says there are none. Choose one."
        )
    if preserve and position in ("before_norm", "residual"):
        raise MethodError(
            f"position = {position!r} cannot be undone in the weights, so preserve = True is not possible. Allowed "
            "with preserve: norm, attention_norm, mlp_norm, branch."
        )


def _scaled_config(config: PreTrainedConfig, *, plain: bool) -> PreTrainedConfig:
    from gnomon.nn.layernorm_scaling.llama import LNSLlamaConfig

    if config.model_type == MODEL_TYPE or any(entry["slug"] == SLUG for entry in getattr(config, "gnomon", None) or ()):
        raise ModelError(f"{SLUG} was applied to this {config.model_type!r} configuration already; it acts once.")
    if not isinstance(config, LlamaConfig):
        raise ModelError(
            f"A {config.model_type!r} configuration cannot carry the scales; only LlamaConfig has a class that does. "
            "Build the model and apply the method to that: "
            "apply_layernorm_scaling(AutoModelForCausalLM.from_config(config))."
        )
    if not plain:
        raise MethodError(
            "A configuration takes the method as it is (position 'norm', kind 'depth', no preserve). For an ablation "
            "build the model and apply the method to it."
        )
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    return LNSLlamaConfig(**values)


def _check_not_applied(model: PreTrainedModel) -> None:
    kind = family(model)
    if kind == MODEL_TYPE or next(attached(model), None) is not None:
        raise ModelError(
            f"{SLUG} was applied to this {kind!r} model already; applied twice it would scale by 1/l. Fold it first "
            "with fold_layernorm_scaling, or build the model anew."
        )
    if surgery.is_replaying():
        return
    if surgery.is_recorded(model, SLUG):
        raise ModelError(
            f"The configuration of this {kind!r} model records {SLUG}, but its scales are missing: it was loaded "
            "without them. Load it with gnomon.load_model instead of applying the method again."
        )
    for entry in surgery.recorded(model):
        placement = entry["options"].get("placement", "mix")
        if entry["slug"] == "mix-ln" and placement != "pre":
            raise ModelError(
                f"This {kind!r} model has the norm placement {placement!r} (mix-ln), which is not Pre-LN in every "
                f"block. {SLUG} needs norms in front of the sub-layers alone. Use one of the two methods."
            )


def _check_blocks(model: PreTrainedModel, found: Sequence[Block], blocks: int | None) -> None:
    if blocks is not None and blocks != block_count(found):
        raise ModelError(
            f"The scales were made for {blocks} blocks, but this {family(model)!r} model has {block_count(found)}. A "
            "block keeps the scale of its ORIGINAL depth, so fold before removing or inserting blocks: "
            "fold_layernorm_scaling(model)."
        )


def check_untrained(model: PreTrainedModel, found: Sequence[Block], from_scratch: bool | None) -> None:
    """Refuse trained weights: loaded from somewhere, or with gains that are no longer as initialised."""
    if from_scratch:
        return
    reason = "from_scratch = False says so" if from_scratch is False else None
    origin = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    if reason is None and origin:
        reason = f"it was loaded from {origin!r}"
    for block in found:
        for name in block.norms:
            if reason is None and not untouched_gain(model.get_submodule(name)):
                reason = f"the gains of {name!r} are no longer 1"
    if reason is not None:
        raise ModelError(
            f"This {family(model)!r} model is trained ({reason}): scaling its norms would change what it computes. "
            "Use preserve=True (or unfold_layernorm_scaling) to keep its function for continued training, or "
            "from_scratch=True if the weights are random after all."
        )


def _warn_of_company(model: PreTrainedModel, found: Sequence[Block], kind: str, position: str, preserve: bool) -> None:
    if kind == "depth" and position != "branch" and any(b.post_norm for block in found for b in block.branches):
        warnings.warn(
            f"{family(model)!r} blocks have a norm behind each sub-layer as well. It is not scaled, and it undoes "
            "most of the scale in front: the growth of the residual stream stays. position='branch' scales behind it.",
            GnomonWarning,
            stacklevel=3,
        )
    if kind == "depth" and not preserve and initialised_by_depth(model, found):
        warnings.warn(
            f"The output projections of this {family(model)!r} model were initialised smaller by depth (1/sqrt(2L) or "
            "1/sqrt(2l)). Together with LayerNorm scaling that costs 0.04 to 0.44 perplexity in the paper. "
            f"Initialise them like the other layers (scale_init(model, 'plain')).",
            GnomonWarning,
            stacklevel=3,
        )


def unfold_layernorm_scaling(model: PreTrainedModel) -> Any:
    """Turn a Pre-LN checkpoint into an equal model with scales, for continued training: gains times ``sqrt(l)``.

    The same as ``apply_layernorm_scaling(model, preserve=True)``, and the inverse of `fold_layernorm_scaling`.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Changed in place.

    Returns
    -------
    the model

    Raises
    ------
    ModelError
        As `apply_layernorm_scaling`.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = unfold_layernorm_scaling(tiny("llama"))
    >>> round(float(model.model.layers[3].input_layernorm.weight[0]), 4)
    2.0
    """
    return apply_layernorm_scaling(model, preserve=True)


def apply_layer_scale(model: PreTrainedModel, init: float = 1e-5) -> Any:
    """Multiply each branch by a learned vector (LayerScale, Touvron et al. 2021), a baseline of the paper.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place: each branch gains the parameter ``depth_gamma`` of shape (hidden,).
    init : float, default 1e-5
        First value. The value the paper used is not known.

    Returns
    -------
    the model
    """
    return apply_layernorm_scaling(model, kind="layer_scale", init=init)


def apply_skip_init(model: PreTrainedModel, init: float | None = None) -> Any:
    """Multiply each branch by a learned number (SkipInit, De & Smith 2020), a baseline of the paper.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place: each branch gains the parameter ``depth_gamma`` of shape (1,).
    init : float, optional
        First value; default ``1/sqrt(L)``. The authors' released code has 0.001.

    Returns
    -------
    the model
    """
    return apply_layernorm_scaling(model, kind="skip_init", init=init)


def scale_init(model: PreTrainedModel, kind: Literal["scaled", "depth", "plain"] = "scaled") -> PreTrainedModel:
    """Rescale the freshly initialised output projections of attention and MLP: the initialisation baselines.

    Parameters
    ----------
    model : PreTrainedModel
        Untrained; changed in place. No number is drawn.
    kind : {"scaled", "depth", "plain"}
        ``"scaled"``: by ``1/sqrt(2L)`` (GPT-2, Megatron, OLMo); ``"depth"``: by ``1/sqrt(2l)`` in block l;
        ``"plain"``: back to the standard deviation of the other layers.

    Returns
    -------
    the model

    Raises
    ------
    MethodError
        When `kind` is unknown.
    ModelError
        When the weights are trained, or initialised in that way already.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = scale_init(tiny("llama", num_layers=2), "scaled")
    >>> round(model.model.layers[0].mlp.down_proj.weight.std().item(), 3)
    0.01
    """
    if kind not in ("scaled", "depth", "plain"):
        raise MethodError(f"kind = {kind!r} is unknown. {nearest(kind, ('scaled', 'depth', 'plain'), noun='kind')}")
    inner = cast(PreTrainedModel, unwrap(model))
    found = find_blocks(inner)
    check_untrained(inner, found, None)
    rescale_init(inner, found, kind)
    return model
