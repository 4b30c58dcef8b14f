"""Writes factors into weights and back, so that a stock model computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedModel

from gnomon.common import surgery
from gnomon.common.layers import family, unwrap
from gnomon.errors import ModelError
from gnomon.nn.layernorm_scaling.gains import check_multipliable, multiply_output
from gnomon.nn.layernorm_scaling.hooks import InputScale, LearnedScale, Restart, attached, detach
from gnomon.nn.layernorm_scaling.placement import MODEL_TYPE, SLUG, Attached
from gnomon.nn.layernorm_scaling.structure import Block, find_blocks

__all__ = ["fold_layernorm_scaling", "write_factors"]


def write_factors(
    model: PreTrainedModel, found: Sequence[Block], chosen: Sequence[Attached], *, inverse: bool = False
) -> None:
    """Write the factors of hooks into the weights, after checking that every one can be written."""
    outputs = {branch.end: branch.output for block in found for branch in block.branches}
    keep = "Keep the model as it is and save it with gnomon.save_model."
    targets: dict[str, Any] = {}
    for name, hook in chosen:
        where = f"{name!r} of this {family(model)!r} model"
        target = outputs.get(name, name)
        if isinstance(hook, InputScale):
            raise ModelError(
                f"The scale in front of {where} stands before a norm or on the residual stream: no stock model "
                f"computes that. {keep}"
            )
        if len(hook.scales) > 1:
            raise ModelError(
                f"{where} is called at {len(hook.scales)} depths with different scales, which one gain cannot hold. "
                f"{keep}"
            )
        if target is None:
            raise ModelError(
                f"The output of {where} is not that of one linear layer (a mixture of experts?), so no weight can hold "
                f"its scale. {keep}"
            )
        check_multipliable(model.get_submodule(target), target)
        factor = model.get_parameter(f"{name}.{hook.parameter}") if isinstance(hook, LearnedScale) else hook.scales[0]
        targets[target] = 1 / factor if inverse else factor
    weights = {id(model.get_submodule(target).weight) for target in targets}
    if len(weights) < len(targets):
        raise ModelError(
            f"Two norms of this {family(model)!r} model share one weight, which cannot hold two scales. {keep}"
        )
    for target, factor in targets.items():
        multiply_output(model.get_submodule(target), factor, target)


def fold_layernorm_scaling(model: PreTrainedModel) -> Any:
    """Write the scales into the gains and return the stock model: equal logits, no hook, no record.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        With `apply_layernorm_scaling` applied, or an `LNSLlamaForCausalLM` (which becomes a ``LlamaForCausalLM``).
        Changed in place. Gains are multiplied in float32 and rounded once.

    Returns
    -------
    the model

    Raises
    ------
    ModelError
        When nothing was applied, or no weight can hold the scales (``before_norm``, ``residual``, blocks shared
        between depths, norms without a gain).

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.nn.layernorm_scaling import apply_layernorm_scaling
    >>> model = fold_layernorm_scaling(apply_layernorm_scaling(tiny("llama")))
    >>> hasattr(model.config, "gnomon")
    False
    """
    inner = cast(PreTrainedModel, unwrap(model))
    hooks = [(name, hook) for name, _, hook in attached(inner) if not isinstance(hook, Restart)]
    if not hooks:
        raise ModelError(
            f"This {family(inner)!r} model carries no LayerNorm scaling, so there is nothing to fold. Apply it with "
            "apply_layernorm_scaling, or load the model with gnomon.load_model if it was saved with it."
        )
    on_branches = any(isinstance(hook, LearnedScale) for _, hook in hooks) or any(
        entry["slug"] == SLUG and entry["options"].get("position") == "branch" for entry in surgery.recorded(inner)
    )
    write_factors(inner, find_blocks(inner) if on_branches else (), hooks)
    for name, hook in hooks:
        if isinstance(hook, LearnedScale):
            del inner.get_submodule(name)._parameters[hook.parameter]
    detach(inner)
    surgery.forget(inner, SLUG)
    if family(inner) == MODEL_TYPE:
        from gnomon.nn.layernorm_scaling.llama import to_stock

        to_stock(inner)
    return model
