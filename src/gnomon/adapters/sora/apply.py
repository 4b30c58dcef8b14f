"""The plain function by which recipes attach a SoRA adapter."""

from __future__ import annotations

from typing import Literal

from peft import PeftModel
from transformers import PreTrainedModel

from gnomon.adapters._peft import attach
from gnomon.adapters.sora.config import SoRAConfig

__all__ = ["apply_sora"]


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
