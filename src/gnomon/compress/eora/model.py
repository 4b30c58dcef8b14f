"""The two entries for whole models: make an adapter, or fill one that exists."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import decoder_blocks, family, unwrap
from gnomon.compress.eora.compensate import Compensation, OnLayer, Options
from gnomon.compress.eora.layer import Unseen
from gnomon.compress.eora.pairing import (
    DenseLayer,
    block_linears,
    check_pair,
    layer_ranks,
    lora_config,
    resolve_targets,
    update_config,
)
from gnomon.errors import GnomonWarning, MethodError, ModelError

__all__ = ["eora", "initialize_eora"]


def _dtype(model: nn.Module, dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise MethodError(f"dtype = {dtype!r}: a floating dtype such as 'float32', 'bfloat16' or 'float16' is needed.")
    return found


def _warn_of_fused_experts(model: nn.Module) -> None:
    for name, parameter in decoder_blocks(model).named_parameters():
        if parameter.ndim == 3:
            warnings.warn(
                f"{name!r} holds the weights of several experts in one tensor; it is no linear layer and is not "
                "compensated. The attention layers are.",
                GnomonWarning,
                stacklevel=3,
            )
            return


def _attach(base: nn.Module, ranks: Mapping[str, int], rank: int, dtype: torch.dtype) -> PeftModel:
    devices = list({p.device for p in base.parameters() if p.device.type == "cuda"})
    before = set(base.modules())
    with torch.random.fork_rng(devices=devices):  # PEFT draws its start values from the global state
        try:
            model = get_peft_model(base, lora_config(base, ranks, rank), autocast_adapter_dtype=False)
        except ValueError as error:
            raise ModelError(f"PEFT cannot put LoRA on this {family(base)!r} model: {error}") from error
    for name in ranks:
        for key, container in base.get_submodule(name).named_children():
            if key in ("lora_A", "lora_B"):
                container.to(dtype)
    for module in set(model.modules()) - before:
        module.training = base.training
    return model


def _drop(model: PeftModel, base: nn.Module, names: Sequence[str], ranks: dict[str, int], rank: int) -> None:
    """Take the LoRA layers of these names out of a model and its configuration."""
    for name in names:
        layer = base.get_submodule(name)
        base.set_submodule(name, layer.get_base_layer() if isinstance(layer, LoraLayer) else layer)
        del ranks[name]
    if not ranks:
        raise MethodError("No target layer received a token of the calibration set, so there is no adapter.")
    update_config(model.peft_config["default"], base, ranks, rank)


def eora(
    compressed_model: PreTrainedModel,
    original_model: PreTrainedModel,
    calibration: Any,
    rank: int = 128,
    *,
    targets: str | list[str] = "all-linear",
    rank_pattern: dict[str, int] | None = None,
    method: Literal["eora", "svd", "act_s", "gradient"] = "eora",
    accumulation: Literal["sum", "decay"] = "sum",
    unseen: Unseen = "skip",
    exact: bool | None = None,
    cutoff: float | None = None,
    adapter_bits: int | None = None,
    adapter_group_size: int = 128,
    gradient_steps: int = 3000,
    dtype: str | torch.dtype | None = None,
    batch_size: int = 8,
    seed: int = 0,
    on_layer: OnLayer | None = None,
) -> PeftModel:
    """Compensate a compressed model by LoRA adapters in closed form.

    Parameters
    ----------
    compressed_model : PreTrainedModel
        Pruned or quantised; plain weights, or any quantised layer PEFT has LoRA for. LoRA layers are put into it.
    original_model : PreTrainedModel
        The dense model it was made from. Not changed.
    calibration : LongTensor (n, tokens), mapping, or iterable of batches
        See `gnomon.common.calibration.as_batches`. Paper: 64 sequences of 2048 tokens of the downstream task.
    rank : int, default 128
        The paper's default (64 to 512 there). Lowered, with a warning, where it exceeds min(out, in).
    targets : "all-linear", regular expression, or list of str, default "all-linear"
        Which linear layers of the blocks, as PEFT reads `target_modules`; never embeddings or the output head.
    rank_pattern : dict of str to int, optional
        Other ranks by layer name or its ending, as in PEFT; 0 leaves a layer without adapter.
    method : {"eora", "svd", "act_s", "gradient"}, default "eora"
        The baselines of the paper have the same interface: see `eora_layer` and `gradient_fit`.
    accumulation : {"sum", "decay"}, default "sum"
        "decay" is the authors' running average, in which early sequences weigh less (and `batch_size` matters); only
        to reproduce their figures.
    unseen, exact, cutoff
        See `eora_layer` and `input_space`.
    adapter_bits, adapter_group_size : int, optional, default 128
        Round A and B to this many bits: see `quantise_adapter`.
    gradient_steps : int, default 3000
        Steps of the "gradient" baseline.
    dtype : str or torch.dtype, optional
        Of the adapter; default the compressed model's.
    batch_size : int, default 8
        Sequences per forward pass.
    seed : int, default 0
        Of the range finder and of the "gradient" baseline. The global random state is left alone.
    on_layer : callable (name, facts), optional
        Called after each layer with rank, tokens, effective_rank (input directions seen; their number bounds it for
        the baselines) and error_before, error_after: the squared output error per token.

    Returns
    -------
    PeftModel
        Around `compressed_model`: an ordinary LoRA with lora_alpha = r, without dropout or bias.

    Raises
    ------
    ModelError
        When the two models do not belong together or carry adapters already.
    MethodError
        When an option is out of range, or a layer's inputs or weights are not finite (the message names it).
    DataError
        When the calibration set is empty or does not fit the model.

    Examples
    --------
    >>> import copy
    >>> from gnomon.common.models import tiny
    >>> dense = tiny(num_layers=1)
    >>> pruned = copy.deepcopy(dense)
    >>> _ = pruned.model.layers[0].mlp.up_proj.weight.data[:, ::2].zero_()
    >>> peft_model = eora(pruned, dense, torch.arange(256).view(2, 128), rank=8)
    >>> peft_model.peft_config["default"].lora_alpha
    8
    """
    options = Options(
        method=method,
        accumulation=accumulation,
        unseen=unseen,
        exact=exact,
        cutoff=cutoff,
        adapter_bits=adapter_bits,
        adapter_group_size=adapter_group_size,
        gradient_steps=gradient_steps,
        batch_size=batch_size,
        seed=seed,
    )
    wanted = _dtype(compressed_model, dtype)
    dense = block_linears(original_model)
    check_pair(compressed_model, original_model, dense)
    ranks = layer_ranks(dense, resolve_targets(dense, targets), rank, rank_pattern)
    _warn_of_fused_experts(original_model)
    base = unwrap(compressed_model)
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    model = _attach(base, ranks, rank, wanted)
    try:
        work = Compensation(base, "default", dense, options, on_layer)
        work.run(calibration)
        if work.idle:
            _drop(model, base, work.idle, ranks, rank)
    except BaseException:
        model.unload()
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(trainable[name])
        raise
    return model


def check_options(
    model: PreTrainedModel,
    *,
    rank: int = 128,
    targets: str | list[str] = "all-linear",
    rank_pattern: dict[str, int] | None = None,
    dtype: str | torch.dtype | None = None,
    **others: Any,
) -> None:
    """Check the options of `eora` against a model before anything runs.

    Raises
    ------
    MethodError, ModelError
        As `eora`.
    """
    Options(**{name: value for name, value in others.items() if name in Options.__dataclass_fields__})
    _dtype(model, dtype)
    dense = block_linears(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what `eora` warns of it says when it runs
        layer_ranks(dense, resolve_targets(dense, targets), rank, rank_pattern)


def _dense_weights(
    base: nn.Module, source: nn.Module | Mapping[str, Tensor], layers: Mapping[str, LoraLayer]
) -> dict[str, DenseLayer]:
    """Return the dense layers, in the blocks, that stand in `source` and as linears in the model."""
    if isinstance(source, nn.Module):
        dense = block_linears(source)
    else:
        dense = {}
        inside = {id(m) for block in decoder_blocks(base) for m in block.modules()}
        for name, module in base.named_modules():
            plain = module.get_base_layer() if isinstance(module, LoraLayer) else module
            weight = source.get(f"{name}.weight")
            if id(module) in inside and weight is not None and weight.ndim == 2 and not name.endswith(".base_layer"):
                bias = source.get(f"{name}.bias", getattr(plain, "bias", None))
                dense[name] = DenseLayer(weight.T if isinstance(plain, Conv1D) else weight, bias)
    missing = [name for name in layers if name not in dense]
    if missing:
        raise ModelError(
            f"dense_weights has no weight for {len(missing)} of the adapter's layers, for example {missing[0]!r}. Give "
            f"the dense model, or its state dict with keys such as {missing[0] + '.weight'!r}; the adapter may only "
            "target linear layers of the blocks."
        )
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        if tuple(dense[name].weight.shape) != shape:
            raise ModelError(
                f"Layer {name!r}: the adapter's layer is {shape} (out, in), the dense weight "
                f"{tuple(dense[name].weight.shape)}. Both must come from the same architecture."
            )
    return dense


def initialize_eora(
    peft_model: PeftModel,
    dense_weights: nn.Module | Mapping[str, Tensor],
    dataloader: Any,
    *,
    adapter_name: str = "default",
    method: Literal["eora", "svd", "act_s", "gradient"] = "eora",
    unseen: Unseen = "skip",
    exact: bool | None = None,
    batch_size: int = 8,
    seed: int = 0,
    on_layer: OnLayer | None = None,
) -> PeftModel:
    """Start the LoRA adapter of a compressed model where it compensates the compression, to be trained from there.

    In the manner of PEFT's `initialize_lora_eva_weights`: the PEFT model, with its own ranks, alpha and dropout, exists
    already; its A and B are written. The scaling is accounted for, so that the start is the same for any lora_alpha.

    Parameters
    ----------
    peft_model : PeftModel
        LoRA on a compressed model, not merged, with `adapter_name` alone active.
    dense_weights : nn.Module or mapping of str to Tensor
        The dense model, or its state dict. Where a state dict lacks a layer without adapter, the compressed layer
        stands in when inputs are collected.
    dataloader : LongTensor (n, tokens), mapping, or iterable of batches
        Calibration data; see `gnomon.common.calibration.as_batches`.
    adapter_name : str, default "default"
    method, unseen, exact, batch_size, seed, on_layer
        See `eora`.

    Returns
    -------
    PeftModel
        The same object.

    Raises
    ------
    ModelError
        When there is no such LoRA adapter, it is merged, or a layer has no dense weight or another shape.

    Examples
    --------
    >>> import copy
    >>> from peft import LoraConfig, get_peft_model
    >>> from gnomon.common.models import tiny
    >>> dense = tiny(num_layers=1)
    >>> pruned = copy.deepcopy(dense)
    >>> _ = pruned.model.layers[0].mlp.up_proj.weight.data[:, ::2].zero_()
    >>> peft_model = get_peft_model(pruned, LoraConfig(r=4, target_modules=["up_proj"]))
    >>> peft_model = initialize_eora(peft_model, dense.state_dict(), torch.arange(256).view(2, 128))
    >>> bool(peft_model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.any())
    True
    """
    if not isinstance(peft_model, PeftModel):
        raise ModelError(
            f"{type(peft_model).__name__} is no PeftModel. Wrap the compressed model by peft.get_peft_model first, or "
            "use eora, which makes the adapter."
        )
    if adapter_name not in peft_model.peft_config or list(peft_model.active_adapters) != [adapter_name]:
        raise ModelError(
            f"The adapter {adapter_name!r} must be the only active one; active: {list(peft_model.active_adapters)}, "
            f"present: {list(peft_model.peft_config)}. Call peft_model.set_adapter({adapter_name!r})."
        )
    base = unwrap(peft_model)
    layers = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.r}
    merged = [name for name, layer in layers.items() if layer.merged]
    if not layers or merged or peft_model.peft_config[adapter_name].use_dora:
        what = f"is merged into {merged[0]!r}" if merged else "uses DoRA" if layers else "is no LoRA"
        raise ModelError(
            f"The adapter {adapter_name!r} {what}; a plain LoRA that is not merged is needed "
            "(peft_model.unmerge_adapter())."
        )
    dense = _dense_weights(base, dense_weights, layers)
    options = Options(method=method, unseen=unseen, exact=exact, batch_size=batch_size, seed=seed)
    Compensation(base, adapter_name, dense, options, on_layer).run(dataloader)
    return peft_model
