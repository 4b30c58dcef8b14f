"""Small models of every supported family, and stock models made to attend by the equations."""

from __future__ import annotations

import copy
from typing import Any

import lm_infinite_definition as definition
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from gnomon.common.models import tiny

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROTARY: dict[str, dict[str, Any] | None] = {
    "codegen": None, "cohere": {}, "gemma": {}, "glm": {}, "gptj": None, "granite": {}, "helium": {}, "llama": {},
    "mistral": {}, "mixtral": EXPERTS, "nemotron": {}, "olmo": {}, "olmo2": {}, "olmoe": EXPERTS,
    "persimmon": {"num_key_value_heads": None}, "phi": {}, "phi3": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": EXPERTS,
    "stablelm": {}, "starcoder2": {},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}  # fmt: skip


def ids(rows: int = 2, tokens: int = 30, seed: int = 3) -> Tensor:
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def shaken(model: nn.Module, size: float = 0.1) -> Any:
    """Move every weight, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def family(name: str, layers: int = 1, **options: Any) -> Any:
    extra = ROTARY[name]
    if extra is None:
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": layers, "n_head": 4, "rotary_dim": 4, "n_positions": 16}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    else:
        sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "head_dim": 8}
        sizes |= {"sliding_window": None, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, **extra}
        sizes = {k: v for k, v in sizes.items() if v is not None or k == "sliding_window"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **options}))
    return shaken(model).eval()


def llama(layers: int = 3, **options: Any) -> Any:
    """A Llama of two layers or more, grouped heads, and the frequencies of the definition."""
    rope = {"rope_type": "default", "rope_theta": definition.BASE}
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "rope_parameters": rope}
    return shaken(tiny("llama", num_layers=layers, **{**sizes, **options})).eval()


_BY_DEFINITION: dict[str, Any] = {}


def _dense(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Undo the model's rotation and attend by the definition."""
    options = dict(_BY_DEFINITION)
    if module.layer_idx < options.pop("from_layer", 0):
        options.pop("top_k", None)
    at = kwargs["position_ids"]
    q, k = (definition.rotated(t.double(), -at[:, None]) for t in (query, key))
    out = definition.attention(q, k, value.double(), **options)
    return out.transpose(1, 2).to(query.dtype), None


AttentionInterface.register("lm_infinite_by_definition", _dense)
AttentionMaskInterface.register("lm_infinite_by_definition", sdpa_mask)


@torch.no_grad()
def by_definition(model: nn.Module, given: Tensor, **options: Any) -> Tensor:
    """Logits of a copy of a stock model whose attention is the definition."""
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("lm_infinite_by_definition")
    _BY_DEFINITION.clear()
    _BY_DEFINITION.update(options)
    return twin(input_ids=given, use_cache=False).logits


@torch.no_grad()
def logits(model: nn.Module, given: Tensor, **options: Any) -> Tensor:
    return model(input_ids=given, **{"use_cache": False, **options}).logits


@torch.no_grad()
def in_pieces(model: nn.Module, given: Tensor, cuts: list[int], cache: Any = None, mask: Tensor | None = None) -> Any:
    """Logits of a text read in pieces that end at `cuts`, and the cache."""
    outputs = []
    for start, stop in zip([0, *cuts], [*cuts, given.shape[1]], strict=True):
        part = None if mask is None else mask[:, :stop]
        output = model(input_ids=given[:, start:stop], cache=cache, attention_mask=part, use_cache=True)
        cache = output.cache
        outputs.append(output.logits)
    return torch.cat(outputs, 1), cache
