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
from gnomon.common.depth.running import (
    Batch,
    check_index,
    device_of,
    evaluating,
    first_tensor,
    summed_loss,
    token_loss,
)
from gnomon.common.layers import decoder_blocks, family, unwrap
from gnomon.errors import MethodError, ModelError

__all__ = ["block_removal_drop", "remove_block", "skipping_block"]

# configuration values and recorded options that are lists with an entry a block
_PER_BLOCK = ("layer_types", "mlp_layer_types", "layer_placements")


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
    stack = decoder_blocks(model)
    chosen = list(range(len(stack))) if blocks is None else list(blocks)
    for index in chosen:
        check_index(stack, index)
    prepared = as_batches(batches, batch_size, device_of(model)) if metric is None else None
    if prepared is not None and _can_start_inside(model, stack, prepared[0]):
        return _drops_from_inside(model, stack, chosen, prepared)

    def measure() -> float:
        return token_loss(model, prepared, batch_size=batch_size) if metric is None else float(metric(model))

    whole = measure()
    drops = []
    for index in chosen:
        with skipping_block(model, index):
            drops.append(measure() - whole)
    return torch.tensor(drops, dtype=torch.float64)


def _can_start_inside(model: nn.Module, blocks: nn.ModuleList, batch: Batch) -> bool:
    """Whether each block is called once by Python and returns its state alone, so that it can be stood in for."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in (model, *model.modules())):
        return False  # compiled code would not see a replaced forward
    calls: list[bool] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(isinstance(output, Tensor))

    handles = [block.register_forward_hook(note) for block in dict.fromkeys(blocks)]
    try:
        with evaluating(model), torch.no_grad():
            model(input_ids=batch["input_ids"][:1, :2], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls == [True] * len(blocks) and len(set(blocks)) == len(blocks)


@torch.no_grad()
def _drops_from_inside(
    model: nn.Module, blocks: nn.ModuleList, chosen: Sequence[int], batches: Sequence[Batch]
) -> Float[Tensor, " layers"]:
    """The drop in loss of the chosen blocks; the pass without block l starts from the input of block l.

    Blocks in front of l give the state that an earlier pass kept, so all passes together cost about half of full
    ones. One state of one batch is kept at a time.
    """
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    whole, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, count = summed_loss(model, batch)
            whole, tokens = whole + float(loss), tokens + count
            kept: list[Tensor] = []  # the input of block `start`
            start = 0
            for index in sorted(set(chosen)):
                with _started_inside(blocks, start, index, kept):
                    sums[index] += float(summed_loss(model, batch)[0])
                start = index
    return ((sums - whole) / tokens)[list(chosen)]


@contextmanager
def _started_inside(blocks: nn.ModuleList, start: int, index: int, kept: list[Tensor]) -> Iterator[None]:
    """Let blocks before `start` give the kept state and block `index` its input, which is kept from then on."""
    state = list(kept)
    own = [block.__dict__.get("forward") for block in blocks]

    def give(*args: Any, **kwargs: Any) -> Tensor:
        return state[0]

    def skip(*args: Any, **kwargs: Any) -> Tensor:
        kept[:] = [first_tensor(args) if args else first_tensor(list(kwargs.values()))]
        return kept[0]

    for block in list(blocks)[:start]:
        block.__dict__["forward"] = give
    blocks[index].__dict__["forward"] = skip
    try:
        yield
    finally:
        for block, was in zip(blocks, own, strict=True):
            if was is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = was


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
        When scales by depth are attached (fold them first), or blocks share their weights or a cache slot.
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
    config = inner.config.get_text_config(decoder=True)
    slots = [_slot(block) for block in blocks if _slot(block) is not None]
    if len(set(slots)) < len(slots) or bool(getattr(config, "num_kv_shared_layers", None)):
        raise ModelError(
            f"Blocks of this {family(model)!r} model share slots of the KV cache (layer_idx {slots}), so none can be "
            "removed alone. Give each block a slot of its own, or leave a block out for a measurement with "
            "skipping_block."
        )
    del blocks[index]
    for number, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", number)  # noqa: B010  (typed as a tensor otherwise)
    config.num_hidden_layers = length - 1
    for name in _PER_BLOCK:
        if getattr(config, name, None) is not None:
            setattr(config, name, _less(name, getattr(config, name), length, index))
    if getattr(inner.config, "gnomon", None):
        inner.config.gnomon = [
            entry | {"options": {k: _less(k, v, length, index) for k, v in entry["options"].items()}}
            for entry in surgery.recorded(model)
        ]
    return model


def _slot(block: nn.Module) -> int | None:
    """The slot of the KV cache that a block's attention writes to."""
    found = (vars(module).get("layer_idx") for module in block.modules())
    return next((index for index in found if index is not None), None)


def _less(name: str, value: Any, length: int, index: int) -> Any:
    """A per-block list without one entry; anything else as it is."""
    if name not in _PER_BLOCK or not isinstance(value, (list, tuple)) or len(value) != length:
        return value
    return [kind for i, kind in enumerate(value) if i != index]
