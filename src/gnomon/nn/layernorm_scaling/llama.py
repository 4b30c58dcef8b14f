"""A Llama whose class carries the scales, for configurations and the Auto classes."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from gnomon.nn.layernorm_scaling.hooks import OutputScale, attach
from gnomon.nn.layernorm_scaling.placement import MODEL_TYPE, depth_scale

__all__ = ["LNSLlamaConfig", "LNSLlamaForCausalLM", "LNSLlamaModel"]


class LNSLlamaConfig(LlamaConfig):
    """Configuration of a Llama with LayerNorm scaling; the fields are those of `LlamaConfig`.

    Examples
    --------
    >>> LNSLlamaConfig(num_hidden_layers=2).model_type
    'lns_llama'
    """

    model_type = MODEL_TYPE


class LNSLlamaModel(LlamaModel):
    """`LlamaModel` with both pre-norms of block l multiplied by ``1/sqrt(l)``; parameters and keys are Llama's."""

    config_class = LNSLlamaConfig

    def __init__(self, config: LNSLlamaConfig) -> None:
        super().__init__(config)
        _scale(self)


class LNSLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` with both pre-norms of block l multiplied by ``1/sqrt(l)``.

    Importing this module registers it, so ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know
    ``model_type: lns_llama``. `fold_layernorm_scaling` turns it into a plain ``LlamaForCausalLM``.

    Examples
    --------
    >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(LNSLlamaConfig(**sizes))
    >>> type(model).__name__
    'LNSLlamaForCausalLM'
    """

    config_class = LNSLlamaConfig

    def __init__(self, config: LNSLlamaConfig) -> None:
        super().__init__(config)
        _scale(self.model)


def _scale(model: LlamaModel) -> None:
    for depth, block in enumerate(model.layers, start=1):
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            attach(norm, OutputScale((depth_scale(depth),)))


def to_stock(model: PreTrainedModel) -> None:
    """Make a scaled Llama whose scales are folded a stock Llama, in place."""
    scaled: Any = model.config
    values = {k: v for k, v in scaled.to_dict().items() if k not in ("model_type", "architectures")}
    stock = LlamaConfig(**values)
    stock._attn_implementation = scaled._attn_implementation
    classes: dict[type[nn.Module], type[nn.Module]] = {
        LNSLlamaForCausalLM: LlamaForCausalLM,
        LNSLlamaModel: LlamaModel,
    }
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
        if getattr(module, "config", None) is scaled:
            module.config = stock


AutoConfig.register(MODEL_TYPE, LNSLlamaConfig, exist_ok=True)
AutoModel.register(LNSLlamaConfig, LNSLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(LNSLlamaConfig, LNSLlamaForCausalLM, exist_ok=True)
