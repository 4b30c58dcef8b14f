"""PEFT's LoRA layers on bitsandbytes' layers, for ALLoRA; importing this module imports bitsandbytes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from gnomon.adapters.allora.layer import ALLoRALayer

__all__ = ["LAYERS", "ALLoRALinear4bit", "ALLoRALinear8bitLt"]


class ALLoRALinear8bitLt(ALLoRALayer, Linear8bitLt):
    """A layer in 8 bits with adapters that may be trained by ALLoRA's rule."""


class ALLoRALinear4bit(ALLoRALayer, Linear4bit):
    """A layer in 4 bits with adapters that may be trained by ALLoRA's rule."""


LAYERS: dict[str, Any] = {"8bit": ALLoRALinear8bitLt, "4bit": ALLoRALinear4bit}
