"""From gates to ranks: what is left, a plain LoRA of it, and smaller tensors during training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gnomon.adapters.sora.tuner import SoRALinear, sora_layers
from gnomon.common.tensors import full_tensor
from gnomon.errors import MethodError, ModelError

__all__ = ["SoRASummary", "prune_sora", "repack_sora", "sora_ranks", "sora_summary"]


@torch.no_grad()
def sora_ranks(model: nn.Module, adapter: str | None = None) -> dict[str, int]:
    """Return the rank of every adapted module: its gates that are not zero.

    Parameters
    ----------
    model : PeftModel
        Of a sharded model, every rank of the process group must call this.
    adapter : str, optional
        Default the active one.

    Returns
    -------
    dict of str to int
        Path in the base model -> rank.
    """
    name, layers = sora_layers(model, adapter)
    return {key: int((full_tensor(layer.lora_gate[name]) != 0).sum()) for key, layer in layers.items()}


@dataclass(frozen=True)
class SoRASummary:
    """What the gates have left.

    Attributes
    ----------
    gates, all_gates : int
        Gates that are not zero, and all that there were at the start.
    parameters : int
        Trained numbers of the model less (out + in) for every zero gate.
    ranks : dict of str to int
        As `sora_ranks`.
    """

    gates: int
    all_gates: int
    parameters: int
    ranks: dict[str, int]

    @property
    def kept(self) -> float:
        """The share of gates that are not zero."""
        return self.gates / self.all_gates


def sora_summary(model: nn.Module, adapter: str | None = None) -> SoRASummary:
    """Return how many gates, parameters and ranks are left.

    Parameters
    ----------
    model : PeftModel
    adapter : str, optional
        Default the active one.

    Returns
    -------
    SoRASummary

    Examples
    --------
    >>> from gnomon.adapters import apply_sora
    >>> from gnomon.common.models import tiny
    >>> sora_summary(apply_sora(tiny("llama"), r=4)).kept
    1.0
    """
    name, layers = sora_layers(model, adapter)
    ranks = sora_ranks(model, name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = sum(
        (layer.lora_gate[name].numel() - ranks[key]) * (layer.in_features + layer.out_features)
        for key, layer in layers.items()
        if layer.lora_gate[name].requires_grad
    )
    return SoRASummary(sum(ranks.values()), sum(layer.r[name] for layer in layers.values()), trained - zero, ranks)


def prune_sora(model: PeftModel) -> PeftModel:
    """Turn SoRA adapters into plain LoRA ones: A[K], B[:, K] g[K] for the gates K that are not zero.

    `rank_pattern` and `alpha_pattern` give every module its rank and keep the scale lora_alpha / r_max; modules without
    a rank are left out. The result is PEFT's own LoRA: whoever loads it needs nothing of this library. Trained biases
    and `modules_to_save` are carried over.

    Parameters
    ----------
    model : PeftModel
        All its adapters are pruned. Used up: the base model inside goes into the result.

    Returns
    -------
    PeftModel
        With the same adapters by name, and the same one active.

    Raises
    ------
    ModelError
        When the model has no SoRA layers, an adapter is merged, or the parameters are sharded.
    MethodError
        When an adapter has no gate left.

    Examples
    --------
    >>> from gnomon.adapters import apply_sora
    >>> from gnomon.common.models import tiny
    >>> prune_sora(apply_sora(tiny("llama"), r=4)).peft_config["default"].peft_type.value
    'LORA'
    """
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"prune_sora takes a PeftModel, not a {type(model).__name__}. Give it what get_peft_model made."
        )
    layers = {layer.key: layer for layer in model.modules() if isinstance(layer, SoRALinear)}
    adapters = list(model.peft_config)
    for adapter in adapters:
        _check_prunable(model, adapter)
    factors = {adapter: _pruned_factors(layers, adapter) for adapter in adapters}
    whole = {adapter: _trained_whole(model, adapter) for adapter in adapters}
    configs = {name: _lora_config(model.peft_config[name], name, layers, factors[name]) for name in adapters}
    active, training = model.active_adapter, model.training
    base = model.unload()
    with torch.random.fork_rng(devices=[]):  # PEFT draws a start that is overwritten
        made: Any = get_peft_model(base, configs[adapters[0]], adapter_name=adapters[0])
        for adapter in adapters[1:]:
            made.add_adapter(adapter, configs[adapter])
    for adapter in adapters:
        _fill(made, adapter, factors[adapter], whole[adapter])
    made.set_adapter(active)
    made.train(training)
    return made


def _check_prunable(model: PeftModel, adapter: str) -> None:
    name, layers = sora_layers(model, adapter)
    merged = [key for key, layer in layers.items() if name in layer.merged_adapters]
    if merged:
        raise ModelError(f"the adapter {name!r} is merged into {merged[0]}. Call unmerge_adapter() first.")
    if any(isinstance(p, DTensor) for layer in layers.values() for p in layer.parameters()):
        raise ModelError(
            "the parameters are sharded over several processes. Save the adapter, load it in one process and prune it "
            "there."
        )
    if not any(sora_ranks(model, name).values()):
        raise MethodError(
            f"all gates of the adapter {name!r} are zero, so no LoRA is left. The base model alone (model.unload()) "
            "computes the same; or train again with a smaller xi."
        )


@torch.no_grad()
def _pruned_factors(layers: dict[str, SoRALinear], adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A[K] (k, in) and B[:, K] g[K] (out, k) of every module with a rank."""
    found = {}
    for key, layer in layers.items():
        if layer.has(adapter):
            a, gate, b = layer.factors(adapter)
            kept = gate != 0
            if bool(kept.any()):
                found[key] = (a[kept].clone(), b[:, kept] * gate[kept])
    return found


def _lora_config(
    config: Any, adapter: str, layers: dict[str, SoRALinear], factors: dict[str, tuple[Tensor, Tensor]]
) -> LoraConfig:
    adapted = [key for key, layer in layers.items() if key in factors]
    left_out = [key for key, layer in layers.items() if layer.has(adapter) and key not in factors]
    others = [key for key in layers if key not in factors]
    target: Any = adapted
    if any(key.endswith(f".{name}") for key in others for name in adapted):  # PEFT compares the ends of paths
        target = "|".join(re.escape(key) for key in adapted)
    ranks = {key: int(a.shape[0]) for key, (a, _) in factors.items()}
    bias = {"adapter_only": "all" if left_out else "lora_only"}.get(config.bias, config.bias)
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target,
        rank_pattern={_pattern(key): rank for key, rank in ranks.items()},
        alpha_pattern={_pattern(key): layers[key].scaling[adapter] * rank for key, rank in ranks.items()},
        fan_in_fan_out=layers[adapted[0]].fan_in_fan_out,
        bias=bias,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=config.inference_mode,
    )


def _pattern(key: str) -> str:
    """A key of rank_pattern that matches this path alone: PEFT takes it for a regular expression on a path's end."""
    return "^" + re.escape(key)


def _trained_whole(model: PeftModel, adapter: str) -> dict[str, dict[str, Tensor]]:
    """The modules trained beside the adapter: path -> state."""
    return {
        name: {key: value.clone() for key, value in module.modules_to_save[adapter].state_dict().items()}
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in getattr(module, "modules_to_save", ())
    }


@torch.no_grad()
def _fill(
    made: nn.Module, adapter: str, factors: dict[str, tuple[Tensor, Tensor]], whole: dict[str, dict[str, Tensor]]
) -> None:
    base: Any = made.base_model
    modules = dict(base.model.named_modules())
    for key, (a, b) in factors.items():
        layer: Any = modules[key]
        layer.lora_A[adapter].weight.data = a.to(layer.lora_A[adapter].weight)
        layer.lora_B[adapter].weight.data = b.to(layer.lora_B[adapter].weight)
    every = dict(made.named_modules())
    for name, state in whole.items():
        wrapper: Any = every[name]
        wrapper.modules_to_save[adapter].load_state_dict(state)
    extra = [
        key for key, m in modules.items() if isinstance(m, LoraLayer) and adapter in m.lora_A and key not in factors
    ]
    if extra:
        raise ModelError(f"PEFT adapted {extra[0]} too, which has no rank. Report this with the names of the modules.")


@torch.no_grad()
def repack_sora(
    model: nn.Module, optimizer: Optimizer, after: int = 100, *, adapter: str | None = None
) -> dict[str, int]:
    """Drop ranks whose gate has been zero for `after` steps from A, B, the gate and the optimizer's state.

    The tensors get smaller, so steps get cheaper; the dropped gates cannot come back. The parameters stay the same
    objects, so the optimizer and its scheduler go on. A saved re-packed adapter loads into a fresh one of rank r.

    Parameters
    ----------
    model : PeftModel
        Not wrapped for several processes.
    optimizer : torch.optim.Optimizer
        `SoRAProximal`, or the one that `SoRACallback` trains with.
    after : int, default 100
    adapter : str, optional
        Default the active one.

    Returns
    -------
    dict of str to int
        Ranks that are left in memory, by module.

    Raises
    ------
    ModelError
        When the parameters are sharded or the model is wrapped.
    MethodError
        When `after` is not positive, or the optimizer keeps a state that cannot be cut by ranks.
    """
    if not isinstance(after, int) or isinstance(after, bool) or after < 1:
        raise MethodError(f"after = {after!r}: a whole number of steps, at least 1.")
    name, layers = sora_layers(model, adapter)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.distributed.get_world_size() > 1:
        raise ModelError(
            "re-packing changes the shape of parameters, which wrappers for several processes do not allow. Train in "
            "one process, or prune after training."
        )
    for layer in layers.values():
        zero_for = optimizer.state.get(layer.lora_gate[name], {}).get("zero_for")
        if zero_for is None:
            continue
        kept = zero_for < after
        if not bool(kept.all()):
            _cut_state(optimizer, layer, name, kept)
            layer.resize(name, kept)
    return {key: layer.lora_gate[name].numel() for key, layer in layers.items()}


def _cut_state(optimizer: Optimizer, layer: SoRALinear, adapter: str, kept: Tensor) -> None:
    a, gate, b = layer.factors(adapter)
    cuts = {a: lambda x: x[kept], gate: lambda x: x[kept], b: lambda x: x[:, kept]}
    for parameter in cuts:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise MethodError(
                    f"the optimizer keeps {key} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(parameter.shape)}, which cannot be cut by ranks. Re-pack with an optimizer whose state "
                    "has the shape of the parameters, such as torch.optim.AdamW, or prune after training."
                )
    for parameter, cut in cuts.items():
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = cut(value).contiguous()
