"""A LoRA-SB or LoRA-XS adapter as a plain LoRA: lora_A = A, lora_B = B R, without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from gnomon.adapters.lora_sb.initialize import _adapter, _copy, _inner
from gnomon.errors import MethodError

__all__ = ["lora_sb_as_lora", "save_lora_sb_as_lora"]


def lora_sb_as_lora(model: nn.Module, adapter_name: str | None = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the configuration and the tensors of the plain LoRA that computes the same.

    `peft.save_as_lora` does it by a decomposition of every change; here the factors are taken over as they are.

    Parameters
    ----------
    model : PeftModel
    adapter_name : str, optional
        Default the active one.

    Returns
    -------
    LoraConfig
        Rank r, scale s; modules trained whole and trained biases as before.
    dict of str to Tensor
        As `peft.get_peft_model_state_dict` gives them; float32, or float64 where the adapter is.

    Raises
    ------
    ModelError
        When the model has no such adapter, or it has no factors yet.

    Examples
    --------
    >>> import peft
    >>> from gnomon.adapters import LoRAXSConfig
    >>> from gnomon.common.models import tiny
    >>> model = peft.get_peft_model(tiny("llama"), LoRAXSConfig(r=4, target_modules=["q_proj"]))
    >>> config, state = lora_sb_as_lora(model)
    >>> config.r, len(state)
    (4, 4)
    """
    inner = _inner(model)
    name, layers = _adapter(inner, adapter_name)
    own: Any = inner.peft_config[name]
    stem = next(iter(layers.values())).stem
    saved = get_peft_model_state_dict(inner, adapter_name=name)
    state = {key: value for key, value in saved.items() if not key.rpartition(".")[2].startswith(f"{stem}_")}
    with torch.no_grad():
        for key, layer in layers.items():
            A, B, R = (_copy(x) for x in layer.factors(name))
            state[f"base_model.model.{key}.lora_A.weight"] = A
            state[f"base_model.model.{key}.lora_B.weight"] = B @ R
    config = LoraConfig(
        r=own.r,
        lora_alpha=own.lora_alpha,
        target_modules=own.target_modules,
        exclude_modules=own.exclude_modules,
        layers_to_transform=own.layers_to_transform,
        layers_pattern=own.layers_pattern,
        modules_to_save=own.modules_to_save,
        bias="lora_only" if own.bias == "adapter_only" else own.bias,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        base_model_name_or_path=own.base_model_name_or_path,
        task_type=own.task_type,
        inference_mode=True,
    )
    return config, state


def save_lora_sb_as_lora(folder: str | Path, model: nn.Module, adapter_name: str | None = None) -> None:
    """Save an adapter as a plain LoRA, which loads wherever PEFT's LoRA does.

    Parameters
    ----------
    folder : str or Path
        Made if need be.
    model : PeftModel
    adapter_name : str, optional
        Default the active one.

    Raises
    ------
    MethodError
        When `folder` is a file.
    ModelError
        As in `lora_sb_as_lora`.
    """
    folder = Path(folder)
    if folder.is_file():
        raise MethodError(f"{folder} is a file. Name a folder, which is made if need be.")
    config, state = lora_sb_as_lora(model, adapter_name)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))
