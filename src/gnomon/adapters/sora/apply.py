"""The plain functions by which recipes attach a SoRA adapter and train its gates."""

from __future__ import annotations

from typing import Any, Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from gnomon.adapters._peft import attach
from gnomon.adapters.sora.callback import SoRACallback
from gnomon.adapters.sora.config import SoRAConfig
from gnomon.adapters.sora.schedule import SparsifyingSchedule
from gnomon.adapters.sora.tuner import sora_layers

__all__ = ["apply_sora", "sora_callback"]


def apply_sora(
    model: PreTrainedModel,
    r: int = 8,
    *,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    gate_init: Literal["normal", "ones"] = "normal",
    seed: int = 0,
    target_modules: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
) -> PeftModel:
    """Attach a SoRA adapter to a model: `SoRAConfig` with plain options, then `peft.get_peft_model`.

    The gates become sparse only through the proximal step: train with `SoRACallback` or `SoRAProximal`.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; all its own weights are frozen.
    r, lora_alpha, lora_dropout, gate_init, seed, target_modules, modules_to_save
        As in `SoRAConfig`.

    Returns
    -------
    PeftModel
        For classifiers its head is trained and saved too.

    Raises
    ------
    MethodError
        When an option is not allowed.
    ModelError
        When the model has adapters, a target is no linear layer, or the family's targets are not known.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> model = apply_sora(tiny("llama"), r=4)
    >>> sum(p.numel() for name, p in model.named_parameters() if "lora_gate" in name)
    16
    """
    task: str | None
    if type(model).__name__.endswith("ForSequenceClassification"):
        task = "SEQ_CLS"  # PEFT then trains and saves the head
    else:
        task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    config = SoRAConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        gate_init=gate_init,
        seed=seed,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
        task_type=task,
    )
    return attach(model, config)


def sora_callback(
    model: nn.Module,
    xi: float = 3e-4,
    lambda1: float = 1e-3,
    *,
    prox: Literal["soft", "authors"] = "soft",
    xi_times_lr: bool = False,
    gate_lr: float | None = None,
    xi_end: float | None = None,
    stages: int = 7,
    spacing: Literal["linear", "log_linear", "exp_linear"] = "linear",
    first: float = 50.0,
    further: float = 15.0,
    repack_after: int | None = None,
) -> TrainerCallback:
    """Return the callback that a recipe's train stage needs beside `apply_sora`.

    Parameters
    ----------
    model : PeftModel
        With a SoRA adapter.
    xi, lambda1, prox, xi_times_lr, gate_lr, repack_after
        As in `SoRACallback`.
    xi_end : float, optional
        With it the threshold rises from `xi` to `xi_end` over the run; default it stays.
    stages : int, default 7
        Thresholds, the first included (authors' script: 7).
    spacing : {"linear", "log_linear", "exp_linear"}, default "linear"
    first, further : float, default 50 and 15
        How long the first and each further stage lasts, relative to each other (authors' script: epochs).

    Raises
    ------
    MethodError
        When an option is not allowed.
    ModelError
        When the model has no SoRA layers.
    """
    sora_layers(model)
    schedule: Any = None
    if xi_end is not None:
        schedule = SparsifyingSchedule.spaced(xi, xi_end, stages, spacing, first=first, further=further)
    return SoRACallback(
        xi,
        lambda1,
        prox=prox,
        xi_times_lr=xi_times_lr,
        gate_lr=gate_lr,
        schedule=schedule,
        repack_after=repack_after,
    )
