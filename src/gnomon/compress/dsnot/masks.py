"""Masks as objects of their own: read off a sparse model, saved, applied, held during fine-tuning."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from gnomon.common.layers import decoder_blocks, linear_layers, set_weight, weight_of
from gnomon.errors import DataError, ModelError

__all__ = ["FrozenMasks", "apply_masks", "freeze_masks", "load_masks", "masks_of", "plain_name", "save_masks"]

_FORMAT = "gnomon-masks"


def plain_name(name: str) -> str:
    """Return a layer's name as it stands in the stock model, without what PEFT, DDP or torch.compile put into it."""
    for prefix in ("_orig_mod.", "module.", "base_model.model."):
        name = name.removeprefix(prefix)
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    inside = {id(layer) for block in decoder_blocks(model) for layer in linear_layers(block).values()}
    return {plain_name(name): layer for name, layer in linear_layers(model).items() if id(layer) in inside}


@torch.no_grad()
def masks_of(model: nn.Module) -> dict[str, Bool[Tensor, "out in"]]:
    """Read the masks off a sparse model: True where a weight is not zero.

    Parameters
    ----------
    model : nn.Module
        Any decoder, such as a sparse checkpoint of other origin.

    Returns
    -------
    dict of str to Tensor (out, in)
        By the stock name of each linear layer of the blocks.
    """
    return {name: weight_of(layer) != 0 for name, layer in _linears(model).items()}


def save_masks(masks: nn.Module | Mapping[str, Bool[Tensor, "out in"]], path: str | Path) -> None:
    """Write masks as packed bitmaps (one bit per weight) into a safetensors file.

    Parameters
    ----------
    masks : nn.Module or mapping
        A sparse model, or what `masks_of` returned.
    path : str or Path
        The file; written under a temporary name and renamed.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks({"a": torch.tensor([[True, False]])}, f"{folder}/masks.safetensors")
    ...     load_masks(f"{folder}/masks.safetensors")["a"].tolist()
    [[True, False]]
    """
    found = masks_of(masks) if isinstance(masks, nn.Module) else dict(masks)
    packed = {}
    for name, mask in found.items():
        if mask.dtype != torch.bool:
            raise DataError(f"The mask {name!r} has dtype {mask.dtype}. Masks are bool, True where a weight is kept.")
        packed[name] = torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))
    shapes = {name: list(mask.shape) for name, mask in found.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(packed, str(part), metadata={"format": _FORMAT, "version": "1", "shapes": json.dumps(shapes)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_masks(path: str | Path) -> dict[str, Bool[Tensor, "out in"]]:
    """Read masks written by `save_masks`: a dict from stock layer names to bool (out, in), True = kept.

    Raises
    ------
    DataError
        When there is no such file or it holds no masks.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise DataError("this safetensors file holds no masks. Write one with save_masks.", file=path)
            shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
            masks = {}
            for name, shape in shapes.items():
                bits = np.unpackbits(file.get_tensor(name).numpy(), count=int(np.prod(shape)))
                masks[name] = torch.from_numpy(bits.astype(bool)).view(*shape)
            return masks
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot be read as a mask file ({error}). Write one with save_masks.", file=path) from error


def _matched(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, tuple[nn.Module, Tensor]]:
    layers = _linears(model)
    matched = {}
    for name, mask in masks.items():
        layer = layers.get(plain_name(name))
        if layer is None or weight_of(layer).shape != mask.shape:
            seen = "is missing" if layer is None else f"has shape {tuple(weight_of(layer).shape)}"
            raise ModelError(
                f"The masks hold {name!r} of shape {tuple(mask.shape)}; in this model that layer {seen}. "
                "Use masks of the same model."
            )
        matched[name] = (layer, mask.to(weight_of(layer).device))
    return matched


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Bool[Tensor, "out in"]]) -> nn.Module:
    """Set to zero what the masks prune, in place; return the model.

    Raises
    ------
    ModelError
        When a mask belongs to no layer of the model or has another shape.
    """
    for layer, mask in _matched(model, masks).values():
        set_weight(layer, weight_of(layer).masked_fill(~mask, 0))
    return model


class _Masked(nn.Module):
    """The parametrisation: the weight as it is used is the stored weight times the mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("pruned", ~mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(self.pruned, 0)  # type: ignore[arg-type]


def _stock_state(layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    stored = state.pop(f"{prefix}parametrizations.weight.original", None)
    if stored is not None:
        masked: Any = layer.parametrizations
        state[f"{prefix}weight"] = masked.weight[0](stored)


def _from_stock_state(_layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}weight" in state:
        state[f"{prefix}parametrizations.weight.original"] = state.pop(f"{prefix}weight")


class FrozenMasks:
    """Masks held on a model by `freeze_masks`; `remove` (or leaving a ``with`` block) makes it a stock model again."""

    def __init__(self, layers: list[nn.Module], hooks: list[Any]) -> None:
        self._layers = layers
        self._hooks = hooks

    def remove(self) -> None:
        """Take the masks off, leaving exact zeros in plain weights; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        self._layers, self._hooks = [], []

    def __enter__(self) -> FrozenMasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def freeze_masks(model: nn.Module, masks: Mapping[str, Bool[Tensor, "out in"]] | None = None) -> FrozenMasks:
    """Keep pruned weights at zero while the model is trained, whatever the optimizer does.

    Each masked weight becomes a parametrisation, stored weight times mask, so pruned weights get no gradient and have
    no effect even if momentum or noise moves them. State dicts keep the stock names with the mask applied: checkpoints
    written meanwhile load as plain models, and plain state dicts load into the masked model.

    Call it before the optimizer is made; call `remove` before pruning again or merging adapters.

    Parameters
    ----------
    model : nn.Module
        A sparse model; of a PEFT model the base layers are held.
    masks : mapping of str to Tensor (out, in), optional
        Default: `masks_of` the model. Layers whose mask keeps everything are left alone.

    Returns
    -------
    FrozenMasks
        With `remove`, or for use in ``with``.

    Raises
    ------
    ModelError
        When a mask fits no layer, or a layer has a parametrisation already.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> from gnomon.compress.dsnot import prune
    >>> model = prune(tiny(num_layers=1), method="magnitude", sparsity=0.5)
    >>> with freeze_masks(model):
    ...     "model.layers.0.mlp.up_proj.weight" in model.state_dict()
    True
    """
    matched = _matched(model, masks_of(model) if masks is None else masks)
    layers: list[nn.Module] = []
    hooks: list[Any] = []
    for name, (layer, _) in matched.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ModelError(f"Layer {name!r} is parametrised already. Remove that first; masks cannot be held twice.")
    for layer, mask in matched.values():
        if bool(mask.all()):
            continue
        own = mask.t() if isinstance(layer, Conv1D) else mask
        parametrize.register_parametrization(layer, "weight", _Masked(own.contiguous()))
        hooks.append(layer.register_state_dict_post_hook(_stock_state))
        hooks.append(layer.register_load_state_dict_pre_hook(_from_stock_state))
        layers.append(layer)
    return FrozenMasks(layers, hooks)
