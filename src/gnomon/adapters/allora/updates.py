"""ALLoRA at the optimizer: what it does to a row of B is multiplied by that row's scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gnomon.adapters.allora.layer import ALLoRAVariant
from gnomon.errors import MethodError

__all__ = ["ScaledUpdates", "is_followed", "plain_optimizer", "scale_allora_updates", "scaled_update", "update_layers"]


def scaled_update(
    before: Float[Tensor, "out r"], after: Float[Tensor, "out r"], scales: Float[Tensor, " out"]
) -> Float[Tensor, "out r"]:
    """Return before + diag(scales) (after - before).

    Parameters
    ----------
    before, after : Tensor (out, r)
        B before and after the optimizer's step.
    scales : Tensor (out,)
        From `row_scales` at the factors before the step.

    Returns
    -------
    Tensor (out, r)
        In the dtype of `after`, computed in float32 (float64).

    Examples
    --------
    >>> scaled_update(torch.ones(2, 1), torch.tensor([[1.5], [0.0]]), torch.tensor([2.0, 0.5])).flatten()
    tensor([2.0000, 0.5000])
    """
    start = before.to(scales.dtype)
    return (start + scales.unsqueeze(1) * (after.to(scales.dtype) - start)).to(after.dtype)


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the wrappers that accelerate and others put around it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise MethodError(
            f"the optimizer is a {type(optimizer).__name__}. Give a torch.optim.Optimizer, whose steps can be followed."
        )
    return optimizer


class ScaledUpdates:
    """Follows the steps of one optimizer; `scale_allora_updates` makes it.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    layers : list of LoraLayer
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[Any]) -> None:
        self.layers = layers
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )
        for variant, _, _ in self._members():
            variant.attached = True

    def _members(self) -> Iterator[tuple[ALLoRAVariant, Any, str]]:
        """What is scaled, looked up anew: factors are replaced when a model is moved or sharded."""
        for layer in self.layers:
            for adapter, variant in layer.lora_variant.items():
                if isinstance(variant, ALLoRAVariant) and variant.apply == "update":
                    yield variant, layer, adapter

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._kept = [
            (
                layer.lora_B[adapter].weight,
                layer.lora_B[adapter].weight.detach().clone(),
                variant.scales(layer, adapter),
            )
            for variant, layer, adapter in self._members()
            if layer.lora_B[adapter].weight.requires_grad
        ]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for b, before, scales in self._kept:
            b.copy_(scaled_update(before, b, scales))
        self._kept = []

    def remove(self) -> None:
        """Let the optimizer go on as it was."""
        for handle in self._handles:
            handle.remove()
        for variant, _, _ in self._members():
            variant.attached = False


def update_layers(model: nn.Module) -> list[Any]:
    """The LoRA layers with an adapter whose updates are to be scaled."""
    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and any(isinstance(v, ALLoRAVariant) and v.apply == "update" for v in module.lora_variant.values())
    ]


def is_followed(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer scales its updates already."""
    hooks = optimizer._optimizer_step_post_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), ScaledUpdates) for hook in hooks)


def scale_allora_updates(optimizer: Any, model: nn.Module) -> ScaledUpdates:
    """Make an optimizer multiply its update of row i of B by s_i, for all adapters with ``apply="update"``.

    With B' = what the optimizer makes of B, the new B is B + diag(s) (B' - B), s from `row_scales` at the factors
    before the step: row i has the learning rate lr s_i, for weight decay as well. A is the optimizer's.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any, as it is or inside accelerate's wrapper. Its steps are followed by hooks, so its class, state and
        checkpoints stay its own. A copy of it is not followed.
    model : nn.Module
        A `PeftModel`.

    Returns
    -------
    ScaledUpdates
        Its `remove()` ends it.

    Raises
    ------
    MethodError
        When no adapter has ``apply="update"``, the optimizer does not hold their factors, or follows the rule already.

    Examples
    --------
    >>> import peft
    >>> from gnomon.common.models import tiny
    >>> model = peft.get_peft_model(tiny("llama"), ALLoRAConfig(r=4, apply="update"))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> follower = scale_allora_updates(optimizer, model)
    """
    plain = plain_optimizer(optimizer)
    layers = update_layers(model)
    if not layers:
        raise MethodError(
            "no adapter of the model has apply='update'. Attach one with ALLoRAConfig(apply='update'), or call "
            "train_as_allora(model, apply='update') on a LoRA."
        )
    held = {id(p) for group in plain.param_groups for p in group["params"]}
    factors = {
        id(layer.lora_B[name].weight)
        for layer in layers
        for name, variant in layer.lora_variant.items()
        if isinstance(variant, ALLoRAVariant) and variant.apply == "update"
    }
    if not factors & held:
        raise MethodError(
            f"the optimizer ({type(plain).__name__}) holds none of the model's factors B. Make it from the parameters "
            "of this model, after it was sharded; optimizers with copies of their own (DeepSpeed, FSDP1) cannot be "
            "followed."
        )
    if is_followed(plain):
        raise MethodError("the optimizer scales its updates already. Call remove() on what the first call returned.")
    return ScaledUpdates(plain, layers)
