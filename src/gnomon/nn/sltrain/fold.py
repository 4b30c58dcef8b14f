"""Turns converted layers back into dense ones, and shows what their two parts hold."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from gnomon.common import surgery
from gnomon.common.layers import family, unwrap
from gnomon.errors import ModelError
from gnomon.nn.sltrain.apply import SLUG
from gnomon.nn.sltrain.layer import SparseLowRankLinear

__all__ = ["fold_sltrain", "spectra"]


def fold_sltrain(model: PreTrainedModel) -> Any:
    """Replace every sparse plus low-rank layer by the dense one and return the stock model: no record, equal logits.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        With `apply_sltrain` applied; changed in place, one layer at a time. Weights are summed in float32 and rounded
        once.

    Returns
    -------
    the model

    Raises
    ------
    ModelError
        When nothing was applied, or the parameters are sharded.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.nn.sltrain import apply_sltrain
    >>> model = fold_sltrain(apply_sltrain(tiny("llama"), rank=8))
    >>> type(model.model.layers[0].mlp.up_proj).__name__, hasattr(model.config, "gnomon")
    ('Linear', False)
    """
    inner = cast(PreTrainedModel, unwrap(model))
    found = {
        name: module
        for name, module in inner.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLowRankLinear)
    }
    if not found:
        raise ModelError(
            f"This {family(inner)!r} model has no sparse plus low-rank layers, so there is nothing to fold. Apply "
            "apply_sltrain, or load the model with gnomon.load_model if it was saved with them."
        )
    if any(hasattr(p, "full_tensor") for p in inner.parameters()):
        raise ModelError(
            f"The parameters of this {family(inner)!r} model are sharded. Save it whole, load it with "
            "gnomon.load_model and fold that."
        )
    made: dict[int, Any] = {}
    for name, layer in found.items():
        made[id(layer)] = made.get(id(layer)) or layer.to_dense()
        inner.set_submodule(name, made[id(layer)])
    surgery.forget(inner, SLUG)
    return model


@torch.no_grad()
def spectra(layer: SparseLowRankLinear) -> dict[str, Float[Tensor, " s"]]:
    """Return the singular values of a layer's weight and of its two parts, falling.

    In the paper the low-rank part of a trained layer carries the head of the spectrum and the sparse part the tail.

    Parameters
    ----------
    layer : SparseLowRankLinear

    Returns
    -------
    dict of str to Tensor of shape (min(m, n),)
        ``"weight"``, ``"low_rank"`` (scale * B A) and ``"sparse"`` (S), in float32 or float64.

    Examples
    --------
    >>> {name: len(values) for name, values in spectra(SparseLowRankLinear(20, 16, rank=4, sparsity=0.1)).items()}
    {'weight': 16, 'low_rank': 16, 'sparse': 16}
    """
    dtype = torch.promote_types(layer.B.dtype, torch.float32)
    low_rank = layer.scale * (layer.B.to(dtype) @ layer.A.to(dtype))
    sparse = torch.zeros_like(low_rank)
    sparse.view(-1).index_add_(0, layer.indices, layer.values.to(dtype))
    parts = {"weight": low_rank + sparse, "low_rank": low_rank, "sparse": sparse}
    return {name: torch.linalg.svdvals(part) for name, part in parts.items()}
