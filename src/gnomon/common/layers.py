"""Where things stand in a Hugging Face decoder: its blocks, their norms and linear layers, for every family we support.

Everything is found by structure (what a block contains, in which order it is called), never by a class name,
so look-alikes of Llama, Qwen, Mistral, GPT-2 and GPT-NeoX work without a line of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gnomon.errors import ModelError

__all__ = [
    "attention_and_mlp",
    "backbone",
    "decoder_blocks",
    "family",
    "linear_layers",
    "set_weight",
    "unwrap",
    "weight_of",
]

_BLOCK_PATHS = ("layers", "h", "blocks", "decoder.layers", "encoder.layers", "encoder.layer", "block")
_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the `transformers` model inside PEFT, DDP or torch.compile wrappers (or `model` itself)."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "get_base_model") and not isinstance(inner, PreTrainedModel):
            inner = inner.get_base_model()
        else:
            found: nn.Module = inner
            return found


def family(model: nn.Module) -> str:
    """Return ``config.model_type`` ("llama", "gpt2", ...), or the class name where there is no config."""
    config = getattr(unwrap(model), "config", None)
    return str(getattr(config, "model_type", "") or type(model).__name__)


def backbone(model: nn.Module) -> nn.Module:
    """Return the model without its head: the module whose output is the last hidden state."""
    inner = unwrap(model)
    base: nn.Module = getattr(inner, "base_model", inner)
    return base


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of transformer blocks of a decoder (or encoder) stack, first block first.

    Raises
    ------
    ModelError
        When no such list is found; the message names the model's family.
    """
    base = backbone(model)
    for path in _BLOCK_PATHS:
        found: object = base
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList) and len(found) > 0:
            return found
    raise ModelError(
        f"No list of transformer blocks found in a {family(model)!r} model ({type(unwrap(model)).__name__}). "
        f"Looked for {', '.join(_BLOCK_PATHS)} in its base model. Llama, Qwen, Mistral, GPT-2, GPT-NeoX and "
        "look-alikes are supported."
    )


def attention_and_mlp(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the attention and the feed-forward module of one block.

    Raises
    ------
    ModelError
        When either is not found; the message lists the block's children.
    """
    attention = next((getattr(block, n) for n in _ATTENTION_NAMES if hasattr(block, n)), None)
    mlp = next((getattr(block, n) for n in _MLP_NAMES if hasattr(block, n)), None)
    if attention is None or mlp is None:
        missing = "attention" if attention is None else "feed-forward"
        raise ModelError(
            f"No {missing} module found in a {type(block).__name__}; it has "
            f"{', '.join(name for name, _ in block.named_children())}. Known names: "
            f"{', '.join(_ATTENTION_NAMES if attention is None else _MLP_NAMES)}."
        )
    return attention, mlp


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return every `nn.Linear` and `Conv1D` below `module` by name; PEFT's adapter matrices are left out."""
    return dict(_linears(module))


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # a model with adapters has brought PEFT along; importing it here would slow down everything else
    tuner_layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    tuned: list[str] = []  # layers an adapter wraps: of what hangs on them, only the layer itself counts
    for name, child in module.named_modules():
        if isinstance(child, tuner_layer):
            tuned.append(f"{name}." if name else "")
        elif isinstance(child, (nn.Linear, Conv1D)):
            inside = next((prefix for prefix in reversed(tuned) if name.startswith(prefix)), None)
            if inside is None or name[len(inside) :].split(".")[0] == "base_layer":
                yield name, child


def weight_of(layer: nn.Module) -> torch.Tensor:
    """Return a layer's weight as (out, in): `Conv1D` (GPT-2), which stores (in, out), gives a transposed view."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.t() if isinstance(layer, Conv1D) else weight


@torch.no_grad()
def set_weight(layer: nn.Module, weight: torch.Tensor) -> None:
    """Write a weight of shape (out, in) into a layer in place, in the layer's own dtype and layout."""
    weight_of(layer).copy_(weight)
