"""Merging a compensation into the compressed weights, which only a new compression of the sum makes possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from gnomon.common.layers import set_weight, unwrap, weight_of
from gnomon.compress.eora.compensate import OnLayer
from gnomon.errors import MethodError, ModelError

__all__ = ["requantise_after_merge"]


@torch.no_grad()
def requantise_after_merge(
    peft_model: PeftModel,
    requantise: Callable[[str, Tensor], Tensor],
    *,
    on_layer: OnLayer | None = None,
) -> nn.Module:
    """Merge an adapter into compressed weights and compress each sum again.

    W_compressed + B A is dense and lies off the grid, so an adapter cannot be merged into pruned or quantised weights
    as they are. Compressing again undoes a part of the compensation: what is lost is told layer by layer; where it is
    most of it, keep the adapter.

    Parameters
    ----------
    peft_model : PeftModel
        A plain LoRA on floating-point weights (pruned, or values on a grid).
    requantise : callable (name, weight) -> weight
        Gets a layer's full name and W_compressed + B A as (out, in), and returns the compressed weight of that shape:
        for example the same rounding as before, or ``lambda name, w: w * masks[name]``.
    on_layer : callable (name, facts), optional
        Called after each layer with ``kept``: 1 - ||requantised - merged||^2 / ||B A||^2, that is 1 when nothing of
        the correction is lost, 0 or less when as much as all of it is.

    Returns
    -------
    PreTrainedModel
        The compressed model without adapter, changed in place.

    Raises
    ------
    ModelError
        When the model has no LoRA layers, they are merged already, or its base layers hold packed weights (PEFT's own
        merge requantises those where it can).
    MethodError
        When the callable returns another shape or values that are not finite.

    Examples
    --------
    >>> import copy
    >>> from gnomon.common.models import tiny
    >>> from gnomon.compress.eora import eora
    >>> def coarse(name, weight):
    ...     return (weight * 50).round() / 50
    >>> dense = tiny(num_layers=1)
    >>> rounded = copy.deepcopy(dense)
    >>> for name in ("gate_proj", "up_proj"):
    ...     layer = getattr(rounded.model.layers[0].mlp, name)
    ...     layer.weight.data = coarse(name, layer.weight.data)
    >>> peft_model = eora(rounded, dense, torch.arange(256).view(2, 128), rank=4, targets=["gate_proj", "up_proj"])
    >>> merged = requantise_after_merge(peft_model, coarse)
    >>> type(merged).__name__
    'LlamaForCausalLM'
    """
    base = unwrap(peft_model)
    layers = {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    if not isinstance(peft_model, PeftModel) or not layers:
        raise ModelError(
            f"{type(peft_model).__name__} has no LoRA layers to merge. Give the PeftModel that eora returned."
        )
    for name, layer in layers.items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        if layer.merged:
            raise ModelError(f"Layer {name!r}: its adapter is merged already. Call peft_model.unmerge_adapter() first.")
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise ModelError(
                f"Layer {name!r} holds packed weights ({type(layer.get_base_layer()).__name__}); they cannot be "
                "replaced one by one. Use peft_model.merge_and_unload(), which requantises where PEFT can."
            )
    for name, layer in layers.items():
        inner = layer.get_base_layer()
        before = weight_of(inner).detach().float().clone()
        merged = before.clone()
        for adapter in layer.active_adapters:
            if adapter in layer.r:
                A, B = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
                merged += layer.scaling[adapter] * (B @ A)
        rounded = requantise(name, merged.clone())
        if rounded.shape != merged.shape or not bool(torch.isfinite(rounded).all()):
            raise MethodError(
                f"Layer {name!r}: requantise returned a weight of shape {tuple(rounded.shape)}"
                f"{'' if rounded.shape != merged.shape else ' with NaN or infinite values'}; a finite weight of shape "
                f"{tuple(merged.shape)} is needed."
            )
        set_weight(inner, rounded)
        if on_layer is not None:
            added = float((merged - before).square().sum())
            lost = float((rounded.float() - merged).square().sum())
            on_layer(name, {"kept": 1.0 - lost / added if added else 1.0})
    return peft_model.unload()
