"""The plain functions by which recipes attach LoRA-SB and LoRA-XS adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from gnomon.adapters._peft import attach
from gnomon.adapters.lora_sb.config import LoRASBConfig, LoRAXSConfig
from gnomon.adapters.lora_sb.initialize import initialize_lora_sb
from gnomon.common.gradient_probe import Batch

__all__ = ["apply_lora_sb", "apply_lora_xs"]


def apply_lora_sb(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    lr: float,
    num_training_steps: int,
    *,
    r: int = 96,
    lora_alpha: float | None = None,
    num_samples: int | None = None,
    warmup_ratio: float = 0.02,
    parity: bool = False,
    save_factors: bool | Literal["bf16", "seeded-sketch"] = True,
    seed: int = 0,
    target_modules: list[str] | str | None = None,
) -> PeftModel:
    """Attach a LoRA-SB adapter and initialise it from the first training rows.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; all its own weights are frozen.
    batches : iterable of mappings
        In training order.
    lr : float
        Peak learning rate of the training to come.
    num_training_steps : int
    r, lora_alpha, parity, save_factors, seed, target_modules
        As in `LoRASBConfig`.
    num_samples : int, optional
        Rows to probe with; default a thousandth of the rows of `batches`, at least those of the first batch.
    warmup_ratio : float, default 0.02
        As in `initialize_lora_sb`.

    Returns
    -------
    PeftModel

    Raises
    ------
    MethodError, ModelError
        As `LoRASBConfig` and `initialize_lora_sb` do, and when the model has adapters.

    Examples
    --------
    >>> import torch
    >>> from gnomon.common.models import tiny
    >>> ids = torch.arange(64).reshape(4, 16)
    >>> rows = [{"input_ids": ids, "labels": ids}]
    >>> model = apply_lora_sb(tiny("llama"), rows, 1e-3, 100, r=4, target_modules="all-linear")
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    224
    """
    config = LoRASBConfig(
        r=r,
        lora_alpha=lora_alpha,
        parity=parity,
        save_factors=save_factors,
        seed=seed,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    adapted = attach(model, config)
    chosen = _thousandth(batches) if num_samples is None else batches
    initialize_lora_sb(
        adapted,
        chosen,
        lr=lr,
        num_training_steps=num_training_steps,
        warmup_ratio=warmup_ratio,
        num_samples=num_samples,
        seed=seed,
    )
    return adapted


def _thousandth(batches: Iterable[Batch]) -> list[Batch]:
    """Return the first batches: one for every thousand."""
    total = len(batches) if hasattr(batches, "__len__") else 1  # type: ignore[arg-type]
    wanted = max(1, total // 1000)
    found: list[Batch] = []
    for batch in batches:
        found.append(batch)
        if len(found) == wanted:
            break
    return found


def apply_lora_xs(
    model: PreTrainedModel,
    r: int = 96,
    *,
    lora_alpha: float | None = None,
    save_factors: bool | Literal["bf16"] = False,
    seed: int = 0,
    target_modules: list[str] | str | None = None,
) -> PeftModel:
    """Attach a LoRA-XS adapter: `LoRAXSConfig` with plain options, then `peft.get_peft_model`.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; all its own weights are frozen.
    r, lora_alpha, save_factors, seed, target_modules
        As in `LoRAXSConfig`.

    Returns
    -------
    PeftModel

    Raises
    ------
    MethodError
        When an option is not allowed.
    ModelError
        When the model has adapters, a target is no linear layer, or the family's targets are not known.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = apply_lora_xs(tiny("llama"), r=4, target_modules="all-linear")
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    224
    """
    config = LoRAXSConfig(
        r=r,
        lora_alpha=lora_alpha,
        save_factors=save_factors,
        seed=seed,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    return attach(model, config)
