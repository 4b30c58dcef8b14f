"""The model without one of its blocks: for a measurement, or for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gnomon.common import surgery
from gnomon.common.calibration import as_batches
from gnomon.common.depth.running import check_index, device_of, first_tensor, token_loss
from gnomon.common.layers import decoder_blocks, family, unwrap
from gnomon.errors import MethodError, ModelError

__all__ = ["block_removal_drop", "remove_block", "skipping_block"]


@contextmanager
def skipping_block(model: nn.Module, index: int) -> Iterator[None]:
    """Let block `index` return its input: the model without that block, for the time of the ``with`` block.

    Raises
    ------
    MethodError
        When there is no such block.
    """
    blocks = decoder_blocks(model)
    check_index(blocks, index)

    def skip(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = first_tensor(args) if args else first_tensor(list(kwargs.values()))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = blocks[index].register_forward_hook(skip, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def block_removal_drop(
    model: nn.Module,
    batches: Any = None,
    *,
    metric: Callable[[nn.Module], float] | None = None,
    blocks: Sequence[int] | None = None,
    batch_size: int = 8,
) -> Float[Tensor, " layers"]:
    """Return dP(l) = P(model without block l) - P(model), without fine-tuning.

    Parameters
    ----------
    model : PreTrainedModel
    batches : LongTensor (n, T), mapping, or iterable
        What the loss is measured on, the same for every l.
    metric : callable, optional
        ``metric(model) -> float`` instead of the loss on `batches`, such as an accuracy.
    blocks : sequence of int, optional
        Indices (from 0) of the blocks to leave out in turn; default all.
    batch_size : int, default 8

    Returns
    -------
    Tensor (layers,)
        float64, in the order of `blocks`. With the loss, a large value marks a block the model needs.

    Raises
    ------
    MethodError
        Without `batches` and without `metric`; an index that does not exist.

    Examples
    --------
    >>> from gnomon.common.models import tiny
    >>> block_removal_drop(tiny("llama"), torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([4])
    """
    if metric is None and batches is None:
        raise MethodError("block_removal_drop got neither batches nor a metric. Give token batches or metric=callable.")
    prepared = as_batches(batches, batch_size, device_of(model)) if metric is None else None

    def measure() -> float:
        return token_loss(model, prepared, batch_size=batch_size) if metric is None else float(metric(model))

    whole = measure()
    drops = []
    for index in range(len(decoder_blocks(model))) if blocks is None else blocks:
        with skipping_block(model, index):
            drops.append(measure() - whole)
    return torch.tensor(drops, dtype=torch.float64)


def remove_block(model: nn.Module, index: int) -> nn.Module:
    """Delete one block for good: the rest is numbered anew for the KV cache, the configuration counts one less.

    Parameters
    ----------
    model : PreTrainedModel
        Changed in place.
    index : int
        Which block, from 0.

    Returns
    -------
    the model

    Raises
    ------
    MethodError
        When there is no such block, or it is the only one.
    ModelError
        When scales by depth are attached (fold them first), or blocks share their weights.
    """
    blocks = decoder_blocks(model)
    check_index(blocks, index)
    if len(blocks) == 1:
        raise MethodError("The model has one block; without it nothing is left. Give a deeper model.")
    if len({id(block) for block in blocks}) < len(blocks):
        raise ModelError(f"Blocks of this {family(model)!r} model share their weights, so none can be removed alone.")
    inner: Any = unwrap(model)
    if surgery.is_recorded(model, "layernorm-scaling") or family(model) == "lns_llama":
        raise ModelError(
            f"This {family(model)!r} model carries LayerNorm scaling, whose scales follow the ORIGINAL depth of a "
            "block. Fold them into the gains first: gnomon.nn.fold_layernorm_scaling(model)."
        )
    length = len(blocks)
    del blocks[index]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010  (typed as a tensor otherwise)
    config = inner.config.get_text_config(decoder=True)
    config.num_hidden_layers = length - 1
    for name in ("layer_types", "mlp_layer_types"):
        types = getattr(config, name, None)
        if isinstance(types, (list, tuple)) and len(types) == length:
            setattr(config, name, [kind for i, kind in enumerate(types) if i != index])
    return model
