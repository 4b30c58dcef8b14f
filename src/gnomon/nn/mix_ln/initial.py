"""Initial weights that go with a placement: DeepNorm's, output projections scaled by depth, wide embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gnomon.common.layers import decoder_blocks, family, linear_layers, set_weight, weight_of
from gnomon.errors import MethodError, ModelError
from gnomon.nn.mix_ln.plan import deepnorm_constants
from gnomon.nn.mix_ln.structure import BlockParts

__all__ = ["check_initial", "initialise", "planned_draws"]

Draw = tuple[nn.Module, slice | Tensor, float]

_UNIT_GAIN = ("q_proj", "k_proj")
_FUSED = ("c_attn", "qkv_proj", "query_key_value")  # query, key and value in one matrix
_OUTPUT = ("o_proj", "c_proj", "dense", "out_proj", "down_proj", "dense_4h_to_h", "fc2", "w2")
_BASE_STD = 0.02


def check_initial(embed_std: float | None, scaled_init: bool, kinds: Sequence[str]) -> None:
    """Refuse initialisations that do not exist or exclude each other."""
    if embed_std is not None and not (math.isfinite(embed_std) and embed_std > 0):
        raise MethodError(
            f"embed_std = {embed_std}. It is a standard deviation over 0: 0.02 is usual, 0.632 is that of the authors' "
            "released code."
        )
    if scaled_init and "deepnorm" in kinds:
        raise MethodError("scaled_init = True and DeepNorm each draw the output projections in a way of their own. "
                          "Choose one.")  # fmt: skip


@torch.no_grad()
def initialise(
    model: PreTrainedModel,
    parts: Sequence[BlockParts],
    kinds: Sequence[str],
    *,
    embed_std: float | None,
    scaled_init: bool,
    generator: torch.Generator | None,
) -> None:
    """Draw the weights that the options ask for; the others stay as they are.

    Parameters
    ----------
    model : PreTrainedModel
        Untrained; changed in place.
    parts, kinds : sequence
        Of every block.
    embed_std : float, optional
        The embeddings are multiplied so that their standard deviation is this.
    scaled_init : bool
        Draw attention's and the MLP's output projections from ``N(0, (s / sqrt(2L))^2)``, s the model's
        ``initializer_range``.
    generator : torch.Generator, optional
        On the CPU; default the global one, as constructors of transformers use it.
    """
    draws = planned_draws(model, parts, kinds, scaled_init=scaled_init)
    if not draws and embed_std is None:
        return
    if any(p.is_meta for p in model.parameters()):
        raise ModelError(
            f"This {family(model)!r} model has no storage (meta), so embed_std, scaled_init and DeepNorm's initial "
            "weights cannot be drawn. Build it on a real device first."
        )
    if embed_std is not None:
        _rescale_embedding(model, embed_std)
    for layer, rows, std in draws:
        weight = weight_of(layer).detach().clone()
        # on the CPU in float32, so that device and dtype do not change the numbers
        drawn = torch.randn(weight[rows].shape, generator=generator, dtype=torch.float32, device="cpu") * std
        weight[rows] = drawn.to(weight.device, weight.dtype)
        set_weight(layer, weight)


def planned_draws(
    model: PreTrainedModel, parts: Sequence[BlockParts], kinds: Sequence[str], *, scaled_init: bool
) -> list[Draw]:
    """Return what `initialise` will draw, without drawing it: (layer, rows, standard deviation).

    Raises
    ------
    ModelError
        When a sub-layer that is to be drawn is not made of linear layers alone.
    """
    blocks, family_ = decoder_blocks(model), family(model)
    std = float(getattr(model.config.get_text_config(decoder=True), "initializer_range", _BASE_STD))
    draws: list[Draw] = []
    for block, one, kind in zip(blocks, parts, kinds, strict=True):
        if kind == "deepnorm":
            draws += _deepnorm_draws(block, one, family_, len(blocks))
        if scaled_init:
            small = std / math.sqrt(2 * len(blocks))
            draws += [(layer, slice(None), small) for layer in _outputs(block, one, family_)]
    return draws


def _rescale_embedding(model: PreTrainedModel, std: float) -> None:
    embedding: Any = model.get_input_embeddings()
    kept = torch.ones(embedding.weight.shape[0], dtype=torch.bool, device=embedding.weight.device)
    if getattr(embedding, "padding_idx", None) is not None:
        kept[embedding.padding_idx] = False  # a row of zeros
    present = float(embedding.weight[kept].float().std(correction=0))
    if present == 0.0:
        raise ModelError(
            f"The embeddings of this {family(model)!r} model are all equal, so no factor gives them a standard "
            f"deviation of {std}. Initialise the model first."
        )
    embedding.weight.mul_(std / present)


def _layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a sub-layer by last name; a layer inside an adapter counts under the adapter's name."""
    found = linear_layers(module)
    return {name.removesuffix(".base_layer").rpartition(".")[2]: layer for name, layer in found.items()}


def _outputs(block: nn.Module, parts: BlockParts, kind: str) -> Iterator[nn.Module]:
    """Yield the output projection of attention and of the feed-forward layer."""
    for name in (parts.attention, parts.mlp):
        sub_layer = block.get_submodule(name)
        _check_dense(sub_layer, kind)
        layers = _layers_of(sub_layer)
        found = [last for last in layers if last in _OUTPUT]
        if len(found) != 1:
            raise ModelError(
                f"Which linear layer of {name!r} in this {kind!r} model is its output projection cannot be told: it "
                f"has {', '.join(layers)}; known are {', '.join(_OUTPUT)}. Leave scaled_init out."
            )
        yield layers[found[0]]


def _check_dense(module: nn.Module, kind: str) -> None:
    linear = {id(weight) for layer in linear_layers(module).values() for weight in layer.parameters()}
    others = (p for name, p in module.named_parameters() if id(p) not in linear and ".lora_" not in name)
    if len(_layers_of(module)) < max(1, len(linear_layers(module))) or any(p.dim() > 1 for p in others):
        raise ModelError(
            f"The sub-layers of this {kind!r} model are not made of linear layers alone (a mixture of experts?), so "
            "scaled_init and DeepNorm's initial weights are not defined for it. Allowed: dense models, or the other "
            "placements without scaled_init."
        )


def _deepnorm_draws(block: nn.Module, parts: BlockParts, kind: str, num_layers: int) -> Iterator[Draw]:
    """Xavier-normal, ``gain * sqrt(2 / (fan_in + fan_out))``, of one matrix each: fused ones count as separate."""
    small = deepnorm_constants(num_layers)[1]
    attention, mlp = block.get_submodule(parts.attention), block.get_submodule(parts.mlp)
    for sub_layer in (attention, mlp):
        _check_dense(sub_layer, kind)
    gains: list[tuple[nn.Module, slice | Tensor, float]] = []
    for name, layer in _layers_of(attention).items():
        if name in _FUSED:
            rows = _fused_rows(attention, name, layer)
            gains += [(layer, part, gain) for part, gain in zip(rows, (1.0, 1.0, small), strict=True)]
        else:
            gains.append((layer, slice(None), 1.0 if name in _UNIT_GAIN else small))
    gains += [(layer, slice(None), small) for layer in _layers_of(mlp).values()]
    for layer, rows_, gain in gains:
        yield layer, rows_, gain * math.sqrt(2 / sum(weight_of(layer)[rows_].shape))


def _fused_rows(attention: nn.Module, name: str, layer: nn.Module) -> list[Tensor]:
    """Rows of query, key and value in a fused projection of shape (out, in)."""
    total = weight_of(layer).shape[0]
    rows = torch.arange(total)
    config: Any = attention.config
    if name == "query_key_value":  # per head: query, key, value
        return list(rows.view(config.num_attention_heads, 3, -1).transpose(0, 1).reshape(3, -1))
    if name == "qkv_proj":
        groups = config.num_attention_heads // config.num_key_value_heads
        share = total // (groups + 2)
        return list(rows.split([groups * share, share, share]))
    return list(rows.chunk(3))
