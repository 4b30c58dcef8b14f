"""Gradients by depth: their norm per block, and the Jacobian of one residual block."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gnomon.common.calibration import as_batches
from gnomon.common.depth.running import Batch, check_index, device_of, evaluating, first_tensor, summed_loss
from gnomon.common.layers import decoder_blocks, family
from gnomon.errors import DataError, MethodError, ModelError

__all__ = ["block_jacobian", "diagonal_dominance", "gradient_norms", "jacobian_dominance"]


def gradient_norms(model: nn.Module, batches: Any, *, batch_size: int = 8) -> Float[Tensor, " layers"]:
    """Return, per block, the L2 norm over all its trainable parameters of the gradient of the mean token loss.

    Parameters
    ----------
    model : PreTrainedModel
        Its ``.grad`` fields are left alone.
    batches : LongTensor (n, T), mapping, or iterable
    batch_size : int, default 8

    Returns
    -------
    Tensor (layers,)
        float64.

    Raises
    ------
    ModelError
        When no parameter of any block is trainable.
    """
    owned = [[p for p in block.parameters() if p.requires_grad] for block in decoder_blocks(model)]
    flat = [p for parameters in owned for p in parameters]
    if not flat:
        raise ModelError(
            f"No parameter in the blocks of this {family(model)!r} model is trainable, so there are no gradients. "
            "Unfreeze them: parameter.requires_grad_(True)."
        )
    sums: dict[int, Tensor] = {}
    count = 0
    with evaluating(model):
        for batch in as_batches(batches, batch_size, device_of(model)):
            loss, tokens = summed_loss(model, batch)
            count += tokens
            for i, grad in enumerate(torch.autograd.grad(loss, flat, allow_unused=True)):
                if grad is not None:
                    sums[i] = sums[i] + grad.float() if i in sums else grad.float()
    squares = [float((sums[i] / count).double().square().sum()) if i in sums else 0.0 for i in range(len(flat))]
    ends = [0, *itertools.accumulate(len(parameters) for parameters in owned)]
    return torch.tensor([sum(squares[a:b]) ** 0.5 for a, b in itertools.pairwise(ends)], dtype=torch.float64)


def block_jacobian(
    model: nn.Module, batches: Any, index: int, *, positions: int = 8, batch_size: int = 8
) -> Float[Tensor, "features features"]:
    """Return the Jacobian of one residual block, d output / d input of the same token, averaged over tokens.

    Parameters
    ----------
    model : PreTrainedModel
    batches : LongTensor (n, T), mapping, or iterable
    index : int
        Which block, from 0.
    positions : int, default 8
        Tokens of each sequence that are averaged over, spread evenly; each costs one backward pass of the block a
        feature. Padded sequences count at the positions where they have tokens.
    batch_size : int, default 8

    Returns
    -------
    Tensor (features, features)
        float64; row: output feature, column: input feature.

    Raises
    ------
    MethodError
        When there is no such block, or `positions` is under 1.
    """
    blocks = decoder_blocks(model)
    check_index(blocks, index)
    if positions < 1:
        raise MethodError(f"positions = {positions}. It must be at least 1.")
    total: Tensor | None = None
    count = 0
    with evaluating(model):
        for batch in as_batches(batches, batch_size, device_of(model)):
            args, kwargs, key = _call_of(model, blocks[index], batch)
            leaf = (args[0] if key is None else kwargs[key]).detach().requires_grad_(True)
            output = first_tensor(
                blocks[index](leaf, *args[1:], **kwargs)
                if key is None
                else blocks[index](*args, **{**kwargs, key: leaf})
            )
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            steps = min(positions, leaf.shape[1])
            for t in torch.linspace(0, leaf.shape[1] - 1, steps).round().long().unique().tolist():
                part = _token_jacobian(output, leaf, t, mask[:, t])
                total = part if total is None else total + part
                count += int(mask[:, t].sum())
    if total is None or count == 0:
        raise DataError("No token stands at the chosen positions: only padding. Give more positions or other data.")
    return total / count


def _token_jacobian(output: Tensor, leaf: Tensor, t: int, rows: Bool[Tensor, " batch"]) -> Tensor:
    """Sum over sequences of d output[t] / d input[t]; sequences do not see each other, so one pass serves all."""
    parts = []
    for i in range(output.shape[-1]):
        (grad,) = torch.autograd.grad(output[:, t, i].sum(), leaf, retain_graph=True)
        parts.append(grad[rows, t].double().sum(0).cpu())
    return torch.stack(parts)


def diagonal_dominance(jacobian: Float[Tensor, "features features"]) -> float:
    """Return ``sum |diagonal| / sum |all|``: 1 for a diagonal matrix such as that of an identity block.

    Examples
    --------
    >>> diagonal_dominance(torch.eye(3)), diagonal_dominance(torch.ones(4, 4))
    (1.0, 0.25)
    """
    magnitude = jacobian.double().abs()
    return float(magnitude.diagonal().sum() / magnitude.sum())


def jacobian_dominance(
    model: nn.Module, batches: Any, *, positions: int = 8, batch_size: int = 8
) -> Float[Tensor, " layers"]:
    """Return the diagonal dominance of every block's mean Jacobian; see `block_jacobian`."""
    prepared = as_batches(batches, batch_size, device_of(model))
    values = [
        diagonal_dominance(block_jacobian(model, prepared, i, positions=positions, batch_size=batch_size))
        for i in range(len(decoder_blocks(model)))
    ]
    return torch.tensor(values, dtype=torch.float64)


def _call_of(model: nn.Module, block: nn.Module, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], str | None]:
    """What the model calls one block with: arguments, keywords and the keyword of the hidden states, if it is one."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        handle.remove()
    args, kwargs = seen[0]
    key = None if args else next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return args, kwargs, key
