"""ALLoRA as a variant of PEFT's LoRA: the layer is LoRA's, and only what A and B receive in training differs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.integrations import get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from gnomon.adapters.allora.config import ALLoRAConfig
from gnomon.adapters.allora.rule import allora_linear, row_scales
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["ALLoRALayer", "ALLoRALinear", "ALLoRAVariant", "build_layer"]


class ALLoRAVariant(LoraVariant):
    """What ALLoRA does at one layer for one adapter; PEFT keeps it in the layer's `lora_variant`.

    Parameters
    ----------
    eta : float
    apply : {"gradient", "update"}
    key : str, default ""
        Path of the layer, for messages.

    Attributes
    ----------
    attached : bool
        Whether an optimizer scales its updates by it (``apply="update"``).
    """

    def __init__(self, eta: float, apply: str, key: str = "") -> None:
        self.eta = eta
        self.apply = apply
        self.key = key
        self.attached = False
        self._passed = False  # a backward pass came through
        self._warned = False

    def init(self, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Check the layer's forward scale."""
        self.key = kwargs.get("target_name") or self.key
        if module.scaling[adapter_name] != 1.0:
            raise MethodError(
                f"{self.key}: the adapter {adapter_name!r} has the forward scale {module.scaling[adapter_name]:g}, and "
                "ALLoRA has none. Set lora_alpha to the rank."
            )

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus B A x."""
        layer_a, layer_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        a, b = layer_a.weight, layer_b.weight
        if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
            self._check(a, b)
            if self.apply == "gradient":
                added = allora_linear(x, a, b, self.eta)
            else:
                added = layer_b(layer_a(x))
                self._watch(module, b, added)
        else:
            added = layer_b(layer_a(x))
        scaling = module.scaling[active_adapter]
        return result + (added if scaling == 1.0 else added * scaling)

    def _check(self, a: Tensor, b: Tensor) -> None:
        if self.apply == "gradient" and (isinstance(a, DTensor) or isinstance(b, DTensor) or a.dim() + b.dim() != 4):
            raise ModelError(
                f"{self.key or 'a LoRA layer'}: A and B are sharded apart from their layer. Shard whole blocks (FSDP2: "
                "fully_shard of each decoder layer), without tensor parallelism of adapted layers, or take "
                "apply='update'."
            )
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
            bad = [name for name, factor in (("A", a), ("B", b)) if not bool(torch.isfinite(factor).all())]
            if bad:
                raise MethodError(
                    f"{self.key or 'a LoRA layer'}: {' and '.join(bad)} not finite. The training has diverged: lower "
                    "the learning rate or eta, or clip the gradients."
                )

    def _watch(self, module: Any, b: Tensor, added: Tensor) -> None:
        """Warn when gradients were made and taken away again, as around a step, and no optimizer knows of the rule."""
        if self.attached or self._warned or not module.training or torch.compiler.is_compiling():
            return
        if self._passed and b.grad is None:
            self._warned = True
            warnings.warn(
                "an adapter has apply='update', but no optimizer scales its updates, so it trains as plain LoRA. Call "
                "scale_allora_updates(optimizer, model), or add ALLoRACallback() to the Trainer.",
                GnomonWarning,
                stacklevel=2,
            )
        elif not self._passed:
            added.register_hook(self._mark)

    def _mark(self, gradient: Tensor) -> None:
        self._passed = True

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter added."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the adapter to the weight."""
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter taken out."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def scales(self, module: Any, adapter: str) -> Tensor:
        """Return s of every row, from A and B as they are: (out,)."""
        return row_scales(module.lora_B[adapter].weight, module.lora_A[adapter].weight, self.eta)


class ALLoRALayer:
    """Makes a LoRA layer of PEFT take `ALLoRAConfig` beside every other LoRA configuration."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> Any:
        """Return what the configuration asks of the layer beyond plain LoRA."""
        if isinstance(config, ALLoRAConfig):
            return ALLoRAVariant(config.eta, config.apply)
        return super().resolve_lora_variant(config=config, **kwargs)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"gnomon.{super().__repr__()}"


class ALLoRALinear(ALLoRALayer, Linear):
    """PEFT's LoRA of a linear layer or a Conv1D, in which adapters may be trained by ALLoRA's rule."""


def build_layer(
    target: nn.Module, adapter_name: str, config: ALLoRAConfig, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module:
    """Return the LoRA layer that takes the place of a module; PEFT calls it.

    Raises
    ------
    ModelError
        When the module is no linear layer, or of a kind whose LoRA layer cannot take the rule.
    """
    key = kwargs.get("target_name") or "the target"
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    width = get_bnb_param_type(getattr(base, "weight", None))
    if isinstance(base, NonDynamicallyQuantizableLinear):
        raise ModelError(
            f"{key} belongs to an nn.MultiheadAttention, which reads the weight past the layer, so an adapter there "
            "would do nothing. Name other target_modules."
        )
    if width:
        from gnomon.adapters.allora import quantized  # imports bitsandbytes

        return quantized.LAYERS[width](target, adapter_name, config=config, **kwargs)
    if not isinstance(base, (nn.Linear, Conv1D)) or resolve_quantization_backend(base) is not None:
        raise ModelError(
            f"{key} is a {type(base).__name__}. Allowed: nn.Linear, transformers' Conv1D and the layers of "
            "bitsandbytes in 8 and 4 bits. Name other target_modules."
        )
    is_conv1d = isinstance(base, Conv1D)
    config.fan_in_fan_out = is_conv1d  # the saved configuration says so too, or PEFT warns when it loads
    return ALLoRALinear(target, adapter_name, config=config, is_target_conv_1d_layer=is_conv1d, **kwargs)
