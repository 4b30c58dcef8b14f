"""Gives the blocks of an untrained decoder their placements, and writes that into the model's record."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from gnomon.common import surgery
from gnomon.common.layers import decoder_blocks, family, unwrap
from gnomon.errors import GnomonWarning, ModelError, NoEffectWarning
from gnomon.nn.mix_ln.blocks import FROM_SCRATCH, PlacedBlock, place_block
from gnomon.nn.mix_ln.initial import check_initial, initialise, planned_draws
from gnomon.nn.mix_ln.plan import (
    MODEL_TYPE,
    SLUG,
    BlockPlacement,
    Placement,
    block_placements,
    check_choice,
    deepnorm_constants,
    post_layer_count,
)
from gnomon.nn.mix_ln.structure import BlockParts, check_pre_ln, read_blocks

__all__ = ["apply_norm_placement", "check_options", "place_blocks"]


def apply_norm_placement(
    model: PreTrainedModel,
    placement: Placement = "mix",
    post_ratio: float = 0.25,
    *,
    num_post_layers: int | None = None,
    embed_std: float | None = None,
    scaled_init: bool = False,
    from_scratch: bool | None = None,
    seed: int = 0,
    layer_placements: list[str] | None = None,
    residual_scale: float | None = None,
) -> Any:
    """Put the norms of an untrained decoder where `placement` says.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        Untrained, with Pre-LN blocks; changed in place. Blocks that stay Pre-LN are not touched.
    placement : str, default "mix"
        ``"mix"``: the first P blocks Post-LN, the others Pre-LN (the method). ``"pre"`` and ``"post"``: all blocks.
        ``"pre_post"``: the last P blocks Post-LN (the reversed mix; the authors' code has the first 7 blocks Pre-LN,
        which is ``num_post_layers = L - 7``). ``"sandwich"``: a norm before and one behind each sub-layer.
        ``"deepnorm"``: Post-LN with the residual multiplied by ``(2L)^(1/4)`` and its own initial weights.
    post_ratio : float, default 0.25
        ``P = floor(post_ratio * L)``; used by ``"mix"`` and ``"pre_post"``. The paper: 0.25, 0.0625 at 7B.
    num_post_layers : int, optional
        P itself, in place of `post_ratio`.
    embed_std : float, optional
        Standard deviation of the embeddings; default as they are (0.02 in transformers). The authors' released code
        has ``sqrt(2/5) = 0.632``, which takes nearly all of the gain away in the paper's Table 8.
    scaled_init : bool, default False
        Draw the output projections of attention and MLP from ``N(0, (0.02 / sqrt(2L))^2)``, where 0.02 is the
        model's ``initializer_range``; the paper's baseline "scaled init" with ``placement="pre"``.
    from_scratch : bool, optional
        True: the weights are untrained, do not look. False: they are trained. Default: they count as trained when
        the model has a ``name_or_path`` (``from_pretrained`` sets it) or a norm's gain is no longer constant.
    seed : int, default 0
        Of the weights that ``scaled_init`` and DeepNorm draw; nothing else is drawn.
    layer_placements : list of {"pre", "post", "sandwich", "deepnorm"}, optional
        The placement of every block, in place of what follows from `placement`.
    residual_scale : float, optional
        DeepNorm's factor; default ``(2L)^(1/4)``. The authors' baseline has 2.828 at every depth.

    Returns
    -------
    the model

    Raises
    ------
    MethodError
        An option that is unknown, out of range or contradicts another.
    ModelError
        Applied twice; trained weights; blocks that are not Pre-LN, run in parallel or are shared.

    Warns
    -----
    NoEffectWarning
        When a ratio over 0 rounds down to no Post-LN block.
    GnomonWarning
        Post-LN in all of more than 12 blocks; wide embeddings that are tied to the head.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = apply_norm_placement(tiny("llama", num_layers=4))
    >>> [type(block).__name__ for block in model.model.layers][:2]
    ['PostNormLlamaDecoderLayer', 'LlamaDecoderLayer']
    """
    inner = cast(PreTrainedModel, unwrap(model))
    kinds, parts = _prepared(
        inner, placement, post_ratio, num_post_layers, embed_std, scaled_init, layer_placements, residual_scale
    )
    if not surgery.is_replaying():
        check_pre_ln(inner, parts)
        if from_scratch is not True and (set(kinds) != {"pre"} or scaled_init or embed_std is not None):
            _check_untrained(inner, parts, from_scratch)
        counted = placement in ("mix", "pre_post") and num_post_layers is None and layer_placements is None
        _warn(inner, kinds, post_ratio if counted else 0.0, embed_std)
        generator = torch.Generator().manual_seed(seed)
        initialise(inner, parts, kinds, embed_std=embed_std, scaled_init=scaled_init, generator=generator)
    scale = place_blocks(inner, parts, kinds, residual_scale)
    options: dict[str, Any] = {
        "placement": "pre" if set(kinds) == {"pre"} else placement,
        "layer_placements": list(kinds),
    }
    options |= {"residual_scale": scale} if "deepnorm" in kinds else {}
    options |= {} if embed_std is None else {"embed_std": embed_std}
    options |= {"scaled_init": True} if scaled_init else {}
    surgery.record(inner, SLUG, options)
    return model


def check_options(
    model: PreTrainedModel,
    placement: Placement = "mix",
    post_ratio: float = 0.25,
    *,
    num_post_layers: int | None = None,
    embed_std: float | None = None,
    scaled_init: bool = False,
    from_scratch: bool | None = None,
    seed: int = 0,
    layer_placements: list[str] | None = None,
    residual_scale: float | None = None,
) -> None:
    """Check the options of `apply_norm_placement` against a model, which may be without storage; nothing is changed.

    Raises
    ------
    MethodError, ModelError
        As `apply_norm_placement`.
    """
    inner = cast(PreTrainedModel, unwrap(model))
    _prepared(inner, placement, post_ratio, num_post_layers, embed_std, scaled_init, layer_placements, residual_scale)


def _prepared(
    model: PreTrainedModel,
    placement: Placement,
    post_ratio: float,
    num_post_layers: int | None,
    embed_std: float | None,
    scaled_init: bool,
    layer_placements: Sequence[str] | None,
    residual_scale: float | None,
) -> tuple[list[BlockPlacement], list[BlockParts]]:
    """Check everything that can be told without running the model; return each block's placement and parts."""
    check_choice(placement, post_ratio, num_post_layers, layer_placements, residual_scale)
    _check_not_applied(model)
    length = len(decoder_blocks(model))
    if layer_placements is not None and len(layer_placements) != length:
        raise ModelError(
            f"layer_placements names {len(layer_placements)} blocks, but this {family(model)!r} model has {length}. "
            "Give one placement a block."
        )
    chosen = layer_placements or block_placements(length, placement, post_ratio, num_post_layers)
    kinds = cast("list[BlockPlacement]", list(chosen))
    check_initial(embed_std, scaled_init, kinds)
    parts = read_blocks(model)
    if not surgery.is_replaying():
        planned_draws(model, parts, kinds, scaled_init=scaled_init)
    return kinds, parts


def _check_not_applied(model: PreTrainedModel) -> None:
    kind = family(model)
    if kind == MODEL_TYPE or any(isinstance(block, PlacedBlock) for block in model.modules()):
        raise ModelError(
            f"{SLUG} was applied to this {kind!r} model already. Build the stock model anew and choose the placement "
            "once."
        )
    if surgery.is_replaying():
        return
    for entry in surgery.recorded(model):
        if entry["slug"] == SLUG and set(entry["options"].get("layer_placements", ["?"])) != {"pre"}:
            raise ModelError(
                f"The configuration of this {kind!r} model records {SLUG}, but its blocks are stock: the model was "
                "loaded without them, or shares its configuration object with another. Load it with "
                "gnomon.load_model, or give it a configuration of its own (copy.deepcopy)."
            )
        if entry["slug"] == SLUG:
            raise ModelError(f"{SLUG} was applied to this {kind!r} model already, with placement 'pre'.")
        if entry["slug"] == "layernorm-scaling":
            raise ModelError(
                f"This {kind!r} model carries LayerNorm scaling, which multiplies pre-norms; most placements have "
                "none. Use one of the two methods."
            )
    if kind == "lns_llama":
        raise ModelError(f"A {kind!r} model has LayerNorm scaling built in. Use one of the two methods.")


def _check_untrained(model: PreTrainedModel, parts: Sequence[BlockParts], from_scratch: bool | None) -> None:
    """Refuse trained weights: loaded from somewhere, or with gains that are no longer as initialised."""
    origin = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    reason = "from_scratch = False says so" if from_scratch is False else None
    if reason is None and origin:
        reason = f"it was loaded from {origin!r}"
    for index, (block, one) in enumerate(zip(decoder_blocks(model), parts, strict=True)):
        for name in one.norms:
            weight = getattr(block.get_submodule(name), "weight", None)
            if reason is None and weight is not None and not weight.is_meta:
                first = float(weight.detach().flatten()[0])
                if first not in (0.0, 1.0) or not bool((weight == first).all()):
                    reason = f"the gains of {name!r} in block {index} are no longer as initialised"
    if reason is not None:
        raise ModelError(
            f"{FROM_SCRATCH}, and this {family(model)!r} model is trained ({reason}): with its norms elsewhere its "
            "weights mean nothing. Build the model from its configuration, or say from_scratch=True if the weights "
            "are random after all."
        )


def _warn(model: PreTrainedModel, kinds: Sequence[str], post_ratio: float, embed_std: float | None) -> None:
    length = len(kinds)
    if post_ratio > 0 and post_layer_count(length, post_ratio) == 0:
        warnings.warn(
            f"post_ratio = {post_ratio} of {length} blocks rounds down to none: the model is Pre-LN. Give a ratio of "
            f"at least 1/{length}, or num_post_layers=1.",
            NoEffectWarning,
            stacklevel=3,
        )
    if kinds.count("post") == length > 12:
        warnings.warn(
            f"Post-LN in all {length} blocks with the usual initial weights: in the paper such runs collapsed at 24 "
            "blocks. Lower the learning rate and warm up longer, or use placement 'mix' or 'deepnorm'.",
            GnomonWarning,
            stacklevel=3,
        )
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if embed_std is not None and embed_std > 0.1 and head is not None and head.weight is embedding.weight:
        warnings.warn(
            f"embed_std = {embed_std}: the head of this {family(model)!r} model is tied to its embeddings, so the "
            "first logits become large as well. Untie them (tie_word_embeddings=False), as the paper has it.",
            GnomonWarning,
            stacklevel=3,
        )


def place_blocks(
    model: PreTrainedModel,
    parts: Sequence[BlockParts],
    kinds: Sequence[BlockPlacement],
    residual_scale: float | None = None,
) -> float:
    """Place every block and tell the model about its new block classes; return DeepNorm's factor."""
    blocks = decoder_blocks(model)
    scale = deepnorm_constants(len(blocks))[0] if residual_scale is None else float(residual_scale)
    before = {type(block).__name__ for block in blocks}
    for block, one, kind in zip(blocks, parts, kinds, strict=True):
        place_block(block, one, kind, scale)
    after = {type(block).__name__ for block in blocks}
    for module in model.modules():  # what must stay on one device, and what FSDP wraps, goes by class name
        names = getattr(module, "_no_split_modules", None)
        if isinstance(module, PreTrainedModel) and names and before & set(names):
            module._no_split_modules = (set(names) - before) | after
    return scale
