"""Plain functions: attach an ALLoRA adapter, or train a LoRA that is there by ALLoRA's rule."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers import PreTrainedModel

from gnomon.adapters._peft import attach
from gnomon.adapters.allora.config import ALLoRAConfig, check_mode
from gnomon.adapters.allora.layer import ALLoRAVariant
from gnomon.adapters.allora.rule import check_eta
from gnomon.common.lora import lora_pairs
from gnomon.errors import MethodError, ModelError, NoEffectWarning

__all__ = ["apply_allora", "train_as_allora"]


def apply_allora(
    model: PreTrainedModel,
    r: int = 8,
    eta: float = 2.0,
    apply: Literal["gradient", "update"] = "gradient",
    *,
    seed: int = 0,
    target_modules: list[str] | str | None = None,
) -> PeftModel:
    """Attach an ALLoRA adapter to a model: `ALLoRAConfig` with plain options, then `peft.get_peft_model`.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; all its own weights are frozen.
    r, eta, apply, target_modules
        As in `ALLoRAConfig`.
    seed : int, default 0
        Of the random start of A. The global generator is left as it was.

    Returns
    -------
    PeftModel
        With ``apply="update"`` the optimizer is told by `scale_allora_updates` or `ALLoRACallback`.

    Raises
    ------
    MethodError
        When an option is not allowed.
    ModelError
        When the model has adapters, or a target is no linear layer.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = apply_allora(tiny("llama"), r=4, eta=2.0)
    >>> model.peft_config["default"].lora_alpha
    4
    """
    config = ALLoRAConfig(r=r, eta=eta, apply=apply, target_modules=target_modules, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # PEFT draws A on the CPU, from the global generator
        return attach(model, config)


def train_as_allora(
    model: nn.Module, eta: float = 2.0, apply: Literal["gradient", "update"] = "gradient", *, adapter: str | None = None
) -> None:
    """Let a LoRA that is attached already be trained by ALLoRA's rule.

    For a LoRA that was loaded, in whatever way, and is to be trained further, and for one that another program
    attached. What is saved stays as it was.

    Parameters
    ----------
    model : nn.Module
        A `PeftModel` with a LoRA whose forward scale is 1 and that has no dropout; changed in place.
    eta : float, default 2.0
    apply : {"gradient", "update"}, default "gradient"
        As in `ALLoRAConfig`.
    adapter : str, optional
        Default the active one.

    Raises
    ------
    MethodError
        When an option is not allowed, or the LoRA has what the method removes.
    ModelError
        When there is no LoRA at a linear layer, or it stands on a layer that cannot take the rule.

    Warns
    -----
    NoEffectWarning
        When the adapter is frozen.

    Examples
    --------
    >>> model = peft.PeftModel.from_pretrained(base, "adapter", is_trainable=True)
    >>> train_as_allora(model, eta=2.0)
    """
    eta = check_eta(eta)
    check_mode(apply)
    pairs = lora_pairs(model, adapter)
    for pair in pairs:
        layer, name = pair.layer, pair.adapter
        if not _takes_variants(layer):
            raise ModelError(
                f"{pair.name} is a {type(layer).__name__}, whose forward pass cannot take the rule. Allowed: PEFT's "
                "LoRA of nn.Linear, of Conv1D, and of the layers of bitsandbytes in 8 and 4 bits."
            )
        if not isinstance(layer.lora_variant.get(name), (ALLoRAVariant, type(None))):
            raise MethodError(
                f"{pair.name}: the adapter {name!r} is a LoRA variant of its own "
                f"({type(layer.lora_variant[name]).__name__}), and ALLoRA is a rule for plain LoRA. Take a plain LoRA."
            )
        if pair.scaling != 1.0:
            raise MethodError(
                f"{pair.name}: the adapter {name!r} has the forward scale {pair.scaling:g}, and ALLoRA has none. Train "
                f"a LoRA with lora_alpha = r, or save this one with its scale in B."
            )
        if not isinstance(layer.lora_dropout[name], nn.Identity):
            raise MethodError(
                f"{pair.name}: the adapter {name!r} has dropout, and ALLoRA has none. Set lora_dropout=0."
            )
        if layer.lora_bias.get(name):
            raise MethodError(f"{pair.name}: the adapter {name!r} has a bias, for which ALLoRA has no rule.")
    if not any(pair.a.requires_grad or pair.b.requires_grad for pair in pairs):
        warnings.warn(
            f"the adapter {pairs[0].adapter!r} is frozen, so how it would be trained changes nothing. Load it with "
            "is_trainable=True.",
            NoEffectWarning,
            stacklevel=2,
        )
    for pair in pairs:
        pair.layer.lora_variant[pair.adapter] = ALLoRAVariant(eta, apply, pair.name)


def _takes_variants(layer: nn.Module) -> bool:
    """Whether the layer's forward pass asks `lora_variant`: PEFT's LoRA of plain layers and of bitsandbytes'."""
    return isinstance(layer, Linear) or any(c.__module__ == "peft.tuners.lora.bnb" for c in type(layer).__mro__)
