"""PEFT's own LoRA by one call with plain options, for recipes: what the adapters here are compared with."""

from __future__ import annotations

from typing import Literal

import peft
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from gnomon.adapters._peft import attach

__all__ = ["apply_lora"]


def apply_lora(
    model: PreTrainedModel,
    r: int = 8,
    lora_alpha: float | None = None,
    *,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora", "orthogonal"] = "default",
    target_modules: list[str] | str | None = None,
    seed: int = 0,
) -> PeftModel:
    """Attach PEFT's LoRA to a model.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place; all its own weights are frozen.
    r, lora_dropout, use_rslora, use_dora, target_modules
        As in `peft.LoraConfig`.
    lora_alpha : float, optional
        Default `r`, a scale of 1.
    init_lora_weights : {"default", "gaussian", "pissa", "olora", "orthogonal"}
        ``"default"`` is PEFT's True.
    seed : int, default 0
        Of the start of A.

    Returns
    -------
    PeftModel

    Raises
    ------
    ModelError
        When the model has adapters, or the family's targets are not known.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> apply_lora(tiny("llama"), r=4).peft_config["default"].r
    4
    """
    config = peft.LoraConfig(
        r=r,
        lora_alpha=r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=True if init_lora_weights == "default" else init_lora_weights,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # PEFT draws A from the global generator
        return attach(model, config)
