"""SoRA as a PEFT tuner: PEFT's LoRA layer with a gate between A and B."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from gnomon.adapters._peft import LinearAdapter, LinearTuner
from gnomon.adapters.sora.config import SoRAConfig
from gnomon.errors import MethodError, ModelError, nearest

__all__ = ["SoRALinear", "SoRAModel", "gated_delta", "sora_layers"]


def gated_delta(
    b: Float[Tensor, "out r"], gate: Float[Tensor, " r"], a: Float[Tensor, "r in"], scaling: float
) -> Float[Tensor, "out in"]:
    """Return scaling B diag(g) A, the change of the weight.

    Parameters
    ----------
    b, gate, a : Tensor (out, r), (r,), (r, in)
    scaling : float
        lora_alpha / r_max.
    """
    return (b * (gate * scaling)) @ a


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class SoRALinear(LinearAdapter, LoraLayer):
    """A linear layer with W + lora_alpha / r B diag(g) A; A, B, dropout and scale are those of PEFT's LoRA."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_gate")
    other_param_names = LoraLayer.other_param_names

    if TYPE_CHECKING:  # PEFT carries no types
        lora_A: Any  # noqa: N815
        lora_B: Any  # noqa: N815
        lora_dropout: Any
        r: dict[str, int]
        scaling: dict[str, float]
        lora_gate: Any

    def make_containers(self) -> None:
        """Make the containers of LoRA and that of the gates."""
        LoraLayer.__init__(self, self.base_layer)
        self.lora_gate = nn.ParameterDict()

    def add(self, adapter_name: str, config: SoRAConfig) -> None:
        """Make A, B and the gate of one adapter."""
        generator = _generator(config.seed, self.key)
        given = torch.randn(config.r, generator=generator) if config.gate_init == "normal" else torch.ones(config.r)
        self.lora_gate[adapter_name] = nn.Parameter(given)
        lora = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            LoraLayer.update_layer(self, adapter_name, config.r, lora_alpha=config.lora_alpha, config=lora)
        weight = self.lora_A[adapter_name].weight
        if not weight.is_meta:
            drawn = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
            with torch.no_grad():
                weight.copy_(drawn)

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Return A (r, in), the gate (r,) and B (out, r) of one adapter."""
        return self.lora_A[adapter_name].weight, self.lora_gate[adapter_name], self.lora_B[adapter_name].weight

    def delta(self, adapter_name: str) -> Tensor:
        """Return lora_alpha / r B diag(g) A, (out, in)."""
        a, gate, b = self.factors(adapter_name)
        return gated_delta(b, gate, a, self.scaling[adapter_name])

    def branch(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return lora_alpha / r ((drop(x) A^T) * g) B^T."""
        down, up = self.lora_A[adapter_name], self.lora_B[adapter_name]
        h = down(self.lora_dropout[adapter_name](self._cast_input_dtype(x, down.weight.dtype)))
        gate = self.lora_gate[adapter_name] * self.scaling[adapter_name]
        out: Tensor = up((h * gate).to(h.dtype))  # under autocast h has fewer bits than the gate
        return out

    def resize(self, adapter_name: str, kept: Tensor | int) -> None:
        """Keep only some ranks of one adapter: those of a mask (r,), or a number of unknown ones to be loaded.

        The parameters stay the same objects. The scale does not change.
        """
        a, gate, b = self.factors(adapter_name)
        if isinstance(kept, int):
            kept = torch.arange(gate.numel(), device=gate.device) < kept
        for parameter, data in ((a, a.data[kept]), (gate, gate.data[kept]), (b, b.data[:, kept])):
            parameter.data = data.contiguous()
            parameter.grad = None
        self.lora_A[adapter_name].out_features = self.lora_B[adapter_name].in_features = gate.numel()


class SoRAModel(LinearTuner):
    """Puts `SoRALinear` layers into a model; made by `peft.get_peft_model` from a `SoRAConfig`."""

    prefix = "sora_"
    tuner_layer_cls = SoRALinear

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SoRAConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():  # a file saved after re-packing holds fewer ranks
            stored = state_dict.get(f"{name}.lora_gate.{adapter_name}")
            if not isinstance(layer, SoRALinear) or stored is None:
                continue
            if stored.numel() < layer.lora_gate[adapter_name].numel():
                layer.resize(adapter_name, stored.numel())
        return state_dict


def sora_layers(model: nn.Module, adapter: str | None = None) -> tuple[str, dict[str, SoRALinear]]:
    """Return the name of an adapter and its SoRA layers by their path in the base model.

    Parameters
    ----------
    model : PeftModel
    adapter : str, optional
        Default the active one.

    Raises
    ------
    ModelError
        When the model has no SoRA layers.
    MethodError
        When several adapters are active and none is named, or there is no such adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, SoRALinear)]
    if not layers:
        raise ModelError(
            f"this {type(model).__name__} has no SoRA layers. "
            'Make them with peft.get_peft_model(model, SoRAConfig(r=8, target_modules="all-linear")).'
        )
    if adapter is None:
        active = sorted({name for layer in layers for name in layer.active_adapters})
        if len(active) != 1:
            raise MethodError(
                f"{len(active)} adapters are active ({', '.join(active) or 'none'}). Name one, or activate one with "
                "set_adapter."
            )
        adapter = active[0]
    found = {layer.key: layer for layer in layers if layer.has(adapter)}
    if not found:
        known = sorted({name for layer in layers for name in layer.lora_gate})
        raise MethodError(f"there is no SoRA adapter {adapter!r}. {nearest(adapter, known, noun='adapter')}")
    return adapter, found
