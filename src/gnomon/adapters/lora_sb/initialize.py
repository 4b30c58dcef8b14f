"""What sets the factors of a LoRA-SB adapter: a gradient probe, or the user."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gnomon.adapters.lora_sb.config import LoRASBConfig
from gnomon.adapters.lora_sb.factors import (
    Factors,
    authors_factors,
    captured,
    first_update,
    sketched_factors,
    update_factors,
)
from gnomon.adapters.lora_sb.tuner import LatentLinear
from gnomon.common.gradient_probe import Batch, Loss, first_samples, probe_gradients
from gnomon.common.ranks import ranks
from gnomon.errors import GnomonWarning, MethodError, ModelError, nearest

__all__ = ["LoRASBStart", "initialize_lora_sb", "lora_sb_factors", "set_lora_sb_factors"]


@dataclass(frozen=True)
class LoRASBStart:
    """What an initialisation found.

    Attributes
    ----------
    eta : float
        Learning rate of the first step.
    captured : dict of str to float
        Layer -> share of the energy of the first step that its factors hold.
    without_gradient : tuple of str
        Layers that no gradient reached.
    """

    eta: float
    captured: dict[str, float]
    without_gradient: tuple[str, ...] = ()


def initialize_lora_sb(
    model: nn.Module,
    dataloader: Iterable[Batch] | Callable[[], object],
    *,
    lr: float | None = None,
    num_training_steps: int | None = None,
    warmup_ratio: float = 0.02,
    eta: float | None = None,
    num_samples: int | None = None,
    adapter_name: str | None = None,
    loss: Loss | None = None,
    passes: int = 1,
    keep_latent: bool = False,
    seed: int = 0,
) -> LoRASBStart:
    """Set the factors of a LoRA-SB adapter from the first step that full fine-tuning would take.

    The gradient of the base weights is taken with all adapters off, in training mode, and summed over the ranks; the
    base weights are left as they are. Call it after `peft.get_peft_model`, before DDP, FSDP or quantisation.

    Parameters
    ----------
    model : PeftModel
    dataloader : iterable of mappings, or callable
        Batches such as ``{"input_ids", "attention_mask", "labels"}`` in training order; or a callable without
        arguments that runs forward and backward itself.
    lr : float
        Peak learning rate of the training to come.
    num_training_steps : int, optional
        Default the length of the loader, as in the authors' scripts (one epoch).
    warmup_ratio : float, default 0.02
        The first step has eta = lr / (warmup_ratio num_training_steps). 0 gives eta = 0. GLUE: 0.06.
    eta : float, optional
        Given instead of the three above. It sets the size of R's start, not the factors.
    num_samples : int, optional
        Rows to probe with, of all ranks together (MetaMathQA: 50, Commonsense170K: 170, GLUE: 2; a thousandth of the
        training rows). Default all rows of the loader.
    adapter_name : str, optional
        Default the active one.
    loss : callable (model, batch) -> Tensor (), optional
        Default ``model(**batch).loss``.
    passes : int, default 1
        Probe the layers in so many groups: gradient buffers of a p-th of the model, p times the batches.
    keep_latent : bool, default False
        Keep R: for an adapter that was saved without its factors.
    seed : int, default 0
        Of the dropout in the probe.

    Returns
    -------
    LoRASBStart

    Raises
    ------
    MethodError
        When the adapter is not ``init="sb"``, there are too few rows, no loss, no gradient at all or one with NaN, or
        eta does not follow from what was given.
    ModelError
        When the model has no such adapter, is quantised or sharded, or an adapter is merged.

    Warns
    -----
    GnomonWarning
        When eta is 0, or no gradient reaches a layer; such a layer gets the singular vectors of its weight and R = 0.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> import peft
    >>> model = peft.get_peft_model(tiny("llama"), LoRASBConfig(r=4, target_modules="all-linear"))
    >>> ids = torch.arange(64).reshape(4, 16)
    >>> start = initialize_lora_sb(model, [{"input_ids": ids, "labels": ids}], lr=1e-3, num_training_steps=100)
    >>> round(start.eta, 6)
    0.0005
    """
    inner = _inner(model)
    name, layers = _adapter(inner, adapter_name)
    config = next(iter(layers.values())).configs[name]
    if config.init != "sb":
        remedy = "It has its factors already." if config.init == "xs" else "Set its factors with set_lora_sb_factors."
        raise MethodError(f"the adapter {name!r} has init = {config.init!r}, not 'sb'. {remedy}")
    _check_bases(layers)
    eta = _eta(eta, lr, num_training_steps, warmup_ratio, dataloader)
    batches: Any = dataloader
    if isinstance(dataloader, Iterable):
        batches = first_samples(dataloader, num_samples)
    elif num_samples is not None:
        raise MethodError("num_samples counts rows of a loader; a callable runs over its own. Leave it out.")
    held: dict[str, float] = {}
    bases = {key: layer.get_base_layer() for key, layer in layers.items()}
    with _without_adapters(inner):
        for key, gradient in probe_gradients(inner, bases, batches, loss=loss, passes=passes, seed=seed):
            if gradient is not None and bool(gradient.any()):
                factors, held[key] = _factors(gradient, layers[key], config, eta)
                layers[key].fill(name, _alike(factors), keep_latent=keep_latent)
    _fill_the_rest(layers, name, config, held, keep_latent)
    return LoRASBStart(eta, held, tuple(key for key in layers if key not in held))


def set_lora_sb_factors(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    *,
    adapter_name: str | None = None,
    keep_latent: bool = False,
) -> None:
    """Set A, B and R of every layer of an adapter by hand.

    With ``init="given"`` this is the initialisation. Otherwise it puts the factors of one adapter into another, so
    that several adapters of one model, or of several clients, differ in R alone: the mean of their R is then exactly
    the mean of their changes.

    Parameters
    ----------
    model : PeftModel
    factors : mapping of str to (A, B, R)
        Path of the layer in the base model -> tensors (r, in), (out, r), (r, r); see `lora_sb_factors`.
    adapter_name : str, optional
        Default the active one.
    keep_latent : bool, default False
        Keep R as it is.

    Raises
    ------
    MethodError
        When a layer is missing or unknown, a shape is another one, or the adapter's options ask for other factors.
    ModelError
        When the model has no such adapter, or is sharded.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> import peft
    >>> model = peft.get_peft_model(tiny("llama"), LoRASBConfig(r=2, init="given", target_modules=["q_proj"]))
    >>> eye = torch.eye(64)
    >>> layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    >>> set_lora_sb_factors(model, {layer: (eye[:2], eye[:, :2], torch.zeros(2, 2)) for layer in layers})
    """
    name, layers = _adapter(_inner(model), adapter_name)
    for key in sorted(set(factors) - set(layers)):
        raise MethodError(f"there is no adapted layer {key!r}. {nearest(key, layers, noun='layer')}")
    missing = [key for key in layers if key not in factors]
    if missing:
        raise MethodError(f"the factors of {missing[0]} and {len(missing) - 1} further layers are missing. Give all.")
    config = next(iter(layers.values())).configs[name]
    sketched = config.save_factors == "seeded-sketch"
    for key, layer in layers.items():
        given = Factors(*factors[key])
        if sketched and not _lies_in_sketch(layer, name, given):
            raise MethodError(
                f"the factors of {key} do not lie in the sketch of seed {config.seed}, so they could not "
                "be saved. Take save_factors=True or 'bf16'."
            )
        layer.fill(name, given, keep_latent=keep_latent)


def lora_sb_factors(model: nn.Module, adapter_name: str | None = None) -> dict[str, Factors]:
    """Return copies of A, B and R of every layer of an adapter, by the path of the layer in the base model.

    Parameters
    ----------
    model : PeftModel
    adapter_name : str, optional
        Default the active one.

    Raises
    ------
    ModelError
        When the model has no such adapter, or it has no factors yet.
    """
    name, layers = _adapter(_inner(model), adapter_name)
    return {key: Factors(*(_copy(x) for x in layer.factors(name))) for key, layer in layers.items()}


def _copy(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def _inner(model: nn.Module) -> PeftModel:
    """Return the PeftModel inside DDP and torch.compile."""
    inner: Any = model
    while hasattr(inner, "_orig_mod") or isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    if not isinstance(inner, PeftModel):
        raise ModelError(
            f"a {type(inner).__name__} is no PeftModel. Make one first: peft.get_peft_model(model, "
            "LoRASBConfig(r=96, ...))."
        )
    return inner


def _adapter(model: PeftModel, adapter_name: str | None) -> tuple[str, dict[str, LatentLinear]]:
    """Return the adapter's name and its layers by their path in the base model."""
    every = [module for module in model.modules() if isinstance(module, LatentLinear)]
    if adapter_name is None:
        active = sorted({name for layer in every for name in layer.active_adapters})
        if every and len(active) != 1:
            raise MethodError(f"the active adapters are {', '.join(active) or '(none)'}. Name one with adapter_name.")
        adapter_name = active[0] if active else "default"
    layers = {layer.key: layer for layer in every if layer.has(adapter_name)}
    if not layers:
        known = sorted({name for layer in every for name in layer.configs})
        raise ModelError(
            f"the model has no LoRA-SB or LoRA-XS adapter {adapter_name!r}; it has {', '.join(known) or 'none'}. "
            "Attach one: peft.get_peft_model(model, LoRASBConfig(r=96, ...))."
        )
    return adapter_name, layers


def _check_bases(layers: Mapping[str, LatentLinear]) -> None:
    for key, layer in layers.items():
        if layer.quantization_backend is not None:
            raise ModelError(
                f"{key} is quantised ({type(layer.get_base_layer()).__name__}), and a quantised weight has no "
                "gradient. Initialise on the model in bfloat16 or float32, save the adapter, and load it on the "
                "quantised base; or set the factors by hand (init='given', set_lora_sb_factors)."
            )
        if layer.merged:
            raise ModelError(
                f"{key} has the adapters {', '.join(layer.merged_adapters)} merged into its weight, so the gradient "
                "would not be that of the base model. Call unmerge_adapter() first."
            )


def _eta(eta: float | None, lr: float | None, steps: int | None, warmup_ratio: float, loader: object) -> float:
    """Return the learning rate of the first warm-up step, and warn when it is 0."""
    if eta is None:
        steps = len(loader) if steps is None and hasattr(loader, "__len__") else steps
        if lr is None or steps is None:
            raise MethodError(
                f"lr = {lr}, num_training_steps = {steps}: the size of the first step is lr / (warmup_ratio x "
                "num_training_steps). Give both, or eta=."
            )
        if steps < 1 or not 0 <= warmup_ratio <= 1:
            raise MethodError(
                f"num_training_steps = {steps}, warmup_ratio = {warmup_ratio}: a whole number of at least 1, and a "
                "share between 0 and 1."
            )
        eta = lr / (warmup_ratio * steps) if warmup_ratio else 0.0
    if not 0 <= eta < float("inf"):
        raise MethodError(f"the first step has a learning rate of {eta}; it is a finite number of at least 0.")
    if not eta:
        warnings.warn(
            "the first step has a learning rate of 0 (lr or the warm-up is 0), so R starts at 0 and the adapter "
            "changes nothing at first; its factors are as they would be. Give eta= for a start along the step.",
            GnomonWarning,
            stacklevel=3,
        )
    return float(eta)


@contextmanager
def _without_adapters(model: PeftModel) -> Iterator[None]:
    """All adapters off; afterwards on, with what was trainable trainable again and nothing else."""
    flags = {p: p.requires_grad for p in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


def _factors(gradient: Tensor, layer: LatentLinear, config: LoRASBConfig, eta: float) -> tuple[Factors, float]:
    """Return the factors of the first step of one layer, and how much of its energy they hold."""
    s = config.scaling
    if config.parity:
        step = first_update(gradient, eta or 1.0)
        found = authors_factors(step, config.r, scaling=s)
        return found if eta else found._replace(R=0 * found.R), captured(step, found, s)
    direction = first_update(gradient, 1.0)
    if config.save_factors == "seeded-sketch":
        name = next(name for name, own in layer.configs.items() if own is config)
        found = sketched_factors(direction, config.r, *layer.sketches(name, gradient.device), scaling=s)
    else:
        found = update_factors(direction, config.r, scaling=s, method=config.svd)  # type: ignore[arg-type]
    return found._replace(R=eta * found.R), captured(direction, found, s)


def _alike(factors: Factors) -> Factors:
    """Give every rank the first rank's factors: two machines may round a decomposition differently."""
    if ranks().num_processes == 1:
        return factors
    parts = [part.contiguous() for part in factors]
    for part in parts:
        dist.broadcast(part, src=0)
    return Factors(*parts)


def _fill_the_rest(
    layers: Mapping[str, LatentLinear], name: str, config: LoRASBConfig, held: Mapping[str, float], keep: bool
) -> None:
    """Give layers that no gradient reached the singular vectors of their weight and R = 0."""
    rest = [key for key in layers if key not in held]
    if len(rest) == len(layers):
        raise MethodError(
            "the gradient is 0 at every layer, so there is no first step. Look for labels that are all -100, a loss "
            "that does not depend on the layers, or float16 gradients that underflow."
        )
    if rest:
        warnings.warn(
            f"no gradient reached {len(rest)} of {len(layers)} layers ({', '.join(rest[:4])}"
            f"{', ...' if len(rest) > 4 else ''}), such as experts that no row was sent to. They get the singular "
            "vectors of their weight and R = 0. Probe with more rows to initialise them too.",
            GnomonWarning,
            stacklevel=3,
        )
    for key in rest:
        layer = layers[key]
        if config.save_factors == "seeded-sketch":
            weight = layer.get_base_weight()
            weight = weight.T if layer.fan_in_fan_out else weight
            A, B, _ = sketched_factors(weight.float(), config.r, *layer.sketches(name, weight.device))
        else:
            A, B = layer.own_factors(config, orthonormal=True)
        layer.fill(name, _alike(Factors(A, B, A.new_zeros(config.r, config.r))), keep_latent=keep)


def _lies_in_sketch(layer: LatentLinear, name: str, factors: Factors) -> bool:
    rows, columns = layer.sketches(name, factors.A.device)
    return torch.equal(rows.expand(rows.pick(factors.B)), factors.B) and torch.equal(
        columns.expand(columns.pick(factors.A.T)), factors.A.T
    )
